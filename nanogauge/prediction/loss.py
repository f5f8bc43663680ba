"""Final validation loss of a GPT, in nats per token of GPT-2's tokenizer.

    L = E + E_data + A (N / 100 M)^-alpha + B (m D / 5 G)^-beta

N counts the blocks and one head, D the tokens seen, with repeated ones discounted. m is the
recipe's multiplier: the tokens of GPT-2's own recipe that one of its tokens is worth.
Source: Hoffmann et al. 2022, arXiv 2203.15556 (the form); Muennighoff et al. 2023, arXiv 2305.16264
(repeated data). bench/fit_loss.py fits the constants, bench/validate_loss.py compares them with
published runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

Z90 = 1.645
"""Half the width of a normal distribution's central 90 %, in standard deviations."""


@dataclass(frozen=True)
class Constant:
    value: float
    sigma: float
    """Standard deviation of the fit; 0 for a constant taken from its source."""
    source: str


_RUNS = "fit to FITTED_RUNS; prior: "
_CURVES = "fit to FITTED_CURVES"
# bench/fit_loss.py --write rewrites the fitted values, their sigmas and both lists of names.
CONSTANTS: dict[str, Constant] = {
    "irreducible": Constant(2.207, 0.03, _RUNS + "arXiv 2203.15556, 2404.10102"),
    "fineweb_edu": Constant(-0.1946, 0.009, _RUNS + "difference of GPT2_124M"),
    "openwebtext": Constant(-0.2161, 0.009, _RUNS + "difference of GPT2_124M"),
    "parameter_scale": Constant(0.7752, 0.03, _RUNS + "arXiv 2305.16264, 2404.10102"),
    "parameter_exponent": Constant(0.3566, 0.01, _RUNS + "arXiv 2305.16264, 2404.10102"),
    "token_scale": Constant(0.4358, 0.02, _RUNS + "arXiv 2305.16264, 2404.10102"),
    "token_exponent": Constant(0.3459, 0.02, _RUNS + "arXiv 2305.16264, 2404.10102"),
    "tuned_rotary": Constant(1.829, 0.1, _RUNS + "1.6, assumed"),
    "muon": Constant(1.543, 0.1, _RUNS + "arXiv 2502.16982 (1.9), 2509.02046 (1.1-1.4)"),
    "modern_blocks": Constant(1.227, 0.09, _RUNS + "1.2, assumed"),
    "untied_head": Constant(1.442, 0.1, _RUNS + "1 to 1.7, all of its parameters"),
    "shortcuts": Constant(1.18, 0.1, _RUNS + "1.2, assumed"),
    "repeat_decay": Constant(15.39, 0, "arXiv 2305.16264"),
    "cosine_exponent": Constant(0.8, 0.1, _CURVES),
    "cosine_rate_loss": Constant(0.12, 0.02, _CURVES),
    "wsd_exponent": Constant(0.4, 0.1, _CURVES),
    "wsd_rate_loss": Constant(0.08, 0.02, _CURVES),
}
_RUN_NAMES = """
llmc-124m-keller llmc-124m-orig llmc-350m mng-adamw-0606 mng-adamw-first mng-adam-1029 mng3-adam
mng3-adamh mng-soap-1009 mng-muon-1010 mng-muon-1014 mng-muon-1018 mng-muon-1029 mng-muon-1103
mng-muon-10b mng-short-1108 mng-short-6b mng-1b5-adam mng-1b5-muon mng3-muon-3600 mng3-muon-3250
mng3-muon-3275 agndm-shuffled agndm-half agndm-smaller agndm-bigger agndm-2.5ep agndm-linear
nanogpt-124m nanugpt-124m-300b nanugpt-124m-10b-a nanugpt-124m-llmc nanugpt-124m-keller
documented-40m
"""
_CURVE_NAMES = """
agndm-shuffled agndm-smaller agndm-bigger agndm-half_dataset agndm-group_weight_g2 agndm-no_warmup
agndm-2.5ep llmc-keller llmc-350m documented(train-eval) documented(5.7k-val) mng-adamw-0606
mng-soap mng-muon-1010 mng-muon-1014 mng-adam-1029 mng-untied-1103 mng-untied-10b mng-short-6b
mng-short-1108 mng-d1024-1b7 mng-d1024-10b mng-1b5-adam mng-1b5-muon ty1erz-100m
"""
FITTED_RUNS = frozenset(_RUN_NAMES.split())
FITTED_CURVES = frozenset(_CURVE_NAMES.split())
"""Published runs, and curves, that the constants were fitted to."""

VALUES: dict[str, float] = {name: constant.value for name, constant in CONSTANTS.items()}
Values = Mapping[str, float]

DATASETS = {"FineWeb": None, "FineWeb-Edu": "fineweb_edu", "OpenWebText": "openwebtext"}
"""Data sets with a known level -> the constant that is its distance from FineWeb's."""
REPOSITORIES = {
    "HuggingFaceFW/fineweb": "FineWeb",
    "HuggingFaceFW/fineweb-edu": "FineWeb-Edu",
    "Skylion007/openwebtext": "OpenWebText",
}
"""Repository on the Hugging Face hub -> data set."""


@dataclass(frozen=True)
class Mark:
    loss: float
    source: str


GPT2_124M: dict[str, Mark] = {
    "FineWeb-Edu": Mark(3.2924, "OpenAI's checkpoint; karpathy/build-nanogpt, play.ipynb"),
    "FineWeb": Mark(3.424958, "OpenAI's checkpoint; karpathy/llm.c, dev/vislog.ipynb"),
    "OpenWebText": Mark(3.12, "OpenAI's checkpoint; karpathy/nanoGPT, README"),
}
"""GPT-2 124M's validation loss by data set. It was not trained on the first two."""
HELLASWAG_PARITY = Mark(3.17, "hellaswag_accuracy() is GPT-2 124M's 0.2945 here")


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


_AT_124M = (100e6, 150e6)
EVIDENCE: dict[Recipe, tuple[float, float]] = {
    Recipe(): (29e6, 1.6e9),
    Recipe(tuned_rotary=True): (100e6, 1.6e9),
    Recipe(tuned_rotary=True, modern_blocks=True): _AT_124M,
    Recipe(tuned_rotary=True, modern_blocks=True, untied_head=True): _AT_124M,
    Recipe(tuned_rotary=True, muon=True): _AT_124M,
    Recipe(tuned_rotary=True, muon=True, modern_blocks=True): (100e6, 1.6e9),
    Recipe(tuned_rotary=True, muon=True, modern_blocks=True, untied_head=True): _AT_124M,
    Recipe(True, True, True, True, True): _AT_124M,
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


def gpt_parameters(layers: int, width: int, vocabulary: int = 50304) -> int:
    """Return N: the matrices of the blocks and one head."""
    return 12 * layers * width**2 + vocabulary * width


def effective_tokens(tokens: float, unique_tokens: float, values: Values = VALUES) -> float:
    """Return the unique tokens that are worth `tokens` seen in passes over `unique_tokens`."""
    unique, decay = min(unique_tokens, tokens), values["repeat_decay"]
    return unique * (1 - decay * math.expm1(-(tokens / unique - 1) / decay))


def scaling_law(
    parameters: float, effective: float, multiplier: float, values: Values = VALUES
) -> float:
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
    """N, as counted by gpt_parameters()."""
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
    """Tokens of the validation set; None if unknown."""

    @property
    def unique(self) -> float:
        return self.tokens if self.unique_tokens is None else min(self.unique_tokens, self.tokens)

    @property
    def passes(self) -> float:
        return self.tokens / self.unique

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


def validation_error(validation_tokens: float) -> float:
    """Return the standard error that the size of a validation set gives a loss.

    Losses of documents differ by 0.45 nats, assumed; a document has 780 tokens.
    """
    return 0.45 / math.sqrt(max(1.0, validation_tokens / 780))


def predict_loss(
    run: LossInputs, finished: FinishedLoss | None = None, values: Values = VALUES
) -> LossEstimate | NoEstimate:
    """Predict the final validation loss of a run, or return why it cannot be predicted."""
    laws, outside, widened = run.laws(values), _refusal(run), _departures(run)
    below, above = 0.05, 0.07
    if finished is not None and finished.inputs.evaluated_on == run.evaluated_on:
        level = finished.loss - finished.inputs.laws(values)[1]
        below = above = 0.05 + 0.02 * abs(math.log2(run.parameters / finished.inputs.parameters))
        if run.recipe == finished.inputs.recipe:
            laws = [laws[1]] * 3
        if outside:  # the law says how much may differ, not by how much it does
            away = abs(laws[1] + level - finished.loss)
            widened = [(away, away, f"{outside}; the level is that of the finished run")]
    elif outside:
        return NoEstimate(outside)
    elif run.dataset not in DATASETS:
        name = run.dataset or "this data set"
        return NoEstimate(f"no published run gives the level of {name}; a finished run on it will")
    elif run.tokenizer != "gpt2":
        return NoEstimate(f"no published run gives a loss per token of {run.tokenizer}")
    elif run.context != 1024:
        return NoEstimate(f"no published run has a context of {run.context:,}; 1,024 is validated")
    else:
        level = data_level(run.dataset, values)
        if run.recipe is not None and run.recipe.muon:
            below, above = 0.06, 0.08
    if run.validation_tokens is not None:
        noise = Z90 * validation_error(run.validation_tokens)
        below, above = math.hypot(below, noise), math.hypot(above, noise)
    least, expected, most = (level + law for law in laws)
    return LossEstimate(
        low=most - below - sum(low for low, _, _ in widened),
        expected=expected,
        high=least + above + sum(high for _, high, _ in widened),
        caveats=tuple(why for _, _, why in widened),
    )


def _refusal(run: LossInputs) -> str | None:
    """Return why the scaling law does not apply to the run; None if it does."""
    ratio, unique = run.tokens / run.parameters, run.unique
    if run.parameters < 12e6:
        return f"{run.parameters / 1e6:.3g} M parameters: the law begins at 12 M"
    if ratio < 5:
        return f"{ratio:.2g} tokens a parameter: the law begins at 5"
    if run.steps < 500:
        return f"{run.steps:,.0f} steps: the law begins at 500"
    if run.tokens < 1e8:
        return f"{run.tokens / 1e6:.3g} M tokens: the law begins at 100 M"
    if run.layers < 4:
        return f"{run.layers} layers: the law begins at 4"
    if run.passes > (35 if unique > 50 * run.parameters else 15):
        return f"{run.passes:.3g} passes over {unique / 1e9:.2g} G tokens: the model will overfit"
    if run.rate_ratio >= 4:
        return f"{run.rate_ratio:.2g} times the recipe's learning rate: training diverges"
    return None


def _departures(run: LossInputs) -> list[tuple[float, float, str]]:
    """Return departures from the validated range: nats to widen below, above, and the reason."""
    ratio, aspect = run.tokens / run.parameters, run.width / run.layers
    millions, billions = run.parameters / 1e6, run.tokens / 1e9
    a_step = run.tokens / run.steps / 1e6
    smallest, largest = EVIDENCE.get(run.recipe or Recipe(), EVIDENCE[Recipe()])
    outside = max(smallest / run.parameters, run.parameters / largest, 1.0)
    far = 0.03 * math.log2(outside)
    rate = 0.08 if run.rate_ratio > 2 else 0.035 if run.rate_ratio >= 0.25 else 0.05
    unseen = run.recipe is not None and run.recipe not in EVIDENCE
    noisy = run.validation_tokens is not None and run.validation_tokens < 1e6
    rows = [
        (ratio < 8, 0.0, 0.06, f"{ratio:.2g} tokens a parameter: validated from 8"),
        (ratio > 400, 0.03, 0.03, f"{ratio:,.0f} tokens a parameter: validated to 400"),
        (run.steps < 800, 0.0, 0.27, f"{run.steps:,.0f} steps: 0.14-0.27 too low elsewhere"),
        (800 <= run.steps < 1000, 0.0, 0.14, f"{run.steps:,.0f} steps: validated from 1,000"),
        (billions < 0.4, 0.10, 0.15, f"{billions:.2g} G tokens: validated from 1 G"),
        (0.4 <= billions < 1, 0.05, 0.05, f"{billions:.2g} G tokens: validated from 1 G"),
        (run.layers < 6, 0.0, 0.09, f"{run.layers} layers: validated from 6"),
        (aspect > 96, 0.0, 0.05, f"width {aspect:.0f} times the depth: validated to 96"),
        (aspect < 13, 0.0, 0.03, f"width {aspect:.0f} times the depth: validated from 13"),
        (far > 0, far, far, f"{millions:,.0f} M parameters: no published run of this recipe near"),
        (
            *(run.unique < 4e8 and run.passes > 4, 0.0, 0.15),
            f"{run.passes:.2g} passes over {run.unique / 1e9:.2g} G: validated from 0.4 G",
        ),
        (a_step > 0.6, 0.0, 0.10, f"{a_step:.2g} M tokens a step: validated to 0.5 M"),
        (a_step < 0.12, 0.03, 0.03, f"{a_step:.2g} M tokens a step: validated from 0.13 M"),
        (run.end_rate > 0.1, 0.05, 0.05, f"the rate ends at {run.end_rate:.2g} of its peak"),
        (not 0.5 <= run.rate_ratio <= 2, 0.0, rate, f"{run.rate_ratio:.2g} times the usual rate"),
        (run.recipe is None, 0.0, 0.0, "recipe not known: a multiplier of 1 to 3.4"),
        (unseen, 0.0, 0.0, "no published run combines these parts of a recipe"),
        (noisy, 0.0, 0.0, f"{run.validation_tokens or 0:,.0f} validation tokens: noisy"),
    ]
    return [(low, high, why) for departs, low, high, why in rows if departs]


def hellaswag_accuracy(fineweb_edu_loss: float) -> float | None:
    """Return HellaSwag's accuracy at a loss on FineWeb-Edu; None outside 2.9-3.7.

    A parabola through 698 evaluations of six runs of AGNDM/build-nanogpt, rms 0.003.
    """
    if not 2.9 <= fineweb_edu_loss <= 3.7:
        return None
    return 0.1081 * fineweb_edu_loss**2 - 0.808 * fineweb_edu_loss + 1.7688
