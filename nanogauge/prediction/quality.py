"""Predict a run's final validation loss, and its HellaSwag score relative to GPT-2 124M's."""

import math
from collections.abc import Sequence
from pathlib import Path

import platformdirs
from pydantic import TypeAdapter, ValidationError

from nanogauge.files import write_atomic
from nanogauge.prediction.flops import count_parameters
from nanogauge.prediction.loss import (
    GPT2_124M,
    GPT2_124M_HELLASWAG,
    HELLASWAG_RMS,
    USUAL_RATES,
    Z90,
    FinishedLoss,
    LossEstimate,
    LossInputs,
    NoEstimate,
    Recipe,
    data_level,
    effective_tokens,
    hellaswag_accuracy,
    multipliers,
    predict_loss,
)
from nanogauge.quantities import Interval
from nanogauge.runspec import NO_SHAPE, RunSpec
from nanogauge.schedule import learning_rate
from nanogauge.schema import Estimate

GPT2_VOCABULARIES = (50257, 50304)
"""Rows of the embedding with GPT-2's tokenizer, exact and padded to a multiple of 64."""
USUAL_RATE_EXPONENT = 0.27
"""Decrease of the usual learning rates with model size. Source: loss.toml."""
HELLASWAG_ITEMS = 10_042


def usual_rates(kind: str, parameters: float) -> tuple[float, float]:
    """Return the lowest and highest usual learning rate at a model size."""
    scale = (parameters / 124e6) ** -USUAL_RATE_EXPONENT
    low, high = USUAL_RATES[kind]
    return scale * low, scale * high


def loss_inputs(spec: RunSpec) -> LossInputs:
    """Return what the scaling law needs to know of a run."""
    shape, schedule, tokens = spec.shape, spec.schedule, spec.tokens_per_step * spec.steps
    counted = count_parameters(shape)
    parameters = counted.block_matrices + counted.vocabulary
    recipe, rate_ratio, end_rate = None, 1.0, 0.0
    if schedule is not None:
        peak = schedule.learning_rate
        muon = spec.optimizer.name == "muon"
        rate = (spec.optimizer.matrix_learning_rate if muon else None) or peak
        rotary = not shape.position_table
        tuned = muon or (rotary and rate >= 0.5 * usual_rates("tuned_rotary", parameters)[0])
        program = spec.program
        recipe = Recipe(
            tuned_rotary=tuned,
            muon=muon,
            modern_blocks=rotary and program.qk_norm and program.squared_relu,
            untied_head=not shape.tied_head,
            shortcuts=shape.table_parameters > 0,
        )
        low, high = usual_rates("muon" if muon else "tuned_rotary" if tuned else "gpt2", parameters)
        rate_ratio = rate / low if rate < low else max(1.0, rate / high)
        end_rate = learning_rate(spec.steps, schedule, spec.steps) / peak
    tokenizer = spec.tokenizer
    if tokenizer is None:
        gpt2 = shape.vocabulary in GPT2_VOCABULARIES
        tokenizer = "gpt2" if gpt2 else f"a vocabulary of {shape.vocabulary:,}"
    evaluated = (spec.eval_batches or 0) * spec.micro_batch * shape.context or math.inf
    validation = min(evaluated, spec.validation_tokens or math.inf)
    return LossInputs(
        parameters=parameters,
        tokens=tokens,
        steps=spec.steps,
        layers=shape.n_layer,
        width=shape.n_embd,
        dataset=spec.dataset,
        recipe=recipe,
        unique_tokens=spec.unique_tokens,
        context=shape.context,
        tokenizer=tokenizer,
        end_rate=end_rate,
        rate_ratio=rate_ratio,
        validation_tokens=validation if validation < math.inf else None,
        pretrained=spec.init_from is not None,
    )


def nearest_finished(run: LossInputs, finished: Sequence[FinishedLoss]) -> FinishedLoss | None:
    """Return the finished run on the same data that is most like a run; None without one."""

    def distance(other: FinishedLoss) -> tuple[bool, float]:
        sizes = ((run.parameters, other.inputs.parameters), (run.tokens, other.inputs.tokens))
        return other.inputs.recipe != run.recipe, sum(abs(math.log(a / b)) for a, b in sizes)

    alike = [f for f in reversed(finished) if f.inputs.evaluated_on == run.evaluated_on]
    return min(alike, key=distance, default=None)


def predict_quality(
    spec: RunSpec, finished: Sequence[FinishedLoss] = ()
) -> tuple[dict[str, Estimate], dict[str, Estimate], dict[str, str], list[str]]:
    """Predict the rows val_loss and quality_vs_gpt2.

    Returns analytic and calibrated estimates by row, reasons for missing ones, and notes.
    """
    if spec.traced is not None:
        return {}, {}, dict.fromkeys(("val_loss", "quality_vs_gpt2"), NO_SHAPE), []
    run = loss_inputs(spec)
    nearest = nearest_finished(run, finished)
    analytic, calibrated = predict_loss(run), nearest and predict_loss(run, nearest)
    unpredicted = {"quality_vs_gpt2": "it follows from the loss, which is not predicted"}
    if isinstance(analytic, NoEstimate):
        unpredicted["val_loss"] = analytic.why
    found, by_run = [], f"the finished run {nearest.name if nearest else ''} on the same data"
    for loss, formula, source in (
        (analytic, _formula(run), "scaling law fitted to published runs, docs/prediction.md"),
        (calibrated, "its loss times the ratio of the law's losses", by_run),
    ):
        rows: dict[str, Estimate] = {}
        if isinstance(loss, LossEstimate):
            interval = Interval(loss.low, loss.expected, loss.high)
            rows["val_loss"] = Estimate.of("val_loss", interval, formula, source)
            quality = quality_at(run, interval)
            if isinstance(quality, Estimate):
                rows["quality_vs_gpt2"] = quality
            else:
                unpredicted["quality_vs_gpt2"] = quality
        found.append(rows)
    if "quality_vs_gpt2" in found[0]:
        del unpredicted["quality_vs_gpt2"]
    caveats = analytic.caveats if isinstance(analytic, LossEstimate) else ()
    return found[0], found[1], unpredicted, [f"Loss: {caveat}." for caveat in caveats]


def mark_sentence(dataset: str | None, loss: Interval | None) -> str | None:
    """Compare a predicted loss with GPT-2 124M's on the same data; None without one of them."""
    mark = GPT2_124M.get(dataset or "")
    if loss is None or mark is None:
        return None
    p = LossEstimate(loss.low, loss.expected, loss.high).probability_below(mark.loss)
    chance = f"{100 * p:.0f} %" if 0.01 <= p <= 0.99 else "over 99 %" if p > 0.5 else "under 1 %"
    words = "expected" if p > 0.9 else "not expected" if p < 0.1 else "open"
    return (
        f"GPT-2 124M's loss on {dataset} is {mark.loss:.3f}, which it never saw: a lower one "
        f"is {words} (probability {chance})."
    )


def _formula(run: LossInputs) -> str:
    least, expected, most = multipliers(run.recipe)
    seen = effective_tokens(run.tokens, run.unique)
    worth = f"{expected:.2g}" if least == most else f"{expected:.2g} ({least:.2g}-{most:.2g})"
    return (
        f"E of {run.dataset} + A N^-alpha + B (m D)^-beta, N {run.parameters / 1e6:.3g} M, "
        f"D {seen / 1e9:.3g} G, m {worth}"
    )


def quality_at(run: LossInputs, loss: Interval) -> Estimate | str:
    """Return the score on HellaSwag over GPT-2 124M's, or why there is none."""
    if run.dataset not in ("FineWeb", "FineWeb-Edu") or run.evaluated_on[1:] != ("gpt2", 1024):
        return "HellaSwag's accuracy is known as a function of FineWeb's loss alone"
    offset = data_level("FineWeb-Edu") - data_level(run.dataset)
    if hellaswag_accuracy(loss.expected + offset) is None:
        return "HellaSwag's accuracy is known for losses of 2.9 to 3.7 on FineWeb-Edu alone"
    low, expected, high = (
        hellaswag_accuracy(min(3.7, max(2.9, value + offset))) or 0.0 for value in (loss.high, loss.expected, loss.low)
    )
    sampling = math.sqrt(expected * (1 - expected) / HELLASWAG_ITEMS)
    noise = Z90 * math.hypot(sampling, HELLASWAG_RMS)
    interval = Interval(
        expected - math.hypot(expected - low, noise), expected, expected + math.hypot(high - expected, noise)
    )
    return Estimate.of(
        "quality_vs_gpt2",
        interval / GPT2_124M_HELLASWAG,
        f"HellaSwag's accuracy {expected:.3f} at this loss / {GPT2_124M_HELLASWAG} of GPT-2 124M",
        "698 evaluations of AGNDM/build-nanogpt, docs/prediction.md",
    )


_FINISHED = TypeAdapter(tuple[FinishedLoss, ...])
LOSSES_KEPT = 100


def losses_path() -> Path:
    """Return the path of the losses of finished runs, which may not exist."""
    return platformdirs.user_data_path("nanogauge", appauthor=False) / "losses.json"


def load_losses() -> tuple[FinishedLoss, ...]:
    """Return the losses of this user's finished runs; none if their file is absent or damaged."""
    try:
        return _FINISHED.validate_json(losses_path().read_bytes())
    except (OSError, ValidationError):
        return ()


def store_loss(finished: FinishedLoss) -> str | None:
    """Add the loss of a finished run; return a warning if the file could not be written."""
    path, together = losses_path(), (*load_losses(), finished)[-LOSSES_KEPT:]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, _FINISHED.dump_json(together, indent=1))
    except OSError as error:
        return f"The losses {path} could not be written: {error.strerror}"
    return None
