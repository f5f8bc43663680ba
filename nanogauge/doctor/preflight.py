"""Run the doctor's checks on this machine and on a run before it starts. Nothing is written."""

import math
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from nanogauge.config import Config, RunSection
from nanogauge.device import cpu_hardware
from nanogauge.doctor import machine
from nanogauge.doctor.checks import (
    DiskUse,
    Finding,
    TorchBuild,
    check_compiler,
    check_data,
    check_disk,
    check_gpu,
    check_memory,
    check_power,
    check_wandb,
    remedies,
    warn_of_wsl,
)
from nanogauge.doctor.sleep import check_sleep
from nanogauge.errors import BadInput
from nanogauge.files import obstacle
from nanogauge.hardware import find_gpu, from_row
from nanogauge.measure.host import total_memory_bytes
from nanogauge.measure.sensors import DriverInfo, driver_info
from nanogauge.prediction.loss import REPOSITORIES, validation_error
from nanogauge.prediction.overheads import state_bytes
from nanogauge.prediction.prediction import predict
from nanogauge.prediction.search import fit_verdict, largest_micro_batch, memory_of, with_micro_batch
from nanogauge.runlog.reader import has_begun
from nanogauge.runspec import RunSpec
from nanogauge.schedule import checkpoints
from nanogauge.schema import Hardware
from nanogauge.shell import pip_install
from nanogauge.sinks.mode import switched_off

DEFAULT_RUN = RunSection(name="NAME")
"""Settings that are examined if no configuration is given."""
CountTokens = Callable[[Config], tuple[int, int]]
"""Counts a run's training and validation tokens; raises BadInput if its data cannot be used."""
WARNED_RUN_TOKENS, LEAST_EVALUATED_TOKENS = 10**8, 10**6
"""Tokens of a run from which, and validation tokens below which, the doctor warns of noise."""
LOG_BYTES_PER_STEP = 600
LOG_BYTES_PER_SECOND = 500
"""Growth of the log through sensor readings; a run without a GPU has none."""


@dataclass(frozen=True)
class Device:
    """The device that a run would train on."""

    torch: TorchBuild | None
    """Facts of the torch build; None if it was not examined."""
    dtype: str = ""
    """Precision of the run; empty if the device is absent or does not support it."""
    hardware: Hardware | None = None
    """Hardware of the device; None for a CPU, which is not measured here."""
    uuid: str | None = None
    """UUID of the GPU."""
    dtype_problem: str | None = None
    """Why the device does not support run.dtype, and what to set; None if it does."""


def device_without_torch(run: RunSection) -> Device:
    """Describe the first GPU as the driver reports it; without one, the CPU."""
    driver = driver_info(0)
    gpu = find_gpu(driver.name, driver.total_bytes) if driver.name is not None else None
    dtype = run.dtype if run.dtype != "auto" else "float32"
    if gpu is None or run.device == "cpu":
        return Device(None, dtype)
    if run.dtype == "auto" and "bfloat16" in gpu.flop_per_clock_per_sm:
        dtype = "bfloat16"
    return Device(None, dtype, from_row(gpu, dtype, driver.power_limit_watts))


def examine(
    config: Config | None, device: Device, count_tokens: CountTokens | None = None, gpus: int = 1, beside: int = 1
) -> list[Finding]:
    """Run all checks in a fixed order; without a configuration, those of the machine only.

    Checks of the device are skipped if it is absent, those of torch if it was not examined, that of the data without
    count_tokens. `gpus` is the world size, and `beside` the ranks on this machine, which share its memory if they train
    on the CPU.
    """
    run = config.run if config is not None else DEFAULT_RUN
    driver = driver_info(device.uuid or 0)
    key_from = machine.wandb_key_from(os.environ, Path.home())
    switch = switched_off()
    mode = config.wandb.mode if config is not None else switch[0] if switch else "auto"
    torch, hardware = device.torch, device.hardware
    kind = torch.device if torch is not None else "cpu" if hardware is None else "cuda"
    if kind == "cpu":
        hardware = cpu_hardware(None, "not measured", None, "this machine")
    dtype, on_gpu = device.dtype, kind == "cuda"
    findings = [
        *_check_torch(run, torch, driver),
        _check_dtype(device),
        hardware and _check_memory(config, hardware, dtype, driver, gpus, beside),
        _check_disk(config, hardware, dtype, gpus),
        config and count_tokens and _check_data(config, count_tokens),
        check_sleep(machine.ROOT, os.environ, machine.command_output, platform.system()),
        warn_of_wsl() if machine.is_wsl() and on_gpu else None,
        on_gpu and check_power(driver.power_limit_watts, driver.power_limit_default_watts),
        config and config.trackio.project and _check_trackio(find_spec("trackio") is not None),
        check_wandb(mode, find_spec("wandb") is not None, key_from, switch),
    ]
    return [finding for finding in findings if finding]


def _check_trackio(installed: bool) -> Finding:
    if installed:
        return Finding("trackio", "go", "installed")
    return Finding(
        "trackio", "warn", "the package is not installed: the run is not mirrored to it", pip_install("trackio")
    )


def _check_torch(run: RunSection, torch: TorchBuild | None, driver: DriverInfo) -> list[Finding]:
    """Check that the GPU, its driver, torch and the compilers work together."""
    if torch is None:
        return [_check_driver(run, driver)]
    visible, system = os.environ.get("CUDA_VISIBLE_DEVICES"), platform.system()
    gpu = check_gpu(run.device, torch, driver, visible, system)
    device = torch.device
    if device not in ("cuda", "cpu") or not run.compile:
        return [gpu]
    usual: tuple[str, ...]
    if device == "cuda":  # as Triton chooses
        language, named, usual = "C", os.environ.get("CC"), ("gcc", "clang")
    else:  # as torch._inductor chooses
        language, named = "C++", os.environ.get("CXX")
        usual = ({"Darwin": "clang++", "Windows": "cl"}.get(system, "g++"),)
    tried = (named,) if named else usual
    compiler = next((name for name in tried if shutil.which(name) is not None), None)
    installers = remedies()["installers"].get(system, ["apt-get"])
    installer = next((name for name in installers if shutil.which(name)), installers[0])
    install = remedies()["compilers"][installer]
    return [gpu, check_compiler(language, tried, compiler, machine.python_headers(), install)]


def _check_dtype(device: Device) -> Finding | None:
    """Return a no-go if the device does not support the precision of the run."""
    if device.dtype_problem is None:
        return None
    text, _, remedy = device.dtype_problem.rstrip(".").partition("; ")
    return Finding("dtype", "no-go", text, remedy or "set another --run.dtype")


def _check_driver(run: RunSection, driver: DriverInfo) -> Finding:
    """Check that the driver reports a GPU, without torch."""
    if driver.name is not None or run.device not in ("auto", "cuda"):
        return Finding("gpu", "go", f"{driver.name or 'no NVIDIA GPU'}; torch is checked only in a checkout")
    verdict: Literal["no-go", "warn"] = "no-go" if run.device == "cuda" else "warn"
    remedy = "check nvidia-smi and the driver, or train with --run.device cpu"
    return Finding("gpu", verdict, f"no NVIDIA GPU ({driver.absent['name']})", remedy)


def _check_memory(
    config: Config | None, hardware: Hardware, dtype: str, driver: DriverInfo, gpus: int, beside: int
) -> Finding:
    if hardware.kind == "cpu":
        place, total, others = "of memory", total_memory_bytes(), None
    else:
        place, total, others = "on the card", driver.total_bytes, driver.others
    memory = machine.free_memory(hardware, [driver], processes=beside)
    free = None if memory is None else memory.bytes
    if config is None or free is None:
        return check_memory(place, free, total, others, None, None, None)
    spec = RunSpec.from_config(config, dtype, gpus)
    peak = memory_of(spec, hardware).process
    fit = fit_verdict(peak, free)
    micro = largest_micro_batch(spec, hardware, free, "high" if fit == "doubtful" else "expected")
    smaller = None
    if micro is not None:
        accumulation = with_micro_batch(spec, micro).grad_accum
        smaller = f"--train.micro-batch {micro} --train.grad-accum {accumulation}"
        if has_begun(config.folder):
            smaller += " --resume auto --allow-change train.micro_batch train.grad_accum"
    return check_memory(place, free, total, others, peak, fit, smaller)


def _check_disk(config: Config | None, hardware: Hardware | None, dtype: str, gpus: int) -> Finding:
    folder = config.folder if config is not None else Path(DEFAULT_RUN.out)
    nearest = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(nearest).free
    use = None
    if config is not None:
        use = disk_use_of(config, RunSpec.from_config(config, dtype or None, gpus), hardware)
    return check_disk(folder, obstacle(folder), free, use)


def disk_use_of(config: Config, spec: RunSpec, hardware: Hardware | None) -> DiskUse:
    """Return the disk use of a run; its sensor lines count only if its time is predicted."""
    log = LOG_BYTES_PER_STEP * config.train.max_steps
    if hardware is not None and hardware.kind != "cpu":
        total = predict(spec, hardware).quantities.get("total_seconds")
        log += LOG_BYTES_PER_SECOND * math.ceil(total.high if total is not None else 0)
    existing = (config.folder / "checkpoints").rglob("*")
    copies = config.train.keep_checkpoints + 2  # the best one, and the one being written
    return DiskUse(
        checkpoint=state_bytes(spec),
        copies=min(copies, checkpoints(spec)),
        existing=sum(file.stat().st_size for file in existing if file.is_file()),
        log=log,
    )


def _check_data(config: Config, count_tokens: CountTokens) -> Finding:
    data, steps = config.data, config.train.max_steps
    run_tokens = config.tokens_per_step * steps
    where = data.path or "the text that ships with Python"
    try:
        tokens, validation = count_tokens(config)
    except BadInput as error:
        text, prepares, remedy = str(error).rpartition("; ")
        if not prepares:
            return Finding("data", "no-go", str(error).rstrip("."), "make it readable")
        ours = data.tokens is not None and "prepare_fineweb.py" in remedy
        amount = f" --tokens {data.tokens}" if ours else ""
        named = [path for path, name in REPOSITORIES.items() if name == data.dataset and ours]
        source = f" --dataset {named[0]}" if named else ""
        return Finding("data", "no-go", text, remedy.rstrip(".") + amount + source)
    train = config.train
    evaluated = min(validation, train.eval_batches * train.micro_batch * config.model.block_size)
    found = check_data(steps, run_tokens, tokens, data.tokens, where, fixed=data.embedded)
    if (
        found.verdict == "go"
        and not data.embedded
        and run_tokens >= WARNED_RUN_TOKENS
        and evaluated < LEAST_EVALUATED_TOKENS
    ):
        text = (
            f"{found.text}; an evaluation reads {evaluated:,} validation tokens, which gives the "
            f"loss a standard error of {validation_error(evaluated):.3f}"
        )
        remedy = "prepare more --val-tokens" if evaluated == validation else "more eval_batches"
        return Finding("data", "warn", text, f"{remedy}: a million tokens or more")
    return found


def print_checks(findings: list[Finding]) -> None:
    """Print a line per finding: verdict, check, text and remedy."""
    for finding in findings:
        remedy = f"  → {finding.remedy}" if finding.remedy is not None else ""
        print(f"{finding.verdict:6} {finding.check:9} {finding.text}{remedy}")


def consult(
    config: Config, device: Device, count_tokens: CountTokens, force: bool, gpus: int = 1, beside: int = 1
) -> None:
    """Check a run before it starts; print one line if all is go, else each finding that is not.

    Raises:
        BadInput: for a no-go, unless `force`.
    """
    findings = examine(config, device, count_tokens, gpus, beside)
    shown = [finding for finding in findings if finding.verdict != "go"]
    if not shown:
        print(f"doctor: {len(findings)} checks, all go")
    print_checks(shown)
    grave = [f for f in shown if f.verdict == "no-go"]
    if grave and not force:
        raise BadInput(f"{grave[0].text}; {grave[0].remedy}, or start anyway with --force.")
