"""A prediction that is corrected by what one run measured.

On the same card each part of the time is predicted anew and multiplied by how much longer it took
in this run than was predicted; the step in the way in which every finished run corrects the next
prediction (predict/calibration.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from nanogauge.hardware import usually_free_bytes
from nanogauge.predict.calibration import Calibration, FinishedRun
from nanogauge.predict.energy import cost_of, kwh_of
from nanogauge.predict.fit import Verdict, fit_verdict, memory_of, with_micro_batch
from nanogauge.predict.prediction import predict
from nanogauge.predict.workload import workload_of
from nanogauge.quantities import Interval
from nanogauge.records import Hardware, Prediction
from nanogauge.report.measured import Measurements
from nanogauge.runlog import Recorded
from nanogauge.runspec import RunSpec
from nanogauge.schedule import checkpoints, evaluations


def in_micro_batches(spec: RunSpec, micro: int) -> RunSpec:
    """Return the same tokens a step in other micro-batches, and as many or a few more evaluated."""
    sequences = (spec.eval_batches or 0) * spec.micro_batch
    return replace(with_micro_batch(spec, micro), eval_batches=math.ceil(sequences / micro))


def memory_left(hardware: Hardware, recorded: Recorded) -> int | None:
    """Bytes that a run can have on this card: all but what other programs held at the start.

    Where nobody told, a card that may drive a screen is taken to hold a desktop; of a machine
    without a GPU nothing is known but its whole memory. None where not even that is known.
    """
    total, others = hardware.memory_bytes, recorded.starts[-1].other_programs
    same_card = hardware.kind != "cpu" and hardware.name == recorded.starts[-1].device
    if same_card and total is not None and others is not None:
        return total - sum(others.values())
    return usually_free_bytes(hardware)


@dataclass(frozen=True)
class Engine:
    """The prediction of runs like this one, corrected by it."""

    spec: RunSpec
    hardware: Hardware
    calibration: Calibration
    """this run alone"""
    factors: dict[str, float]
    """measured over predicted, of each part of the ledger but the steps"""
    memory_factor: float
    """measured peak of the process over the predicted one; 1 where it was not measured"""
    memory_measured: bool
    free_bytes: int | None
    watts: float | None
    """mean that was measured"""
    recorded: Recorded

    @classmethod
    def of(
        cls, spec: RunSpec, prediction: Prediction, found: Measurements, recorded: Recorded
    ) -> Engine:
        hardware = prediction.hardware
        step, watts = found.values["step_seconds"], found.values.get("power_watts")
        on_gpu = hardware.kind != "cpu"
        this_run = FinishedRun(
            name=spec.name or "",
            workload=workload_of(spec, on_gpu),
            step_seconds=step.value,
            p10_seconds=step.value if step.p10 is None else step.p10,
            p90_seconds=step.value if step.p90 is None else step.p90,
            n=step.n or 1,
            finished_unix=recorded.starts[-1].unix_time or 0.0,
        )
        peak = found.values.get("peak_process_bytes")
        expected = memory_of(spec, hardware).process.expected
        return cls(
            spec=spec,
            hardware=hardware,
            calibration=Calibration(
                device=hardware.name,
                torch="",
                threads=None,
                created_unix=this_run.finished_unix,
                runs=(this_run,),
            ),
            factors=_factors(spec, predict(spec, hardware), found, recorded),
            memory_factor=peak.value / expected if peak is not None else 1.0,
            memory_measured=peak is not None,
            free_bytes=memory_left(hardware, recorded),
            watts=watts.value if watts is not None else None,
            recorded=recorded,
        )

    @property
    def step_factor(self) -> float:
        """The measured steady step over the predicted one."""
        found = predict(self.spec, self.hardware, self.calibration)
        measured, predicted = found.calibrated["step_seconds"], found.quantities["step_seconds"]
        return measured.expected / predicted.expected

    def on(self, hardware: Hardware, free_bytes: int | None) -> Engine:
        """For another card, of which nothing was measured: only its memory and power."""
        return replace(
            self,
            hardware=hardware,
            free_bytes=free_bytes,
            memory_factor=1.0,
            memory_measured=False,
            watts=None,
        )

    def seconds(self, spec: RunSpec) -> Interval:
        """The whole run; the interval is the step's, as the other parts were measured."""
        found = predict(spec, self.hardware, self.calibration)
        step, analytic = found.calibrated["step_seconds"], found.quantities["step_seconds"]
        slower = step.expected / analytic.expected
        ledger = found.ledger
        work = spec.steps * step.expected
        work += ledger["eval_s"] * self.factors.get("eval_s", slower)
        rest = sum(ledger[k] * self.factors[k] for k in ("compile_s", "checkpoint_s", "other_s"))
        return step.scaled(work) + rest

    def power(self, limit_watts: float | None = None) -> Interval | None:
        """Mean watts of the boards: as measured, else as predicted.

        The interval of a measured mean is as wide as the predicted one: other work draws another
        share of the limit. It does not go above the limit unless the measurement did.
        """
        predicted = predict(self.spec, self.hardware)
        share = predicted.quantities.get("power_watts")
        if share is None:
            return None
        if self.watts is None:
            return share
        limit = self.spec.world_size * (
            limit_watts or self.hardware.power_limit_watts or self.watts
        )
        drawn = share.scaled(self.watts)
        return Interval(drawn.low, self.watts, max(self.watts, min(drawn.high, limit)))

    def memory(self, spec: RunSpec) -> tuple[float, Verdict | None]:
        """The expected peak, and whether it fits; both corrected by the measured peak.

        What was measured of this very workload has no interval.
        """
        memory = memory_of(spec, self.hardware)
        peak = self.memory_factor * memory.process
        work = workload_of(spec, self.hardware.kind != "cpu")
        if self.memory_measured and work == self.calibration.runs[0].workload:
            peak = Interval.exact(peak.expected)
        verdict = None if self.free_bytes is None else fit_verdict(peak, self.free_bytes)
        return peak.expected, verdict

    def made_to_fit(self, spec: RunSpec) -> RunSpec | None:
        """The configuration, in halved micro-batches until it may fit; None where it never does."""
        while self.memory(spec)[1] == "does not fit":
            micro = spec.micro_batch
            if micro % 2:
                return None
            spec = in_micro_batches(spec, micro // 2)
        return spec


def _factors(
    spec: RunSpec, predicted: Prediction, found: Measurements, recorded: Recorded
) -> dict[str, float]:
    """Measured over predicted, of each part of the ledger but the steps.

    What the log does not tell apart stands in another part, or was not seen: a checkpoint that was
    timed with the evaluation costs nothing here, a start-up that nobody timed what is predicted.
    """
    measured, ledger = found.ledger, predicted.ledger
    factors = {"compile_s": 1.0, "checkpoint_s": 1.0, "other_s": 1.0}
    again = sum(startup.compile_seconds for startup in recorded.startups[1:])
    if measured.compile_s is not None and ledger["compile_s"] > 0:
        factors["compile_s"] = (measured.compile_s - again) / ledger["compile_s"]
    if measured.eval_s is not None and recorded.evals and ledger["eval_s"] > 0:
        one = measured.eval_s / len(recorded.evals)
        factors["eval_s"] = one / (ledger["eval_s"] / evaluations(spec))
    saved = sum(line.seconds is not None for line in recorded.checkpoints)
    if measured.checkpoint_s is None:
        factors["checkpoint_s"] = 0.0
    elif saved and ledger["checkpoint_s"] > 0:
        one = measured.checkpoint_s / saved
        factors["checkpoint_s"] = one / (ledger["checkpoint_s"] / checkpoints(spec))
    if measured.other_s is not None:
        factors["other_s"] = max(measured.other_s, 0.0) / ledger["other_s"]
    return factors


def energy_and_cost(
    spec: RunSpec, watts: Interval | None, seconds: Interval
) -> tuple[Interval | None, Interval | None]:
    """Return the energy of the boards in kWh and its cost; None without power or a tariff."""
    if watts is None:
        return None, None
    energy = kwh_of(watts, seconds)
    tariff = spec.cost.price_per_kwh is not None
    return energy, cost_of(spec.cost, energy, seconds) if tariff else None
