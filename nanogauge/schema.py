"""Schemas of prediction.json and of the lines of log.jsonl.

Units are seconds, bytes, watts and joules. A field that was not measured is None. `elapsed_seconds` is the monotonic
time since the start of the process that wrote the line; None in an imported log.
"""

from __future__ import annotations

import re
from datetime import datetime, timedelta, timezone
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from nanogauge.quantities import QUANTITIES, Interval

SCHEMA = 1

Count = Annotated[int, Field(ge=0, le=2**53)]
"""Count that a float64 column holds exactly."""


class Stored(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)


def _zone_name(name: str) -> str:
    """Return an abbreviation such as CEST unchanged, and anything longer as "local time"."""
    return name if re.fullmatch(r"[A-Za-z0-9+-]{1,10}", name) else "local time"


class TimeZone(Stored):
    """Time zone of the machine that trained; reports show times in it."""

    name: Annotated[str, AfterValidator(_zone_name)] = "UTC"
    utc_offset_seconds: Annotated[int, Field(gt=-86400, lt=86400)] = 0

    def local(self, unix: float) -> datetime:
        """Convert a Unix time to this time zone."""
        zone = timezone(timedelta(seconds=self.utc_offset_seconds), self.name)
        return datetime.fromtimestamp(unix, zone)


class Hardware(Stored):
    """The device that a prediction is for; its values come from hardware.toml or the device."""

    name: str
    kind: Literal["geforce", "workstation", "datacenter", "cpu", "other"]
    """geforce and workstation GPUs may also drive a screen"""
    architecture: str
    peak_flops: float | None
    """dense FLOP/s of matrix products in the run's dtype; None if unknown"""
    peak_name: str
    """derivation of the peak: cores x rate x clock, or how it was measured"""
    boost_clock_hz: float | None = None
    """clock in peak_flops; None if the peak was measured or is unknown"""
    matmul_flops: float | None
    """FLOP/s of a large matrix product measured on this device model; None if not measured"""
    sms: int | None = None
    float32_flops: float | None = None
    """FLOP/s of the fp32 units, without the matrix units"""
    memory_bytes: int | None
    bandwidth_bytes_per_second: float | None
    power_limit_watts: float | None
    board_power_watts: float | None = None
    """default power limit of the board in W; None if unknown"""
    interconnect: str | None = None
    """link to other devices: PCIe 4.0 x16, NVLink 4"""
    interconnect_bytes_per_second: float | None = None
    """datasheet bandwidth of one device in one direction"""
    process_bytes: int | None = None
    """resident memory of the process before it creates the model; None away from the machine"""
    source: str


class FreeMemory(Stored):
    bytes: int
    """free memory of each device"""
    source: str


class Estimate(Interval):
    """A predicted quantity with its formula and source."""

    unit: str
    formula: str
    source: str

    @classmethod
    def of(cls, row_id: str, interval: Interval, formula: str, source: str) -> Estimate:
        ends = interval.model_dump(include={"low", "expected", "high"})
        return cls(**ends, unit=QUANTITIES[row_id].unit, formula=formula, source=source)


class Part(Stored):
    """One summand of a predicted quantity."""

    name: str
    value: float
    formula: str


class Prediction(Stored):
    """Predicted quantities of a run, frozen before its first step."""

    schema_version: int = SCHEMA
    created_unix: float
    hardware: Hardware
    gpus: int = 1
    """devices that share the run; step_parts and memory_parts are of each device"""
    dtype: str
    quantities: dict[str, Estimate]
    """row id -> analytic estimate; without the quantities in `unpredicted`"""
    unpredicted: dict[str, str]
    """row id -> reason why there is no prediction"""
    calibrated: dict[str, Estimate] = {}
    """row id -> estimate from measurements on this device"""
    step_parts: list[Part]
    """seconds of one optimizer step by kind of operation; sums to the expected step time"""
    memory_parts: list[Part]
    """bytes by component; sums to the expected peak"""
    ledger: dict[str, float]
    """expected seconds of the whole run: compile_s, step_s, eval_s, checkpoint_s, other_s"""
    notes: list[str] = []

    def best(self, row_id: str) -> Estimate | None:
        """Return the calibrated estimate, else the analytic one, else None."""
        return self.calibrated.get(row_id, self.quantities.get(row_id))

    def __getitem__(self, row_id: str) -> Estimate:
        """Return best(row_id).

        Raises:
            KeyError: without an estimate, with the reason.
        """
        estimate = self.best(row_id)
        if estimate is None:
            raise KeyError(f"{row_id}: {self.unpredicted.get(row_id, 'no such quantity')}")
        return estimate

    def fits(self, free_gib: float) -> bool:
        """Return whether the expected peak of the process fits into the free memory in GiB."""
        return self["peak_process_bytes"].expected <= free_gib * 2**30

    @property
    def peak_flops(self) -> float | None:
        """FLOP/s of all devices together: the denominator of MFU."""
        peak = self.hardware.peak_flops
        return None if peak is None else self.gpus * peak


class Line(Stored):
    elapsed_seconds: float | None = None


class Start(Line):
    """Start of a process that begins or resumes the run."""

    kind: Literal["start"] = "start"
    unix_time: float | None = None
    source: Annotated[str, Field(pattern=r"^[a-z0-9._]+$")] = "train"
    """train, library, watch, or the log it was imported from: nanogpt_log, wandb_history"""
    max_steps: int
    first_step: int = 0
    """step that the process starts at; above 0 for a resumed run"""
    prediction_sha256: str
    device: str
    train_tokens: int | None = None
    """unique training tokens of the opened data set; None in an imported log"""
    idle_power_watts: float | None = None
    """mean power of the idle board just before the run"""
    idle_utilization: float | None = None
    """utilization by other programs meanwhile; above a few percent, the board was not idle"""
    other_programs: dict[str, int] | None = None
    """program name -> bytes it holds on the GPU; None if the driver does not report them"""
    wandb_id: str | None = None
    """W&B id of the run, which a resumed process continues"""
    continues: bool | None = None
    """True if the same process rolled back to a checkpoint, so that its clock continues"""
    restart: Count | None = None
    """restarts by --supervise so far; None without supervision"""
    rollbacks: Count | None = None
    """rollbacks after non-finite updates so far; the data order depends on them"""
    ranks: Count | None = None
    """world size; None if unknown"""
    sensed_cards: Count | None = None
    """GPUs that the sensor lines cover; None if unknown"""
    micro_batch: Count | None = None
    """micro-batch size chosen after running out of memory; None: that of the configuration"""

    @property
    def is_live(self) -> bool:
        """True if the process itself was measured; False for an imported log."""
        return self.logs_all or self.source == "watch"

    @property
    def logs_all(self) -> bool:
        """True if the program itself logged its checkpoints, compilations and restarts."""
        return self.source in ("train", "library")


class Compile(Line):
    """Compilation of the model, with the mode that training then used."""

    kind: Literal["compile"] = "compile"
    step: int | None = None
    """step that waited for a recompilation; None for the first compilation"""
    seconds: float
    """compilation time; not part of any step, evaluation or checkpoint"""
    mode: Literal["compiled", "eager"]


class Step(Line):
    """One optimizer step; steps count from 0."""

    kind: Literal["step"] = "step"
    step: Count
    loss: float | None = None
    """mean over the micro-batches of the step in nats per token; None if non-finite"""
    step_seconds: float | None = None
    """step time without evaluation, checkpoint and compilation; None if a log lacks it"""
    printed_seconds: float | None = None
    """step time as another program printed it, including evaluation or compilation"""
    data_wait_seconds: float | None = None
    """part of step_seconds: wait of the device for its batches, including their copy"""
    forward_seconds: float | None = None
    """part of step_seconds; like the next two fields and the peaks, only in every measure.split_every-th step"""
    backward_seconds: float | None = None
    optimizer_seconds: float | None = None
    """gradient clipping, update and zero_grad"""
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens: Count | None = None
    power_watts: float | None = None
    """mean of the samples during this step; None without samples"""
    power_min_watts: float | None = None
    power_max_watts: float | None = None
    peak_allocated_bytes: Count | None = None
    """peak so far; also in the end line, which a killed run does not write"""
    peak_reserved_bytes: Count | None = None
    peak_host_bytes: Count | None = None


class Rank(Line):
    """One rank's measurements of every measure.split_every-th step in a multi-process run."""

    kind: Literal["rank"] = "rank"
    step: Count
    rank: Count
    step_seconds: float
    """step time on the rank's own clock; about equal for all, as an all-reduce ends each step"""
    data_wait_seconds: float
    forward_seconds: float | None = None
    """all forward passes of the step, in which no rank waits for another"""
    peak_allocated_bytes: Count | None = None
    """peak so far"""
    peak_host_bytes: Count | None = None


class Eval(Line):
    """An evaluation after `step` updates."""

    kind: Literal["eval"] = "eval"
    step: int
    train_loss: float | None = None
    val_loss: float | None = None
    """None if non-finite"""
    val_bits_per_byte: float | None = None
    """validation loss in bits per byte, as some programs print it instead of nats per token"""
    final: float | None = None
    """forecast of the final validation loss, from curve, schedule and plan; None too early"""
    final_low: float | None = None
    final_high: float | None = None
    seconds: float | None = None


class Checkpoint(Line):
    """A checkpoint after `step` updates, logged once it is on disk."""

    kind: Literal["checkpoint"] = "checkpoint"
    step: int
    seconds: float | None = None
    """time that the training loop waited"""
    write_seconds: float | None = None
    """time of the background write, from the copy in memory to the renamed folder"""
    bytes: int | None = None
    path: str | None = None


class Sensor(Line):
    """Readings of the sensors, about one a second; None for a sensor that the GPU lacks.

    Power covers the samples since the previous line; all other fields are instantaneous. With several GPUs
    (Start.sensed_cards), power, power limit and energy are sums, and utilization is the mean. Every other field is that
    of the worst GPU: the highest temperature, fan speed and memory, the lowest clocks and link, and all reasons for
    throttling.
    """

    kind: Literal["sensor"] = "sensor"
    power_watts: float | None = None
    power_min_watts: float | None = None
    power_max_watts: float | None = None
    energy_joules: float | None = None
    """energy since the sampler started, from the driver's counter if there is one"""
    energy_source: Literal["counter", "integral"] | None = None
    integral_joules: float | None = None
    """energy since the sampler started, integrated from the sampled power"""
    gap_seconds: float | None = None
    """time without samples since the sampler started, excluded from the integral; None for none"""
    power_limit_watts: float | None = None
    temperature_celsius: float | None = None
    fan: float | None = None
    """target speed as a share of the maximum"""
    sm_clock_hz: float | None = None
    memory_clock_hz: float | None = None
    utilization: float | None = None
    throttle: list[str] | None = None
    """reasons why the clock is reduced; empty if it is not. Idle clocks and clocks set by an application do not
    count"""
    pcie_generation: Count | None = None
    pcie_width: Count | None = None
    device_used_bytes: Count | None = None
    process_used_bytes: Count | None = None
    hottest_card: Count | None = None
    """rank of the GPU with this temperature; like the next two, None for a single GPU"""
    fullest_card: Count | None = None
    """rank of the GPU with this device_used_bytes"""
    slowest_card: Count | None = None
    """rank of the GPU with this sm_clock_hz"""


class Event(Line):
    """A message about the run."""

    kind: Literal["event"] = "event"
    level: Literal["info", "warning", "alarm"] = "info"
    """alarms need attention at once, warnings after the run"""
    what: str
    """machine-readable kind of the event"""
    text: str
    step: int | None = None
    about: str | None = None
    """row id of the quantity concerned"""
    seconds: float | None = None
    """length of a standstill (measure/standstill.py); None for other events"""


class Benchmark(Line):
    """A metric of a checkpoint on a benchmark, appended by evaluate.py after the run.

    A newer line with the same name, metric and `against` replaces an older one.
    """

    kind: Literal["benchmark"] = "benchmark"
    step: Count
    """updates before the checkpoint"""
    name: str
    """held_out or hellaswag"""
    metric: str
    better: Literal["higher", "lower"]
    main: bool = True
    """True for the metric of this benchmark that models are compared by"""
    value: float
    low: float | None = None
    """low end of the central 95 % of bootstrap samples, as for the other intervals"""
    high: float | None = None
    n: Count
    """number of windows, examples or documents"""
    against: str | None = None
    """model evaluated on the same items for comparison; gpt2 is GPT-2 124M"""
    against_value: float | None = None
    difference_low: float | None = None
    """low end of value - against_value on the same bootstrap samples"""
    difference_high: float | None = None
    seconds: float | None = None
    """time for all models and metrics of this benchmark together"""


class End(Line):
    """Orderly end of a process; a process without this line died."""

    kind: Literal["end"] = "end"
    status: Literal["finished", "stopped", "failed"]
    steps: int
    """updates made since step 0"""
    wall_seconds: float | None = None
    """lifetime of this process; None in an imported log"""
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    peak_process_bytes: int | None = None
    """resident memory on a CPU; None on a GPU, whose sensor lines have it"""
    peak_host_bytes: int | None = None
    """resident memory of this process; of a watched program with its children"""
    cpu_seconds: float | None = None
    """processor time of a watched program and its children"""
    peak_inactive_bytes: int | None = None
    """reserved memory beyond the allocated, at the peaks of both"""
    allocation_retries: int | None = None
    """times that the allocator freed its cache and retried"""
    others_processor_share: float | None = None
    """mean share of all cores that other programs used after the first step; None if unknown"""
    reason: str | None = None
    restartable: bool | None = None
    """True if a failed run may succeed from its last checkpoint, so that --supervise restarts it; None if the run did
    not fail"""


LogLine = Annotated[
    Start | Compile | Step | Rank | Eval | Checkpoint | Sensor | Event | Benchmark | End, Field(discriminator="kind")
]
