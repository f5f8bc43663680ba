"""nanoGPT's own log -> a run log of ours, with evaluation taken out of the iterations again.

nanoGPT closes an iteration's clock after the evaluation and checkpoint that may lie in it. Here the
steady iteration is the median of those without an evaluation; what an iteration with one took
beyond that median is the evaluation (and checkpoint); what iteration 0 took beyond an evaluation
and a step is compilation.
"""

from __future__ import annotations

import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from nanogauge.errors import BadInput
from nanogauge.quantities import finite
from nanogauge.records import Checkpoint, Compile, End, Eval, Event, LogLine, Start, Step

_LOSS = r"(-?\d+\.\d{4}|-?inf|nan)"  # four decimals: a line cut within them is seen to be cut
_ITER = re.compile(rf"iter (\d+): loss {_LOSS}, time (\d+\.\d\d)ms, mfu (-?\d+\.\d\d)%$")
_STEP = re.compile(rf"step (\d+): train loss {_LOSS}, val loss {_LOSS}$")
_SAVED = re.compile(r"saving checkpoint to ")
_BEGINS = re.compile(r"(iter|step) \d")
NANOGPT_PEAK_TFLOPS = 312  # nanoGPT's model.py divides by an A100's bf16 peak, whatever the card


@dataclass
class NanoGptLog:
    iterations: list[tuple[int, float, float, float]] = field(default_factory=list)
    """iteration, loss, seconds as printed, MFU as printed"""
    evaluations: list[tuple[int, float, float]] = field(default_factory=list)
    """iteration, train loss, validation loss"""
    checkpoints: list[int] = field(default_factory=list)


def parse(path: Path) -> NanoGptLog:
    """Read a log that nanoGPT's train.py printed; lines of other programs are passed over.

    Raises:
        BadInput: if the file cannot be read, has no iterations, or a line of it is cut or damaged.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        raise BadInput(f"there is no log {path}; give the file with nanoGPT's output.") from None
    except OSError as error:
        raise BadInput(f"cannot read the log {path}: {error.strerror}.") from None
    log = NanoGptLog()
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.strip()
        try:
            if match := _ITER.match(line):
                iteration, loss, milliseconds, mfu = match.groups()
                entry = int(iteration), float(loss), float(milliseconds) / 1e3, float(mfu) / 100
                if entry[2] <= 0:
                    raise ValueError  # no iteration takes no time
                log.iterations.append(entry)
            elif match := _STEP.match(line):
                step, train, validation = match.groups()
                log.evaluations.append((int(step), float(train), float(validation)))
            elif _SAVED.match(line) and log.evaluations:
                log.checkpoints.append(log.evaluations[-1][0])
            elif _BEGINS.match(line):
                raise ValueError
        except ValueError:
            raise BadInput(
                f"line {number} of {path} is cut or damaged ({line[:40]!r}); "
                "remove it, or give the whole log."
            ) from None
    if not log.iterations:
        raise BadInput(
            f"{path} is no nanoGPT log: it has no line like "
            "'iter 200: loss 6.2977, time 3917.80ms, mfu 12.87%'."
        )
    numbers = [entry[0] for entry in log.iterations]
    if numbers != sorted(set(numbers)):
        raise BadInput(f"the iterations of {path} do not rise; give the log of one run alone.")
    if numbers[0] != 0:
        raise BadInput(
            f"{path} begins at iteration {numbers[0]:,}, so a part of the run is not in it; "
            "give a log from iteration 0 on."
        )
    return log


def to_run_log(
    log: NanoGptLog, max_steps: int, device: str, prediction_sha256: str
) -> list[LogLine]:
    """The lines of our run log that say the same.

    Raises:
        BadInput: if every printed iteration has an evaluation in it, so that no step is clean.
    """
    with_evaluation = {step for step, _, _ in log.evaluations}
    clean = [s for i, _, s, _ in log.iterations if i not in with_evaluation and i > 0]
    if not clean:
        raise BadInput("every printed iteration contains an evaluation; none shows a step alone.")
    steady = statistics.median(clean)
    evaluation_seconds = {
        i: s - steady for i, _, s, _ in log.iterations if i in with_evaluation and i > 0
    }
    lines: list[LogLine] = [
        Start(
            unix_time=None,
            source="nanogpt_log",
            max_steps=max_steps,
            prediction_sha256=prediction_sha256,
            device=device,
        )
    ]
    first_seconds = log.iterations[0][2]
    known = list(evaluation_seconds.values())
    if known or 0 not in with_evaluation:  # else compilation and evaluation cannot be told apart
        inside = statistics.median(known) if 0 in with_evaluation else 0.0
        left = first_seconds - steady - inside
        lines.append(Compile(seconds=max(left, 0.0), mode="compiled" if left > 0 else "eager"))
    for iteration, loss, seconds, _ in log.iterations:
        more = iteration in with_evaluation or iteration == 0
        lines.append(
            Step(
                step=iteration,
                loss=finite(loss),
                step_seconds=None if more else seconds,
                printed_seconds=seconds if more else None,
            )
        )
    for step, train, validation in log.evaluations:
        lines.append(
            Eval(
                step=step,
                train_loss=finite(train),
                val_loss=finite(validation),
                seconds=evaluation_seconds.get(step),
            )
        )
    for step in log.checkpoints:
        lines.append(Checkpoint(step=step, seconds=None, bytes=None, path=None))
    printed = [mfu for _, _, _, mfu in log.iterations if mfu >= 0]
    if printed:
        lines.append(
            Event(
                what="logged_mfu",
                about="mfu_palm",
                text=f"the log itself printed {100 * min(printed):.1f}-{100 * max(printed):.1f} %, "
                f"because nanoGPT divides by an A100's {NANOGPT_PEAK_TFLOPS} TFLOP/s on every card",
            )
        )
    # The evaluation of step k comes before iteration k; nanoGPT's last iteration bears the number
    # max_iters: it runs one more than that.
    steps = max([log.iterations[-1][0] + 1, *with_evaluation])
    status: Literal["finished", "stopped"] = "finished" if steps >= max_steps else "stopped"
    lines.append(End(status=status, steps=steps, wall_seconds=None))
    return lines
