"""In how many tokens, and in what time, does the fast recipe reach the documented recipe's loss?

python bench/recipe.py [--sizes 4x96] [--horizons 320,640] [--seeds 1] [--rates 5] [--ablate]
    [--results FILE] [--json]

Both recipes are those of configs/rtx4070_fineweb.toml and rtx4070_fineweb_fast.toml, in a smaller
shape, without dropout, in fp32 on a CPU, on the sources of CPython's library and its help topics,
byte by byte. The documented one trains for a horizon of steps; the fast one for shares of it, each
with a schedule of its own that ends there, and between these its tokens to the same validation loss
are interpolated. Each recipe's learning rate is the best of as many, a factor of 2 apart: at the
horizon, and at a quarter of it. Runs that the file of results holds are not made again.
"""

from __future__ import annotations

import json
import math
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, Self

from results import ROOT, Bench, Result, result

# isort: split
import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from model import GPT
from nanogauge.config import Config, load_config
from nanogauge.errors import BadInput
from nanogauge.prediction.flops import count_parameters
from nanogauge.schedule import learning_rate
from trainer.data.loader import Batches
from trainer.data.manifest import Split
from trainer.data.shards import Shards
from trainer.step.loss import TrainingLoss
from trainer.step.optimizer import make_optimizer, set_learning_rate, update

CONFIGS = {
    "documented": ROOT / "configs" / "rtx4070_fineweb.toml",
    "fast": ROOT / "configs" / "rtx4070_fineweb_fast.toml",
}
MIDDLE_RATE = {"documented": 4e-3, "fast": 8e-3}
"""of those that are tried"""
BLOCK, MICRO_BATCH, VOCABULARY, END_OF_TEXT = 128, 32, 264, 256
SHARES = (0.125, 0.25, 0.5, 1.0)
TUNED_AT = 0.25
EVALUATIONS = 8
PACED = 16
"""steps of either recipe by which the time of a step is compared"""
EVAL_BATCHES = 12
HELD_OUT_EVERY = 20
CPU = torch.device("cpu")
ABLATIONS: dict[str, dict[str, dict[str, object]]] = {
    "learned positions": {"model": {"positions": "learned"}},
    "LayerNorm with weights": {"model": {"norm": "layernorm"}},
    "queries and keys not normed": {"model": {"qk_norm": False}},
    "GELU": {"model": {"activation": "gelu"}},
    "projections not zero at first": {"model": {"zero_init": False}},
    "logits not capped": {"model": {"logit_softcap": 0.0}},
    "an untied head": {"model": {"tied_head": False}},
    "AdamW alone": {"optimizer": {"name": "adamw"}},
    "cosine": {"optimizer": {"schedule": "cosine"}},
}


@dataclass(frozen=True)
class Run:
    """One training."""

    recipe: str
    size: str
    """layers x width"""
    steps: int
    rate: float
    seed: int
    without: str | None = None
    """name of an ablation"""


@dataclass(frozen=True)
class Outcome:
    curve: list[tuple[int, float]]
    """validation loss in nats per byte after so many steps; the last after all"""
    step_seconds: float
    """median of the steps"""
    parameters: int
    """without position embeddings"""

    @property
    def loss(self) -> float:
        """infinite where the run diverged"""
        return self.curve[-1][1]


class Results:
    """Outcomes of runs, in a file of JSON lines that an interrupted bench goes on from."""

    def __init__(self, path: Path, quiet: bool) -> None:
        self._path, self._quiet = path, quiet
        self._known: dict[Run, Outcome] = {}
        lines = path.read_text().splitlines() if path.exists() else []
        for line in lines:
            found = json.loads(line)
            curve = [(step, loss) for step, loss in found["outcome"].pop("curve")]
            self._known[Run(**found["run"])] = Outcome(curve=curve, **found["outcome"])

    def of(self, run: Run) -> Outcome:
        """The outcome of a run, which is made where it is not there yet."""
        if run not in self._known:
            self._known[run] = outcome = train(run)
            with self._path.open("a") as file:
                file.write(json.dumps({"run": asdict(run), "outcome": asdict(outcome)}) + "\n")
            if not self._quiet:
                print(f"  {run} -> {outcome.loss:.4f}, {outcome.step_seconds:.3f} s", flush=True)
        return self._known[run]


@cache
def text() -> dict[Split, Shards]:
    """Bytes of the texts, each behind an end-of-text; every twentieth is held out."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [p for p in sorted(library.rglob("*.py")) if "site-packages" not in p.parts]
    whole = [path.read_bytes() for path in files]
    whole += [topics[name].encode() for name in sorted(topics)]
    parts: dict[Split, list[npt.NDArray[Any]]] = {"train": [], "val": []}
    for index, data in enumerate(whole):
        split: Split = "val" if index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 else "train"
        parts[split] += [np.array([END_OF_TEXT], np.uint16), np.frombuffer(data, np.uint8)]
    return {split: [np.concatenate(found).astype(np.uint16)] for split, found in parts.items()}


def config_of(run: Run) -> Config:
    """The recipe's configuration in the run's shape; warm-up and least rate in their proportion."""
    own = load_config(CONFIGS[run.recipe])
    layers, width = (int(number) for number in run.size.split("x"))
    rate, warmup = own.optimizer.learning_rate, own.optimizer.warmup_steps / own.train.max_steps
    overrides: dict[str, dict[str, object]] = {
        "run": {"seed": run.seed},
        "model": {
            "n_layer": layers,
            "n_head": width // 32,
            "n_embd": width,
            "block_size": BLOCK,
            "vocab_size": VOCABULARY,
            "dropout": 0.0,
        },
        "train": {"micro_batch": MICRO_BATCH, "grad_accum": 1, "max_steps": run.steps},
        "optimizer": {
            "learning_rate": run.rate,
            "min_learning_rate": own.optimizer.min_learning_rate / rate * run.rate,
            "warmup_steps": max(1, round(warmup * run.steps)),
        },
    }
    for section, keys in ABLATIONS.get(run.without or "", {}).items():
        overrides[section] |= keys
    return load_config(CONFIGS[run.recipe], overrides)


class Training:
    """The loop of train.py without its instruments, a step at a time. A context manager."""

    def __init__(self, run: Run) -> None:
        self.config = config_of(run)
        self._steps, schedule = run.steps, self.config.to_spec().schedule
        assert schedule is not None
        self._schedule = schedule
        torch.manual_seed(run.seed)
        self._model = GPT(self.config.model)
        self.loss_of = TrainingLoss(self._model, "chunked", 1, CPU)
        self._optimizer = make_optimizer(self._model, self.config.optimizer)
        self._scaler = torch.amp.GradScaler("cpu", enabled=False)
        self.batches = Batches(
            text(), MICRO_BATCH, BLOCK, VOCABULARY, run.seed, CPU, eval_batches=EVAL_BATCHES
        )

    def step(self, step: int) -> float:
        """The seconds that it took."""
        config, model = self.config.optimizer, self._model
        began = time.perf_counter()
        set_learning_rate(self._optimizer, learning_rate(step, self._schedule, self._steps))
        loss = self.loss_of(*self.batches.batch("train", step, 0))
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        update(self._optimizer, self._scaler, torch.isfinite(norm))
        self._optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - began

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.batches.close()


def train(run: Run) -> Outcome:
    """All steps of a run, and its losses."""
    curve: list[tuple[int, float]] = []
    seconds: list[float] = []
    with Training(run) as training:
        for step in range(run.steps):
            seconds.append(training.step(step))
            if (step + 1) * EVALUATIONS // run.steps > step * EVALUATIONS // run.steps:
                curve.append((step + 1, validation_loss(training.loss_of, training.batches)))
    counted = count_parameters(training.config.to_spec().shape)
    return Outcome(curve, statistics.median(seconds), counted.total - counted.tables)


@cache
def pace(size: str) -> float:
    """How many times as long a step of the fast recipe takes: the median of steps in turn."""
    runs = (Run(recipe, size, 4 * PACED, MIDDLE_RATE[recipe], 1) for recipe in CONFIGS)
    with ExitStack() as stack:
        documented, fast = (stack.enter_context(Training(run)) for run in runs)
        ratios = [1 / documented.step(i) * fast.step(i) for i in range(PACED + 3)]
    return statistics.median(ratios[3:])


@torch.no_grad()
def validation_loss(loss_of: TrainingLoss, batches: Batches) -> float:
    """Nats per byte over the same held-out windows each time; infinite if it is no number."""
    losses = [float(loss_of(*batches.evaluation_batch("val", i))) for i in range(EVAL_BATCHES)]
    mean = statistics.fmean(losses)
    return mean if math.isfinite(mean) else math.inf


def tuned(results: Results, recipe: str, size: str, steps: int, count: int) -> list[Run]:
    """The runs of the sweep by seed 1, the best first."""
    rates = [MIDDLE_RATE[recipe] * 2.0 ** (i - count // 2) for i in range(count)]
    runs = [Run(recipe, size, steps, rate, 1) for rate in rates]
    return sorted(runs, key=lambda run: results.of(run).loss)


def share_needed(points: Sequence[tuple[float, float]], target: float) -> float | None:
    """The share of the horizon at which the loss is the target: linear in the log of the share.

    points: shares, ascending, and final losses. None where the last is still above the target; the
    first share where its loss is below already.
    """
    before: tuple[float, float] | None = None
    for share, loss in points:
        if loss <= target:
            if before is None:
                return share
            part = (before[1] - target) / (before[1] - loss)
            return float(before[0] * (share / before[0]) ** part)
        before = (share, loss)
    return None


def compare(results: Results, size: str, horizon: int, given: Any) -> list[Result]:
    """Compare one size at one horizon; print the sweeps, the losses and the ratios."""
    say = (lambda *_: None) if given.json else print
    sweeps = {
        "documented": tuned(results, "documented", size, horizon, given.rates),
        "fast": tuned(results, "fast", size, round(TUNED_AT * horizon), given.rates),
    }
    say(f"\n{size}, horizon {horizon} steps of {MICRO_BATCH * BLOCK:,} tokens")
    for recipe, runs in sweeps.items():
        by_rate = sorted(runs, key=lambda run: run.rate)
        tried = ", ".join(f"{run.rate:g}: {results.of(run).loss:.4f}" for run in by_rate)
        edge = "  (the best at the edge)" if runs[0] in (by_rate[0], by_rate[-1]) else ""
        say(f"  {recipe} at {runs[0].steps} steps, rate: loss  {tried}{edge}")
    tokens: list[float] = []
    times: list[float] = []
    longer = pace(size)
    say(f"  a step of the fast recipe takes {longer:.2f} times as long, in turn with the other's")
    documented, fast = (sweeps[name][0] for name in ("documented", "fast"))
    for seed in range(1, given.seeds + 1):
        base = results.of(Run("documented", size, horizon, documented.rate, seed))
        points: list[tuple[float, float]] = []
        for share in SHARES:
            ran = results.of(Run("fast", size, round(share * horizon), fast.rate, seed))
            points.append((share, ran.loss))
            if ran.loss <= base.loss:
                break
        needed = share_needed(points, base.loss)
        losses = ", ".join(f"{share:g}: {loss:.4f}" for share, loss in points)
        say(f"  seed {seed}: documented {base.loss:.4f}; fast, share: loss  {losses}")
        if seed == 1:
            curve = ", ".join(f"{step}: {loss:.3f}" for step, loss in base.curve)
            say(f"    documented, step: loss  {curve}")
            more = results.of(fast).parameters / base.parameters - 1
            say(f"    parameters {base.parameters:,}; fast {more:+.2%}")
        if needed is None:
            say("    the fast recipe did not reach it")
            continue
        tokens.append(needed)
        times.append(needed * longer)
        below = " or less" if len(points) == 1 else ""
        say(f"    {needed:.1%} of the tokens{below}, {needed * longer:.1%} of the time")
    if given.ablate:
        ablate(results, fast, say)
    case = f"{size}, {horizon} steps"
    peer = "configs/rtx4070_fineweb.toml"
    return [
        result(name, case, values, peer)
        for name, values in (("token_ratio", tokens), ("time_ratio", times))
        if values
    ]


def ablate(results: Results, best: Run, say: Any) -> None:
    """The loss with each idea left out, at the same rate, which is not tuned again."""
    whole = results.of(best)
    say(f"  changed, at {best.steps} steps and rate {best.rate:g}; unchanged: {whole.loss:.4f}")
    for name in ABLATIONS:
        ran = results.of(Run("fast", best.size, best.steps, best.rate, best.seed, name))
        say(f"    {name}: {ran.loss - whole.loss:+.4f}")


def numbers(given: str, name: str) -> list[int]:
    """Numbers with commas between.

    Raises:
        BadInput: if they are none above 7, the number of evaluations of the shortest run.
    """
    parts = given.split(",")
    if not all(part.isdecimal() and int(part) >= EVALUATIONS / SHARES[0] for part in parts):
        raise BadInput(f"{name} takes numbers from {EVALUATIONS / SHARES[0]:.0f} on, as 320,640.")
    return [int(part) for part in parts]


def measure(given: Any) -> list[Result]:
    if given.smallest:
        given.sizes, given.horizons = "1x32", f"{EVALUATIONS / SHARES[0]:.0f}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.jsonl" if given.smallest else given.results
        results = Results(path, given.json)
        found: list[Result] = []
        for size in given.sizes.split(","):
            for horizon in numbers(given.horizons, "--horizons"):
                found += compare(results, size, horizon, given)
    return found


if __name__ == "__main__":
    bench = Bench(__doc__)
    bench.add_argument("--sizes", default="4x96", help="layers x width, with commas between")
    bench.add_argument("--horizons", default="320,640", help="steps of the documented recipe")
    bench.add_argument("--seeds", type=int, default=1, help="1 to this; the sweep has 1 alone")
    bench.add_size("--rates", 5, 1, "learning rates of each sweep")
    bench.add_argument("--ablate", action="store_true", help="leave out each idea of the recipe")
    bench.add_argument("--results", type=Path, default=Path("recipe.jsonl"), help="of the runs")
    bench.run(measure)
