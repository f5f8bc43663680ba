"""Make one anonymous row of a finished run, for the tables that predictions are validated with.

It has the GPU, driver, torch, what ran, step time, memory, power and clock: no name, path, data set, commit or time. It
is printed, and written only with --write.
"""

import csv
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nanogauge.analysis.measured import Measurements, finished_run, measure
from nanogauge.cli import Parser, print_json
from nanogauge.errors import BadInput
from nanogauge.prediction.calibrated import Calibration, add_to_calibration
from nanogauge.prediction.flops import count_parameters
from nanogauge.prediction.workload import resolve_dtype, workload_of
from nanogauge.runlog.folder import RunFolder, load_with_log
from nanogauge.runlog.history import RunHistory
from nanogauge.runspec import NO_SHAPE

COLUMNS = """
id source source_detail gpu n_gpus precision compile flash_attn n_layer n_head n_embd block_size
vocab_size params_m micro_batch grad_accum world activation_ckpt optimizer iter_ms tokens_per_sec
mfu_logged mfu_peak_used_tflops peak_vram_mib power_w confidence quote
"""
"""Columns of a table of published runs."""
SHARED_COLUMNS = ("driver", "torch", "sm_clock_mhz", "spec")
"""Columns that a shared row has beside them; spec is the JSON of a RunSpec."""
_SPEC_FIELDS = """
schema_version shape micro_batch grad_accum world_size sharding dtype compile dropout head
recomputation attention program
"""

SharedRow = dict[str, object]


def main(arguments: Sequence[str]) -> int:
    parser = Parser(f"{__doc__}\n  %(prog)s runs/NAME --write rows.csv")
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--write", type=Path, metavar="CSV", help="append the row to this table")
    parser.add_argument("--calibrate", action="store_true", help="base this machine's predictions on the run")
    parser.add_argument("--json", action="store_true", help="print only JSON")
    given = parser.parse(arguments)
    folder, recorded = load_with_log(given.run)
    measurements = measure(recorded, folder.spec, folder.prediction)
    row = shared_row(folder, recorded, measurements)
    if given.json:
        print_json(row)
    else:
        width = max(map(len, row))
        print("\n".join(f"{name:{width}}  {value}" for name, value in row.items() if value != ""))
    said = []
    if given.write is not None:
        _append(given.write, row)
        said.append(f"{given.write} has this row; CONTRIBUTING.md says where to send it.")
    if given.calibrate:
        said.append(_calibrate(folder, recorded, measurements))
    if not given.json:
        print("\n" + ("\n".join(said) or "Nothing was written: give --write CSV to keep the row."))
    return 0


def shared_row(folder: RunFolder, recorded: RunHistory, measurements: Measurements) -> SharedRow:
    """Return the row of a run on GPUs; what was not measured is empty.

    Raises:
        BadInput: if the run has no shape, no step time, or was on a CPU.
    """
    hardware, spec, values = folder.prediction.hardware, folder.spec, measurements.values
    if spec.traced is not None:
        raise BadInput(f"{folder.path} cannot be shared: {NO_SHAPE}; give the run of a GPT.")
    if hardware.kind == "cpu" or "step_seconds" not in values:
        why = measurements.missing.get("step_seconds", "it ran on a CPU, and no table has its peak")
        raise BadInput(f"{folder.path} cannot be shared: {why}; give a run on a GPU.")
    spec = spec.resolved(folder.prediction.dtype, folder.prediction.gpus)
    work, step = workload_of(spec, on_gpu=True), values["step_seconds"].value
    limit = hardware.power_limit_watts
    limited = limit is not None and limit != hardware.board_power_watts
    peak, power = values.get("peak_allocated_bytes"), values.get("power_watts")
    clocks = recorded.sensors.known("sm_clock_hz")
    described = {name: value for name, value in spec.to_dict().items() if name in _SPEC_FIELDS.split()}
    optimizer = {"name": spec.optimizer.name, "grad_clip": spec.optimizer.grad_clip}
    row: SharedRow = dict.fromkeys((*COLUMNS.split(), *SHARED_COLUMNS), "") | {
        "source": "nanogauge share",
        "gpu": hardware.name + (f" ({limit:.0f} W limit)" if limited else ""),
        "n_gpus": work.gpus,
        "precision": resolve_dtype(spec, on_gpu=True),
        "compile": "" if spec.compile is None else ("yes" if spec.compile else "no"),
        "flash_attn": {"flash": "yes", "flash3": "fa3", "plain": "no"}[work.attention],
        "n_layer": work.shape.n_layer,
        "n_head": work.shape.n_head,
        "n_embd": work.shape.n_embd,
        "block_size": work.shape.context,
        "vocab_size": work.shape.vocabulary,
        "params_m": round(count_parameters(work.shape).total / 1e6, 2),
        "micro_batch": work.micro_batch,
        "grad_accum": work.grad_accum,
        "world": work.gpus,
        "activation_ckpt": "no" if work.checkpointing == "none" else work.checkpointing,
        "optimizer": work.optimizer,
        "iter_ms": round(1e3 * step, 3),
        "tokens_per_sec": round(work.tokens_per_step / step),
        "peak_vram_mib": round(peak.value / 2**20, 1) if peak is not None else "",
        "power_w": round(power.value / work.gpus, 1) if power is not None else "",
        "confidence": "high" if spec.compile is not None else "medium",
        "driver": _version(folder.machine.get("gpu_driver")),
        "torch": _version(folder.machine.get("torch")),
        "sm_clock_mhz": round(float(np.median(clocks)) / 1e6) if len(clocks) else "",
        "spec": json.dumps(described | {"steps": 1, "optimizer": optimizer}),
    }
    digest = hashlib.sha256(json.dumps(row).encode()).hexdigest()
    return row | {"id": f"{re.sub('[^a-z0-9]+', '-', hardware.name.lower())}-{digest[:8]}"}


def _version(value: object) -> str:
    """Return a version number as it is, and anything else as empty."""
    return value if isinstance(value, str) and re.fullmatch(r"[0-9A-Za-z.+-]{1,30}", value) else ""


def _append(path: Path, row: SharedRow) -> None:
    try:
        is_new = not path.exists() or path.stat().st_size == 0
        with path.open("a", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if is_new:
                writer.writeheader()
            writer.writerow(row)
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}; give --write another file.") from None


def _calibrate(folder: RunFolder, recorded: RunHistory, measurements: Measurements) -> str:
    """Store the run for predictions on this device, and return a sentence about it."""
    torch_version = _version(folder.machine.get("torch"))
    if not torch_version:
        raise BadInput(f"{folder.path} does not say its version of torch; leave out --calibrate.")
    run = finished_run(folder.spec, folder.prediction, recorded, measurements)
    device = folder.prediction.hardware.name
    newer = Calibration(device=device, torch=torch_version, threads=None, runs=(run,))
    _, warning = add_to_calibration(newer)
    return warning or f"Predictions for {device} and torch {torch_version} now know this run."
