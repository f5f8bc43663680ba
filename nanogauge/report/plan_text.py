"""A plan for a terminal: the rows, whether it fits, when it ends, what else would fit or end."""

from __future__ import annotations

from datetime import datetime

from rich.console import Console
from rich.table import Table
from rich.text import Text

from nanogauge.clock_times import day_and_time
from nanogauge.consistency import Inconsistency
from nanogauge.planning import Candidate, Deadline, Fit, FittingModels, Steps
from nanogauge.predict.flops import (
    flops_per_token_causal,
    flops_per_token_executed,
    flops_per_token_palm,
)
from nanogauge.quantities import GIB, Interval, format_range, format_seconds, format_value
from nanogauge.recipe import cut_sentences, recipe_sentence
from nanogauge.records import Prediction
from nanogauge.report.cells import in_order
from nanogauge.report.compare import Row
from nanogauge.report.render import predicted_columns, print_findings, print_rows
from nanogauge.runspec import RunSpec


def print_plan(
    spec: RunSpec,
    prediction: Prediction,
    rows: list[Row],
    findings: list[Inconsistency],
    fit: Fit,
    deadline: Deadline,
    now: datetime,
) -> None:
    console = Console()
    hardware, gpus = prediction.hardware, prediction.gpus
    several = f"{gpus} x " if gpus > 1 else ""
    console.print(Text(f"{spec.name} on {several}{hardware.name}", style="bold"))
    console.print(Text(hardware.peak_name, style="dim"))
    console.print(Text(recipe_sentence(spec), style="dim"))
    console.print()
    shown = [row for row in in_order(rows) if row.claimed is not None or row.analytic is not None]
    print_rows(shown, ("expected", *predicted_columns(rows), "claimed"), console, planned=True)
    console.print()
    console.print(Text(fit_sentence(spec, prediction, fit)))
    for sentence in deadline_sentences(spec, prediction, deadline, now):
        console.print(Text(sentence))
    if deadline.preparation_seconds is not None:
        console.print(
            Text(
                f"Not in these times: {spec.dataset} is not there; preparing its tokens takes "
                f"about {_time(deadline.preparation_seconds)} before the run."
            )
        )
    console.print(Text(flops_sentence(spec), style="dim"))
    if prediction.step_parts:
        parts = ", ".join(
            f"{p.name} {format_seconds(p.value)}" for p in prediction.step_parts if p.value
        )
        console.print(Text(f"One step: {parts}.", style="dim"))
    if (step := prediction.calibrated.get("step_seconds")) is not None:
        console.print(Text(f"Calibrated by {step.source}: {step.formula}.", style="dim"))
    if fit.models is not None:
        print_models(spec, fit.models, console)
    for note in prediction.notes:
        console.print(Text(f"! {note}", style="yellow"))
    print_findings(findings, console)


def flops_sentence(spec: RunSpec) -> str:
    """A step by each of the named conventions."""
    shape = spec.shape
    palm, causal, executed = (
        f"{spec.tokens_per_step * per_token(shape) / 1e12:,.4g}"
        for per_token in (flops_per_token_palm, flops_per_token_causal, flops_per_token_executed)
    )
    return (
        f"One step: {palm} TFLOP (6N + 12LCT); {causal} where only causal attention counts, "
        f"{executed} as flash attention computes it."
    )


def fit_sentence(spec: RunSpec, prediction: Prediction, fit: Fit) -> str:
    peak = prediction.quantities["peak_process_bytes"]
    low, expected, high, free = (
        f"{size / GIB:.1f}" for size in (peak.low, peak.expected, peak.high, fit.free_bytes)
    )
    largest, sure = fit.largest_micro_batch, fit.largest_sure_micro_batch
    if largest is None:
        advice = "No micro-batch is expected to fit: make the model smaller"
    elif largest == sure:
        advice = f"The largest micro-batch that fits at the same tokens per step is {largest}"
    else:
        advice = (
            f"At the same tokens per step a micro-batch of {largest} is expected to fit, "
            f"{sure or 'none'} is sure to"
        )
    each = " on each GPU" if prediction.gpus > 1 else ""
    return (
        f"Memory: {fit.verdict}: about {expected} ({low}-{high}) of {free} GiB free{each} "
        f"({fit.free_source}) at micro-batch {spec.micro_batch}. {advice}."
    )


def deadline_sentences(
    spec: RunSpec, prediction: Prediction, deadline: Deadline, now: datetime
) -> list[str]:
    """When it ends; and where a time was given, what would end by then."""
    finish = deadline.finish
    if finish is None:
        return [f"Finish: not known: {prediction.unpredicted['total_seconds']}."]
    start = day_and_time(deadline.start, now) if deadline.start > now else "now"
    between = f", between {day_and_time(finish.low, now)} and {day_and_time(finish.high, now)}"
    sentences = [
        f"Finish: {day_and_time(finish.expected, now)}{between if finish.expected else ''}, "
        f"if it starts {start}."
    ]
    if deadline.by is None or deadline.steps is None or deadline.tokens is None:
        return sentences
    by = day_and_time(deadline.by, now)
    sentences += _steps_sentences(spec, by, deadline.steps, deadline.tokens)
    ratio = f"{deadline.tokens_per_parameter:g} tokens for each parameter"
    if deadline.model is None:
        sentences.append(f"No model of this shape ends by {by} with {ratio}.")
    else:
        model = deadline.model
        shape = f"{model.n_layer} layers x {model.n_embd} ({model.n_head} heads)"
        sentences.append(
            f"The largest model of this shape that ends by {by} with {ratio}: {shape}, "
            f"{_parameters(model)} parameters, {model.max_steps:,} steps at micro-batch "
            f"{model.micro_batch}, {_time(model.total_seconds)}; memory: {model.verdict}."
        )
    return sentences


def _steps_sentences(spec: RunSpec, by: str, steps: Steps, tokens: Steps) -> list[str]:
    """How much of the run ends by then; where it is not all, what to do about it."""
    if not steps.high:
        return [f"By {by}: not even one step of this model ends."]
    planned, expected = spec.steps, steps.expected
    total = format_value("tokens_total", tokens.expected)
    made = f"{expected:,} of the {planned:,} steps of this run ({total} tokens)"
    if expected >= planned:
        made = f"all {planned:,} steps of this run; {expected:,} would end by then ({total} tokens)"
    interval = f"{steps.low:,} even if it is as slow as can be, {steps.high:,} if as fast"
    told = [f"By {by}: {made}; {interval}."]
    if 0 < expected < planned:
        told += cut_sentences(spec, expected, steps.low)
    elif 0 < steps.low < planned:
        told.append(f"To be sure that it ends by then: --train.max-steps {steps.low}.")
    return told


def print_models(spec: RunSpec, models: FittingModels, console: Console) -> None:
    """The largest models that fit, as a table."""
    console.print()
    steps = f"{spec.steps:,} steps"
    title = f"What is expected to fit at micro-batch {spec.micro_batch}, for {steps}:"
    console.print(Text(title))
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("", "layers", "width", "heads", "parameters", "memory", "step", "whole run"):
        table.add_column(column, no_wrap=True)
    found = {
        "widest": models.widest,
        "deepest": models.deepest,
        "same aspect": models.same_aspect,
    }
    for name, model in found.items():
        if model is None:
            table.add_row(name, "none")
            continue
        sizes = (f"{size:,}" for size in (model.n_layer, model.n_embd, model.n_head))
        table.add_row(
            name,
            *sizes,
            _parameters(model),
            f"{model.peak_process_bytes / GIB:.1f} GiB",
            *(
                format_seconds(seconds.expected) if seconds is not None else "not known"
                for seconds in (model.step_seconds, model.total_seconds)
            ),
        )
    console.print(table)


def _parameters(model: Candidate) -> str:
    if model.parameters >= 1e9:
        return f"{model.parameters / 1e9:.3g} G"
    return f"{model.parameters / 1e6:.3g} M"


def _time(seconds: Interval | None) -> str:
    if seconds is None:
        return "not known"
    interval = format_range("total_seconds", seconds.low, seconds.high)
    return f"{format_seconds(seconds.expected)} ({interval})"
