"""The W&B mirror: what it writes, and that nothing W&B does reaches the run."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nanogauge.config import Config
from nanogauge.errors import BadInput
from nanogauge.records import (
    Compile,
    End,
    Estimate,
    Eval,
    Event,
    Hardware,
    LogLine,
    Prediction,
    Sensor,
    Start,
    Step,
)
from nanogauge.runlog import RunLog
from nanogauge.tracking import OUTPUT_NAME, Mirror, main

ROOT = Path(__file__).parents[1]
STEPS = 20
PEAK_FLOPS = 58.3e12
FLOPS_TOTAL = 3.146e15


def make_folder(folder: Path) -> Path:
    """A run folder as train.py leaves it before step 0."""
    folder.mkdir(parents=True)
    config = Config.model_validate(
        {
            "run": {"name": "night"},
            "model": {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 8, "vocab_size": 64},
            "data": {"embedded": True},
            "train": {"micro_batch": 4, "max_steps": STEPS, "log_every": 5},
        }
    )
    (folder / "config.toml").write_text(config.to_toml())
    hardware = Hardware(
        name="RTX 4070",
        kind="geforce",
        architecture="Ada",
        peak_flops=PEAK_FLOPS,
        peak_name="46 SMs x 512 FLOP x 2.475 GHz",
        matmul_flops=None,
        memory_bytes=12 * 2**30,
        bandwidth_bytes_per_second=504e9,
        power_limit_watts=200.0,
        source="datasheet",
    )

    def estimate(value: float, unit: str) -> Estimate:
        low, high = 0.9 * value, 1.1 * value
        return Estimate(
            low=low, expected=value, high=high, unit=unit, formula="by hand", source="test"
        )

    prediction = Prediction(
        created_unix=1.0,
        hardware=hardware,
        dtype="bfloat16",
        quantities={
            "flops_total_palm": estimate(FLOPS_TOTAL, "FLOP"),
            "step_seconds": estimate(3.9, "s"),
            "mfu_palm": estimate(0.69, "1"),
        },
        unpredicted={"val_loss": "nobody knows"},
        step_parts=[],
        memory_parts=[],
        ledger={"step_s": 3.9 * STEPS},
    )
    (folder / "prediction.json").write_text(prediction.model_dump_json())
    return folder


def lines_of_a_run(first_step: int = 0, last_step: int = STEPS) -> Iterator[LogLine]:
    yield Start(
        elapsed_seconds=0.1,
        unix_time=1.0,
        max_steps=STEPS,
        first_step=first_step,
        prediction_sha256="0" * 64,
        device="cuda:0",
    )
    yield Compile(elapsed_seconds=5.0, seconds=4.5, mode="compiled")
    for step in range(first_step, last_step):
        t = 10.0 + 4 * step
        if step % 10 == 0:
            yield Eval(
                elapsed_seconds=t, step=step, train_loss=4.0, val_loss=4.25 - step, seconds=1.5
            )
        yield Sensor(
            elapsed_seconds=t + 1,
            power_watts=190.0 + step,
            energy_joules=700.0 * step,
            energy_source="counter",
            sm_clock_hz=2.6e9,
            process_used_bytes=9 * 2**30 + step,
        )
        yield Step(
            elapsed_seconds=t + 4,
            step=step,
            loss=5.0 - step / 7,
            step_seconds=3.9 + step / 1000,
            data_wait_seconds=None if step == 5 else 0.01 * step,
            learning_rate=1e-4 * step,
            grad_norm=1.5,
            tokens=524288,
        )
    yield Event(level="warning", what="slow", text="The clock fell.", step=last_step)
    yield Event(level="info", what="fine", text="Nothing.", step=last_step)


END = End(elapsed_seconds=99.0, status="finished", steps=STEPS, wall_seconds=99.5)


def write(folder: Path, lines: Iterator[LogLine] | list[LogLine]) -> None:
    with RunLog(folder) as log:
        for line in lines:
            log.write(line)


def records_of(path: Path) -> Iterator[Any]:
    """W&B's own records in an offline file: a log in LevelDB's framing."""
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


def recorded(folder: Path) -> list[Any]:
    (path,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    return list(records_of(path))


def expected_rows(lines: Iterator[LogLine]) -> list[dict[str, Any]]:
    rows = []
    sensor = None
    predicted = {"predicted/step_seconds": 3.9, "predicted/mfu_palm": 0.69}
    for line in lines:
        if isinstance(line, Sensor):
            sensor = line
        elif isinstance(line, Eval):
            row = {"train_loss": line.train_loss, "val_loss": line.val_loss}
            row = {f"eval/{key}": value for key, value in row.items()}
            row |= {"eval/seconds": line.seconds, "run/elapsed_seconds": line.elapsed_seconds}
            rows.append({**row, "step": line.step})
        elif isinstance(line, Step) and line.step % 5 == 0:
            assert line.step_seconds is not None and sensor is not None
            row = {
                "train/loss": line.loss,
                "train/learning_rate": line.learning_rate,
                "train/grad_norm": line.grad_norm,
                "perf/step_seconds": line.step_seconds,
                "perf/data_wait_seconds": line.data_wait_seconds,
                "perf/tokens_per_second": 524288 / line.step_seconds,
                "perf/mfu_palm": FLOPS_TOTAL / STEPS / line.step_seconds / PEAK_FLOPS,
                "gpu/power_watts": sensor.power_watts,
                "gpu/energy_joules": sensor.energy_joules,
                "gpu/sm_clock_hz": sensor.sm_clock_hz,
                "memory/process_used_bytes": sensor.process_used_bytes,
                "run/elapsed_seconds": line.elapsed_seconds,
                "step": line.step,
                **predicted,
            }
            rows.append({key: value for key, value in row.items() if value is not None})
    return rows


def wait_until(true: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def processes_of(folder: Path) -> dict[int, str]:
    """Process number and command line of all that a mirror of this folder is and started."""
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
    """W&B's own process sees the end of the mirror's a moment later, and ends too."""
    return wait_until(lambda: not processes_of(folder), 3)


def cores_of(folder: Path) -> list[int]:
    """W&B's own processes among them."""
    return [pid for pid, command in processes_of(folder).items() if "wandb-core" in command]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder; processes that the test starts carry its name, and know no W&B but this."""
    made = make_folder(tmp_path / "runs" / "night")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NANOGAUGE_TEST", str(made))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    return made


def test_every_value_in_wandb_is_the_logs(folder: Path) -> None:
    """The mirror of a run says what its log says: a key mixed up would mislead all night."""
    mirror = Mirror.start(folder, "offline", "nights", 5)
    write(folder, lines_of_a_run())
    write(folder, [END])
    assert mirror.finish() is None, (folder / OUTPUT_NAME).read_text()
    records = recorded(folder)
    rows = [items(r.history.item) for r in records if r.WhichOneof("record_type") == "history"]
    assert rows == expected_rows(lines_of_a_run())

    alerts = [r.alert for r in records if r.WhichOneof("record_type") == "alert"]
    assert [(a.title, a.text, a.level) for a in alerts] == [("slow", "The clock fell.", "WARN")]
    (run,) = [r.run for r in records if r.WhichOneof("record_type") == "run"][:1]
    config = items(run.config.update)
    assert run.project == "nights" and run.display_name == "night"
    assert config["train"]["max_steps"] == STEPS
    assert config["prediction"]["step_seconds"]["high"] == pytest.approx(1.1 * 3.9)
    summary: dict[str, Any] = {}
    for record in records:
        if record.WhichOneof("record_type") == "summary":
            summary |= items(record.summary.update)
    assert summary["run/status"] == "finished" and summary["perf/compile_seconds"] == 4.5
    assert all_gone(folder)


@pytest.fixture
def silent_server() -> Iterator[str]:
    """A server that takes every connection and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    taken.append(server.accept()[0])
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_wandb_that_hangs_cannot_hold_up_the_end(
    folder: Path, silent_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """wandb.init waits 90 s for a server that says nothing: a run must not wait with it."""
    monkeypatch.setenv("WANDB_BASE_URL", silent_server)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    began = time.monotonic()
    mirror = Mirror.start(folder, "online", "nights", 5)
    write(folder, [*lines_of_a_run(), END])
    assert time.monotonic() - began < 1, "neither the start nor the log waits for W&B"
    assert wait_until(lambda: bool(cores_of(folder)), 15)
    began = time.monotonic()
    warning = mirror.finish(3.0)
    assert time.monotonic() - began < 5
    assert warning is not None and "not taken all of the run after 3 s" in warning
    assert all_gone(folder)


def test_without_a_key_auto_is_offline_and_online_says_so(folder: Path) -> None:
    """Nobody who has no account is asked for one; who asked for online learns it was not."""
    write(folder, [*lines_of_a_run(), END])
    for mode, warned in (("auto", False), ("online", True)):
        mirror = Mirror.start(folder, mode, "nights", 5)  # type: ignore[arg-type]
        warning = mirror.finish()
        assert (warning is not None) == warned, (folder / OUTPUT_NAME).read_text()
    assert warning is not None
    assert "No API key" in warning and "wandb sync" in warning
    files = sorted((folder / "wandb").glob("offline-run-*/*.wandb"), key=os.path.getmtime)
    for path in files:
        rows = [r for r in records_of(path) if r.WhichOneof("record_type") == "history"]
        assert len(rows) == len(expected_rows(lines_of_a_run()))
    assert len(files) == 2
    assert all_gone(folder)


PARENT = """
import sys, time
from pathlib import Path
from nanogauge.tracking import Mirror
mirror = Mirror.start(Path(sys.argv[1]), "offline", "nights", 5)
print("started", flush=True)
time.sleep(60)
"""


def test_the_mirror_of_a_killed_run_ends_by_itself(folder: Path) -> None:
    """A run killed for memory writes no end line; its mirror must not wait for one for ever."""
    write(folder, lines_of_a_run())
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(folder)], cwd=ROOT, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == b"started\n"
        assert wait_until((folder / "wandb").exists, 15)
        assert wait_until(lambda: bool(cores_of(folder)), 15)
        os.kill(parent.pid, signal.SIGKILL)
    assert wait_until(lambda: not processes_of(folder), 10), processes_of(folder)
    rows = [r for r in recorded(folder) if r.WhichOneof("record_type") == "history"]
    assert len(rows) == len(expected_rows(lines_of_a_run())), "all that was logged is mirrored"


def test_a_resumed_run_is_mirrored_whole_and_alerts_only_for_what_is_new(folder: Path) -> None:
    """An old end line must not end the new mirror, nor an old warning wake anybody twice."""
    stopped = End(elapsed_seconds=50.0, status="stopped", steps=10, wall_seconds=50.0)
    write(folder, [*lines_of_a_run(last_step=10), stopped])
    mirror = Mirror.start(folder, "offline", "nights", 5)
    assert wait_until(lambda: bool(list((folder / "wandb").glob("*/*.wandb"))), 15)
    time.sleep(1.0)  # the mirror is past the old end line by now
    write(folder, [*lines_of_a_run(first_step=10), END])
    assert mirror.finish() is None, (folder / OUTPUT_NAME).read_text()
    records = recorded(folder)
    rows = [items(r.history.item) for r in records if r.WhichOneof("record_type") == "history"]
    assert rows == [
        *expected_rows(lines_of_a_run(last_step=10)),
        *expected_rows(lines_of_a_run(first_step=10)),
    ]
    assert len([r for r in records if r.WhichOneof("record_type") == "alert"]) == 1


def test_a_mirror_that_fails_leaves_the_run_alone_and_says_why(folder: Path) -> None:
    """W&B's process may be killed for memory: the log goes on, and the end names the cause."""
    mirror = Mirror.start(folder, "offline", "nights", 1)
    assert wait_until(lambda: bool(list((folder / "wandb").glob("*/*.wandb"))), 15)
    for pid in cores_of(folder):
        os.kill(pid, signal.SIGKILL)
    write(folder, [*lines_of_a_run(), END])
    warning = mirror.finish()
    assert warning is not None and "W&B failed before the end" in warning, warning
    assert all_gone(folder)


def test_tracking_loads_neither_wandb_nor_torch() -> None:
    """The loop imports this module: half a second of wandb belongs to the mirror alone."""
    code = "import sys, nanogauge.tracking; print({'wandb', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    assert done.stdout == b"set()\n"


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="config.toml"):
        main([str(tmp_path)])
    make_folder(tmp_path / "run")
    (tmp_path / "run" / "prediction.json").unlink()
    with pytest.raises(BadInput, match="prediction.json"):
        main([str(tmp_path / "run")])
