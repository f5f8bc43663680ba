"""What is on disk: the frozen prediction and the lines of the run log. Schemas, nothing else.

Times are seconds, sizes bytes, powers watts, energies joules; a field that was not measured is
None. `elapsed_seconds` counts from the start of the process that wrote the line, on a monotonic
clock; it is None in an imported log, which has no such clock.
"""

from __future__ import annotations

import re
from datetime import datetime, timedelta, timezone
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from nanogauge.quantities import QUANTITIES, Interval

SCHEMA = 1


Whole = Annotated[int, Field(ge=0, le=2**53)]
"""what a column of float64 holds exactly; more is no count of anything here"""


class Stored(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)


def _zone_name(name: str) -> str:
    """Return an abbreviation such as CEST unchanged, and anything longer as "local time"."""
    return name if re.fullmatch(r"[A-Za-z0-9+-]{1,10}", name) else "local time"


def _utc_offset(seconds: int) -> int:
    if abs(seconds) >= 86400:
        raise ValueError("a time zone is less than a day from UTC")
    return seconds


class TimeZone(Stored):
    """Time zone of the machine that trained, which its report shows times in."""

    name: Annotated[str, AfterValidator(_zone_name)] = "UTC"
    utc_offset_seconds: Annotated[int, AfterValidator(_utc_offset)] = 0

    def local(self, unix: float) -> datetime:
        """Return a moment in this time zone."""
        zone = timezone(timedelta(seconds=self.utc_offset_seconds), self.name)
        return datetime.fromtimestamp(unix, zone)


class Hardware(Stored):
    """The device a prediction is made for; see hardware.toml."""

    name: str
    kind: Literal["geforce", "workstation", "datacenter", "cpu", "other"]
    """geforce and workstation cards may also drive a screen"""
    architecture: str
    peak_flops: float | None
    """dense FLOP/s of matrix products in the run's dtype; None where it is not known"""
    peak_name: str
    """what the peak is, in words: cores x rate x clock, or how it was measured"""
    boost_clock_hz: float | None = None
    """the clock that peak_flops counts with; None where it was measured, or is not known"""
    matmul_flops: float | None
    """FLOP/s of a large matrix product that was measured on such a device; a reachable ceiling"""
    sms: int | None = None
    float32_flops: float | None = None
    """FLOP/s of the plain fp32 units, outside the matrix units"""
    memory_bytes: int | None
    bandwidth_bytes_per_second: float | None
    power_limit_watts: float | None
    interconnect: str | None = None
    """what joins it to other devices, in words: PCIe 4.0 x16, NVLink 4"""
    interconnect_bytes_per_second: float | None = None
    """in one direction, of one device, as the datasheet has it"""
    process_bytes: int | None = None
    """resident memory of the process before it makes the model; known only where it runs"""
    source: str


class FreeMemory(Stored):
    bytes: int
    """of each device"""
    source: str
    """in words"""


class Estimate(Interval):
    """A predicted quantity with its formula and source."""

    unit: str
    formula: str
    source: str

    @classmethod
    def of(cls, row_id: str, interval: Interval, formula: str, source: str) -> Estimate:
        return cls(
            low=interval.low,
            expected=interval.expected,
            high=interval.high,
            unit=QUANTITIES[row_id].unit,
            formula=formula,
            source=source,
        )


class Part(Stored):
    """One summand of a predicted quantity."""

    name: str
    value: float
    formula: str


class Prediction(Stored):
    """What a run will need, frozen before its first step."""

    schema_version: int = SCHEMA
    created_unix: float
    hardware: Hardware
    gpus: int = 1
    """devices of this kind that share the run: step_parts and memory are of each of them"""
    dtype: str
    quantities: dict[str, Estimate]
    """by row id; a quantity nobody can predict is absent"""
    unpredicted: dict[str, str]
    """row id -> why there is no prediction"""
    calibrated: dict[str, Estimate] = {}
    """by row id: what follows from measurements on this very device, where there are any"""
    step_parts: list[Part]
    """seconds of one optimizer step by kind of operation; adds up to the expected step"""
    memory_parts: list[Part]
    """bytes by component; adds up to the expected peak"""
    ledger: dict[str, float]
    """expected seconds of the whole run: compile_s, step_s, eval_s, checkpoint_s, other_s"""
    notes: list[str] = []

    def best(self, row_id: str) -> Estimate | None:
        """The calibrated estimate where there is one, else the analytic one."""
        return self.calibrated.get(row_id, self.quantities.get(row_id))

    @property
    def peak_flops(self) -> float | None:
        """FLOP/s of all devices together, against which MFU counts."""
        peak = self.hardware.peak_flops
        return None if peak is None else self.gpus * peak


class Line(Stored):
    elapsed_seconds: float | None = None


class Start(Line):
    """A process began, or resumed, a run."""

    kind: Literal["start"] = "start"
    unix_time: float | None = None
    source: Literal[
        "train", "nanogpt_log", "nanochat_log", "build_nanogpt_log", "wandb_history"
    ] = "train"
    max_steps: int
    first_step: int = 0
    """0, or the step a resumed run goes on from"""
    prediction_sha256: str
    device: str
    train_tokens: int | None = None
    """unique training tokens that were found; None where the data was not seen"""
    idle_power_watts: float | None = None
    """mean power of the board just before the run, while nothing was asked of it"""
    idle_utilization: float | None = None
    """what other programs kept of the board meanwhile; above a few percent it was not idle"""
    other_programs: dict[str, int] | None = None
    """bytes on the card that other programs hold, by their name; None where nobody tells"""
    wandb_id: str | None = None
    """W&B's id of the run, which its resumption continues"""
    continues: bool | None = None
    """True where the process that wrote the line before goes on, on the same clock: it went back
    to a checkpoint by itself"""
    restart: Whole | None = None
    """how often --supervise has started the run again by itself; None where it does not watch"""
    rollbacks: Whole | None = None
    """how often the run has gone back for updates that were not finite; the order of the data
    depends on it"""
    ranks: Whole | None = None
    """processes that share the micro-batches of a step; None where that is not known"""
    sensed_cards: Whole | None = None
    """GPUs that the sensor lines are of; None where the log does not tell, as of one process"""
    micro_batch: Whole | None = None
    """sequences in a pass, where memory had run out with those of the configuration"""


class Compile(Line):
    """Time spent making the compiled model; mode says what the loop then ran."""

    kind: Literal["compile"] = "compile"
    step: int | None = None
    """the step that had to wait for it, where it came in the middle of the run"""
    seconds: float
    """in no step, evaluation or checkpoint"""
    mode: Literal["compiled", "eager"]


class Step(Line):
    """One optimizer step. `step` counts from 0: the step that makes update step + 1."""

    kind: Literal["step"] = "step"
    step: Whole
    loss: float | None = None
    """mean over the micro-batches of the step, in nats per token; None where it was not finite"""
    step_seconds: float | None = None
    """from the end of the previous work to the end of this update, without evaluation, checkpoint
    or compilation; None where a log has no time of its own for this step"""
    printed_seconds: float | None = None
    """what another program printed for it, with the evaluation or compilation that lies in it"""
    data_wait_seconds: float | None = None
    """of step_seconds: how long the device waited for its batches, their copy included"""
    forward_seconds: float | None = None
    """of step_seconds; like the next two and the peaks only in every measure.split_every-th step"""
    backward_seconds: float | None = None
    optimizer_seconds: float | None = None
    """clipping, update and clearing of gradients"""
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens: Whole | None = None
    power_watts: float | None = None
    """mean, least and most of the samples that fell into this step; None where none did"""
    power_min_watts: float | None = None
    power_max_watts: float | None = None
    peak_allocated_bytes: Whole | None = None
    """so far, as in the end line: a run that dies has no end line"""
    peak_reserved_bytes: Whole | None = None
    peak_host_bytes: Whole | None = None


class Rank(Line):
    """One of several processes in a step: every measure.split_every-th has a line for each."""

    kind: Literal["rank"] = "rank"
    step: Whole
    rank: Whole
    step_seconds: float
    """on its own clock; a step ends for all at once, when they have exchanged their gradients"""
    data_wait_seconds: float
    forward_seconds: float | None = None
    """all forward passes of the step, in which no process waits for another"""
    peak_allocated_bytes: Whole | None = None
    """so far, as in the step line"""
    peak_host_bytes: Whole | None = None


class Eval(Line):
    """An evaluation after `step` updates."""

    kind: Literal["eval"] = "eval"
    step: int
    train_loss: float | None = None
    val_loss: float | None = None
    """None where it was not finite"""
    val_bits_per_byte: float | None = None
    """instead of nats per token, where another program gives this; the one follows from the other
    only with the bytes per token of its validation text"""
    seconds: float | None = None


class Checkpoint(Line):
    """A checkpoint after `step` updates; the line is written once it is on disk."""

    kind: Literal["checkpoint"] = "checkpoint"
    step: int
    seconds: float | None = None
    """what the loop waited for it"""
    write_seconds: float | None = None
    """from its copy in memory to its name on the disk, while training went on"""
    bytes: int | None = None
    path: str | None = None


class Sensor(Line):
    """One reading of the sensors, about one a second; a field that nobody gives is None.

    Power is the mean of the samples since the reading before; all else is as it is at
    elapsed_seconds. Where a run has several cards (Start.sensed_cards), power, its limit and energy
    are their sums, utilisation is their mean, and all else is of the card that is worst off: the
    highest temperature, fan and memory, the lowest clocks and link, every reason for throttling.
    """

    kind: Literal["sensor"] = "sensor"
    power_watts: float | None = None
    power_min_watts: float | None = None
    power_max_watts: float | None = None
    energy_joules: float | None = None
    """energy since the sampler started: from the driver's counter where there is one"""
    energy_source: Literal["counter", "integral"] | None = None
    integral_joules: float | None = None
    """the same from the sampled power alone, whether there is a counter or not"""
    gap_seconds: float | None = None
    """since the sampler started: time without samples, which no integral bridges; absent if none"""
    power_limit_watts: float | None = None
    temperature_celsius: float | None = None
    fan: float | None = None
    """intended speed as a share of the highest"""
    sm_clock_hz: float | None = None
    memory_clock_hz: float | None = None
    utilization: float | None = None
    throttle: list[str] | None = None
    """in words, why the clock is lower than it could be; empty if it is not. What a card does that
    has nothing to do (idle, clocks set by an application) is no throttling"""
    pcie_generation: Whole | None = None
    pcie_width: Whole | None = None
    device_used_bytes: Whole | None = None
    process_used_bytes: Whole | None = None
    hottest_card: Whole | None = None
    """of several cards, the rank whose temperature this is; like the next two absent for one card
    """
    fullest_card: Whole | None = None
    """whose device_used_bytes this is"""
    slowest_card: Whole | None = None
    """whose sm_clock_hz this is"""


class Event(Line):
    """Something worth telling. `about` is the row id it bears on."""

    kind: Literal["event"] = "event"
    level: Literal["info", "warning", "alarm"] = "info"
    """a warning is worth reading in the morning, an alarm at night"""
    what: str
    text: str
    step: int | None = None
    about: str | None = None


class Benchmark(Line):
    """How the model of a checkpoint does on something, written after the run by evaluate.py.

    A newer line of the same name, metric and `against` takes the place of an older one.
    """

    kind: Literal["benchmark"] = "benchmark"
    step: Whole
    """updates that the model has seen"""
    name: str
    """held_out, hellaswag, or a task of lm-evaluation-harness"""
    metric: str
    better: Literal["higher", "lower"]
    main: bool = True
    """whether it is the metric of this benchmark that models are compared by"""
    value: float
    low: float | None = None
    """of the middle 95 % of bootstrap samples, as are the other intervals"""
    high: float | None = None
    n: Whole
    """windows, examples or documents"""
    against: str | None = None
    """the model that was held against it, on the same items; gpt2 is GPT-2 124M"""
    against_value: float | None = None
    difference_low: float | None = None
    """of value - against_value, both on the same samples"""
    difference_high: float | None = None
    seconds: float | None = None
    """for all models and metrics of this benchmark together"""


class End(Line):
    """The run came to its end, or was stopped; without this line it died."""

    kind: Literal["end"] = "end"
    status: Literal["finished", "stopped", "failed"]
    steps: int
    """updates made since step 0"""
    wall_seconds: float | None = None
    """of this process, from its start; None in an imported log"""
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    peak_process_bytes: int | None = None
    """resident memory on a CPU; on a GPU the sensor lines tell"""
    peak_host_bytes: int | None = None
    """resident memory of this process, on every device"""
    peak_inactive_bytes: int | None = None
    """of the reserved memory: free, but in pieces of blocks that are in use"""
    allocation_retries: int | None = None
    """how often the allocator had to give everything back to find room"""
    reason: str | None = None
    restartable: bool | None = None
    """of a run that failed: whether another attempt from its last checkpoint may go better, for
    which --supervise makes one; None of a run that did not fail"""


LogLine = Annotated[
    Start | Compile | Step | Rank | Eval | Checkpoint | Sensor | Event | Benchmark | End,
    Field(discriminator="kind"),
]
