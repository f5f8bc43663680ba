"""Final validation loss of a GPT, in nats per token of GPT-2's tokenizer.

    L = E + E_data + A (N / 100 M)^-alpha + B (m D / 5 G)^-beta

N counts the blocks and one head, D the tokens seen, with repeated ones discounted. m is the recipe's multiplier: the
tokens of GPT-2's own recipe that one of its tokens is worth.
Source: Hoffmann et al. 2022, arXiv 2203.15556 (the form); Muennighoff et al. 2023, arXiv 2305.16264 (repeated data).
bench/fit_loss.py fits the constants of loss.toml to published runs, and bench/validate_loss.py compares them.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from nanogauge.files import package_table

Z90 = 1.645
"""Half the width of a normal distribution's central 90 %, in standard deviations."""


@dataclass(frozen=True)
class Constant:
    value: float
    sigma: float
    """Standard deviation of the fit; 0 for a constant taken from its source."""
    source: str


@dataclass(frozen=True)
class Mark:
    loss: float
    source: str


_TABLE = package_table("loss.toml")
CONSTANTS = {name: Constant(**row) for name, row in _TABLE["constants"].items()}
FITTED_RUNS, FITTED_CURVES = (frozenset(names.split()) for names in _TABLE["fitted"].values())
"""Published runs, and curves, that the constants were fitted to."""
DATASETS: dict[str, str | None] = {n: row.get("offset") for n, row in _TABLE["datasets"].items()}
"""Data sets with a known level -> the constant that is its distance from FineWeb's."""
REPOSITORIES: dict[str, str] = {row["repository"]: n for n, row in _TABLE["datasets"].items()}
"""Repository on the Hugging Face hub -> data set."""
GPT2_124M = {name: Mark(**row["gpt2_124m"]) for name, row in _TABLE["datasets"].items()}
"""GPT-2 124M's validation loss by data set. It was not trained on the first two."""
USUAL_RATES: dict[str, tuple[float, float]] = _TABLE["usual_rates"]
"""Lowest and highest peak learning rate of published runs at 124 M parameters, by recipe."""
VALUES: dict[str, float] = {name: constant.value for name, constant in CONSTANTS.items()}
Values = Mapping[str, float]

GPT2_124M_HELLASWAG = 0.2945
"""GPT-2 124M's accuracy on HellaSwag. Source: karpathy/build-nanogpt."""
HELLASWAG_PARITY = Mark(3.17, "hellaswag_accuracy() is GPT2_124M_HELLASWAG here")
HELLASWAG_RMS = 0.003
"""Scatter of accuracies about hellaswag_accuracy()."""


@dataclass(frozen=True)
class Recipe:
    """Differences of a training recipe from GPT-2 trained by AdamW at 6e-4."""

    tuned_rotary: bool = False
    """Rotary positions and a tuned learning rate, 1.5e-3 or more for AdamW."""
    muon: bool = False
    """Muon, or SOAP, for the matrices of the blocks."""
    modern_blocks: bool = False
    """Normalized queries and keys, squared ReLU, projections that start at zero."""
    untied_head: bool = False
    shortcuts: bool = False
    """Value and embedding shortcuts, soft-capped logits."""

    @property
    def factors(self) -> tuple[str, ...]:
        return tuple(name for name, present in vars(self).items() if present)


EVIDENCE: dict[Recipe, tuple[float, float]] = {
    Recipe(**dict.fromkeys(row["factors"], True)): tuple(row["parameters"]) for row in _TABLE["recipes"]
}
"""Recipes with published runs -> range of N in these runs."""
MOST_UNKNOWN = 3.4
"""Largest multiplier assumed for an unknown recipe."""


def multipliers(recipe: Recipe | None, values: Values = VALUES) -> tuple[float, float, float]:
    """Return the least, expected and greatest multiplier of a recipe's tokens.

    A combination without published runs lies between 1 and the product of its factors.
    """
    if recipe is None:
        return 1.0, 1.0, MOST_UNKNOWN
    product = math.prod(values[name] for name in recipe.factors)
    return (product,) * 3 if recipe in EVIDENCE else (1.0, math.sqrt(product), product)


def effective_tokens(tokens: float, unique_tokens: float, values: Values = VALUES) -> float:
    """Return the unique tokens that are worth `tokens` seen in passes over `unique_tokens`."""
    unique, decay = min(unique_tokens, tokens), values["repeat_decay"]
    return unique * (1 - decay * math.expm1(-(tokens / unique - 1) / decay))


def scaling_law(parameters: float, effective: float, multiplier: float, values: Values = VALUES) -> float:
    """Return the loss above data_level(): its terms in model size and token count.

    `effective` is the result of effective_tokens(), `multiplier` a factor on those tokens.
    """
    of_size = math.pow(parameters / 1e8, -values["parameter_exponent"])
    of_tokens = math.pow(multiplier * effective / 5e9, -values["token_exponent"])
    return values["parameter_scale"] * of_size + values["token_scale"] * of_tokens


def data_level(dataset: str, values: Values = VALUES) -> float:
    """Return the loss of an unlimited model and unlimited tokens on a data set of DATASETS."""
    offset = DATASETS[dataset]
    return values["irreducible"] + (values[offset] if offset else 0.0)


@dataclass(frozen=True)
class LossEstimate:
    """Loss in nats per token with its 90 % interval."""

    low: float
    expected: float
    high: float
    caveats: tuple[str, ...] = ()

    def probability_below(self, mark: float) -> float:
        """Return the probability of a loss below a mark on the same validation tokens."""
        half = self.high - self.expected if mark > self.expected else self.expected - self.low
        return 0.5 * (1 + math.erf((mark - self.expected) / (half / Z90) / math.sqrt(2)))


@dataclass(frozen=True)
class NoEstimate:
    why: str


@dataclass(frozen=True, kw_only=True)
class LossInputs:
    """What the final loss of a run depends on."""

    parameters: float
    """N: the matrices of the blocks and one head."""
    tokens: float
    """Tokens seen, repeated ones included."""
    steps: float
    layers: int
    width: int
    dataset: str | None
    """A name in DATASETS; any other data, tokenizer or context needs a FinishedLoss."""
    recipe: Recipe | None
    """Training recipe; None if unknown."""
    unique_tokens: float | None = None
    """Unique tokens of the training set; None if no token is repeated."""
    context: int = 1024
    tokenizer: str = "gpt2"
    end_rate: float = 0.0
    """Learning rate of the last step over its peak."""
    rate_ratio: float = 1.0
    """Peak learning rate over the recipe's usual one."""
    validation_tokens: float | None = None
    """Tokens of the validation set that an evaluation reads; None if unknown."""
    pretrained: bool = False
    """The run starts from trained weights."""

    @property
    def unique(self) -> float:
        return self.tokens if self.unique_tokens is None else min(self.unique_tokens, self.tokens)

    @property
    def passes(self) -> float:
        return self.tokens / self.unique

    @property
    def ratio(self) -> float:
        """Tokens per parameter."""
        return self.tokens / self.parameters

    @property
    def aspect(self) -> float:
        return self.width / self.layers

    @property
    def evaluated_on(self) -> tuple[str | None, str, int]:
        """Key of comparability: only losses of runs with an equal key are comparable."""
        return self.dataset, self.tokenizer, self.context

    def laws(self, values: Values = VALUES) -> list[float]:
        """Return the law at the least, expected and greatest multiplier of the recipe."""
        seen = effective_tokens(self.tokens, self.unique, values)
        # A rate that has not come down leaves a loss proportional to it.
        undecayed = values["wsd_rate_loss"] * self.end_rate if self.end_rate > 0.1 else 0.0
        found = multipliers(self.recipe, values)
        return [undecayed + scaling_law(self.parameters, seen, m, values) for m in found]


@dataclass(frozen=True)
class FinishedLoss:
    """A run whose final loss sets the level for others of the same data, tokenizer and context."""

    inputs: LossInputs
    loss: float
    name: str = ""


def validation_error(validation_tokens: float) -> float:
    """Return the standard error that the size of a validation set gives a loss.

    Losses of documents differ by 0.45 nats, assumed; a document has 780 tokens.
    """
    return 0.45 / math.sqrt(max(1.0, validation_tokens / 780))


def predict_loss(
    run: LossInputs, finished: FinishedLoss | None = None, values: Values = VALUES
) -> LossEstimate | NoEstimate:
    """Predict the final validation loss of a run, or return why it cannot be predicted."""
    if finished is not None and finished.inputs.evaluated_on != run.evaluated_on:
        finished = None
    if finished is not None and run.unique_tokens is None:  # a plan does not count the data
        run = replace(run, unique_tokens=finished.inputs.unique_tokens)
    laws, outside, widened = run.laws(values), _refusal(run), _departures(run)
    below, above = 0.05, 0.07
    if finished is not None:
        base = data_level(run.dataset, values) if run.dataset in DATASETS else values["irreducible"]
        # A ratio: the nats of another token, or of a byte, are a share of those of GPT-2's.
        scale = finished.loss / (base + finished.inputs.laws(values)[1])
        laws, level = [scale * law for law in laws], scale * base
        below = above = 0.05 + 0.02 * abs(math.log2(run.parameters / finished.inputs.parameters))
        if run.recipe == finished.inputs.recipe:
            laws = [laws[1]] * 3
        if outside:  # the law says how much may differ, not by how much it does
            away = abs(laws[1] + level - finished.loss)
            widened = [(away, away, f"{outside}; the level is that of the finished run")]
    elif run.dataset not in DATASETS:
        name = run.dataset or "this data set"
        return NoEstimate(f"no published run gives the level of {name}; a finished run on it will")
    elif outside:
        return NoEstimate(outside)
    elif run.tokenizer != "gpt2":
        return NoEstimate(f"no published run gives a loss per token of {run.tokenizer}")
    elif run.context != 1024:
        return NoEstimate(f"no published run has a context of {run.context:,}; 1,024 is validated")
    else:
        level = data_level(run.dataset, values)
        if run.recipe is not None and run.recipe.muon:
            below, above = 0.06, 0.08
    same_windows = finished is not None and finished.inputs.validation_tokens == run.validation_tokens
    if run.validation_tokens is not None and not same_windows:
        noise = Z90 * validation_error(run.validation_tokens)
        below, above = math.hypot(below, noise), math.hypot(above, noise)
    least, expected, most = (level + law for law in laws)
    return LossEstimate(
        low=most - below - sum(low for low, _, _ in widened),
        expected=expected,
        high=least + above + sum(high for _, high, _ in widened),
        caveats=tuple(why for _, _, why in widened),
    )


def _quantities(run: LossInputs) -> dict[str, float]:
    """Return the quantities that the tables `limits` and `departures` restrict."""
    return {
        "million_parameters": run.parameters / 1e6,
        "tokens_per_parameter": run.ratio,
        "billion_tokens": run.tokens / 1e9,
        "million_tokens_a_step": run.tokens / run.steps / 1e6,
        "steps": run.steps,
        "layers": run.layers,
        "aspect": run.aspect,
        "end_rate": run.end_rate,
        "rate_ratio": run.rate_ratio,
        "validation_tokens": run.validation_tokens or math.inf,
    }


def _rows(table: str, run: LossInputs) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the rows of a table that apply to the run, and their reasons."""
    quantities = _quantities(run)
    for row in _TABLE[table]:
        value = quantities[row["of"]]
        if row.get("over", -math.inf) < value < row.get("under", math.inf):
            yield row, row["why"].format(value)


def _refusal(run: LossInputs) -> str | None:
    """Return why the scaling law does not apply to the run; None if it does."""
    unique = run.unique
    if run.pretrained:
        return "the run starts from trained weights: the law is of random ones"
    if run.passes > (35 if unique > 50 * run.parameters else 15):
        return f"{run.passes:.3g} passes over {unique / 1e9:.2g} G tokens: the model will overfit"
    return next((why for _, why in _rows("limits", run)), None)


def _departures(run: LossInputs) -> list[tuple[float, float, str]]:
    """Return departures from the validated range: nats to widen below, above, and the reason."""
    found = [(*row["widen"], why) for row, why in _rows("departures", run)]
    smallest, largest = EVIDENCE.get(run.recipe or Recipe(), EVIDENCE[Recipe()])
    far = 0.03 * math.log2(max(smallest / run.parameters, run.parameters / largest, 1.0))
    if far > 0:
        millions = f"{run.parameters / 1e6:,.0f} M parameters"
        found.append((far, far, f"{millions}: no published run of this recipe near"))
    if run.unique < 4e8 and run.passes > 4:
        passes = f"{run.passes:.2g} passes over {run.unique / 1e9:.2g} G"
        found.append((0.0, 0.15, f"{passes}: validated from 0.4 G"))
    if run.recipe is None:
        found.append((0.0, 0.0, "recipe not known: a multiplier of 1 to 3.4"))
    elif run.recipe not in EVIDENCE:
        found.append((0.0, 0.0, "no published run combines these parts of a recipe"))
    return found


def hellaswag_accuracy(fineweb_edu_loss: float) -> float | None:
    """Return HellaSwag's accuracy at a loss on FineWeb-Edu; None outside 2.9-3.7.

    A parabola through 698 evaluations of six runs of AGNDM/build-nanogpt.
    """
    if not 2.9 <= fineweb_edu_loss <= 3.7:
        return None
    return 0.1081 * fineweb_edu_loss**2 - 0.808 * fineweb_edu_loss + 1.7688
