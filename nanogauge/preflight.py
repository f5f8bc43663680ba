"""The doctor at work: what this machine, and a run on it, stand on; before anything is started.

    python plan.py --doctor                  # the machine alone
    python plan.py CONFIG --doctor           # and whether this run has what it needs

measure/ reads and judges; here configuration and prediction come to it. Nothing is written.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import shutil
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from nanogauge.config import Config, RunSection
from nanogauge.errors import BadInput
from nanogauge.hardware import find_gpu
from nanogauge.measure import machine
from nanogauge.measure.doctor import (
    Finding,
    Writes,
    check_data,
    check_disk,
    check_memory,
    check_power,
    check_sleep,
    check_wandb,
    check_wsl,
)
from nanogauge.measure.environment import cpu_name, total_memory_bytes
from nanogauge.measure.gpu import DriverInfo, driver_info
from nanogauge.measure.memory import process_bytes
from nanogauge.measure.toolchain import Card, Torch, check_compiler, check_gpu, check_triton
from nanogauge.predict.checkpoints import state_bytes
from nanogauge.predict.fit import fit_verdict, largest_micro_batch, memory_of, with_micro_batch
from nanogauge.predict.prediction import predict
from nanogauge.prepare.opening import open_dataset
from nanogauge.records import Hardware
from nanogauge.runspec import RunSpec
from nanogauge.schedule import checkpoints

if TYPE_CHECKING:
    import torch

C_TRIED = ("gcc", "clang")
LOG_BYTES_PER_STEP = 600
LOG_BYTES_PER_SECOND = 400
"""of the sensors' readings, which a GPU has"""


def examine(config: Config | None, gpus: int = 1, beside: int = 1) -> list[Finding]:
    """All checks in a fixed order; without a configuration those of the machine alone.

    Args:
        config: of the run.
        gpus: processes that share its steps.
        beside: of these on this machine, whose memory they share where they train on it.

    Imports torch, which has to be asked for the GPU. A check that needs a device is left out where
    the device of the configuration is not there.

    Raises:
        BadInput: if the device has no such arithmetic as the configuration wants.
    """
    run = config.run if config is not None else RunSection(name="NAME")
    device, told, uuid = _torch_facts(run.device)
    driver = driver_info(uuid or 0)
    card = Card(driver.name, driver.driver_version, driver.absent.get("name"), driver.cuda_version)
    key_from = machine.wandb_key_from(os.environ, Path.home())
    mode = config.wandb.mode if config is not None else "auto"
    hardware, dtype = _hardware(run, device) if device is not None else (None, "")
    on_gpu = told.device == "cuda"
    findings = [
        check_gpu(run.device, told, card, os.environ.get("CUDA_VISIBLE_DEVICES")),
        *_check_compilation(run, told.device),
        _check_memory(config, hardware, dtype, driver, gpus, beside)
        if hardware is not None
        else None,
        _check_disk(config, hardware, dtype, gpus),
        _check_data(config) if config is not None else None,
        check_sleep(machine.sleep_facts(machine.ROOT, os.environ, machine.ask)),
        check_wsl(machine.is_wsl(), platform.system(), on_gpu),
        _check_power(driver) if on_gpu else None,
        check_wandb(mode, find_spec("wandb") is not None, key_from),
    ]
    return [finding for finding in findings if finding is not None]


def _torch_facts(wanted: str) -> tuple[torch.device | None, Torch, str | None]:
    """The device of run.device, None where it is not there; what torch says; the GPU's UUID."""
    import nanogauge.threads  # noqa: F401  before torch

    # isort: split
    import torch

    from nanogauge.training.device import choose_device

    device = None
    with warnings.catch_warnings(), contextlib.suppress(BadInput):
        warnings.simplefilter("ignore")  # of a driver that is too old: the check says it
        device = choose_device(wanted)
    if device is None or device.type != "cuda":
        kind = None if device is None else device.type
        return device, Torch(torch.__version__, kind, torch.version.cuda), None
    gpu = torch.cuda.get_device_properties(device)
    told = Torch(
        version=torch.__version__,
        device="cuda",
        cuda=torch.version.cuda,
        gpu=gpu.name,
        capability=(gpu.major, gpu.minor),
        architectures=tuple(torch.cuda.get_arch_list()),
    )
    return device, told, str(gpu.uuid)


def _hardware(run: RunSection, device: torch.device) -> tuple[Hardware, str]:
    """The device as a prediction of memory needs it, and the dtype; no processor is measured."""
    from nanogauge.training.device import choose_dtype

    dtype = choose_dtype(run.dtype, device)
    if device.type != "cpu":
        from nanogauge.present import describe_hardware

        return describe_hardware(device, dtype)[0], dtype
    processor = Hardware(
        name=cpu_name() or "CPU",
        kind="cpu",
        architecture="cpu",
        peak_flops=None,
        peak_name="not measured",
        matmul_flops=None,
        memory_bytes=total_memory_bytes(),
        bandwidth_bytes_per_second=None,
        power_limit_watts=None,
        process_bytes=process_bytes(),
        source="this machine",
    )
    return processor, dtype


def _check_compilation(run: RunSection, device: str | None) -> list[Finding]:
    if device not in ("cuda", "cpu"):
        return []
    unneeded = None if run.compile else "run.compile is false"
    system, wanted = platform.system(), machine.required_version("triton", "torch")
    without_triton = unneeded or (None if device == "cuda" else "the run is on the processor")
    found = error = None
    if without_triton is None:
        found, error = machine.imported_version("triton")
    if device == "cuda":  # as Triton chooses
        language, named = "C", os.environ.get("CC")
        tried = (named,) if named else ("cl", "gcc", "clang") if system == "Windows" else C_TRIED
    else:  # as torch._inductor chooses
        language, named = "C++", os.environ.get("CXX")
        tried = (named or {"Windows": "cl", "Darwin": "clang++"}.get(system, "g++"),)
    compiler = machine.first_found(tried)
    return [
        check_triton(without_triton, wanted, found, error, system),
        check_compiler(unneeded, language, tried, compiler, machine.python_headers()),
    ]


def _check_memory(
    config: Config | None,
    hardware: Hardware,
    dtype: str,
    driver: DriverInfo,
    gpus: int,
    beside: int,
) -> Finding:
    if hardware.kind == "cpu":
        place, total, others = "of memory", total_memory_bytes(), None
    else:
        place, total, others = "on the card", driver.total_bytes, driver.others
    memory = machine.free_memory(hardware, [driver], processes=beside)
    free = None if memory is None else memory.bytes
    if config is None or free is None:
        return check_memory(place, free, total, others, None, None, None)
    spec = config.to_spec(dtype, gpus)
    peak = memory_of(spec, hardware).process
    fit = fit_verdict(peak, free)
    end: Literal["high", "expected"] = "high" if fit == "doubtful" else "expected"
    micro = largest_micro_batch(spec, hardware, free, end)
    smaller = None
    if micro is not None:
        accumulation = with_micro_batch(spec, micro).grad_accum
        smaller = f"--train.micro-batch {micro} --train.grad-accum {accumulation}"
    return check_memory(place, free, total, others, peak, fit, smaller)


def _check_disk(config: Config | None, hardware: Hardware | None, dtype: str, gpus: int) -> Finding:
    folder = config.folder if config is not None else Path(RunSection(name="NAME").out)
    nearest = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    obstacle = None
    if not nearest.is_dir():
        obstacle = f"{nearest} is not a folder"
    elif not os.access(nearest, os.W_OK | os.X_OK):
        obstacle = f"{nearest} is not writable"
    free = shutil.disk_usage(nearest).free
    writes = None
    if config is not None:
        writes = writes_of(config, config.to_spec(dtype or None, gpus), hardware)
    return check_disk(folder, obstacle, free, writes)


def writes_of(config: Config, spec: RunSpec, hardware: Hardware | None) -> Writes:
    """Return what a run will write; the sensors' lines only where its time is predicted.

    Args:
        config: of the run.
        spec: the same, on the devices that train.
        hardware: of each device; None if there is none.
    """
    log = LOG_BYTES_PER_STEP * config.train.max_steps
    if hardware is not None and hardware.kind != "cpu":
        total = predict(spec, hardware).quantities.get("total_seconds")
        log += LOG_BYTES_PER_SECOND * math.ceil(total.high if total is not None else 0)
    there = (config.folder / "checkpoints").rglob("*")
    copies = config.train.keep_checkpoints + 2  # the best one, and the one that is being written
    return Writes(
        checkpoint=state_bytes(spec),
        copies=min(copies, checkpoints(spec)),
        there=sum(file.stat().st_size for file in there if file.is_file()),
        log=log,
    )


def _check_data(config: Config) -> Finding:
    data, steps = config.data, config.train.max_steps
    run_tokens = config.tokens_per_step * steps
    if data.path is None or data.folder is None:
        from nanogauge.prepare.embedded import embedded_tokens

        found = embedded_tokens()[0].size
        where = "the text that ships with Python"
        return check_data(steps, run_tokens, found, data.tokens, where, fixed=True)
    try:
        found = open_dataset(data.folder).tokens("train")
    except BadInput as error:
        text, prepares, remedy = str(error).rpartition("; ")
        if not prepares:
            return Finding("data", "no-go", str(error).rstrip("."), "make it readable")
        ours = data.tokens is not None and "prepare_fineweb.py" in remedy
        amount = f" --tokens {data.tokens}" if ours else ""
        return Finding("data", "no-go", text, remedy + amount)
    return check_data(steps, run_tokens, found, data.tokens, data.path, fixed=False)


def _check_power(driver: DriverInfo) -> Finding:
    row = find_gpu(driver.name, driver.total_bytes) if driver.name is not None else None
    datasheet = row.power_watts if row is not None else None
    return check_power(driver.power_limit_watts, driver.power_limit_default_watts, datasheet)


def print_checks(findings: list[Finding]) -> None:
    """One line each: verdict, check, what was found, and what to do about it."""
    for finding in findings:
        remedy = f"  → {finding.remedy}" if finding.remedy is not None else ""
        print(f"{finding.verdict:6} {finding.check:9} {finding.text}{remedy}")


def consult(config: Config, force: bool, gpus: int = 1, beside: int = 1) -> None:
    """The doctor before a run: one line if all is go, else what is not.

    A model that does not fit is shown here, and refused where the run is set up, together with
    what would fit.

    Args:
        config: of the run.
        force: whether a no-go is no obstacle.
        gpus: as of examine, like the next.
        beside: processes of the run on this machine.

    Raises:
        BadInput: for a no-go, unless it is forced.
    """
    findings = examine(config, gpus, beside)
    told = [finding for finding in findings if finding.verdict != "go"]
    if not told:
        print(f"doctor: {len(findings)} checks, all go")
    print_checks(told)
    grave = [f for f in told if f.verdict == "no-go" and f.check != "memory"]
    if grave and not force:
        raise BadInput(f"{grave[0].text}; {grave[0].remedy}.")
