"""A run for the tests of the mirror, and readers of W&B's own files."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import ROOT, wait_until

from nanogauge.config import Config
from nanogauge.hardware import lookup
from nanogauge.prediction.prediction import predict
from nanogauge.runlog.folder import write_spec
from nanogauge.runlog.reader import LOG_NAME
from nanogauge.runlog.writer import RunLog
from nanogauge.runspec import RunSpec
from nanogauge.schema import Checkpoint, Compile, End, Estimate, Eval, Event, LogLine, Sensor, Start, Step
from nanogauge.sinks.mirror import Mirror, finish_mirrors
from nanogauge.sinks.sink import SinkName

STEPS = 20
TOKENS = 4 * 8 * 2
"""Of one step."""
RUN_ID = "night123"
CONFIG = Config.model_validate(
    {
        "run": {"name": "night"},
        "model": {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 8, "vocab_size": 64},
        "data": {"embedded": True, "tokens": 4096},
        "train": {"micro_batch": 4, "grad_accum": 2, "max_steps": STEPS, "log_every": 5},
        "wandb": {"mode": "disabled", "project": "nights"},
    }
)


SPEC = RunSpec.from_config(CONFIG, "bfloat16")
PREDICTED = predict(SPEC, lookup("RTX 4070", "bfloat16"))
CHOSEN = {
    "mfu_palm": (0.2, 0.25, 0.3),
    "mfu_6n": (0.1, 0.15, 0.2),
    "power_watts": (180.0, 190.0, 200.0),
    "energy_kwh": (0.003, 0.004, 0.005),
    "peak_allocated_bytes": (8e9, 9e9, 1e10),
    "peak_process_bytes": (9e9, 1e10, 1.1e10),
}
"""Low, expected and high of the predictions in the golden rows."""
STEP_SECONDS = Estimate(low=3.6, expected=4.0, high=4.4, unit="s", formula="by hand", source="a calibration")
PREDICTION = PREDICTED.model_copy(
    update={
        "quantities": {
            name: estimate.model_copy(update=dict(zip(("low", "expected", "high"), CHOSEN.get(name, ()), strict=False)))
            for name, estimate in PREDICTED.quantities.items()
            if name != "val_loss"
        },
        "calibrated": {"step_seconds": STEP_SECONDS},
    }
)
PREDICTION_JSON = PREDICTION.model_dump_json()


def make_folder(folder: Path) -> Path:
    """Write a run folder as it is before step 0."""
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(CONFIG.to_toml())
    write_spec(folder, SPEC)
    (folder / "machine.json").write_text('{"gpu": "RTX 4070"}')
    (folder / "prediction.json").write_text(PREDICTION_JSON)
    return folder


def start_line(first_step: int = 0) -> Start:
    return Start(
        elapsed_seconds=0.125,
        unix_time=1.0,
        max_steps=STEPS,
        first_step=first_step,
        prediction_sha256=hashlib.sha256(PREDICTION_JSON.encode()).hexdigest(),
        device="RTX 4070",
        train_tokens=3700,
        idle_power_watts=12.5,
        idle_utilization=0.01,
        other_programs={"Xorg": 300, "firefox": 700},
        wandb_id=RUN_ID,
    )


def lines_of_a_run(first_step: int = 0, last_step: int = STEPS) -> Iterator[LogLine]:
    """Yield the lines of one process; every field of a log is in one of them."""
    yield start_line(first_step)
    yield Compile(elapsed_seconds=5.0, seconds=4.5, mode="compiled")
    for step in range(first_step, last_step):
        t = 10.0 + 4 * (step - first_step)
        if step % 10 == 0:
            yield Eval(elapsed_seconds=t, step=step, train_loss=4.0, val_loss=4.25 - step, seconds=1.5)
            yield Checkpoint(elapsed_seconds=t + 0.5, step=step, seconds=0.25, bytes=2**20)
        if step == 7:
            yield Compile(elapsed_seconds=t + 0.75, step=7, seconds=2.5, mode="compiled")
        yield Sensor(
            elapsed_seconds=t + 1,
            power_watts=190.0 + step,
            power_min_watts=150.0,
            power_max_watts=200.5,
            energy_joules=700.0 * (step - first_step + 1),
            energy_source="counter",
            integral_joules=690.0 * (step - first_step + 1),
            gap_seconds=0.5 if step > 3 else None,
            power_limit_watts=200.0,
            temperature_celsius=60.0 + step,
            fan=0.4,
            sm_clock_hz=2.6e9,
            memory_clock_hz=10.5e9,
            utilization=0.99,
            throttle=["power limit"] if step in (4, 5) else [],
            pcie_generation=4,
            pcie_width=16,
            device_used_bytes=10 * 2**30,
            process_used_bytes=9 * 2**30 + (step if step < 12 else 0),
        )
        detailed = step % 8 == 0
        yield Step(
            elapsed_seconds=t + 4,
            step=step,
            loss=5.0 - step / 7,
            step_seconds=3.9 + step / 1000,
            printed_seconds=4.5 if step == 0 else None,
            data_wait_seconds=None if step == 5 else 0.01 * step,
            forward_seconds=1.25 if detailed else None,
            backward_seconds=2.5 if detailed else None,
            optimizer_seconds=0.125 if detailed else None,
            learning_rate=1e-4 * step,
            grad_norm=1.5,
            tokens=TOKENS,
            power_watts=181.0 + step if step != 10 else None,
            power_min_watts=140.0,
            power_max_watts=201.0,
            peak_allocated_bytes=9_000_000_000 + step if detailed else None,
            peak_reserved_bytes=9_500_000_000 if detailed else None,
            peak_host_bytes=2_000_000_000 if detailed else None,
        )
    yield Event(level="warning", what="slow", text="The clock fell.", step=last_step)
    yield Event(level="alarm", what="hot", text="The card is at its limit.", step=last_step)
    yield Event(level="info", what="fine", text="Nothing.", step=last_step)


END = End(
    elapsed_seconds=99.0,
    status="finished",
    steps=STEPS,
    wall_seconds=99.5,
    peak_allocated_bytes=9_100_000_000,
    peak_reserved_bytes=9_600_000_000,
    peak_process_bytes=9_700_000_000,
    peak_host_bytes=2_100_000_000,
    peak_inactive_bytes=400_000_000,
    allocation_retries=3,
    others_processor_share=0.1,
    reason="none",
)
STOPPED = End(elapsed_seconds=50.0, status="stopped", steps=10, wall_seconds=50.0)

GOLDEN = [json.loads(line) for line in (ROOT / "tests/data/wandb_rows.jsonl").open()]
"""Rows of lines_of_a_run() with every fifth step."""


def write(folder: Path, lines: Iterable[LogLine]) -> None:
    with RunLog(folder) as log:
        for line in lines:
            log.write(line)


def start_sink(sink: SinkName, folder: Path, *options: str, run_id: str = RUN_ID) -> Mirror:
    (folder / LOG_NAME).touch()
    return Mirror(sink, folder, ["--project=nights", "--log-every=5", f"--id={run_id}", *options])


def start(folder: Path, mode: str = "offline", run_id: str = RUN_ID) -> Mirror:
    """Start mirroring to W&B."""
    return start_sink("wandb", folder, f"--mode={mode}", run_id=run_id)


def finish(*mirrors: Mirror, timeout_seconds: float = 30.0) -> str:
    """Wait for mirrors; return their warnings. The time limit is tested by itself."""
    return " ".join(finish_mirrors(mirrors, timeout_seconds))


def records_of(path: Path) -> Iterator[Any]:
    """Yield W&B's records in an offline file, which has the framing of LevelDB's log."""
    from wandb.proto import wandb_internal_pb2

    data = path.read_bytes()
    assert data[:4] == b":W&B"
    position, message = 7, b""
    while position < len(data):
        rest_of_block = 32768 - position % 32768
        if rest_of_block < 7:
            position += rest_of_block
            continue
        length = int.from_bytes(data[position + 4 : position + 6], "little")
        kind = data[position + 6]
        message += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            record.ParseFromString(message)
            yield record
            message = b""


def items(entries: Any) -> dict[str, Any]:
    named = {e.key or "/".join(e.nested_key): json.loads(e.value_json) for e in entries}
    return {key: value for key, value in named.items() if not key.startswith("_")}


def offline_files(folder: Path) -> list[Path]:
    """Return W&B's offline files, oldest first."""
    return sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=os.path.getmtime)


def recorded(folder: Path) -> list[Any]:
    """Return the records of the newest offline file."""
    return list(records_of(offline_files(folder)[-1]))


def rows_in(records: Iterable[Any]) -> list[dict[str, Any]]:
    """Return the rows of history except the report and the charts."""
    rows = [items(r.history.item) for r in records if r.WhichOneof("record_type") == "history"]
    return [row for row in rows if not any(key.startswith(("report/", "bands/")) for key in row)]


def summary_in(records: Iterable[Any]) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    for record in records:
        if record.WhichOneof("record_type") == "summary":
            summary |= items(record.summary.update)
    return summary


def processes_of(folder: Path) -> dict[int, str]:
    """Return process id -> command line of a folder's mirror and the processes it started."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment = (process / "environ").read_bytes()
            command = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if f"NANOGAUGE_TEST={folder}".encode() in environment.split(b"\0"):
            found[int(process.name)] = command.replace(b"\0", b" ").decode()
    return found


def all_gone(folder: Path) -> bool:
    """Return True once the mirror, and soon after it W&B's own process, have ended."""
    return wait_until(lambda: not processes_of(folder), 3)


def cores_of(folder: Path) -> list[int]:
    """Return the ids of W&B's own processes."""
    return [pid for pid, command in processes_of(folder).items() if "wandb-core" in command]


def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a run folder, and an environment with its name and without the user's W&B."""
    made = make_folder(tmp_path / "runs" / "night")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NANOGAUGE_TEST", str(made))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    return made
