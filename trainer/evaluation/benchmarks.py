"""Benchmark a model, alone or compared with another on the same items, with 95 % intervals.

An interval is the middle 95 % of 2,000 bootstrap samples of the items. Two models are compared on the same samples (a
paired bootstrap), so that items hard for both do not widen the difference. Source: Efron and Tibshirani, An
Introduction to the Bootstrap (1993), chapters 8 and 13.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from model import GPT
from nanogauge.errors import BadInput, RunFailed
from nanogauge.schema import Benchmark
from trainer.data.hub import client_errors, first_line, silence_client
from trainer.data.loader import Batches
from trainer.data.shards import Shards
from trainer.data.tokenizer import Tokenizer
from trainer.step.device import autocast

Numbers = npt.NDArray[np.float64]
SAMPLES = 2000
SEED = 1337
HELLASWAG_REPO = "Rowan/hellaswag"
TOKENS_AT_ONCE = 4096
EXAMPLES_AT_ONCE = 8


@dataclass(frozen=True)
class Items:
    """Per-item results of a benchmark, for the run's model and optionally another.

    `own` and `other` are the two models' totals per item; `of` is its number of tokens, bytes or examples. The metric
    is sum(own) / sum(of), over all items or a bootstrap sample.
    """

    own: Numbers
    other: Numbers | None
    of: Numbers

    def figures(self) -> dict[str, float | None]:
        """Return the values and intervals, as fields of the log's Benchmark line."""
        chance = np.random.default_rng(SEED)
        values = [self._values(slice(None))]
        values += [self._values(chance.integers(0, len(self.of), len(self.of))) for _ in range(SAMPLES)]
        own, other = np.array(values).T
        low, high = np.quantile(own[1:], (0.025, 0.975))
        fields: dict[str, float | None] = {"value": own[0], "low": low, "high": high}
        if self.other is not None:
            less, more = np.quantile(own[1:] - other[1:], (0.025, 0.975))
            fields |= {"against_value": other[0], "difference_low": less, "difference_high": more}
        return fields

    def _values(self, chosen: slice | npt.NDArray[np.int64]) -> tuple[float, float]:
        total = self.of[chosen].sum()
        other = self.other[chosen].sum() / total if self.other is not None else math.nan
        return self.own[chosen].sum() / total, other


@dataclass(frozen=True)
class Pair:
    """The model of a run, and optionally a model to compare it with."""

    own: Scorer
    other: Scorer | None
    against: str | None
    """Name of the other model."""
    step: int

    @property
    def scorers(self) -> list[Scorer]:
        return [self.own] if self.other is None else [self.own, self.other]

    def line(
        self, name: str, metric: str, items: Items, seconds: float, better: Literal["higher", "lower"], main: bool
    ) -> Benchmark:
        return Benchmark(
            step=self.step,
            name=name,
            metric=metric,
            better=better,
            main=main,
            n=len(items.of),
            against=self.against if items.other is not None else None,
            seconds=seconds,
            **items.figures(),
        )


def windows_of(
    pair: Pair, shards: Shards, tokens: int, device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield batches of held-out tokens and their targets (B T each), evenly spread.

    Windows do not overlap and have at most `tokens` tokens together. T is the shorter of the two models' contexts.
    """
    block = min(scorer.model.config.block_size for scorer in pair.scorers)
    vocabulary = min(scorer.model.config.vocab_size for scorer in pair.scorers)
    present = sum(max(1, len(s) // block - 1) for s in shards if len(s) > block)
    windows = max(1, min(present, tokens // block))
    batches = Batches({"val": shards}, 1, block, vocabulary, SEED, device, eval_batches=windows, ahead=0)
    at_once = max(1, TOKENS_AT_ONCE // block)
    for begin in range(0, windows, at_once):
        indices = range(begin, min(windows, begin + at_once))
        pairs = [batches.evaluation_batch("val", index) for index in indices]
        inputs, targets = (torch.cat(part) for part in zip(*pairs, strict=True))
        yield inputs, targets


def held_out_items(
    pair: Pair, shards: Shards, tokens: int, device: torch.device, token_bytes: Numbers | None
) -> dict[str, Items]:
    """Return nats_per_token and, if `token_bytes` is given, bits_per_byte; an item is a window.

    Bits exclude tokens without bytes, such as end-of-text.
    """
    nats: list[list[Numbers]] = [[] for _ in pair.scorers]
    bits: list[list[Numbers]] = [[] for _ in pair.scorers]
    counts: list[Numbers] = []
    sizes: list[Numbers] = []
    for inputs, targets in windows_of(pair, shards, tokens, device):
        lengths = token_bytes[targets.cpu().numpy()] if token_bytes is not None else None
        counts.append(np.full(len(targets), targets.shape[1], np.float64))
        if lengths is not None:
            sizes.append(lengths.sum(axis=1))
        for k, scorer in enumerate(pair.scorers):
            losses = scorer.losses(inputs, targets).double().cpu().numpy()
            nats[k].append(losses.sum(axis=1))
            if lengths is not None:
                bits[k].append((losses * (lengths > 0)).sum(axis=1) / math.log(2))
    metrics = {"nats_per_token": _items(nats, counts)}
    if token_bytes is not None:
        metrics["bits_per_byte"] = _items(bits, sizes)
    return metrics


def _items(parts: list[list[Numbers]], of: list[Numbers]) -> Items:
    whole = [np.concatenate(part) for part in parts]
    return Items(whole[0], whole[1] if len(whole) > 1 else None, np.concatenate(of))


@dataclass(frozen=True)
class Example:
    """An example of HellaSwag: a context and its candidate endings, one of them right."""

    context: str
    endings: list[str]
    label: int


def read_hellaswag(path: Path | None, limit: int | None) -> list[Example]:
    """Read the validation examples of HellaSwag from a file of JSON lines, or from the hub.

    Raises:
        BadInput: if the file cannot be read, or holds something else.
        RunFailed: if the download fails.
    """
    rows = _lines(path) if path is not None else _from_hub()
    try:
        examples = [Example(r["ctx"], list(r["endings"]), int(r["label"])) for r in rows[:limit]]
        if not examples or any(not 0 <= e.label < len(e.endings) for e in examples):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise BadInput(f"{path or HELLASWAG_REPO} is not HellaSwag: each line has ctx, endings and label.") from None
    return examples


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}.") from None
    except ValueError:
        raise BadInput(f"{path} holds no JSON lines; give HellaSwag's hellaswag_val.jsonl.") from None


def _from_hub() -> list[dict[str, Any]]:
    import pyarrow.parquet
    from huggingface_hub import HfApi, hf_hub_download

    silence_client()
    try:
        names = HfApi().list_repo_files(HELLASWAG_REPO, repo_type="dataset")
        files = sorted(n for n in names if "validation" in n and n.endswith(".parquet"))
        paths = [hf_hub_download(HELLASWAG_REPO, name, repo_type="dataset") for name in files]
    except client_errors() as error:
        raise RunFailed(
            f"{HELLASWAG_REPO} could not be fetched ({first_line(error)}); check the network "
            "and HF_ENDPOINT, or give its hellaswag_val.jsonl with --hellaswag."
        ) from error
    return [row for path in paths for row in pyarrow.parquet.read_table(path).to_pylist()]


def hellaswag_items(pair: Pair, examples: Sequence[Example], tokenizer: Tokenizer) -> dict[str, Items]:
    """Return the items of acc_norm and acc, defined as in build-nanogpt's hellaswag.py.

    An ending, after a space, completes its context. acc_norm is the share of examples whose right ending has the lowest
    mean loss per token, acc the share whose right ending has the lowest sum.
    """
    right: dict[str, list[list[float]]] = {m: [[] for _ in pair.scorers] for m in ("acc", "acc_norm")}
    encode = tokenizer.encode_text
    for begin in range(0, len(examples), EXAMPLES_AT_ONCE):
        some = examples[begin : begin + EXAMPLES_AT_ONCE]
        rows = [(encode(e.context).tolist(), encode(f" {ending}").tolist()) for e in some for ending in e.endings]
        for k, scorer in enumerate(pair.scorers):
            sums, means = scorer.ending_losses(rows)
            at = 0
            for example in some:
                of = slice(at, at + len(example.endings))
                for metric, losses in (("acc", sums[of]), ("acc_norm", means[of])):
                    right[metric][k].append(float(np.argmin(losses) == example.label))
                at = of.stop
    ones = np.ones(len(examples))
    return {metric: _items([[np.array(values)] for values in both], [ones]) for metric, both in right.items()}


@dataclass(frozen=True)
class Scorer:
    """Computes losses with a model in eval mode; matrix products are in `dtype`."""

    model: GPT
    dtype: str

    @torch.inference_mode()
    def losses(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each target in nats, fp32, B T, of tokens and targets B T."""
        with autocast(tokens.device, self.dtype):
            logits = self.model.logits(self.model.hidden(tokens))
        flat = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
        return flat.view(targets.shape)

    def ending_losses(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> tuple[list[float], list[float]]:
        """Return, for each row, the sum and the mean of its ending's token losses.

        If context and ending are longer than the model's context, the beginning is cut.

        Args:
            rows: pairs of context and ending tokens, at least one token each.
        """
        block = self.model.config.block_size
        cut = [[*context, *ending][-block - 1 :] for context, ending in rows]
        width = max(map(len, cut)) - 1
        device = self.model.embedding.weight.device
        tokens = torch.zeros((len(rows), width), dtype=torch.long)
        targets = torch.zeros_like(tokens)
        counted = torch.zeros((len(rows), width))
        for i, (row, (_, ending)) in enumerate(zip(cut, rows, strict=True)):
            tokens[i, : len(row) - 1] = torch.tensor(row[:-1])
            targets[i, : len(row) - 1] = torch.tensor(row[1:])
            counted[i, max(0, len(row) - 1 - len(ending)) : len(row) - 1] = 1
        losses = self.losses(tokens.to(device), targets.to(device)).cpu() * counted
        sums = losses.sum(dim=1)
        return sums.tolist(), (sums / counted.sum(dim=1)).tolist()
