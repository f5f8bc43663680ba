"""Import a log into a run folder and read back what lies there."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from examples import documented_config, documented_prediction, nanogpt_log

from nanogauge.config import Config
from nanogauge.importers.folder import import_log
from nanogauge.importers.nanogpt_log import read_nanogpt_log
from nanogauge.importers.printed import Printed
from nanogauge.report.measured import Measurements, measure
from nanogauge.runlog import Recorded, read_log

LOG = nanogpt_log(
    iterations=1000,
    log_every=100,
    eval_every=500,
    step_ms=lambda _: 2000.0,
    evaluation_ms=9000.0,
    compile_ms=20_000.0,
)


def config_of(max_steps: int) -> Config:
    """The documented run, but shorter."""
    config = documented_config()
    train = config.train.model_copy(update={"max_steps": max_steps})
    return config.model_copy(update={"train": train})


def imported(
    text: str | bytes,
    max_steps: int = 1000,
    run_number: int | None = None,
    read: Callable[[Path], Printed] = read_nanogpt_log,
    name: str = "nanogpt.txt",
) -> tuple[Recorded, Measurements]:
    """Import a log and read back what lies in the run folder."""
    config, prediction = config_of(max_steps), documented_prediction()
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / name, Path(folder) / "run"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        import_log(read, path, config, prediction, None, None, out, run_number)
        recorded = read_log(out)
    return recorded, measure(recorded, config, prediction)


def texts(recorded: Recorded, what: str) -> list[str]:
    """What the events of this kind say."""
    return [event.text for event in recorded.events if event.what == what]
