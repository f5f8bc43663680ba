"""Describe and calibrate this device: a CPU's peak in two seconds, a step by parts in a minute.

The parts of a step are timed with the model, batches, optimizer and clipping of train.py.
"""

import contextlib
import math
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import trainer.step.torch_env  # noqa: F401  before torch

# isort: split
import numpy as np
import torch
from torch import Tensor, nn

from model import GPT, Block, through
from nanogauge.config import Config, RunSection
from nanogauge.device import cpu_hardware
from nanogauge.doctor.checks import TorchBuild
from nanogauge.doctor.preflight import Device
from nanogauge.errors import BadInput
from nanogauge.hardware import find_gpu, from_properties, from_row
from nanogauge.measure.host import ProcessorWatch, total_memory_bytes
from nanogauge.measure.sensors import DriverInfo, driver_info
from nanogauge.prediction.calibrated import Calibration, MeasuredParts, Rates, add_to_calibration
from nanogauge.prediction.flops import flops_per_token_palm, layer_matrices
from nanogauge.prediction.workload import Workload, workload_of
from nanogauge.runspec import RunSpec
from nanogauge.schema import Hardware
from trainer.data.loader import Batches
from trainer.step.device import DTYPES, autocast, choose_device, choose_dtype, is_out_of_memory, synchronize
from trainer.step.loss import TrainingLoss
from trainer.step.optimizer import make_optimizer

MATMUL_SIZES = (512, 1024, 1536)
COPY_BYTES = 2**27
SECONDS_EACH = 0.35

BUDGET_SECONDS = 45.0  # within a minute together with start-up and compilation
ROUND_SECONDS = 4.0  # one step of all parts; with fewer sequences if it would take longer
# Rounds and time after which to stop, so that a short disturbance does not decide, or MOST_ROUNDS of a tiny model;
# within the budget, but at least FEWEST_ROUNDS. The first round is a warm-up and does not count.
_ROUNDS, ROUNDS_SECONDS, FEWEST_ROUNDS, MOST_ROUNDS = 25, 12.0, 4, 500
STACKED_LAYERS = 4  # blocks measured together; more change the time of one by 1-2 %
MOST_MICRO_BATCHES = 2  # one that allocates the gradients and one that adds to them


def this_processor(dtype: str) -> Hardware:
    """Measure the CPU of this machine as the hardware of a prediction, in about two seconds.

    Peak FLOP/s is the best rate of square matrix products of a few sizes, in the run's dtype and on torch's threads.
    Bandwidth counts the bytes read and written by a copy that exceeds all caches.
    """
    cpu = torch.device("cpu")
    rates = {}
    for size in MATMUL_SIZES:
        seconds = _repeat(_product(size, size, size, DTYPES[dtype], cpu), cpu)
        rates[size] = 2 * size**3 / min(seconds)
    size, peak = max(rates.items(), key=lambda item: item[1])
    bandwidth = 2 * COPY_BYTES / min(_repeat(_copy(cpu), cpu))
    threads = torch.get_num_threads()
    how = f"{dtype} matrix product of {size} x {size} measured on this CPU with {threads} thread{'s' * (threads > 1)}"
    return cpu_hardware(peak, how, bandwidth, "measured before the run, trainer/calibrate.py")


def measure_device(config: Config, device: torch.device, dtype: str, name: str) -> Calibration:
    """Measure single operations and the parts of a step of this configuration.

    Raises:
        BadInput: if the device has not enough memory, or torch.compile is on and fails.
    """
    began = time.perf_counter()
    work = workload_of(RunSpec.from_config(config, dtype), on_gpu=device.type != "cpu")
    torch.set_float32_matmul_precision("high")  # as train.py
    torch.manual_seed(config.run.seed)
    try:
        rates = measure_rates(work, device, DTYPES[dtype])
        deadline = began + BUDGET_SECONDS
        parts = measure_parts(config, work, device, dtype, rates.matmul_flops, deadline)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise BadInput(
            "the device has not enough free memory for one layer of this configuration; set "
            f"--train.micro-batch below {config.train.micro_batch}."
        ) from None
    return Calibration(
        device=name,
        torch=torch.__version__,
        threads=torch.get_num_threads() if device.type == "cpu" else None,
        rates=(rates,),
        parts=(parts,),
    )


def measure_rates(work: Workload, device: torch.device, dtype: torch.dtype) -> Rates:
    """Measure matrix products, square and in the model's shapes, and a copy of memory.

    On a slow device, long products are measured with fewer tokens than a micro-batch has.
    """
    shape, size = work.shape, 1024
    rates = [2 * size**3 / undisturbed(_repeat(_product(size, size, size, dtype, device), device))]
    affordable = rates[0] * SECONDS_EACH / 4  # FLOPs of one repetition
    for inner, outer in {*layer_matrices(shape), (shape.n_embd, shape.vocabulary)}:
        rows = min(work.tokens, max(1, int(affordable / (2 * inner * outer))))
        seconds = undisturbed(_repeat(_product(rows, inner, outer, dtype, device), device))
        rates.append(2 * rows * inner * outer / seconds)
    return Rates(
        dtype=work.dtype,
        matmul_flops=max(rates),
        bandwidth_bytes_per_second=2 * COPY_BYTES / undisturbed(_repeat(_copy(device), device)),
    )


def _product(rows: int, inner: int, outer: int, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    a = torch.randn(rows, inner, device=device).to(dtype)
    b = torch.randn(inner, outer, device=device).to(dtype)
    out = torch.empty(rows, outer, device=device, dtype=dtype)
    return lambda: torch.mm(a, b, out=out)


def _copy(device: torch.device) -> Callable[[], object]:
    source = torch.ones(COPY_BYTES // 4, device=device)
    target = torch.ones(COPY_BYTES // 4, device=device)
    return lambda: target.copy_(source)


def _repeat(work: Callable[[], object], device: torch.device) -> list[float]:
    """Return the seconds of each call within SECONDS_EACH, after a warm-up call."""
    work()
    synchronize(device)
    seconds: list[float] = []
    while not seconds or sum(seconds) < SECONDS_EACH:
        begin = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return seconds


@dataclass
class StepPart:
    """A part of the model that is timed alone, with its own weights and optimizer."""

    module: nn.Module
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler
    micro_batch: Callable[[int, int], Tensor]
    """Run the forward and backward pass of a micro-batch, given step and micro-batch numbers."""

    def step(self, number: int, micro_batches: int, device: torch.device) -> tuple[float, float]:
        """Run a step; return the seconds per micro-batch, and of clipping and update together."""
        synchronize(device)
        begin = time.perf_counter()
        total = torch.zeros((), device=device)
        for micro in range(micro_batches):
            total += self.micro_batch(number, micro)
        total.item()
        between = time.perf_counter()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0).item()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        synchronize(device)
        return (between - begin) / micro_batches, time.perf_counter() - between


class Stack(nn.Module):
    """Transformer blocks in sequence, without embedding and head."""

    def __init__(self, config: Config, layers: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(config.model) for _ in range(layers))
        self.recompute = config.train.checkpointing == "full"

    def forward(self, x: Tensor) -> Tensor:
        return through(self.blocks, x, self.recompute)


def measure_parts(
    config: Config, work: Workload, device: torch.device, dtype: str, flops_per_second: float, deadline: float
) -> MeasuredParts:
    """Measure a step's time per layer, and of embedding, head and all else outside the layers.

    A stack of layers gives the first; a one-layer model minus one layer gives the second. Their steps alternate, so
    that other programs slow both down.
    """
    layers = min(STACKED_LAYERS, work.shape.n_layer)
    both = replace(work.shape, n_layer=1 + layers)
    micro_batches = min(MOST_MICRO_BATCHES, work.grad_accum)
    flops = micro_batches * work.tokens * flops_per_token_palm(both)
    expected_seconds = flops / (flops_per_second / 2)
    affordable = work.micro_batch * ROUND_SECONDS / expected_seconds
    sequences = max(1, min(work.micro_batch, int(affordable)))
    if affordable < 1:
        micro_batches = 1
    pieces = [
        whole_piece(config, sequences, micro_batches, device, dtype),
        stack_piece(config, layers, sequences, device, dtype),
    ]
    for piece in pieces:
        piece.step(0, 1, device)  # compiles

    processor, rounds = ProcessorWatch(), list[list[tuple[float, float]]]()
    now = first = time.perf_counter()
    took = 0.0
    while len(rounds) < FEWEST_ROUNDS or (
        now + took < deadline and len(rounds) < MOST_ROUNDS and (len(rounds) < _ROUNDS or now - first < ROUNDS_SECONDS)
    ):
        begin = time.perf_counter()
        rounds.append([piece.step(len(rounds), micro_batches, device) for piece in pieces])
        now = time.perf_counter()
        took = now - begin
    (whole, whole_update), (stack, stack_update) = (
        (undisturbed(s) for s in zip(*(r[i] for r in rounds[1:]), strict=True)) for i in range(2)
    )
    totals = np.array([[sum(part) for part in each] for each in rounds[1:]])
    low, middle, high = np.quantile(totals, (0.1, 0.5, 0.9), axis=0)
    scale = work.micro_batch / sequences
    return MeasuredParts(
        workload=work,
        layer_seconds=scale * stack / layers,
        rest_seconds=scale * (whole - stack / layers),
        layer_update_seconds=stack_update / layers,
        rest_update_seconds=whole_update - stack_update / layers,
        spread=float(max((high - low) / middle)),
        sequences=sequences,
        measured_unix=time.time(),
        others_share=processor.others_share() if device.type == "cpu" else None,
    )


def undisturbed(seconds: Sequence[float]) -> float:
    """Return the lower quartile of step times, as other programs can only add to a time."""
    return float(np.quantile(seconds, 0.25))


def whole_piece(config: Config, sequences: int, micro_batches: int, device: torch.device, dtype: str) -> StepPart:
    """Return a one-layer model with embedding, head and optimizer, ready to be timed."""
    sizes = config.model.model_copy(update={"n_layer": 1})
    model = GPT(sizes).to(device)
    model.recompute = config.train.checkpointing == "full"
    loss = TrainingLoss(model, config.head, 1, device, tune=config.run.tune)
    if config.run.compile:
        loss.compile()
    loss_of = with_advice(loss) if config.run.compile else loss
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "float16")
    tokens = np.random.default_rng(config.run.seed).integers(
        0, min(sizes.vocab_size, 2**16), 100 * (sizes.block_size + 1), dtype=np.uint16
    )
    batches = Batches(
        {"train": [tokens]}, sequences, sizes.block_size, sizes.vocab_size, 0, device, grad_accum=micro_batches
    )

    def micro_batch(step: int, micro: int) -> Tensor:
        inputs, targets = batches.batch("train", step, micro)
        with autocast(device, dtype):
            value = loss_of(inputs, targets)
        loss.backward(scaler.scale(value))
        return value.detach()

    return StepPart(model, make_optimizer(model, config.optimizer), scaler, micro_batch)


def stack_piece(config: Config, layers: int, sequences: int, device: torch.device, dtype: str) -> StepPart:
    """Return layers alone, ready to be timed with a fixed input and a fixed output gradient."""
    stack = Stack(config, layers).to(device)
    run = with_advice(torch.compile(stack)) if config.run.compile else stack
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "float16")
    size = (sequences, config.model.block_size, config.model.n_embd)
    x = torch.randn(size, device=device, requires_grad=True)
    gradient = torch.randn(size, device=device) / math.prod(size)

    def micro_batch(step: int, micro: int) -> Tensor:
        x.grad = None
        with autocast(device, dtype):
            y = run(x)
        y.backward(scaler.scale(gradient))
        return y.detach()[0, 0, 0]

    return StepPart(stack, make_optimizer(stack, config.optimizer), scaler, micro_batch)


def with_advice(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wrap `run`, which compiles in its first call, so that it raises BadInput if that fails.

    Raises:
        BadInput: in the call of the returned function in which compilation fails.
    """
    torch._dynamo.reset()

    def call(*inputs: Tensor) -> Tensor:
        try:
            return run(*inputs)
        except torch._dynamo.exc.TorchDynamoException as error:
            first = str(error).splitlines()[0]
            raise BadInput(f"torch.compile fails on this machine ({first[:200]}); set --run.compile false.") from None

    return call


def describe_hardware(device: torch.device, dtype: str) -> tuple[Hardware, DriverInfo | None]:
    """Return the hardware to predict for: a GPU's table entry or properties, or a measured CPU."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        driver = driver_info(str(properties.uuid))
        gpu = find_gpu(properties.name, properties.total_memory)
        if gpu is not None:
            return from_row(gpu, dtype, driver.power_limit_watts), driver
        # Two transfers per clock; a driver that does not report the clock gives 0.
        bandwidth = 2 * properties.memory_clock_rate * 1e3 * properties.memory_bus_width / 8
        hardware = from_properties(
            properties.name,
            (properties.major, properties.minor),
            properties.multi_processor_count,
            properties.total_memory,
            driver.max_sm_clock_hz,
            driver.power_limit_watts,
            dtype,
            bandwidth or None,
        )
        return hardware, driver
    if device.type == "mps":
        memory = total_memory_bytes() or 0
        return from_properties("Apple GPU", (0, 0), 0, memory, None, None, dtype), None
    return this_processor(dtype), None


def probe(run: RunSection) -> Device:
    """Return a description of run.device for the doctor's checks, without measuring a CPU."""
    device = None
    with warnings.catch_warnings(), contextlib.suppress(BadInput):
        warnings.simplefilter("ignore")  # a check reports a driver that is too old
        device = choose_device(run.device)
    if device is None:
        return Device(TorchBuild(torch.__version__, None, torch.version.cuda))
    dtype, hardware, problem = "", None, None
    try:
        dtype = choose_dtype(run.dtype, device)
        hardware = describe_hardware(device, dtype)[0] if device.type != "cpu" else None
    except BadInput as error:
        dtype, problem = "", str(error)
    if device.type != "cuda":
        build = TorchBuild(torch.__version__, device.type, torch.version.cuda)
        return Device(build, dtype, hardware, dtype_problem=problem)
    gpu = torch.cuda.get_device_properties(device)
    build = TorchBuild(
        version=torch.__version__,
        device="cuda",
        cuda=torch.version.cuda,
        gpu=gpu.name,
        capability=(gpu.major, gpu.minor),
        architectures=tuple(torch.cuda.get_arch_list()),
    )
    return Device(build, dtype, hardware, str(gpu.uuid), problem)


def calibrated_threads(device: torch.device) -> int | None:
    """Return the number of threads that a CPU calibration depends on, or None for a GPU."""
    return torch.get_num_threads() if device.type == "cpu" else None


def calibrate(config: Config, gpu: str | None) -> tuple[Hardware, str, Calibration, str | None]:
    """Measure this configuration's device in under a minute and store the result for predictions.

    Returns the hardware, the dtype of a run on it, all its calibrations, and a warning if the calibration could not be
    stored.

    Args:
        gpu: name of the GPU that the user asked a plan for; None accepts any.

    Raises:
        BadInput: if `gpu` is not this machine's GPU, or the device cannot run the configuration.
    """
    device = choose_device(config.run.device)
    dtype = choose_dtype(config.run.dtype, device)
    hardware, _ = describe_hardware(device, dtype)
    row = find_gpu(gpu) if gpu is not None else None
    if gpu is not None and (row is None or row.name != hardware.name):
        raise BadInput(
            f"--calibrate measures the device that is here, {hardware.name}, not {gpu!r}; "
            "leave out --gpu, or plan for that card without --calibrate."
        )
    print(f"measuring {hardware.name} for up to a minute ...", file=sys.stderr, flush=True)
    stored, warning = add_to_calibration(measure_device(config, device, dtype, hardware.name))
    return hardware, dtype, stored, warning
