"""Evaluate a run's model, alone or compared with GPT-2, and log the results.

python evaluate.py runs/NAME [--against gpt2|DIR] [--tasks hellaswag] [--tokens 1e6]
    [--limit N] [--hellaswag FILE] [--checkpoint newest|best|STEP] [--json]

Always evaluated: nats per token and bits per byte on the run's held-out tokens. hellaswag follows build-nanogpt; for
other tasks export the run and use lm-evaluation-harness's own command.
--against names a model in Hugging Face's layout with the run's tokenizer: a folder, or on the hub.
"""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import trainer.step.torch_env  # noqa: F401  before torch
from nanogauge.cli import Parser, print_json, run_command

# isort: split
import numpy as np

from nanogauge.analysis.measured import GPT2, HELD_OUT, describe_benchmark
from nanogauge.analysis.report_model import build_report, claims_of
from nanogauge.errors import BadInput, RunFailed
from nanogauge.report.html import write_report
from nanogauge.runlog.lock import acquire_lock
from nanogauge.runlog.writer import RunLog
from nanogauge.schema import Benchmark
from trainer.checkpoints.pretrained import VOCABULARY_NAME, hugging_face_folder, open_pretrained
from trainer.data.dataset import open_dataset
from trainer.data.tokenizer import Tokenizer
from trainer.evaluation.benchmarks import Items, Numbers, Pair, Scorer, held_out_items, hellaswag_items, read_hellaswag
from trainer.evaluation.export import vocabulary_of
from trainer.evaluation.load import CHECKPOINT_HELP, TOKENIZER_HELP, Trained, open_trained, tokenizer_of

NAMES_OF_GPT2 = ("gpt2", "openai-community/gpt2")
HELLASWAG = "hellaswag"


def main(arguments: Sequence[str]) -> int:
    assert __doc__ is not None
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--against", metavar="MODEL", help="gpt2, another on the hub, or a folder")
    parser.add_argument("--tasks", default="", metavar="hellaswag", help="also evaluate HellaSwag")
    parser.add_argument("--tokens", type=float, default=1e6, help="most held-out tokens")
    parser.add_argument("--limit", type=int, help="most examples of each task, the first ones")
    parser.add_argument("--hellaswag", type=Path, metavar="FILE", help="its hellaswag_val.jsonl")
    parser.add_argument("--checkpoint", default="newest", help=CHECKPOINT_HELP)
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    parser.add_argument("--tokenizer", help=TOKENIZER_HELP)
    parser.add_argument("--json", action="store_true", help="print the lines of the log alone")
    given = parser.parse(arguments)
    if given.tokens < 1 or (given.limit is not None and given.limit < 1):
        raise BadInput("--tokens and --limit take numbers above 0.")
    if given.tasks not in ("", HELLASWAG):
        raise BadInput(
            f"--tasks knows {HELLASWAG} alone; for {given.tasks} run export.py, and on its folder lm_eval --model hf "
            "--model_args pretrained=FOLDER --tasks NAME."
        )
    trained = open_trained(given.run, given.checkpoint, given.device, half=False)
    warnings = [*trained.skipped]
    pair, folder = make_pair(trained, given.against)
    tokenizer = None
    if folder is not None or given.tasks:
        tokenizer = tokenizer_of(trained.config.data, given.tokenizer)
    if folder is not None and tokenizer is not None:
        refuse_other_vocabulary(folder, tokenizer, str(given.against))
    lines = []
    with closing(acquire_lock(given.run)) as lock, RunLog(given.run) as log:
        warnings += [lock.warning] if lock.warning is not None else []
        for line in benchmarks(trained, pair, tokenizer, given, warnings):
            log.write(line)
            lines.append(line)
            if not given.json:
                print(describe_benchmark(line) + interval_text(line), flush=True)
    for text in warnings:
        print(f"! {text}", file=sys.stderr)
    run = trained.folder.path
    report, written, recorded = build_report(run, claims_of(run, None))
    paths = write_report(report, written, recorded)
    if given.json:
        print_json([line.model_dump(exclude_none=True) for line in lines])
    else:
        print(f"\n{paths[-1]}  (also .md and .json)")
    return 0


def make_pair(trained: Trained, against: str | None) -> tuple[Pair, Path | None]:
    """Return the run's model and that of `against` on the run's device, and the latter's folder."""
    device = trained.model.embedding.weight.device
    dtype = trained.folder.prediction.dtype if device.type == "cuda" else "float32"
    pair = Pair(Scorer(trained.model, dtype), None, None, trained.step)
    if against is None:
        return pair, None
    folder = hugging_face_folder(against)
    name = GPT2 if against in NAMES_OF_GPT2 and not Path(against).is_dir() else against
    return replace(pair, other=Scorer(open_pretrained(str(folder), device), dtype), against=name), folder


def benchmarks(
    trained: Trained, pair: Pair, tokenizer: Tokenizer | None, given: Any, warnings: list[str]
) -> Iterator[Benchmark]:
    """Run the benchmarks; yield the log lines of each when it is complete."""
    config = trained.config
    device = pair.own.model.embedding.weight.device
    examples = read_hellaswag(given.hellaswag, given.limit) if given.tasks else []
    began = time.perf_counter()
    shards, lengths = (open_dataset(config.data).splits["val"], _token_bytes(trained, given.tokenizer, warnings))
    held_out = held_out_items(pair, shards, int(given.tokens), device, lengths)
    yield from _lines(pair, HELD_OUT, held_out, time.perf_counter() - began, "bits_per_byte", "lower")
    if given.tasks:
        assert tokenizer is not None
        began = time.perf_counter()
        found = hellaswag_items(pair, examples, tokenizer)
        yield from _lines(pair, HELLASWAG, found, time.perf_counter() - began, "acc_norm", "higher")


def _lines(pair: Pair, name: str, found: dict[str, Items], seconds: float, main: str, better: Any) -> list[Benchmark]:
    first = main if main in found else next(iter(found))
    return [pair.line(name, metric, items, seconds, better, metric == first) for metric, items in found.items()]


def _token_bytes(trained: Trained, given: str | None, warnings: list[str]) -> Numbers | None:
    """Return the bytes of text of each token; None with a warning if they are not known."""
    try:
        tokenizer = tokenizer_of(trained.config.data, given)
    except (BadInput, RunFailed) as error:
        warnings.append(f"no bits per byte: {error}")
        return None
    lengths = tokenizer.token_bytes()
    if lengths is None:
        warnings.append(f"no bits per byte: the bytes of a token of {tokenizer.name} are not known.")
        return None
    return lengths.astype(np.float64)


def refuse_other_vocabulary(folder: Path, tokenizer: Tokenizer, name: str) -> None:
    """Check that the other model has the run's vocabulary: losses are compared token by token.

    Raises:
        BadInput: if the other model's vocabulary is missing or differs.
    """
    path = folder / VOCABULARY_NAME
    try:
        theirs = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise BadInput(
            f"{name} has no {VOCABULARY_NAME}, so its tokens cannot be compared with the run's; add it to the folder."
        ) from None
    except (OSError, ValueError):
        raise BadInput(f"{path} is damaged; fetch it again.") from None
    if theirs != vocabulary_of(tokenizer):
        raise BadInput(
            f"{name} has another vocabulary than the run ({tokenizer.name}): the losses of their "
            "tokens cannot be compared; choose a model of the same tokenizer."
        )


def interval_text(line: Benchmark) -> str:
    return f"  [{line.low:.4f} to {line.high:.4f}]" if line.low is not None else ""


if __name__ == "__main__":
    run_command(main)
