"""What nanochat's base_train prints: its clock stands still while it evaluates and saves.

A line is long, so that terminals and recordings of them wrap it: it is put together again, at any
width. Where the wrap fell on a space, the space is lost; no two figures of a line stand side by
side, so none of them can run together.
"""

from __future__ import annotations

import re
from pathlib import Path

from nanogauge.analysis.measured import NOT_IN_LOG
from nanogauge.importers.parsed import (
    Collector,
    Evaluation,
    Form,
    Iteration,
    Printed,
    PrintedSession,
    number_of,
    seconds_of,
    warning,
)
from nanogauge.importers.text import TextLines, plain
from nanogauge.schema import Event

_FIGURE = r"(-?[\d.]+|-?inf|nan)"
_RECORD = re.compile(
    r"step (?P<step>\d+)/(?P<steps>\d+)\s*\(\s*[\d.]+%\)\s*"
    r"\|\s*loss:\s*(?P<loss>-?\d+\.\d{6}|-?inf|nan)\s*"
    rf"(?:\|\s*grad\s*norm:\s*(?P<norm>{_FIGURE})\s*)?"
    r"\|\s*lrm:\s*[\d.]+\s*"
    r"\|\s*dt:\s*(?P<ms>\d+\.\d\d)ms\s*"
    r"\|\s*tok/sec:\s*(?P<rate>[\d,]+)\s*"
    r"\|\s*(?:bf16_)?mfu:\s*(?P<mfu>\d+\.\d\d)\s*"
    r"(?:\|\s*epoch:[^|]{1,60})?"
    r"\|\s*total\s*time:\s*(?P<total>\d+\.\d\d)m"
)
_BEGINS = re.compile(r"(?<![\w./-])step \d{5,}(?:/|$)")  # it pads with zeros
_OF_ANOTHER_STAGE = re.compile(r"(?<![\w./-])step \d+ \(\d|(?<![\w./-])Step \d+/\d+ \|")
_VALIDATION = re.compile(r"(?<![\w./-])Step (\d+) \| Validation bpb: (\d+\.\d{4,})(?: |$)")
_MEMORY = re.compile(r"(?<![\w./-])Peak memory usage: (\d+\.\d\d)MiB$")
_RESUMED = re.compile(r"Resuming optimization from step \d+")
_EXAMPLE = "step 00010/21400 (0.05%) | loss: 8.123456 | lrm: 1.00 | dt: 1234.56ms | tok/sec: ..."
_PARTS = 8
"""lines into which a terminal may have wrapped one"""


def read_nanochat_log(path: Path) -> Printed:
    """Read what nanochat's base_train printed; other stages and programs are passed over.

    Raises:
        BadInput: if the file cannot be read, has no step, or a line of it is cut or damaged.
    """
    lines = TextLines(path, _FORM.what)
    log, wrapped = Collector(path), _Wrapped()
    pretraining = False
    for number, raw in lines:
        line = plain(raw)
        if begins := _BEGINS.search(line):
            if wrapped.text:
                log.damage(wrapped.number, wrapped.text)
            wrapped.begin(number, line[begins.start() :])
        elif wrapped.text:
            wrapped.add(line)
        elif _OF_ANOTHER_STAGE.search(line):
            pretraining = False  # what follows is of the chat's training
        elif _RESUMED.search(line):
            log.begin(number, resumed=True)
        elif match := _VALIDATION.search(line):
            log.evaluation(number, Evaluation(int(match[1]), bits_per_byte=number_of(match[2])))
        elif pretraining and log.current is not None and (match := _MEMORY.search(line)):
            log.current.peak_allocated_bytes = round(number_of(match[1]) * 2**20)
        if wrapped.text and (match := _RECORD.match(wrapped.text)):
            pretraining = True
            try:
                log.iteration(wrapped.number, _iteration(match))
            except ValueError:
                log.damage(wrapped.number, wrapped.text)
            else:
                assert log.current is not None
                log.current.settings["num_iterations"] = (wrapped.number, match["steps"])
                log.current.training_seconds = 60 * number_of(match["total"])
            wrapped.end()
        elif wrapped.parts >= _PARTS:
            log.damage(wrapped.number, wrapped.text)
            wrapped.end()
    if wrapped.text:
        log.damage(wrapped.number, wrapped.text)
    return log.finish(_FORM, lines.too_long, _EXAMPLE)


class _Wrapped:
    """A line whose end has not been seen yet."""

    def __init__(self) -> None:
        self.number, self.text, self.parts = 0, "", 0

    def begin(self, number: int, text: str) -> None:
        self.number, self.text, self.parts = number, text, 1

    def add(self, text: str) -> None:
        self.text += text[:300]
        self.parts += 1

    def end(self) -> None:
        self.text, self.parts = "", 0


def _iteration(match: re.Match[str]) -> Iteration:
    norm = match["norm"]
    return Iteration(
        number=int(match["step"]),
        loss=float(match["loss"]),
        seconds=seconds_of(match["ms"], 1e-3),
        mfu=number_of(match["mfu"]) / 100,
        tokens_per_second=number_of(match["rate"]),
        grad_norm=None if norm is None else number_of(norm),
    )


def _events(run: list[PrintedSession]) -> list[Event]:
    last = run[-1].iterations[-1] if run[-1].iterations else run[0].iterations[-1]
    clock = max(s.training_seconds or 0.0 for s in run)
    lacks = "not in this log: nanochat's clock stands still for evaluation and checkpoints"
    if clock:
        lacks += f" (its sum of the steps after the first 11 is {clock / 60:,.2f} min at its end)"
    events = [
        warning(
            "other_model",
            "nanochat's model and optimizer are not those of a GPT-2: parameters, FLOPs, MFU and "
            "every prediction are of the configuration that was given, and right as far as it is.",
        ),
        Event(
            what="smoothed_loss",
            text=f"The losses up to step {last.number:,} are nanochat's running means.",
        ),
        Event(what=NOT_IN_LOG, about="total_seconds", text=lacks),
    ]
    printed = [e.mfu for session in run for e in session.iterations if e.mfu is not None]
    low, high = 100 * min(printed), 100 * max(printed)
    if high == 0:
        text = "the log itself printed 0.00 %, because nanochat does not know this card's peak"
    else:
        text = f"the log itself printed {low:.1f}-{high:.1f} % by nanochat's own count and peak"
    return [*events, Event(what="logged_mfu", about="mfu_palm", text=text)]


_FORM = Form(
    source="nanochat_log",
    program="nanochat",
    what="nanochat's output",
    evaluation_inside=False,
    compilation_inside=True,
    note="The log does not name its device or software: the device is as given on the command "
    "line. nanochat's model is not the GPT of the configuration: the comparison is only as "
    "right as that configuration describes it.",
    events=_events,
)
