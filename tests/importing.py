"""Import a log into a run folder and read back what lies there."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from examples import documented_prediction, documented_spec, nanogpt_log

from nanogauge.importers.folder import import_log
from nanogauge.importers.nanogpt_log import read_nanogpt_log
from nanogauge.importers.printed import Printed
from nanogauge.report.measured import Measurements, measure
from nanogauge.runlog import Recorded, read_log
from nanogauge.runspec import RunSpec

LOG = nanogpt_log(
    iterations=1000,
    log_every=100,
    eval_every=500,
    step_ms=lambda _: 2000.0,
    evaluation_ms=9000.0,
    compile_ms=20_000.0,
)


def spec_of(steps: int) -> RunSpec:
    """Return the documented run, but shorter."""
    return replace(documented_spec(), steps=steps)


def imported(
    text: str | bytes,
    max_steps: int = 1000,
    run_number: int | None = None,
    read: Callable[[Path], Printed] = read_nanogpt_log,
    name: str = "nanogpt.txt",
) -> tuple[Recorded, Measurements]:
    """Import a log and read back what lies in the run folder."""
    spec, prediction = spec_of(max_steps), documented_prediction()
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / name, Path(folder) / "run"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        import_log(read, path, spec, prediction, None, None, out, run_number)
        recorded = read_log(out)
    return recorded, measure(recorded, spec, prediction)


def texts(recorded: Recorded, what: str) -> list[str]:
    """What the events of this kind say."""
    return [event.text for event in recorded.events if event.what == what]
