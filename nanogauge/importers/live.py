"""Conversion of a program's records to lines of our run log while the program prints them.

Unlike an import, it has the time of each line, which separates an evaluation from the step that is printed with it.
"""

import statistics
from collections.abc import Iterator

from nanogauge.importers.formats import Format
from nanogauge.importers.parsed import LoggedEvaluation, LoggedProcess, LoggedStep
from nanogauge.schema import Checkpoint, Compile, LogLine, Start

_ENOUGH_STEPS = 5
"""Steady steps whose median the first step is compared with to find its compilation."""


class LiveConverter:
    """Convert the records of one run, each once.

    Args:
        start: start line of the run; a process that resumes it gets a copy.
        compiled: False if the program does not compile its model.
    """

    def __init__(self, format: Format, start: Start, compiled: bool) -> None:
        self.format, self._start, self._compiled = format, start, compiled
        self.steady_seconds: list[float] = []
        """Times of the steps without compilation and evaluation."""
        self._process = -1
        self._next_process()

    def _next_process(self) -> None:
        self._process += 1
        self._steps = self._evaluations = 0  # converted so far
        self._checkpoints = set[int]()
        self._last: LoggedStep | None = None
        self._compiling: float | None = None  # seconds of the first step, until its compilation is known

    def lines(self, run: list[LoggedProcess], ended: bool) -> Iterator[LogLine]:
        """Yield the lines of new records; before the end, the last step waits: it may be cut."""
        while self._process < len(run) - 1:
            yield from self._new_lines(run[self._process], True)
            self._next_process()
            resumed = {"first_step": run[self._process].first_step, "continues": True, "elapsed_seconds": None}
            yield self._start.model_copy(update=resumed)
        yield from self._new_lines(run[-1], ended)

    def _new_lines(self, process: LoggedProcess, ended: bool) -> Iterator[LogLine]:
        for step in process.steps[self._steps : None if ended else -1]:
            due = [e for e in process.evaluations[self._evaluations :] if e.step <= step.step]
            together = due[-1] if due and due[-1].step == step.step else None
            evaluation_seconds, step_seconds = self._split(together, step)
            yield from (e.to_line(evaluation_seconds if e is together else None) for e in due)
            yield step.to_line(step_seconds)
            self._steps, self._evaluations, self._last = self._steps + 1, self._evaluations + len(due), step
        if ended:
            yield from (e.to_line(None) for e in process.evaluations[self._evaluations :])
            self._evaluations = len(process.evaluations)
        steady = self.steady_seconds
        if self._compiling is not None and len(steady) >= (1 if ended else _ENOUGH_STEPS):
            seconds = self._compiling - statistics.median(steady)
            yield Compile(seconds=max(seconds, 0.0), mode="compiled" if seconds > 0 else "eager")
            self._compiling = None
        yield from (Checkpoint(step=updates) for updates in sorted(process.checkpoints - self._checkpoints))
        self._checkpoints |= process.checkpoints

    def _split(self, evaluation: LoggedEvaluation | None, step: LoggedStep) -> tuple[float | None, float | None]:
        """Return the seconds of a step's evaluation and of the step alone; None if they cannot be separated."""
        last, printed, includes = self._last, step.seconds, self.format.step_time
        evaluation_seconds, step_seconds = None, printed
        if evaluation is not None:
            after = _between(evaluation, step)
            if printed is not None and "evaluation" in includes:
                evaluation_seconds = max(printed - after, 0.0)
            elif last is not None and last.step == step.step - 1:
                evaluation_seconds = _between(last, evaluation)
            if printed is None or "evaluation" in includes:
                # A checkpoint may be written between the two lines, but not before the first step.
                step_seconds = after if last is None else None
        elif printed is None and last is not None:
            step_seconds = _between(last, step) / (step.step - last.step)
        if last is not None and step_seconds is not None:
            self.steady_seconds.append(step_seconds)
        elif last is None and self._compiled and (printed is None or "compilation" in includes):
            self._compiling, step_seconds = step_seconds, None
        return evaluation_seconds, step_seconds


def _between(earlier: LoggedStep | LoggedEvaluation, later: LoggedStep | LoggedEvaluation) -> float:
    """Return the seconds between two lines."""
    assert earlier.elapsed_seconds is not None and later.elapsed_seconds is not None
    return later.elapsed_seconds - earlier.elapsed_seconds
