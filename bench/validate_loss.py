"""Compare predicted final losses with published ones, leaving each run's source out of the fit.

python bench/validate_loss.py LOSS_RUNS.csv [--curves LOSS_CURVES.csv] [--json]

The headline covers the rows with use = fit. A run that the constants were fitted to is predicted with constants
refitted without its source. Where no other source has its data set, the source's first run on it stays in the fit and
is not counted ("strict": it is left out too, so the data set's level is the prior's in bench/fit_loss.py). Other runs
are predicted with the current constants. Runs of a scaling-law grid use the level of one run of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from fit_loss import Curve, CurveFit, PublishedLoss, fit, read_curves, read_losses, usable
from results import Bench, Result, result

from nanogauge.errors import BadInput
from nanogauge.prediction.loss import (
    FITTED_CURVES,
    FITTED_RUNS,
    VALUES,
    FinishedLoss,
    LossEstimate,
    LossInputs,
    NoEstimate,
    Recipe,
    Values,
    effective_tokens,
    predict_loss,
    scaling_law,
)

HEADLINE = "use = fit, source left out"
STRICT = "use = fit, source left out, no run of it kept"


@dataclass(frozen=True)
class Compared:
    id: str
    measured: float
    estimate: LossEstimate

    @property
    def error(self) -> float:
        return self.estimate.expected - self.measured

    @property
    def inside(self) -> bool:
        return self.estimate.low <= self.measured <= self.estimate.high


def inputs(run: PublishedLoss) -> LossInputs | NoEstimate:
    """Return the inputs of the prediction, or why they are incomplete."""
    if run.metric != "nats/token":
        return NoEstimate(f"in {run.metric}")
    if run.loss is None or run.parameters is None or run.tokens is None or run.layers is None:
        return NoEstimate("N, tokens, layers or loss not published")
    if run.width is None or run.batch_tokens is None or run.context is None:
        return NoEstimate("width, batch or context not published")
    return LossInputs(
        parameters=run.parameters,
        tokens=run.tokens,
        steps=run.tokens / run.batch_tokens,
        layers=run.layers,
        width=run.width,
        dataset=run.dataset,
        recipe=run.recipe,
        unique_tokens=run.unique_tokens,
        context=run.context,
        tokenizer=run.tokenizer,
        end_rate=run.end_rate,
        validation_tokens=run.validation_tokens,
    )


def predicted(run: PublishedLoss, values: Values = VALUES) -> Compared | NoEstimate:
    """Predict a published run, or return why it cannot be compared."""
    of_run = inputs(run)
    if isinstance(of_run, NoEstimate):
        return of_run
    if of_run.recipe is None:
        return NoEstimate("a recipe that is not in the table")
    return _compared(run, predict_loss(of_run, values=values))


def _compared(run: PublishedLoss, estimate: LossEstimate | NoEstimate) -> Compared | NoEstimate:
    if isinstance(estimate, NoEstimate):
        return estimate
    assert run.loss is not None
    return Compared(run.id, run.loss, estimate)


Outcomes = dict[str, Compared | NoEstimate]


def left_out(runs: Sequence[PublishedLoss], strict: bool) -> Outcomes:
    """Predict each fitted run with its source left out; strict leaves out all of it."""
    fitted = [run for run in usable(runs) if run.id in FITTED_RUNS]
    found: Outcomes = {}
    for source in dict.fromkeys(run.source for run in fitted):
        own = [run for run in fitted if run.source == source]
        others = [run for run in fitted if run.source != source]
        first: dict[str, PublishedLoss] = {}
        if not strict:
            elsewhere = {run.dataset for run in others}
            for run in own:
                if run.dataset not in elsewhere:
                    first.setdefault(run.dataset, run)
        values, _ = fit([*others, *first.values()])
        found |= {
            run.id: NoEstimate("gives its data set's level to the source's other runs")
            if run in first.values()
            else predicted(run, values)
            for run in own
        }
    return found


def grid(runs: Sequence[PublishedLoss]) -> tuple[Outcomes, Outcomes]:
    """Predict a grid's runs on one data set from one of them, which is not counted.

    That is the run nearest to 100 M parameters and 40 tokens per parameter. Returns the runs inside and outside the
    validated range.
    """
    inside: Outcomes = {}
    outside: Outcomes = {}
    complete: list[tuple[PublishedLoss, LossInputs]] = []
    for run in runs:
        of_run = inputs(run)
        if isinstance(of_run, NoEstimate):
            inside[run.id] = of_run
        else:
            complete.append((run, replace(of_run, recipe=Recipe())))
    if not complete:
        return inside, outside

    def distance(of_run: LossInputs) -> float:
        ratio = of_run.tokens / of_run.parameters
        return float(np.hypot(np.log(of_run.parameters / 1e8), np.log(ratio / 40)))

    anchor, of_anchor = min(complete, key=lambda pair: distance(pair[1]))
    assert anchor.loss is not None
    for run, of_run in complete:
        estimate = predict_loss(of_run, FinishedLoss(of_anchor, anchor.loss))
        alone = predict_loss(replace(of_run, dataset="FineWeb", tokenizer="gpt2", context=1024))
        if run is anchor:
            inside[run.id] = NoEstimate("gives its level to the others")
        elif isinstance(alone, NoEstimate):
            inside[run.id] = alone
        else:
            (outside if alone.caveats else inside)[run.id] = _compared(run, estimate)
    return inside, outside


def repeated(runs: Sequence[PublishedLoss]) -> Outcomes:
    """Predict runs on repeated data from the run of their size with the most unique tokens."""
    outcomes: Outcomes = {}
    for run in runs:
        alike = [r for r in runs if (r.parameters, r.tokens) == (run.parameters, run.tokens)]
        most = max(alike, key=lambda r: r.unique_tokens or 0)
        if not (run.parameters and run.tokens and run.unique_tokens and run.loss and most.loss):
            outcomes[run.id] = NoEstimate("figures not published")
        elif run is most or most.unique_tokens == run.unique_tokens or not most.unique_tokens:
            outcomes[run.id] = NoEstimate("has the most unique tokens of its size")
        elif run.tokens / run.unique_tokens > 15:
            outcomes[run.id] = NoEstimate("more than 15 epochs")
        else:
            law, other = (
                scaling_law(run.parameters, effective_tokens(run.tokens, unique), 1.0)
                for unique in (run.unique_tokens, most.unique_tokens)
            )
            expected = most.loss + law - other
            estimate = LossEstimate(expected - 0.05, expected, expected + 0.05)
            outcomes[run.id] = Compared(run.id, run.loss, estimate)
    return outcomes


def forecasts(curves: Sequence[Curve], share: float) -> list[Compared]:
    """Forecast each curve; a fitted one with itself (wsd) or its source (cosine) left out."""
    fitted = [curve for curve in curves if curve.id in FITTED_CURVES]
    values: dict[str, Values] = {}
    for kind in ("cosine", "wsd"):
        search = CurveFit(kind, fitted)
        for curve in search.curves:

            def other(c: Curve, left: Curve = curve) -> bool:
                return c.id != left.id if left.schedule == "wsd" else c.source != left.source

            if any(other(c) for c in search.curves):
                values[curve.id] = VALUES | search.fit(other)
    compared = []
    for curve in curves:
        estimate = curve.forecast(share, values.get(curve.id, VALUES))
        if estimate is not None:
            compared.append(Compared(curve.id, curve.losses[-1], estimate))
    return compared


def summary(prefix: str, case: str, compared: Sequence[Compared]) -> list[Result]:
    """Return the errors, coverage and width of a set of comparisons."""
    if not compared:
        return []
    errors = [abs(c.error) for c in compared]
    widths = [c.estimate.high - c.estimate.low for c in compared]
    inside = [float(c.inside) for c in compared]
    rows = (
        ("median_error", errors, np.median(errors)),
        ("p90_error", errors, np.quantile(errors, 0.9)),
        ("worst_error", errors, max(errors)),
        ("coverage", inside, np.mean(inside)),
        ("width", widths, np.mean(widths)),
    )
    return [result(f"{prefix}_{name}", case, values, "published", float(value)) for name, values, value in rows]


def measure(args: Any) -> list[Result]:
    runs = read_losses(args.runs)
    by_use: dict[str, list[PublishedLoss]] = {}
    for run in runs:
        by_use.setdefault(run.use, []).append(run)
    headline = {run.id: predicted(run) for run in by_use.pop("fit", [])}
    if not headline:
        raise BadInput(f"{args.runs} has no row with use = fit")
    sets: dict[str, Outcomes] = {
        HEADLINE: headline | left_out(runs, strict=False),
        STRICT: headline | left_out(runs, strict=True),
    }
    for use, group in sorted(by_use.items()):
        if use == "grid":
            for key in dict.fromkeys((run.source, run.dataset) for run in group):
                own = [run for run in group if (run.source, run.dataset) == key]
                case = f"use = grid, {key[0]}, {key[1]}, level of one run"
                sets[case], sets[f"{case}, outside the validated range"] = grid(own)
        elif use == "grid-repeat":
            sets["use = grid-repeat, difference from the most unique tokens"] = repeated(group)
        else:
            sets[f"use = {use}"] = {run.id: predicted(run) for run in group}
    results: list[Result] = []
    for case, outcomes in sets.items():
        prefix = {HEADLINE: "loss", STRICT: "strict_loss"}.get(case, "group_loss")
        results += summary(prefix, case, [c for c in outcomes.values() if isinstance(c, Compared)])
        if not args.json:
            print_outcomes(case, outcomes)
    for share in (0.15, 0.25, 0.5) if args.curves is not None else ():
        compared = forecasts(read_curves(args.curves), share)
        results += summary("forecast", f"{100 * share:.0f} %", compared)
    return results


def print_outcomes(case: str, outcomes: Outcomes) -> None:
    print(f"\n{case}")
    for name, outcome in outcomes.items():
        if isinstance(outcome, NoEstimate):
            print(f"  {name:28} not compared: {outcome.why}")
            continue
        e = outcome.estimate
        print(
            f"  {name:28} {outcome.measured:.3f}  predicted {e.expected:.3f} "
            f"({e.low:.3f} - {e.high:.3f})  {outcome.error:+.3f}"
            + ("" if outcome.inside else "  outside")
            + "".join(f"  {why}" for why in e.caveats)
        )


if __name__ == "__main__":
    bench = Bench(__doc__)
    bench.add_argument("runs", type=Path, help="CSV of published final losses")
    bench.add_argument("--curves", type=Path, help="CSV of published curves")
    bench.run(measure)
