"""What nanoGPT's train.py prints, with or without the dump of its configuration.

nanoGPT closes an iteration's clock after the evaluation and checkpoint that may lie in it.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

from nanogauge.importers import import_run as contradictions
from nanogauge.importers.parsed import (
    Collector,
    Evaluation,
    Form,
    Iteration,
    Printed,
    PrintedSession,
    number_of,
    seconds_of,
)
from nanogauge.importers.text import TextLines, plain, without_prefix
from nanogauge.schema import Event

NANOGPT_PEAK_TFLOPS = 312  # nanoGPT's model.py divides by an A100's bf16 peak, whatever the card
_LOSS = r"(-?\d+\.\d{4}|-?inf|nan)"  # four decimals: a line cut within them is seen to be cut
_REST = r"(?:[,|] .*)?$"  # what variants of the program add
_ITER = re.compile(
    rf"(?<![\w./-])iter (\d+): loss {_LOSS}, time (\d+\.\d\d)ms(?:, mfu (-?\d+\.\d\d)%{_REST}|$)"
)
_STEP = re.compile(rf"(?<![\w./-])step (\d+): train loss {_LOSS}, val loss {_LOSS}{_REST}")
_BEGINS = re.compile(r"(?:iter|step) \d+ *(?::|$)")
_SAVED = re.compile(r"(?<!\w)saving checkpoint to ")
_DUMP = re.compile(r"Overriding(?: config with|: )")
_ASSIGNED = re.compile(r"(?:Overriding: )?([a-z_]\w*) *= *([^#]+)(?:#|$)")
_TOKENS = re.compile(r"tokens per iteration will be: ([\d,]+)$")
_LATER = re.compile(
    r"number of parameters: (?P<parameters>[\d.]+M)$"
    r"|num decayed parameter tensors: \d+, with (?P<decayed>[\d,]+) parameters$"
    r"|num non-decayed parameter tensors: \d+, with (?P<others>[\d,]+) parameters$"
    r"|(?:found|defaulting to) vocab_size (?:=|of GPT-2 to) (?P<vocabulary>\d+) \("
    r"|Initializing a new model from scratch$"
    r"|(?P<resumed>Resuming training from )"
)
_EXAMPLE = "iter 200: loss 6.2977, time 3917.80ms, mfu 12.87%"


def read_nanogpt_log(path: Path) -> Printed:
    """Read a log that nanoGPT's train.py printed; lines of other programs are passed over.

    Raises:
        BadInput: if the file cannot be read, has no iterations, or a line of it is cut or damaged.
    """
    lines = TextLines(path, _FORM.what)
    log, header = Collector(path), _Header()
    without_mfu: tuple[int, str] | None = None
    with_mfu = False
    for number, raw in lines:
        line = plain(raw)
        bare = without_prefix(line)
        try:
            if match := _ITER.search(line):
                if match[4] is None and with_mfu:
                    raise ValueError  # it was cut after its time
                if without_mfu is not None and match[4] is not None:
                    log.damage(*without_mfu)
                without_mfu = (number, bare) if match[4] is None and not with_mfu else None
                with_mfu |= match[4] is not None
                log.iteration(number, _iteration(match))
            elif match := _STEP.search(line):
                step, train, validation = match.groups()
                log.evaluation(number, Evaluation(int(step), float(train), float(validation)))
            elif _SAVED.search(line):
                log.checkpoint()
            elif _BEGINS.match(bare):
                raise ValueError
            else:
                header.take(log, number, bare)
        except ValueError:
            log.damage(number, bare)
    return log.finish(_FORM, lines.too_long, _EXAMPLE)


def _iteration(match: re.Match[str]) -> Iteration:
    iteration, loss, milliseconds, mfu = match.groups()
    return Iteration(
        number=int(iteration),
        loss=float(loss),
        seconds=seconds_of(milliseconds, 1e-3),
        mfu=None if mfu is None or float(mfu) < 0 else float(mfu) / 100,
    )


class _Header:
    """What nanoGPT prints before its first step: the configuration, tokens, then parameters.

    Every rank prints it, so it may come several times. A stage that comes after a later one is of
    another process: the one before has ended, or will say the same.
    """

    def __init__(self) -> None:
        self._stage = 0
        self._dumping = False
        self._decayed = math.nan

    def take(self, log: Collector, number: int, line: str) -> None:
        if _DUMP.match(line):
            self._enter(log, number, 0)
            self._dumping = True
        if self._dumping and (match := _ASSIGNED.match(line)):
            if contradictions.is_known(match[1]):
                log.setting(number, match[1], match[2].strip())
        elif match := _TOKENS.match(line):
            self._enter(log, number, 1)
            log.setting(number, contradictions.TOKENS, match[1])
        elif match := _LATER.match(line):
            self._enter(log, number, 2, resumed=match["resumed"] is not None)
            if match["parameters"]:
                log.setting(number, contradictions.PARAMETERS, match["parameters"])
            if match["vocabulary"]:
                log.setting(number, "vocab_size", match["vocabulary"])
            if match["decayed"]:
                self._decayed = number_of(match["decayed"])
            if match["others"] and not math.isnan(self._decayed):
                total = self._decayed + number_of(match["others"])
                log.setting(number, contradictions.TOTAL_PARAMETERS, f"{total:.0f}")

    def _enter(self, log: Collector, number: int, stage: int, resumed: bool = False) -> None:
        log.begin(number, resumed, anew=stage < self._stage)
        self._stage = stage
        self._dumping &= stage == 0


def _events(run: list[PrintedSession]) -> list[Event]:
    printed = [e.mfu for session in run for e in session.iterations if e.mfu is not None]
    if not printed:
        return []
    low, high = 100 * min(printed), 100 * max(printed)
    return [
        Event(
            what="logged_mfu",
            about="mfu_palm",
            text=f"the log itself printed {low:.1f}-{high:.1f} %, "
            f"because nanoGPT divides by an A100's {NANOGPT_PEAK_TFLOPS} TFLOP/s on every card",
        )
    ]


_FORM = Form(
    source="nanogpt_log",
    program="nanoGPT",
    what="nanoGPT's output",
    evaluation_inside=True,
    compilation_inside=True,
    note="The log does not name its device, software or power: the device is as given on the "
    "command line.",
    events=_events,
)
