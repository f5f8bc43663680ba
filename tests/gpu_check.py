"""Check a CUDA GPU: make gpu-check PART=arithmetic, then PART=speed, at most 8 minutes each.

arithmetic runs the tests with the mark gpu. speed times a step of the documented run in several variants, and that of a
checkout of nanoGPT, and compares each with its prediction. gpu-check.json has all figures, gpu-check.md is a page to
send in; a part replaces what it wrote before.
"""

import argparse
import contextlib
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import trainer.step.torch_env  # noqa: E402, F401  before torch

# isort: split
import pytest  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from model import GPT  # noqa: E402
from nanogauge.config import Config, load_config  # noqa: E402
from nanogauge.measure.sensors import driver_info, measure_idle, open_sensors  # noqa: E402
from nanogauge.measure.torch_device import allocator_peaks  # noqa: E402
from nanogauge.prediction.prediction import predict  # noqa: E402
from nanogauge.programs import program_named  # noqa: E402
from nanogauge.runspec import RunSpec  # noqa: E402
from trainer.calibrate import describe_hardware  # noqa: E402
from trainer.step.compile import persist_compile_cache  # noqa: E402
from trainer.step.device import autocast, is_out_of_memory, reset_allocator_peaks  # noqa: E402
from trainer.step.loss import TrainingLoss  # noqa: E402
from trainer.step.optimizer import make_optimizer, update  # noqa: E402

IDLE_SECONDS, TIMED_SECONDS = 5.0, 4.0
JSON, PAGE = Path("gpu-check.json"), Path("gpu-check.md")
SCALES = {"step_seconds": 1.0, "peak_allocated_bytes": 1e9}
NANOGPT = "nanoGPT"
VARIANTS: dict[str, tuple[int, dict[str, dict[str, Any]]]] = {
    "as configured": (0, {}),
    "plain head": (0, {"train": {"head": "plain"}}),
    "head in 1 chunk": (1, {}),
    "head in 2 chunks": (2, {}),
    "head in 4 chunks": (4, {}),
    "micro-batch of 8": (0, {"train": {"micro_batch": 8, "grad_accum": 64}}),
    "micro-batch of 32": (0, {"train": {"micro_batch": 32, "grad_accum": 16}}),
    "eager": (0, {"run": {"compile": False}}),
}
"""Chunks of the vocabulary head (0: as the trainer chooses) and configuration keys."""


class Outcomes:
    """A plugin of pytest that collects the outcome of each test, and what it printed."""

    def __init__(self) -> None:
        self.checks: list[dict[str, Any]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            text = report.capstdout if report.passed else str(report.longrepr)[-2000:]
            check = {"name": report.nodeid.split("::")[-1], "outcome": report.outcome}
            self.checks.append(check | {"seconds": round(report.duration, 1), "text": text})


def ours(config: Config, chunks: int, dtype: str, device: torch.device) -> dict[str, Any]:
    """Return measured and predicted figures of the model of a configuration."""
    train = config.train
    model = GPT(config.model).to(device)
    loss = TrainingLoss(model, config.head, train.grad_accum, device)
    if config.run.compile:
        loss.compile()
    optimizer = make_optimizer(model, config.optimizer)
    tokens = train.micro_batch * config.model.block_size
    chosen = mock.patch("trainer.step.loss.chunk_tokens", return_value=-(-tokens // (chunks or 1)))
    with chosen if chunks else contextlib.nullcontext():
        return compare(RunSpec.from_config(config, dtype), model, optimizer, loss, device)


def nanogpt(config: Config, folder: Path, dtype: str, device: torch.device) -> dict[str, Any]:
    """Return the same of the model in a nanoGPT checkout, used as in its train.py."""
    found = importlib.util.spec_from_file_location("nanogpt_model", folder / "model.py")
    assert found is not None and found.loader is not None
    module = sys.modules["nanogpt_model"] = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
    shape = {name: getattr(config.model, name) for name in names}
    model = module.GPT(module.GPTConfig(**shape)).to(device)
    adamw = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cuda")
    compiled = torch.compile(model)
    spec = replace(RunSpec.from_config(config, dtype), program=program_named("nanogpt"), head="plain")
    return compare(spec, model, adamw, lambda x, y: compiled(x, y)[1], device)


def compare(
    spec: RunSpec,
    model: nn.Module,
    optimizer: torch.optim.AdamW,
    loss: Callable[[Tensor, Tensor], Tensor],
    device: torch.device,
) -> dict[str, Any]:
    """Time a step on random tokens, as (grad_accum - 1) micro-batches and one with an update."""
    shape = (2, spec.micro_batch, spec.shape.context)
    tokens, targets = torch.randint(spec.shape.vocabulary, shape, device=device)
    scaler = torch.amp.GradScaler("cuda", enabled=spec.dtype == "float16")

    def micro_batch() -> None:
        with autocast(device, spec.dtype):
            value = loss(tokens, targets) / spec.grad_accum
        scaler.scale(value).backward()

    def last() -> None:
        micro_batch()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(list(model.parameters()), 1.0)
        update(optimizer, scaler, torch.isfinite(norm))
        optimizer.zero_grad(set_to_none=True)

    last()  # compiles
    reset_allocator_peaks(device)
    passes, ends = timed(micro_batch, TIMED_SECONDS), timed(last, TIMED_SECONDS / 4)
    measured = {
        "step_seconds": (spec.grad_accum - 1) * passes + ends,
        "peak_allocated_bytes": allocator_peaks(device)["peak_allocated_bytes"],
    }
    prediction = predict(spec, describe_hardware(device, spec.dtype)[0])
    row: dict[str, Any] = {}
    for name, value in measured.items():
        predicted = prediction[name].model_dump(include={"low", "expected", "high"})
        row[name] = {"measured": value, **predicted}
    return row


def timed(work: Callable[[], object], seconds: float) -> float:
    """Return the median device time of calls for at least `seconds`, and at least 3."""
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def measure_speed(path: Path, folder: Path | None, uuid: str) -> dict[str, Any]:
    """Measure all variants of a configuration; one that does not fit has the reason instead."""
    idle = measure_idle(uuid, 10.0, IDLE_SECONDS)  # before the context of CUDA
    device = torch.device("cuda", torch.cuda.current_device())
    dtype = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    sensors = open_sensors(uuid, 10.0, time.monotonic)
    rows, load_watts = [], None
    for name in [*VARIANTS, *([NANOGPT] if folder is not None else [])]:
        print(name, "...", flush=True)
        chunks, keys = VARIANTS.get(name, (0, {}))
        config = load_config(path, keys)
        sensors.power_since_last()
        try:
            if name == NANOGPT and folder is not None:
                row = nanogpt(config, folder, dtype, device)
            else:
                row = ours(config, chunks, dtype, device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            row = {"why": "it does not fit into the memory"}
        rows.append({"variant": name, **row})
        power = sensors.power_since_last()
        load_watts = power.max_watts if power is not None and load_watts is None else load_watts
        torch.cuda.empty_cache()
    sensors.close()
    return {"variants": rows, "idle_watts": idle.power_watts, "load_watts": load_watts}


def page(found: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    lines = [f"# {found['gpu']['name']}: gpu-check", ""]
    lines += [f"* {name}: {value}" for name, value in found["gpu"].items()]
    lines += ["", "| check | outcome | s |", "|---|---|---|"]
    for check in found.get("arithmetic", []):
        words = check["name"].replace("_", " ")
        lines.append(f"| {words} | {check['outcome']} | {check['seconds']} |")
    speed = found.get("speed", {"variants": []})
    lines += ["", "| variant | step, s | predicted | GB | predicted |", "|---|---|---|---|---|"]
    for row in speed["variants"]:
        cells = [row["variant"]]
        for name, scale in SCALES.items():
            value = {key: f"{x / scale:.3f}" for key, x in row.get(name, {}).items()}
            ends = " to ".join(value[end] for end in ("low", "high") if value)
            cells += [value.get("measured", row.get("why", "")), ends]
        lines.append(f"| {' | '.join(cells)} |")
    watts = (f"{speed.get(key, 'not measured')} W" for key in ("idle_watts", "load_watts"))
    return "\n".join([*lines, "", f"Power idle and at most: {', '.join(watts)}."]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["arithmetic", "speed"])
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "rtx4070_fineweb.toml")
    parser.add_argument("--nanogpt", type=Path)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu-check: no CUDA GPU is visible to torch; see plan.py --doctor", file=sys.stderr)
        return 2
    properties = torch.cuda.get_device_properties(0)
    driver = driver_info(str(properties.uuid))
    found = json.loads(JSON.read_text()) if JSON.exists() else {"schema": 1}
    found["gpu"] = {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "driver": driver.driver_version,
        "power_limit_watts": driver.power_limit_watts,
        "torch": torch.__version__,
    }
    status = 0
    if given.part == "arithmetic":
        outcomes = Outcomes()
        status = int(pytest.main(["-m", "gpu", str(ROOT / "tests" / "test_gpu.py")], [outcomes]))
        found["arithmetic"] = outcomes.checks
    else:
        persist_compile_cache(needed=True)
        torch.set_float32_matmul_precision("high")  # as train.py
        found["speed"] = measure_speed(given.config, given.nanogpt, str(properties.uuid))
    JSON.write_text(json.dumps(found, indent=1) + "\n")
    PAGE.write_text(page(found))
    print(f"{JSON} and {PAGE} are written")
    return status


if __name__ == "__main__":
    sys.exit(main())
