"""The run folder where several processes train: rank 0 opens and writes it, the others are told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from nanogauge.config import Config
from nanogauge.records import Event, LogLine, Prediction
from nanogauge.runfolder import RunFolder
from nanogauge.runlog import Recorded, RunLog
from nanogauge.screen import Screen
from nanogauge.training.ranks import Ranks


class Opened(NamedTuple):
    """A run folder as a process begins with it."""

    folder: RunFolder
    recorded: Recorded | None = None
    """of a run that is resumed, for rank 0 alone"""
    checkpoint: Path | None = None
    damaged: tuple[str, ...] = ()
    """a sentence for each damaged checkpoint that was passed over"""


class SilentLog(RunLog):
    """The log of a rank that writes none."""

    def __init__(self) -> None:
        """Open nothing."""

    def write(self, line: LogLine) -> None:
        """Rank 0 writes a line for all."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """There is nothing to close."""


def share_folder(config: Config, ranks: Ranks, open_it: Callable[[], Opened]) -> Opened:
    """Open the run folder on rank 0, and tell the others its prediction and its checkpoint.

    All of them read the checkpoint: on several machines the folder must be on a shared disk.
    """
    if ranks.world == 1:
        return open_it()
    opened, told = None, None
    if ranks.is_first:
        opened = open_it()
        told = {
            "prediction": opened.folder.prediction.model_dump_json(),
            "sha256": opened.folder.prediction_sha256,
            "checkpoint": str(opened.checkpoint) if opened.checkpoint is not None else None,
        }
    told = ranks.gather(told)[0]
    if opened is not None:
        return opened
    assert told is not None
    prediction, sha256, checkpoint = told["prediction"], told["sha256"], told["checkpoint"]
    assert prediction is not None
    assert sha256 is not None
    return Opened(
        RunFolder(config.folder, config, {}, Prediction.model_validate_json(prediction), sha256),
        checkpoint=Path(checkpoint) if checkpoint is not None else None,
    )


def tell_of_other_ranks(ranks: Ranks, step: int, log: RunLog, screen: Screen) -> None:
    """That a resumed run is not bit by bit what it would have become."""
    text = (
        f"The checkpoint is of another number of processes than the {ranks.world} that go on with "
        "it: sums have another order, and dropout draws other random numbers, those of run.seed, "
        "the rank and this step."
    )
    log.write(Event(what="other_ranks", step=step, text=text))
    screen.say(text)
