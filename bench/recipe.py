"""Measure the tokens and time that the fast recipe needs for the documented recipe's loss.

python bench/recipe.py [--sizes 4x96] [--horizons 320,640] [--seeds 1] [--rates 5] [--results FILE] [--json]
python bench/recipe.py --changes [--sizes 2x64,4x96] [--horizons 160,320] [--seeds 1] [--results FILE] [--json]

The recipes are those of configs/rtx4070_fineweb.toml and rtx4070_fineweb_fast.toml in a smaller shape, without dropout,
in fp32 on a CPU, on the bytes of CPython's library and help topics. The documented recipe trains for a horizon of
steps. The fast one trains for several shares of it, each with its own schedule; the share at equal validation loss is
interpolated. Each recipe uses the best of several learning rates, a factor of 2 apart, tuned at the horizon and at a
quarter of it. With --changes the fast recipe alone trains, without each of its parts and with parts, batches and
learning rates that it does not have; printed is the change of its final loss from seed to seed, by size and horizon.
Runs in the results file are not repeated.
"""

import json
import math
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from results import ROOT, Bench, Result, result

# isort: split
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import GPT, Block
from nanogauge.config import Config, load_config
from nanogauge.errors import BadInput
from nanogauge.prediction.flops import count_parameters
from nanogauge.runspec import RunSpec
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
"""middle of the sweep over learning rates"""
BLOCK, MICRO_BATCH, VOCABULARY, END_OF_TEXT = 128, 32, 264, 256
SHARES = (0.125, 0.25, 0.5, 1.0)
TUNED_AT = 0.25
EVALUATIONS = 8
SHORTEST_HORIZON = round(EVALUATIONS / SHARES[0])
TIMED_STEPS = 16
EVAL_BATCHES = 12
HELD_OUT_EVERY = 20
CPU = torch.device("cpu")
BATCHES = {"half the batch": 0.5, "twice the batch": 2.0}
RATES = {"half the rate": 0.5, "twice the rate": 2.0}
VALUE_EMBEDDINGS = "value embeddings"
CHANGES: dict[str, dict[str, dict[str, object]]] = {
    VALUE_EMBEDDINGS: {},
    "learned positions": {"model": {"positions": "learned"}},
    "LayerNorm with weights": {"model": {"norm": "layernorm"}},
    "queries and keys not normed": {"model": {"qk_norm": False}},
    "GELU": {"model": {"activation": "gelu"}},
    "projections not zero at first": {"model": {"zero_init": False}},
    "logits not capped": {"model": {"logit_softcap": 0.0}},
    "an untied head": {"model": {"tied_head": False}},
    "AdamW alone": {"optimizer": {"name": "adamw"}},
    "cosine": {"optimizer": {"schedule": "cosine"}},
    **{name: {"train": {"micro_batch": round(share * MICRO_BATCH)}} for name, share in BATCHES.items()},
    **{name: {} for name in RATES},
}


@dataclass(frozen=True)
class Run:
    recipe: str
    size: str
    """layers x width"""
    steps: int
    rate: float
    seed: int
    change: str | None = None
    """A name in CHANGES; None for the recipe itself."""


@dataclass(frozen=True)
class Outcome:
    curve: list[tuple[int, float]]
    """Steps and the validation loss after them in nats per byte."""
    step_seconds: float
    """Median step time."""
    parameters: int
    """Parameters without position embeddings."""

    @property
    def loss(self) -> float:
        """Final validation loss; infinite if the run diverged."""
        return self.curve[-1][1]


class Results:
    """Outcomes of runs, cached in a file of JSON lines."""

    def __init__(self, path: Path, quiet: bool, eval_batches: int) -> None:
        self._path, self._quiet, self._eval_batches = path, quiet, eval_batches
        self._outcomes: dict[Run, Outcome] = {}
        lines = path.read_text().splitlines() if path.exists() else []
        for line in lines:
            row = json.loads(line)
            curve = [(step, loss) for step, loss in row["outcome"].pop("curve")]
            self._outcomes[Run(**row["run"])] = Outcome(curve=curve, **row["outcome"])

    def of(self, run: Run) -> Outcome:
        """Return the outcome of a run; train it if the file lacks it."""
        if run not in self._outcomes:
            self._outcomes[run] = outcome = train(run, self._eval_batches)
            with self._path.open("a") as file:
                file.write(json.dumps({"run": asdict(run), "outcome": asdict(outcome)}) + "\n")
            if not self._quiet:
                print(f"  {run} -> {outcome.loss:.4f}, {outcome.step_seconds:.3f} s", flush=True)
        return self._outcomes[run]


@cache
def tokens_of_texts() -> dict[Split, Shards]:
    """Return the bytes of the texts after an end-of-text each; every 20th text is held out."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [p for p in sorted(library.rglob("*.py")) if "site-packages" not in p.parts]
    whole = [path.read_bytes() for path in files]
    whole += [topics[name].encode() for name in sorted(topics)]
    parts: dict[Split, list[npt.NDArray[Any]]] = {"train": [], "val": []}
    for index, data in enumerate(whole):
        split: Split = "val" if index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 else "train"
        parts[split] += [np.array([END_OF_TEXT], np.uint16), np.frombuffer(data, np.uint8)]
    return {split: [np.concatenate(texts).astype(np.uint16)] for split, texts in parts.items()}


def config_of(run: Run) -> Config:
    """Return the recipe's configuration in the run's shape, with warm-up and end rate scaled."""
    own = load_config(CONFIGS[run.recipe])
    layers, width = (int(number) for number in run.size.split("x"))
    rate, warmup = own.optimizer.learning_rate, own.optimizer.warmup_steps / own.train.max_steps
    overrides: dict[str, dict[str, object]] = {
        "run": {"seed": run.seed},
        "model": {"n_layer": layers, "n_head": width // 32, "n_embd": width, "dropout": 0.0},
        "train": {"micro_batch": MICRO_BATCH, "grad_accum": 1, "max_steps": run.steps},
        "optimizer": {
            "learning_rate": run.rate,
            "min_learning_rate": own.optimizer.min_learning_rate / rate * run.rate,
            "warmup_steps": max(1, round(warmup * run.steps)),
        },
    }
    overrides["model"] |= {"block_size": BLOCK, "vocab_size": VOCABULARY}
    for section, keys in CHANGES[run.change].items() if run.change else ():
        overrides[section] |= keys
    return load_config(CONFIGS[run.recipe], overrides)


class Training:
    """Training loop of train.py without measurement, one step per call."""

    def __init__(self, run: Run, eval_batches: int = EVAL_BATCHES) -> None:
        self.config = config_of(run)
        schedule = RunSpec.from_config(self.config).schedule
        assert schedule is not None
        self._steps, self._schedule = run.steps, schedule
        torch.manual_seed(run.seed)
        self._model = GPT(self.config.model)
        if run.change == VALUE_EMBEDDINGS:
            self._add_value_embeddings()
        self._loss = TrainingLoss(self._model, "chunked", 1, CPU)
        self._optimizer = make_optimizer(self._model, self.config.optimizer)
        self._scaler = torch.amp.GradScaler("cpu", enabled=False)
        micro_batch = self.config.train.micro_batch
        size = (micro_batch, BLOCK, VOCABULARY, run.seed, CPU)
        self._batches = Batches(
            tokens_of_texts(), *size, eval_batches=max(1, eval_batches * MICRO_BATCH // micro_batch)
        )

    def _add_value_embeddings(self) -> None:
        """Add a token table, zero at first, to the values of the first and the last layer.

        Source: KellerJordan/modded-nanogpt, record of 2024-11-08. The parameters are more by two tables.
        """
        width = self.config.model.n_embd
        blocks = (self._model.blocks[0], self._model.blocks[-1])
        tables = [nn.Embedding(VOCABULARY, width) for _ in blocks]
        self._model.value_tables = nn.ModuleList(tables)
        for block, table in zip(blocks, tables, strict=True):
            assert isinstance(block, Block)
            nn.init.zeros_(table.weight)

            def add(_: nn.Module, __: Any, heads: Tensor, table: nn.Embedding = table) -> Tensor:
                return heads + F.pad(table(self._tokens), (2 * width, 0))  # the last third are the values

            block.attn.c_attn.register_forward_hook(add)

    def _mean_loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        self._tokens = tokens
        return self._loss(tokens, targets)

    def step(self, step: int) -> float:
        """Train one step and return its seconds."""
        began = time.perf_counter()
        set_learning_rate(self._optimizer, learning_rate(step, self._schedule, self._steps))
        loss = self._mean_loss(*self._batches.batch("train", step, 0))
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self._model.parameters(), self.config.optimizer.grad_clip)
        update(self._optimizer, self._scaler, torch.isfinite(norm))
        self._optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - began

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Return nats per byte over the same held-out windows each time; inf if non-finite."""
        count = self._batches.eval_batches
        batches = (self._batches.evaluation_batch("val", i) for i in range(count))
        mean = statistics.fmean(float(self._mean_loss(*batch)) for batch in batches)
        return mean if math.isfinite(mean) else math.inf


def train(run: Run, eval_batches: int) -> Outcome:
    """Train a run and evaluate it at equal intervals."""
    curve, seconds, training = [], [], Training(run, eval_batches)
    for step in range(run.steps):
        seconds.append(training.step(step))
        if (step + 1) * EVALUATIONS // run.steps > step * EVALUATIONS // run.steps:
            curve.append((step + 1, training.validation_loss()))
    count = count_parameters(RunSpec.from_config(training.config).shape)
    return Outcome(curve, statistics.median(seconds), count.total - count.tables)


@cache
def step_time_ratio(size: str) -> float:
    """Return the step time of the fast recipe over the other's: the median of steps in turn."""
    documented, fast = (Training(Run(recipe, size, 4 * TIMED_STEPS, MIDDLE_RATE[recipe], 1)) for recipe in CONFIGS)
    ratios = [1 / documented.step(i) * fast.step(i) for i in range(TIMED_STEPS + 3)]
    return statistics.median(ratios[3:])


def sweep(results: Results, recipe: str, size: str, steps: int, count: int) -> list[Run]:
    """Return the runs of a sweep over the learning rate with seed 1, the best first."""
    rates = [MIDDLE_RATE[recipe] * 2.0 ** (i - count // 2) for i in range(count)]
    runs = [Run(recipe, size, steps, rate, 1) for rate in rates]
    return sorted(runs, key=lambda run: results.of(run).loss)


def share_needed(points: Sequence[tuple[float, float]], target: float) -> float | None:
    """Interpolate the share of the horizon with this loss, linearly in the log of the share.

    points: ascending shares and their final losses. Returns None if all losses are above the target and the first share
    if its loss is below.
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


def compare(results: Results, size: str, horizon: int, args: Any) -> list[Result]:
    """Compare the recipes at one size and horizon; print the sweeps, losses and ratios."""
    show = (lambda *_: None) if args.json else print
    sweeps = {
        "documented": sweep(results, "documented", size, horizon, args.rates),
        "fast": sweep(results, "fast", size, round(TUNED_AT * horizon), args.rates),
    }
    show(f"\n{size}, horizon {horizon} steps of {MICRO_BATCH * BLOCK:,} tokens")
    for recipe, runs in sweeps.items():
        by_rate = sorted(runs, key=lambda run: run.rate)
        losses = ", ".join(f"{run.rate:g}: {results.of(run).loss:.4f}" for run in by_rate)
        edge = "  (the best rate is at the edge)" if runs[0] in (by_rate[0], by_rate[-1]) else ""
        show(f"  {recipe} at {runs[0].steps} steps, rate: loss  {losses}{edge}")
    tokens: list[float] = []
    times: list[float] = []
    step_ratio = step_time_ratio(size)
    show(f"  a step of the fast recipe takes {step_ratio:.2f} times as long")
    documented, fast = (sweeps[name][0] for name in ("documented", "fast"))
    for seed in range(1, args.seeds + 1):
        base = results.of(Run("documented", size, horizon, documented.rate, seed))
        points: list[tuple[float, float]] = []
        for share in SHARES:
            outcome = results.of(Run("fast", size, round(share * horizon), fast.rate, seed))
            points.append((share, outcome.loss))
            if outcome.loss <= base.loss:
                break
        needed = share_needed(points, base.loss)
        losses = ", ".join(f"{share:g}: {loss:.4f}" for share, loss in points)
        show(f"  seed {seed}: documented {base.loss:.4f}; fast, share: loss  {losses}")
        if seed == 1:
            curve = ", ".join(f"{step}: {loss:.3f}" for step, loss in base.curve)
            show(f"    documented, step: loss  {curve}")
            more = results.of(fast).parameters / base.parameters - 1
            show(f"    parameters {base.parameters:,}; fast {more:+.2%}")
        if needed is None:
            show("    the fast recipe did not reach it")
            continue
        tokens.append(needed)
        times.append(needed * step_ratio)
        below = " or less" if len(points) == 1 else ""
        show(f"    {needed:.1%} of the tokens{below}, {needed * step_ratio:.1%} of the time")
    case = f"{size}, {horizon} steps"
    peer = "configs/rtx4070_fineweb.toml"
    return [
        result(name, case, values, peer) for name, values in (("token_ratio", tokens), ("time_ratio", times)) if values
    ]


def changed(run: Run, name: str) -> Run:
    """Return a run with a change; another batch sees the same tokens, at a rate changed by its root."""
    share = BATCHES.get(name, 1.0)
    rate = run.rate * RATES.get(name, math.sqrt(share))
    return replace(run, change=name, steps=round(run.steps / share), rate=rate)


def changes(results: Results, sizes: Sequence[str], horizons: Sequence[int], args: Any) -> list[Result]:
    """Return the change of the fast recipe's final loss by each change, seed by seed."""
    names = args.changes.split(",") if args.changes != "all" else list(CHANGES)
    unknown = sorted(set(names) - set(CHANGES))
    if unknown:
        raise BadInput(f"--changes knows no {unknown[0]!r}, only: {', '.join(CHANGES)}.")
    losses: dict[tuple[str, str, int], list[float]] = {}
    for horizon, size, seed in product(horizons, sizes, range(1, args.seeds + 1)):
        run = Run("fast", size, horizon, MIDDLE_RATE["fast"], seed)
        unchanged = results.of(run).loss
        losses.setdefault(("loss", size, horizon), []).append(unchanged)
        for name in names:
            change = results.of(changed(run, name)).loss - unchanged
            losses.setdefault((name, size, horizon), []).append(change)
    cases = product(["loss", *names], sizes, horizons)
    return [
        result(
            "loss" if name == "loss" else "loss_change",
            f"{size}, {horizon} steps" + (f", {name}" if name != "loss" else ""),
            losses[name, size, horizon],
            None,
        )
        for name, size, horizon in cases
    ]


def parse_horizons(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) >= SHORTEST_HORIZON for part in parts):
        raise BadInput(f"--horizons takes numbers of at least {SHORTEST_HORIZON}, as 320,640.")
    return [int(part) for part in parts]


def measure(args: Any) -> list[Result]:
    if args.smallest:
        args.sizes, args.horizons = "1x32", f"{SHORTEST_HORIZON}"
    with tempfile.TemporaryDirectory() as folder:
        results = Results(
            args.results or Path(folder) / "results.jsonl", args.json, 1 if args.smallest else EVAL_BATCHES
        )
        sizes, horizons = args.sizes.split(","), parse_horizons(args.horizons)
        if args.changes:
            return changes(results, sizes, horizons, args)
        return [row for size in sizes for horizon in horizons for row in compare(results, size, horizon, args)]


if __name__ == "__main__":
    bench = Bench(__doc__)
    bench.add_argument("--sizes", default="4x96", help="layers x width, ...")
    bench.add_argument("--horizons", default="320,640", help="documented steps, ...")
    bench.add_argument("--seeds", type=int, default=1, help="seeds; the sweep uses seed 1")
    bench.add_size("--rates", 5, 1, "number of learning rates in each sweep")
    bench.add_argument("--changes", metavar="NAME,...", help="measure these changes of the fast recipe, or all")
    bench.add_argument("--results", type=Path, help="file that keeps finished runs, to resume with")
    bench.run(measure)
