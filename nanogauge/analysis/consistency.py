"""Find claims that cannot be true: refuted by arithmetic, by the GPU or by each other.

Each relation is checked by interval arithmetic: claims exclude each other only if no values within their ranges satisfy
it. Claims about another run are left out.
"""

import math
from collections.abc import Iterator
from itertools import combinations, product

from nanogauge.analysis.claims import Claim, Claims, evaluate, formula_names, formula_text
from nanogauge.errors import BadInput
from nanogauge.prediction.flops import MFU_CONVENTIONS, flops_per_token_causal, flops_per_token_palm
from nanogauge.quantities import QUANTITIES, format_range, format_value, mfu
from nanogauge.runspec import RunSpec
from nanogauge.schema import Prediction, Stored

_SLACK = 1e-9  # relative, so that rounding does not separate ranges that touch
_OVERCLOCKED = 1.2
"""Highest clock of a sold board over its datasheet's. Boards of one GPU differ by up to 10 %."""
_RAISED_POWER = 1.4
"""Highest power limit of a sold board over the reference's: RTX 4090 boards go to 600 of 450 W."""


class Inconsistency(Stored):
    ids: list[str]
    """Keys of the claims that cannot be true, or not together."""
    why: str
    certain: bool = True
    """False if a board better than the reference, or another count of FLOPs, could make it true."""
    whole: bool = True
    """False if it refutes only an end of the claimed range."""


def factor_text(factor: float) -> str:
    """Format a factor, or its inverse if below 1: '1,001 times', '1.12 times'."""
    factor = factor if factor >= 1 else 1 / factor
    return f"{factor:,.0f} times" if factor >= 10 else f"{factor:.3g} times"


def computed_value(claim: Claim, spec: RunSpec, prediction: Prediction) -> float | None:
    """Return the claim's value by its formula or by exact arithmetic; None if it has neither.

    Passes over the data are not exact: the unique tokens are counted when the data is opened.

    Raises:
        BadInput: if the formula uses an unknown name or has no value.
    """
    if claim.formula is not None:
        try:
            return evaluate(claim.formula, formula_names(spec, prediction))
        except ValueError as error:
            if spec.unknown:  # a name of the formula may be
                return None
            raise BadInput(f"the formula of the claim {claim.key}: {error}.") from None
    estimate = prediction.quantities.get(claim.row)
    exact = QUANTITIES[claim.row].exact and claim.row != "data_epochs"
    return estimate.expected if estimate is not None and exact else None


def arithmetic_sentence(claim: Claim, value: float, spec: RunSpec, prediction: Prediction, *others: Claim) -> str:
    """Return a sentence that compares claims of one formula with their value."""
    sentence = f"the configuration gives {claim.text(value)}"
    if claim.formula:
        formula = formula_text(claim.formula, formula_names(spec, prediction))
        sentence = f"{formula} = {claim.text(value)}"
    if claim.holds(value):
        return sentence
    factors = [one.factor(value) or 0.0 for one in (claim, *others)]
    if min(factors) <= 0:
        return sentence
    words = " and ".join(factor_text(factor) for factor in factors)
    if factors[0] > 1:
        return f"{sentence}, {words} the claim"
    return f"{sentence}; the claim is {words} that"


def inconsistencies(claims: Claims, spec: RunSpec, prediction: Prediction) -> list[Inconsistency]:
    """Return the claims, and combinations of claims, that cannot be true, each fact once."""
    found: list[Inconsistency] = []
    not_exact: list[Claim] = []
    wrong: dict[tuple[str, str | None], list[tuple[Claim, float]]] = {}
    for claim in claims.claim:
        if claim.about is not None or claim.says is not None:
            continue
        value = computed_value(claim, spec, prediction)
        if value is None:
            not_exact.append(claim)
        elif not claim.holds(value):
            wrong.setdefault((claim.row, claim.formula), []).append((claim, value))
    for group in wrong.values():
        refuted, value = [claim for claim, _ in group], group[0][1]
        ranges = " and ".join(claim.range_text() for claim in refuted)
        verb = "are" if len(refuted) > 1 else "is"
        sentence = arithmetic_sentence(refuted[0], value, spec, prediction, *refuted[1:])
        found.append(_finding(f"{_label(refuted[0])}: {ranges} {verb} wrong: {sentence}.", *refuted))
    for claim in not_exact:
        found += _check_hardware(claim, spec, prediction)
    for one, other in combinations(not_exact, 2):
        if one.row == other.row and min(one.high, other.high) < max(one.low, other.low):
            ranges = f"{one.range_text()} and {other.range_text()}"
            found.append(_finding(f"{_label(one)}: {ranges} exclude each other.", one, other))
    found += _check_mfu(not_exact, spec, prediction)
    at_odds = {key for finding in found if len(finding.ids) > 1 for key in finding.ids}
    found += _check_order([c for c in not_exact if c.key not in at_odds])
    found += _check_products(not_exact, spec)
    return found


def _finding(why: str, *claims: Claim, certain: bool = True, whole: bool = True) -> Inconsistency:
    return Inconsistency(ids=[claim.key for claim in claims], why=why, certain=certain, whole=whole)


def _label(claim: Claim) -> str:
    return QUANTITIES[claim.row].label


def _check_hardware(claim: Claim, spec: RunSpec, prediction: Prediction) -> Iterator[Inconsistency]:
    """Check a claim against the peak, memory and power limit of the hardware."""
    hardware, peak, gpus = prediction.hardware, prediction.peak_flops, prediction.gpus
    steps = {"step_seconds": 1, "total_seconds": spec.steps}.get(claim.row)
    if peak is not None and steps is not None and claim.low > 0 and not spec.unknown:
        per_token = flops_per_token_palm(spec.shape)
        flops = per_token * spec.tokens_per_step * steps
        share, causal = mfu(flops, claim.low, peak), flops_per_token_causal(spec.shape) / per_token
        if share > 1 + _SLACK:
            yield _finding(
                f"{format_value(claim.row, claim.low)} would need {100 * share:.0f} % of the peak "
                f"by 6N + 12LCT, {100 * share * causal:.0f} % with attention's causal half alone.",
                claim,
                certain=share * causal > _OVERCLOCKED,
                whole=mfu(flops, claim.high, peak) * causal > _OVERCLOCKED,
            )
    if claim.row.startswith("mfu") and (claim.low > 1 or 1 < claim.high < math.inf):
        yield _finding(f"{claim.range_text()}: MFU cannot exceed 100 %.", claim, whole=claim.low > 1)
    if hardware.kind == "cpu":
        return
    limit, name, margin = None, "the card's memory", 1.0
    if claim.row == "power_watts" and hardware.power_limit_watts is not None:
        limit, name = gpus * hardware.power_limit_watts, "the power limit"
        if hardware.power_limit_watts == hardware.board_power_watts:
            name, margin = "the reference board's power limit", _RAISED_POWER
    elif claim.row in ("peak_allocated_bytes", "peak_process_bytes"):
        limit = hardware.memory_bytes
    top = claim.high if math.isfinite(claim.high) else claim.low
    if limit is not None and top > limit:
        top_text, limit_text = (format_value(claim.row, value) for value in (top, limit))
        certain = top > margin * limit
        allowed = "" if certain else "; other makers' boards allow more"
        yield _finding(
            f"{top_text} is above {name} of {limit_text}{allowed}.",
            claim,
            certain=certain,
            whole=claim.low > margin * limit,
        )


def _ends(claim: Claim) -> tuple[float, float]:
    """Return the range of a non-negative quantity; an open upper end is infinite."""
    return max(claim.low, 0.0), claim.high


def _disjoint(low: float, high: float, claim: Claim) -> bool:
    """Return True if low..high and the claim's range do not touch."""
    claimed_low, claimed_high = _ends(claim)
    return low > claimed_high * (1 + _SLACK) or high < claimed_low * (1 - _SLACK)


def _span_text(row_id: str, low: float, high: float) -> str:
    """Format a computed range, which may have an open end."""
    if math.isinf(high):
        return f"at least {format_value(row_id, low)}"
    if low == 0:
        return f"at most {format_value(row_id, high)}"
    return format_range(row_id, low, high)


def _combinations(claims: list[Claim], *rows: str) -> Iterator[tuple[Claim, ...]]:
    """Yield every combination of one claim per row."""
    return product(*([claim for claim in claims if claim.row == row] for row in rows))


def _check_mfu(claims: list[Claim], spec: RunSpec, prediction: Prediction) -> Iterator[Inconsistency]:
    """Check MFU x peak x time = FLOPs for every claimed MFU, with all claimed times at once.

    A total may exceed the time of the steps, by evaluation and compilation.
    """
    peak = prediction.peak_flops
    if peak is None or spec.unknown:
        return
    times = {"step_seconds": (1, " a step"), "total_seconds": (spec.steps, "")}
    for share in claims:
        per_token = MFU_CONVENTIONS.get(share.row)
        if per_token is None:
            continue
        least, most = _ends(share)
        implied, excluded = [], []
        for row, (count, unit) in times.items():
            seconds = per_token(spec.shape) * spec.tokens_per_step * count / peak
            low = 0.0 if math.isinf(most) else seconds / most
            high = seconds / least if least > 0 else math.inf
            bound = math.inf if row == "total_seconds" else high
            wrong = [c for c in claims if c.row == row and _disjoint(low, bound, c)]
            excluded += wrong
            if wrong:
                implied.append(_span_text(row, low, high) + unit)
        if excluded:
            ranges = ", ".join(claim.range_text() for claim in excluded)
            yield _finding(
                f"MFU {share.range_text()} means {' and '.join(implied)}, not {ranges}: they exclude each other.",
                share,
                *excluded,
            )


_AT_LEAST = {
    ("first_step_seconds", "step_seconds"): "the first step also compiles",
    ("total_seconds", "first_step_seconds"): "the run includes its first step",
    ("peak_process_bytes", "peak_allocated_bytes"): "the process includes its tensors",
}
"""(larger row id, smaller row id) -> why the first quantity is at least the second."""


def _check_order(claims: list[Claim]) -> Iterator[Inconsistency]:
    """Check claims on pairs of quantities of which one includes the other."""
    for rows, why in _AT_LEAST.items():
        for whole, part in _combinations(claims, *rows):
            if _disjoint(_ends(part)[0], math.inf, whole):
                ranges = "; ".join(f"{_label(c)}: {c.range_text()}" for c in (whole, part))
                yield _finding(f"{ranges}; but {why}.", whole, part)


def _check_products(claims: list[Claim], spec: RunSpec) -> Iterator[Inconsistency]:
    """Check claims against total time = steps x step time and energy = power x time."""
    for total, step in _combinations(claims, "total_seconds", "step_seconds"):
        least = _ends(step)[0] * spec.steps
        if _disjoint(least, math.inf, total):
            yield _finding(
                f"{spec.steps:,} steps of {step.range_text()} take at least "
                f"{format_value('total_seconds', least)}, more than {total.range_text()}.",
                total,
                step,
            )
    for group in _combinations(claims, "energy_kwh", "power_watts", "total_seconds"):
        energy, watts, total = group
        low, high = (w * s / 3.6e6 for w, s in zip(_ends(watts), _ends(total), strict=True))
        if _disjoint(low, high, energy):
            yield _finding(
                f"{watts.range_text()} over {total.range_text()} make "
                f"{_span_text('energy_kwh', low, high)}, not {energy.range_text()}.",
                *group,
            )
