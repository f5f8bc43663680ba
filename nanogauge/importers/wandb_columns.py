"""What the columns of a W&B history mean, program by program: only what is certain."""

from __future__ import annotations

from dataclasses import dataclass, field

from nanogauge.analysis.measured import NOT_IN_LOG
from nanogauge.importers.parsed import Form, PrintedSession, clocked, warning
from nanogauge.schema import Event
from nanogauge.sinks.rows import CHECKPOINT_KEYS, COMPILE_KEYS, EVAL_KEYS, SENSOR_KEYS

CLOCK = ("_runtime", "_timestamp")
"""W&B's own: seconds since its run began, and the time of day"""


@dataclass(frozen=True)
class Flavour:
    """A program that logs to W&B; each mapping is from its column to a field of ours."""

    program: str
    step: str
    """the column that counts its steps"""
    marks: tuple[str, ...]
    """columns that no other program has together"""
    iteration: dict[str, str] = field(default_factory=dict)
    evaluation: dict[str, str] = field(default_factory=dict)
    sensor: dict[str, str] = field(default_factory=dict)
    checkpoint: dict[str, str] = field(default_factory=dict)
    compilation: dict[str, str] = field(default_factory=dict)
    peaks: dict[str, tuple[str, int]] = field(default_factory=dict)
    """column -> peak field of Session, and bytes per unit of the column"""
    energy_from_counter: str = ""
    """1 where the energy is the driver's counter, 0 where it is integrated power"""
    first_step: int = 0
    """the number of the first step in its count"""
    elapsed: str = "_runtime"
    """time since the run began"""
    elapsed_unit_seconds: float = 1.0
    compilation_inside: bool = False
    remarks: tuple[str, ...] = ()
    """what a reader of the report has to know"""

    @property
    def of_evaluations(self) -> bool:
        """It logs nothing between its evaluations."""
        return not self.iteration

    @property
    def known(self) -> set[str]:
        """All columns that are read."""
        mapped = {*self.iteration, *self.evaluation, *self.sensor, *self.checkpoint}
        mapped |= {*self.compilation, *self.peaks}
        single = {self.step, self.elapsed, self.energy_from_counter, *CLOCK}
        return {name for name in mapped | single if name}


_OTHER_MODEL = (
    "{}'s model is not the GPT of the configuration: parameters, FLOPs, MFU and every prediction "
    "are of the configuration that was given, and right as far as it is."
)


def _fields_of(keys: dict[str, str]) -> dict[str, str]:
    return {column: name for name, column in keys.items()}


FLAVOURS = (
    Flavour(
        program="nanogauge",
        step="step",
        marks=("perf/step_seconds",),
        iteration={
            "train/loss": "loss",
            "train/learning_rate": "learning_rate",
            "train/grad_norm": "grad_norm",
            "perf/step_seconds": "seconds",
            "perf/tokens_per_second": "tokens_per_second",
        },
        evaluation=_fields_of(EVAL_KEYS) | {"eval/val_bits_per_byte": "bits_per_byte"},
        sensor=_fields_of(SENSOR_KEYS),
        checkpoint=_fields_of(CHECKPOINT_KEYS),
        compilation=_fields_of(COMPILE_KEYS),
        peaks={
            "memory/peak_allocated_bytes": ("peak_allocated_bytes", 1),
            "memory/peak_reserved_bytes": ("peak_reserved_bytes", 1),
        },
        energy_from_counter="gpu/energy_from_counter",
        elapsed="hours",
        elapsed_unit_seconds=3600.0,
    ),
    Flavour(
        program="torchtitan",
        step="_step",
        marks=("loss_metrics/global_avg_loss",),
        iteration={
            "loss_metrics/global_avg_loss": "loss",
            "grad_norm": "grad_norm",
            "time_metrics/end_to_end(s)": "seconds",
            "throughput(tps)": "tokens_per_second",
        },
        first_step=1,
        peaks={"memory/max_reserved(GiB)": ("peak_reserved_bytes", 2**30)},
        remarks=(
            _OTHER_MODEL.format("torchtitan"),
            "A step's time is torchtitan's mean since its last row, with whatever lay between; the "
            "first row's is left out, because it is divided by steps that were not made.",
        ),
    ),
    Flavour(
        program="nanochat",
        step="step",
        marks=("train/dt", "total_training_time"),
        iteration={
            "train/loss": "loss",
            "train/dt": "seconds",
            "train/tok_per_sec": "tokens_per_second",
            "train/grad_norm": "grad_norm",
        },
        evaluation={"val/bpb": "bits_per_byte"},
        compilation_inside=True,
        remarks=(
            _OTHER_MODEL.format("nanochat"),
            "The losses are nanochat's running means.",
        ),
    ),
    Flavour(
        program="nanoGPT",
        step="iter",
        marks=("train/loss", "val/loss"),
        evaluation={"train/loss": "train_loss", "val/loss": "val_loss"},
    ),
)


def form_of(flavour: Flavour) -> Form:
    def events(run: list[PrintedSession]) -> list[Event]:
        said = [warning("columns", text) for text in flavour.remarks]
        if flavour.elapsed == "_runtime" and clocked(run):
            text = "The time of the whole is W&B's: from the start of its run to its last row."
            said.append(warning("clock", text))
        return said

    return Form(
        source="wandb_history",
        program=f"W&B history of {flavour.program}",
        what="the history of a W&B run",
        evaluation_inside=False,
        compilation_inside=flavour.compilation_inside,
        note="The history does not name its device or software: the device is as given on the "
        "command line.",
        events=events,
    )


def not_in_log(row: str, why: str) -> Event:
    return Event(what=NOT_IN_LOG, about=row, text=f"not in this log: {why}")
