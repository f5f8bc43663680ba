"""What is told, and what is not, where several processes train: rank 0 alone writes."""

from __future__ import annotations

from types import TracebackType

from nanogauge.records import Event, LogLine
from nanogauge.runlog import RunLog
from trainer.run.progress import Screen
from trainer.step.distributed import Ranks


class SilentLog(RunLog):
    """The log of a rank that writes none."""

    def __init__(self) -> None:
        """Open nothing."""

    def write(self, line: LogLine) -> None:
        """Rank 0 writes a line for all."""

    @property
    def problem(self) -> str | None:
        """Nothing that it did not write can be missing."""
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """There is nothing to close."""


def tell_of_other_ranks(ranks: Ranks, step: int, log: RunLog, screen: Screen) -> None:
    """That a resumed run is not bit by bit what it would have become."""
    text = (
        f"The checkpoint is of another number of processes than the {ranks.world} that go on with "
        "it: sums have another order, and dropout draws other random numbers, those of run.seed, "
        "the rank and this step."
    )
    log.write(Event(what="other_ranks", step=step, text=text))
    screen.say(text)
