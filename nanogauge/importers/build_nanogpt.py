"""build-nanogpt: the log.txt that its train_gpt2.py writes, or what it prints.

log.txt holds losses without any time. What is printed holds a time for every step, whose clock runs
from before the evaluation, the HellaSwag test and the sampling that may come first.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from nanogauge.analysis.measured import NOT_IN_LOG
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

_STEP = re.compile(
    r"(?<![\w./-])step +(\d+) \| loss: (-?\d+\.\d{6}|-?inf|nan) \| lr (\d\.\d{4}e[-+]\d\d) \| "
    r"norm: (\d+\.\d{4}|inf|nan) \| dt: (\d+\.\d\d)ms \| tok/sec: (\d+\.\d\d)$"
)
_BEGINS = re.compile(r"step +\d+ *(?:\||$)")
_VALIDATION = re.compile(r"(?<![\w./-])validation loss: (\d+\.\d{4}|inf|nan)$")
_HELLASWAG = re.compile(r"(?<![\w./-])HellaSwag accuracy: (\d+)/(\d+)=\d\.\d{4}$")
_WRITTEN = re.compile(
    r"(\d+) (?:(val) (\d+\.\d{4}|inf|nan)|(hella) (\d\.\d{4})|(train) (\d+\.\d{6}|inf|nan))$"
)
_WRITTEN_BEGINS = re.compile(r"\d+ (?:val|hella|train)\b")
_BATCH = re.compile(r"total desired batch size: (\d+)$")
_PARAMETERS = re.compile(r"num (non-)?decayed parameter tensors: \d+, with ([\d,]+) parameters$")
_EXAMPLE = "100 train 6.123456' or 'step   100 | loss: 6.123456 | lr ..."


def read_build_nanogpt_log(path: Path) -> Printed:
    """Read log.txt or the program's output; lines of other programs are passed over.

    Raises:
        BadInput: if the file cannot be read, has no step, or a line of it is cut or damaged.
    """
    lines = TextLines(path, _FORM.what)
    log, waiting = Collector(path), _Waiting()
    decayed: float | None = None
    for number, raw in lines:
        line = plain(raw)
        bare = without_prefix(line)
        try:
            if match := _STEP.search(line):
                waiting.release(log, number, int(match[1]))
                log.iteration(number, _iteration(match))
            elif match := _VALIDATION.search(line):
                waiting.validation = float(match[1])
            elif match := _HELLASWAG.search(line):
                waiting.accuracy = int(match[1]) / int(match[2])
            elif match := _WRITTEN.match(bare):
                _take_written(log, number, match)
            elif _BEGINS.match(bare) or _WRITTEN_BEGINS.match(bare):
                raise ValueError
            elif match := _BATCH.match(bare):
                log.begin(number)
                log.setting(number, contradictions.TOKENS, match[1])
            elif (match := _PARAMETERS.match(bare)) and match[1] is None:
                log.begin(number)
                decayed = number_of(match[2])
            elif match and decayed is not None:
                total = decayed + number_of(match[2])
                log.setting(number, contradictions.TOTAL_PARAMETERS, f"{total:.0f}")
        except (ValueError, ZeroDivisionError):
            log.damage(number, bare)
    return log.finish(_FORM, lines.too_long, _EXAMPLE)


@dataclass
class _Waiting:
    """What is printed before a step without its number, until the step's line tells it."""

    validation: float | None = None
    accuracy: float | None = None

    def release(self, log: Collector, line: int, step: int) -> None:
        if self.validation is not None or self.accuracy is not None:
            log.evaluation(line, Evaluation(step, val_loss=self.validation))
        if self.accuracy is not None and log.current is not None:
            log.current.accuracy = (step, self.accuracy)
        self.validation = self.accuracy = None


def _iteration(match: re.Match[str]) -> Iteration:
    step, loss, rate, norm, milliseconds, speed = match.groups()
    return Iteration(
        number=int(step),
        loss=float(loss),
        seconds=seconds_of(milliseconds, 1e-3),
        tokens_per_second=number_of(speed),
        learning_rate=number_of(rate),
        grad_norm=float(norm),
    )


def _take_written(log: Collector, line: int, match: re.Match[str]) -> None:
    step = int(match[1])
    if match[2]:
        log.evaluation(line, Evaluation(step, val_loss=float(match[3])))
    elif match[6]:
        log.iteration(line, Iteration(step, loss=float(match[7])))
    elif log.current is not None:
        log.current.accuracy = (step, float(match[5]))


def _events(run: list[PrintedSession]) -> list[Event]:
    tested = [s.accuracy for s in run if s.accuracy is not None]
    if not tested:
        return []
    step, share = tested[-1]
    text = (
        f"HellaSwag is {share:.4f} after {step:,} steps, as build-nanogpt counts it; "
        "no figure of ours is made of it"
    )
    return [Event(what=NOT_IN_LOG, about="quality_vs_gpt2", text=text)]


_FORM = Form(
    source="build_nanogpt_log",
    program="build-nanogpt",
    what="build-nanogpt's log.txt or output",
    evaluation_inside=True,
    compilation_inside=True,
    note="The log does not name its device, software or power: the device is as given on the "
    "command line.",
    events=_events,
)
