"""Estimate a model's benchmark score against GPT-2 124M's from its measured loss."""

from nanogauge.analysis.measured import LEAST_VALIDATION_TOKENS, Measurements
from nanogauge.prediction.loss import GPT2_124M
from nanogauge.prediction.quality import loss_inputs, quality_at
from nanogauge.quantities import Interval
from nanogauge.runspec import RunSpec
from nanogauge.schema import Estimate


def quality_by_loss(spec: RunSpec, measurements: Measurements | None) -> Estimate | None:
    """Return the score that the measured loss stands for; None without a comparable loss.

    It is the loss of the training split if the validation set is small or of unknown size.
    """
    mark = GPT2_124M.get(spec.dataset or "")
    if mark is None or measurements is None or "val_loss" not in measurements.values:
        return None
    loss, split = measurements.values["val_loss"].value, "validation"
    if (spec.validation_tokens or 0) < LEAST_VALIDATION_TOKENS:
        if measurements.train_loss is None:
            return None
        loss, split = measurements.train_loss, "train-split"
    score = quality_at(loss_inputs(spec), Interval.exact(loss))
    if not isinstance(score, Estimate):
        return None
    compared = f"{split} loss {loss:.3f} on {spec.dataset}, GPT-2 124M's {mark.loss:.3f}"
    return score.model_copy(update={"formula": f"{compared}; {score.formula}"})
