"""Measure every row of the report from the run log, or say why it cannot be measured."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from nanogauge.analysis.ledger import Ledger, Measured, build_ledger, describe_run_time, steady_seconds
from nanogauge.analysis.telemetry import energy_figures, memory_figures
from nanogauge.prediction.calibrated import FinishedRun
from nanogauge.prediction.flops import MFU_CONVENTIONS, flops_per_token_6n, flops_per_token_palm
from nanogauge.prediction.workload import workload_of
from nanogauge.quantities import QUANTITIES, mfu
from nanogauge.runlog.history import RunHistory
from nanogauge.runspec import RunSpec
from nanogauge.schema import Benchmark, Prediction, Stored

QUALITY = "quality_vs_gpt2"
PREDICTED_TASK = "hellaswag"
"""Task whose score is predicted; only a figure of it is compared with the prediction."""
GPT2 = "gpt2"
HELD_OUT = "held_out"
LEAST_VALIDATION_TOKENS = 1_000_000
"""A loss on fewer tokens is too noisy to be compared with another."""
NOT_IN_LOG = "not_in_log"
"""Name of the event that says why an imported log has no value for a row."""
NON_FINITE = "non_finite_to_the_end"
"""Name of the event that says from which step on no loss is finite."""


class Measurements(Stored):
    values: dict[str, Measured]
    missing: dict[str, str]
    """Row id -> reason why it was not measured."""
    refused: list[str]
    """Row ids with an impossible measured value; `missing` has the reason."""
    ledger: Ledger
    median_step_seconds: float | None
    train_loss: float | None
    """Loss of the last evaluation on the training split; None without one."""
    steps_done: int
    timed_whole: bool
    """True if the ledger covers the whole run, which an imported log may not."""
    status: str
    """finished, stopped or failed; unfinished if the run died or is still running."""
    notes: dict[str, list[str]]
    """Row id -> texts of logged events about it."""


def measure(recorded: RunHistory, spec: RunSpec, prediction: Prediction) -> Measurements:
    """Measure every quantity of a run."""
    return _Measurer(recorded, spec, prediction).result()


def finished_run(
    spec: RunSpec, prediction: Prediction, recorded: RunHistory, measurements: Measurements
) -> FinishedRun:
    """Return a run whose step time was measured as evidence for other predictions."""
    step, start = measurements.values["step_seconds"], recorded.starts[-1]
    spec = spec.resolved(prediction.dtype, prediction.gpus)
    if recorded.compiles and recorded.compiles[-1].mode == "eager":
        spec = replace(spec, compile=False)
    return FinishedRun(
        name=spec.name or "",
        workload=workload_of(spec, prediction.hardware.kind != "cpu"),
        step_seconds=step.value,
        p10_seconds=step.value if step.p10 is None else step.p10,
        p90_seconds=step.value if step.p90 is None else step.p90,
        n=step.n or 1,
        finished_unix=start.unix_time or 0.0,
        others_share=start.idle_utilization,
    )


class _Measurer:
    """Fill `values`, or `missing` with a reason, for each quantity of one run."""

    def __init__(self, recorded: RunHistory, spec: RunSpec, prediction: Prediction) -> None:
        self.recorded, self.spec, self.prediction = recorded, spec, prediction
        self.values: dict[str, Measured] = {}
        self.missing: dict[str, str] = {}
        self.steps_done = recorded.steps_done
        self.status = recorded.end.status if recorded.end is not None else "unfinished"
        self.seconds = steady_seconds(recorded)
        self.median = float(np.median(self.seconds)) if len(self.seconds) else None
        self.ledger = build_ledger(recorded, self.steps_done, self.median)

    def result(self) -> Measurements:
        self._measure_counts()
        refused = self._measure_step()
        self._measure_first_step()
        self._measure_total()
        for found, absent in (
            memory_figures(self.recorded, self.prediction),
            energy_figures(self.recorded, self.spec, self.prediction, self.ledger.ran_s),
            quality_figures(self.recorded.benchmarks),
        ):
            self.values |= found
            self.missing |= absent
        self._measure_against_first_step()
        self._measure_val_loss()
        notes: dict[str, list[str]] = {}
        if compared := _gpt2_benchmarks(self.recorded.benchmarks):
            notes[QUALITY] = [describe_benchmark(b) for b in compared]
        timed_whole = self.ledger.other_s is not None or self.ledger.eval_s is not None
        for event in self.recorded.events:
            if event.about is not None and event.what == NOT_IN_LOG:
                self.values.pop(event.about, None)
                self.missing[event.about] = event.text
                timed_whole &= event.about != "total_seconds"
            elif event.about is not None:
                notes.setdefault(event.about, []).append(event.text)
        for row, reason in self.spec.absent_rows().items():
            self.values.pop(row, None)
            self.missing[row] = reason
        return Measurements(
            values={row: self.values[row] for row in QUANTITIES if row in self.values},
            missing=self.missing,
            refused=refused,
            ledger=self.ledger,
            median_step_seconds=self.median,
            train_loss=self.recorded.evals[-1].train_loss if self.recorded.evals else None,
            steps_done=self.steps_done,
            timed_whole=timed_whole,
            status=self.status,
            notes=notes,
        )

    def _add(self, row: str, value: float, how: str, n: int | None = None) -> None:
        self.values[row] = Measured(value=value, n=n, how=how)

    def _measure_counts(self) -> None:
        """Fill the rows that follow from the number of steps and the configuration."""
        shape, per_step = self.spec.shape, self.spec.tokens_per_step
        tokens = self.steps_done * per_step
        how = f"counted: {self.steps_done:,} steps x {per_step:,} tokens"
        self._add("tokens_per_step", per_step, "micro-batch x context x accumulation, as run")
        self._add("tokens_total", tokens, how)
        unique = self.recorded.starts[-1].train_tokens
        if unique is not None:
            self._add("data_epochs", tokens / unique, f"{how} / {unique:,} unique tokens")
        else:
            self.missing["data_epochs"] = "the log does not say how many tokens are unique"
        for row in ("parameters", "parameters_total", "weights_bytes"):
            if row in self.prediction.quantities:
                self._add(row, self.prediction.quantities[row].expected, "counted from the configuration")
        for row, per_token in (
            ("flops_total_6n", flops_per_token_6n(shape)),
            ("flops_total_palm", flops_per_token_palm(shape)),
        ):
            self._add(row, per_token * tokens, f"{how} x {per_token / 1e6:.1f} MFLOP per token")
        if self.spec.traced is not None:
            flops = self.spec.traced.flops * self.spec.grad_accum
            self._add("flops_total_traced", self.steps_done * flops, f"{self.steps_done:,} steps x {flops:.4g} FLOP")

    def _measure_step(self) -> list[str]:
        """Fill the step time and MFU rows; return those with an MFU above 1, which are refused."""
        if self.median is None:
            self.missing |= dict.fromkeys(("step_seconds", "mfu_palm", "mfu_6n"), "no steady step is in the log yet")
            return []
        n = len(self.seconds)
        how = f"median of {n:,} steps without compilation, evaluation or checkpoint"
        others = self.recorded.end.others_processor_share if self.recorded.end is not None else None
        if others is not None and others >= 0.1 and self.prediction.hardware.kind == "cpu":
            how += f"; other programs used {100 * others:.0f} % of the processor meanwhile"
        self.values["step_seconds"] = Measured(
            value=self.median,
            p10=float(np.quantile(self.seconds, 0.1)),
            p90=float(np.quantile(self.seconds, 0.9)),
            n=n,
            how=how,
        )
        refused = []
        peak, name = self.prediction.peak_flops, self.prediction.hardware.peak_name
        for row, per_token in MFU_CONVENTIONS.items():
            flops = per_token(self.spec.shape) * self.spec.tokens_per_step
            achieved = f"{flops / self.median / 1e12:.3g}"
            if peak is None:
                self.missing[row] = f"{achieved} TFLOP/s, but the peak is {name}"
            elif (share := mfu(flops, self.median, peak)) > 1:
                self.missing[row] = (
                    f"{achieved} TFLOP/s is above the peak ({name}): the time, the FLOPs or the "
                    "peak is wrong, or several GPUs shared the run, so it is refused"
                )
                refused.append(row)
            else:
                self._add(row, share, f"{achieved} of {peak / 1e12:.3g} TFLOP/s at the median step")
        return refused

    def _measure_first_step(self) -> None:
        row = "first_step_seconds"
        compiles = self.recorded.compiles
        first = self.recorded.steps[0] if self.recorded.steps else None
        compiling = sum(c.seconds for c in compiles[:1])
        if first is None or first.step != 0:
            self.missing[row] = "step 0 is not in the log"
        elif first.step_seconds is not None:
            how = f"compilation {compiling:.3g} s + step {first.step_seconds:.3g} s"
            if not compiles:
                how = "the step alone: the log has no compilation"
            self._add(row, compiling + first.step_seconds, how)
        elif first.printed_seconds is None:
            self.missing[row] = "the log has no time for step 0"
        elif self.median is None or not compiles:
            how = "as printed; the log does not separate evaluation, step and compilation"
            self._add(row, first.printed_seconds, how)
        else:
            own = compiling + self.median
            rest = first.printed_seconds - own
            inside = f" with an evaluation of about {rest:.3g} s; without it {own:.3g} s" if rest > 1e-6 else ""
            what = "compilation" if self.spec.compile else "compilation or warm-up"
            how = f"as printed{inside}: a step of {self.median:.3g} s and {compiling:.3g} s of {what}"
            self.values[row] = Measured(value=first.printed_seconds, how=how, predicted_part=own)

    def _measure_total(self) -> None:
        row, ledger = "total_seconds", self.ledger
        if self.status != "finished":
            self.missing[row] = f"the run is at step {self.spec.progress(self.steps_done)}"
        elif ledger.eval_s is None and ledger.other_s is None:
            self.missing[row] = "no evaluation has a time of its own in this log"
        elif ledger.ran_s is None:
            self.missing[row] = "no steady step in this log gives the time of the others"
        elif ledger.other_s is not None:
            self._add(row, ledger.ran_s, describe_run_time(self.recorded, ledger))
        else:
            timed = len(self.recorded.steps.known("step_seconds"))
            compiled = ", and compilation" if self.recorded.compiles else ""
            how = f"{self.steps_done:,} steps from {timed} printed ones, each evaluation{compiled}"
            self._add(row, ledger.ran_s, f"reconstructed: {how}")

    def _measure_against_first_step(self) -> None:
        """Fill the rows that compare the first step with the steady ones and its compilation."""
        first, compiles = self.values.get("first_step_seconds"), self.recorded.compiles
        if first is None or self.median is None:
            why = self.missing.get("first_step_seconds", "no steady step is in the log yet")
            self.missing |= dict.fromkeys(("speedup_after_warmup", "compile_share"), why)
            return
        how = f"first step over a steady one: {first.value:.3g} / {self.median:.3g} s"
        alone = first.predictable
        self.values["speedup_after_warmup"] = Measured(
            value=first.value / self.median, how=how, predicted_part=alone / self.median
        )
        if compiles:
            took = compiles[0].seconds
            how = f"{took:.3g} of {first.value:.3g} s"
            self.values["compile_share"] = Measured(value=took / first.value, how=how, predicted_part=took / alone)
        else:
            self.missing["compile_share"] = "the log has no compilation"

    def _measure_val_loss(self) -> None:
        row = "val_loss"
        if not self.recorded.evals:
            self.missing[row] = "no evaluation is in the log yet"
            return
        last = self.recorded.evals[-1]
        after = f"after {last.step:,} steps"
        if last.val_bits_per_byte is not None:
            bits = f"{last.val_bits_per_byte:.4f} bits per byte {after}"
            self.missing[row] = f"not in this log: it has {bits}, and not the bytes per token"
        elif last.val_loss is None:
            self.missing[row] = f"non-finite {after}"
        else:
            how, train = f"evaluation {after}", last.train_loss
            few = (self.spec.validation_tokens or 0) < LEAST_VALIDATION_TOKENS
            if not few or row not in self.prediction.quantities:  # a finished run's is of the same tokens
                train = None
            if train is not None:
                how += ", on few or unknown tokens; the prediction is compared with the training "
                how += f"split's {train:.3f}"
            self.values[row] = Measured(value=last.val_loss, how=how, predicted_part=train)


def quality_figures(benchmarks: Sequence[Benchmark]) -> tuple[dict[str, Measured], dict[str, str]]:
    """Return the run's score over GPT-2 124M's (above 1: the run is better), or why it is missing.

    The score is HellaSwag's. Without it, GPT-2's bits per byte on the run's held-out text over those of the run.
    """
    compared = {b.name: b for b in _gpt2_benchmarks(benchmarks)}
    line = compared.get(PREDICTED_TASK) or compared.get(HELD_OUT)
    if line is None:
        others = sorted({b.against for b in benchmarks if b.against not in (None, GPT2)}, key=str)
        absent = "no benchmark was run"
        if others:
            absent = f"benchmarks were compared with {', '.join(map(str, others))}, not GPT-2 124M"
        return {}, {QUALITY: absent}
    how = f"score over GPT-2 124M's: {line.name} ({line.metric})"
    if line.name == HELD_OUT:
        how = f"GPT-2 124M's over the run's own {line.metric} on the run's held-out text"
    return {QUALITY: Measured(value=_score_ratio(line) or 0.0, n=line.n, how=how)}, {}


def _gpt2_benchmarks(benchmarks: Sequence[Benchmark]) -> list[Benchmark]:
    return [b for b in benchmarks if b.main and b.against == GPT2 and _score_ratio(b) is not None]


def describe_benchmark(line: Benchmark) -> str:
    """Describe the run's and the reference model's scores, and if chance may explain them."""
    text = f"{line.name} {line.metric} {line.value:.4f}"
    if line.against_value is None:
        return text
    text += f" against {line.against_value:.4f} of {line.against} (n = {line.n:,}"
    if line.difference_low is not None and line.difference_high is not None:
        text += f", 95 % of the difference: {line.difference_low:+.4f} to {line.difference_high:+.4f}"
        if line.difference_low <= 0 <= line.difference_high:
            text += ", which may be chance"
    return text + f"; step {line.step:,})"


def _score_ratio(line: Benchmark) -> float | None:
    """Return the factor by which the run beats the reference; None if undefined."""
    better, worse = line.value, line.against_value
    if worse is not None and line.better == "lower":
        better, worse = worse, better
    return better / worse if worse is not None and worse > 0 else None
