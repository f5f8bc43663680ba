"""Find claims that cannot be true: refuted by arithmetic, by the GPU or by each other.

Each relation is checked by interval arithmetic: claims exclude each other only if no values within
their ranges satisfy it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations, product

from nanogauge.analysis.claims import Claim, Claims, evaluate, formula_names
from nanogauge.errors import BadInput
from nanogauge.prediction.flops import MFU_CONVENTIONS, flops_per_token_causal, flops_per_token_palm
from nanogauge.quantities import QUANTITIES, format_range, format_value, mfu
from nanogauge.runspec import RunSpec
from nanogauge.schema import Prediction, Stored

_SLACK = 1e-9  # relative, so that rounding does not separate ranges that touch


class Inconsistency(Stored):
    ids: list[str]
    """Keys of the claims that cannot be true, or not together."""
    why: str


def range_text(claim: Claim, currency: str = "") -> str:
    """Format a claimed range; an open end reads 'at least' or 'at most'."""
    if claim.value is not None:
        return format_value(claim.row, claim.value, currency)
    if math.isinf(claim.high):
        return f"at least {format_value(claim.row, claim.low, currency)}"
    if math.isinf(claim.low):
        return f"at most {format_value(claim.row, claim.high, currency)}"
    return format_range(claim.row, claim.low, claim.high, currency)


def factor_text(factor: float) -> str:
    """Format a factor, or its inverse if below 1: '1,001 times', '1.12 times'."""
    factor = factor if factor >= 1 else 1 / factor
    return f"{factor:,.0f} times" if factor >= 10 else f"{factor:.3g} times"


def computed_value(claim: Claim, spec: RunSpec, prediction: Prediction) -> float | None:
    """Return the claim's value by its formula or by exact arithmetic; None if it has neither.

    Raises:
        BadInput: if the formula uses an unknown name or has no value.
    """
    if claim.formula is not None:
        try:
            return evaluate(claim.formula, formula_names(spec, prediction))
        except ValueError as error:
            raise BadInput(f"the formula of the claim {claim.key}: {error}.") from None
    estimate = prediction.quantities.get(claim.row)
    return estimate.expected if estimate is not None and QUANTITIES[claim.row].exact else None


def arithmetic_sentence(claim: Claim, value: float, prediction: Prediction) -> str:
    """Return a sentence that compares a claim with its value from computed_value()."""
    if claim.formula:
        text = f"{claim.formula} = {format_value(claim.row, value)}"
    else:
        formula = prediction.quantities[claim.row].formula
        text = f"the configuration gives {format_value(claim.row, value)} ({formula})"
    if claim.holds(value):
        return text
    factor = claim.factor(value)
    if factor is None or factor <= 0:
        return text
    return f"{text}, {factor_text(factor)} {'more' if factor > 1 else 'less'} than the claim"


def inconsistencies(claims: Claims, spec: RunSpec, prediction: Prediction) -> list[Inconsistency]:
    """Return the claims, and combinations of claims, that cannot be true, with the reasons."""
    found: list[Inconsistency] = []
    not_exact: list[Claim] = []
    for claim in claims.claim:
        value = computed_value(claim, spec, prediction)
        if value is None:
            not_exact.append(claim)
        elif not claim.holds(value):
            sentence = arithmetic_sentence(claim, value, prediction)
            found.append(
                _finding(f"{_label(claim)}: {range_text(claim)} is wrong: {sentence}.", claim)
            )
    for claim in not_exact:
        found += _check_hardware(claim, spec, prediction)
    for one, other in combinations(claims.claim, 2):
        if one.row == other.row and one.formula == other.formula:  # else: different assumptions
            found += _check_same_row(one, other)
    found += _check_mfu(not_exact, spec, prediction)
    found += _check_order(not_exact)
    found += _check_products(not_exact, spec)
    return found


def _finding(why: str, *claims: Claim) -> Inconsistency:
    return Inconsistency(ids=[claim.key for claim in claims], why=why)


def _label(claim: Claim) -> str:
    return QUANTITIES[claim.row].label


def _check_hardware(claim: Claim, spec: RunSpec, prediction: Prediction) -> Iterator[Inconsistency]:
    """Check a claim against the peak, memory and power limit of the hardware."""
    hardware, peak, gpus = prediction.hardware, prediction.peak_flops, prediction.gpus
    steps = {"step_seconds": 1, "total_seconds": spec.steps}.get(claim.row)
    if peak is not None and steps is not None and claim.low > 0:
        per_token = flops_per_token_palm(spec.shape)
        flops = per_token * spec.tokens_per_step * steps
        share = mfu(flops, claim.low, peak)
        if share > 1 + _SLACK:
            causal = flops_per_token_causal(spec.shape) / per_token
            yield _finding(
                f"{format_value(claim.row, claim.low)} would need "
                f"{flops / claim.low / 1e12:.1f} TFLOP/s (6N + 12LCT), {100 * share:.0f} % of the "
                f"peak of {peak / 1e12:.1f}; with only the causal half of attention counted, "
                f"{100 * share * causal:.0f} %.",
                claim,
            )
    if claim.row.startswith("mfu") and (claim.low > 1 or 1 < claim.high < math.inf):
        yield _finding(f"{range_text(claim)}: MFU cannot exceed 100 %.", claim)
    if hardware.kind == "cpu":
        return
    limit, name = None, "the card's memory"
    if claim.row == "power_watts" and hardware.power_limit_watts is not None:
        limit = gpus * hardware.power_limit_watts
        name = "the board's power limit" if gpus == 1 else f"the power limit of {gpus} boards,"
    elif claim.row in ("peak_allocated_bytes", "peak_process_bytes"):
        limit = hardware.memory_bytes
    top = claim.high if math.isfinite(claim.high) else claim.low
    if limit is not None and top > limit:
        top_text, limit_text = (format_value(claim.row, value) for value in (top, limit))
        yield _finding(f"{top_text} is above {name} of {limit_text}.", claim)


def _check_same_row(one: Claim, other: Claim) -> Iterator[Inconsistency]:
    lower, upper = sorted((one, other), key=lambda c: c.low)
    if lower.high < upper.low:
        far, near = upper.value or upper.low, lower.value or lower.high
        factor = far / near if near > 0 else None
        apart = f" are {factor_text(factor)} apart and" if factor and factor > 1.5 else ""
        ranges = f"{range_text(one)} and {range_text(other)}"
        yield _finding(f"{_label(one)}: {ranges}{apart} exclude each other.", one, other)


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


def _check_mfu(
    claims: list[Claim], spec: RunSpec, prediction: Prediction
) -> Iterator[Inconsistency]:
    """Check MFU x peak x time = FLOPs for every claimed MFU and time.

    A total may exceed the time of the steps, by evaluation and compilation.
    """
    peak = prediction.peak_flops
    if peak is None:
        return
    counts = {row: per_token(spec.shape) for row, per_token in MFU_CONVENTIONS.items()}
    times = {"step_seconds": 1, "total_seconds": spec.steps}
    for share, claim in product(claims, claims):
        if share.row not in counts or claim.row not in times:
            continue
        least, most = _ends(share)
        implied = {}
        for row, per_token in counts.items():
            seconds = per_token * spec.tokens_per_step * times[claim.row] / peak
            implied[row] = (
                0.0 if math.isinf(most) else seconds / most,
                seconds / least if least > 0 else math.inf,
            )
        low, high = implied[share.row]
        if _disjoint(low, math.inf if claim.row == "total_seconds" else high, claim):
            other, name = (
                ("mfu_6n", "6N") if share.row == "mfu_palm" else ("mfu_palm", "6N + 12LCT")
            )
            yield _finding(
                f"MFU {range_text(share)} means {_span_text(claim.row, low, high)} "
                f"({_span_text(claim.row, *implied[other])} counting {name}), "
                f"not {range_text(claim)}: the two exclude each other.",
                share,
                claim,
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
                ranges = "; ".join(f"{_label(c)}: {range_text(c)}" for c in (whole, part))
                yield _finding(f"{ranges}; but {why}.", whole, part)


def _check_products(claims: list[Claim], spec: RunSpec) -> Iterator[Inconsistency]:
    """Check claims against total time = steps x step time and energy = power x time."""
    for total, step in _combinations(claims, "total_seconds", "step_seconds"):
        least = _ends(step)[0] * spec.steps
        if _disjoint(least, math.inf, total):
            yield _finding(
                f"{spec.steps:,} steps of {range_text(step)} take at least "
                f"{format_value('total_seconds', least)}, more than {range_text(total)}.",
                total,
                step,
            )
    for group in _combinations(claims, "energy_kwh", "power_watts", "total_seconds"):
        energy, watts, total = group
        low, high = (w * s / 3.6e6 for w, s in zip(_ends(watts), _ends(total), strict=True))
        if _disjoint(low, high, energy):
            yield _finding(
                f"{range_text(watts)} over {range_text(total)} make "
                f"{_span_text('energy_kwh', low, high)}, not {range_text(energy)}.",
                *group,
            )
