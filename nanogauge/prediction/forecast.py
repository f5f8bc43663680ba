"""Forecast the final loss of a running job from its evaluations, its schedule and its plan."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from nanogauge.prediction.loss import VALUES, Z90, LossEstimate, NoEstimate, Values
from nanogauge.quantities import Interval
from nanogauge.runspec import RunSpec
from nanogauge.schedule import learning_rate
from nanogauge.schema import Eval


def forecast_loss(
    steps: Sequence[float],
    losses: Sequence[float],
    rate_share: Callable[[float], float],
    total_steps: int,
    warmup_steps: int,
    values: Values = VALUES,
) -> LossEstimate | NoEstimate:
    """Forecast the final loss from evaluations so far and the learning-rate schedule.

    A power law of the steps plus a loss proportional to the learning rate, through the second half of the steps done,
    evenly in their logarithm. `rate_share` gives the rate of a step over its peak. A schedule whose rate is at its peak
    half way is taken for one with a late decay.
    """
    last = steps[-1] if steps else 0.0
    if last / 2 < max(800, 1.5 * warmup_steps):
        needed = 2 * max(800, 1.5 * warmup_steps)
        return NoEstimate(f"a forecast needs {needed:,.0f} steps of evaluations")
    late_decay = rate_share((warmup_steps + total_steps) / 2) > 0.95
    kind = "wsd" if late_decay else "cosine"
    exponent, rate_loss = values[f"{kind}_exponent"], values[f"{kind}_rate_loss"]
    window = [
        (step, (step / total_steps) ** -exponent, loss - rate_loss * rate_share(step))
        for step, loss in zip(steps, losses, strict=True)
        if step >= last / 2 and math.isfinite(loss)
    ]
    if len(window) < 3 or window[0][0] > 0.7 * last:
        return NoEstimate("a forecast needs three evaluations in the second half of the steps")
    weight = sum(1 / step for step, _, _ in window)
    x_mean = sum(x / step for step, x, _ in window) / weight
    y_mean = sum(y / step for step, _, y in window) / weight
    spread = sum((x - x_mean) ** 2 / step for step, x, _ in window)
    slope = sum((x - x_mean) * (y - y_mean) / step for step, x, y in window) / spread
    recent = [(x, y) for step, x, y in window if step > 0.93 * last]
    x_now, y_now = (sum(column) / len(recent) for column in zip(*recent, strict=True))
    expected = y_now + slope * (1 - x_now) + rate_loss * rate_share(total_steps)
    half = Z90 * forecast_sigma(last / total_steps)
    return LossEstimate(expected - half, expected, expected + half)


def forecast_sigma(share: float) -> float:
    """Return the standard deviation of a forecast when `share` of the steps are done."""
    known = ((0.1, 0.055), (0.25, 0.027), (0.5, 0.014))
    for (x0, y0), (x1, y1) in pairwise(known):
        if share < x1:
            return float(y0 * (y1 / y0) ** (math.log(share / x0) / math.log(x1 / x0)))
    return known[-1][1]


def joined(plan: LossEstimate, forecast: LossEstimate) -> LossEstimate:
    """Return the inverse-variance weighted mean of two estimates."""
    halves = [(e.high - e.low) / 2 for e in (plan, forecast)]
    weights = [1 / half**2 for half in halves]
    total = sum(weights)
    expected = (weights[0] * plan.expected + weights[1] * forecast.expected) / total
    half = 1 / math.sqrt(total)
    return LossEstimate(expected - half, expected, expected + half, plan.caveats)


DEPARTURE, DEPARTS_FROM = 0.08, 0.25
"""Nats between curve and plan that raise an alarm, from this share of the steps on."""


class FinalLoss:
    """Forecast of a running job's final validation loss, from its evaluations and its plan.

    Args:
        spec: the run.
        plan: predicted loss; None without one.
        losses: validation loss of earlier evaluations, by step.
    """

    def __init__(self, spec: RunSpec, plan: Interval | None, losses: Mapping[int, float]) -> None:
        self._spec, self._losses = spec, dict(losses)
        self._plan = None if plan is None else LossEstimate(plan.low, plan.expected, plan.high)
        self._alarmed = False

    def evaluated(self, line: Eval) -> tuple[Eval, str | None]:
        """Return an evaluation with the forecast, and the text of an alarm the first time."""
        spec, schedule, plan = self._spec, self._spec.schedule, self._plan
        self._losses = {step: loss for step, loss in self._losses.items() if step < line.step}
        if line.val_loss is None or schedule is None:
            return line, None
        self._losses[line.step] = line.val_loss

        def share(step: float) -> float:
            return learning_rate(math.floor(step), schedule, spec.steps) / schedule.learning_rate

        steps, losses = list(self._losses), list(self._losses.values())
        curve = forecast_loss(steps, losses, share, spec.steps, schedule.warmup_steps)
        if isinstance(curve, NoEstimate):
            return line, None
        both = curve if plan is None else joined(plan, curve)
        forecast = {"final_low": both.low, "final": both.expected, "final_high": both.high}
        line = line.model_copy(update=forecast)
        early = line.step < DEPARTS_FROM * spec.steps
        if early or self._alarmed or plan is None:
            return line, None
        if abs(plan.expected - curve.expected) <= DEPARTURE:
            return line, None
        self._alarmed = True
        return line, (
            f"The curve up to step {line.step:,} ends at a validation loss of "
            f"{curve.expected:.3f}, the plan at {plan.expected:.3f}: check the order of the data, "
            "the learning rate and the name of the data set (data.dataset)."
        )
