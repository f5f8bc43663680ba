"""The same night at other settings, as the prediction has it once this run has corrected it.

What one card needed beyond its prediction says nothing of another: those are predicted as any run
is, and say so. No loss is predicted: a cheaper night may make a worse model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from nanogauge.errors import BadInput
from nanogauge.hardware import Gpu, all_gpus, find_gpu, from_row
from nanogauge.power_curves import PowerCurve
from nanogauge.predict.constants import POWER_EXPONENT
from nanogauge.predict.deadline import trained_on
from nanogauge.predict.energy import SHARE_OF_LOWERED_LIMIT
from nanogauge.predict.fit import Verdict, largest_micro_batch, reshaped
from nanogauge.predict.parameters import count_parameters
from nanogauge.predict.prediction import predict
from nanogauge.predict.workload import resolve_dtype
from nanogauge.quantities import Interval
from nanogauge.records import Hardware, Prediction, Stored
from nanogauge.report.corrected import (
    Engine,
    energy_and_cost,
    in_micro_batches,
    memory_left,
)
from nanogauge.report.measured import Measurements
from nanogauge.runlog import Recorded
from nanogauge.runspec import SETTINGS, RunSpec, with_shape
from nanogauge.schedule import evaluations

_GPT2 = {
    "n_layer": 12,
    "n_head": 12,
    "n_kv_head": 12,
    "n_embd": 768,
    "head_size": 64,
    "mlp_width": 3072,
}
GPT2_VOCABULARY = 50_257
DATACENTER_CARDS = ("H100 SXM", "A100 80GB")
"""the first that is not the run's own stands for what can be rented"""
LARGER_MICRO_BATCHES = ("micro_batch_double", "micro_batch_largest")
LOWERED_LIMIT = 0.8
"""of the power limit in force"""


class Scenario(Stored):
    """One run that could be made instead, and what it would take."""

    id: str
    label: str
    change: str
    """the flags or the command that do it; empty where nothing changes"""
    total_seconds: Interval | None
    """None where it cannot be said; why says for what reason"""
    delta_s: float | None
    """expected, against the same run made again; below zero where it would be shorter"""
    peak_process_bytes: float | None
    """expected"""
    verdict: Verdict | None
    """whether it fits into the memory; None where how much there is is not known"""
    energy_kwh: Interval | None
    """of the boards; None where neither was measured nor predicted what they draw"""
    cost: Interval | None
    """in the currency of the configuration; None without a tariff, or without energy"""
    corrected: bool
    """by this run; False: as any run on that card is predicted"""
    why: str


def what_if(
    spec: RunSpec,
    prediction: Prediction,
    measurements: Measurements,
    recorded: Recorded,
    curve: PowerCurve | None = None,
) -> list[Scenario]:
    """This run made again, and others; empty where no step was predicted or measured.

    Args:
        spec: the run.
        prediction: its own.
        measurements: what its log says.
        recorded: the log.
        curve: steps of this card at several power limits, where they were measured.
    """
    if not prediction.ledger or measurements.median_step_seconds is None:
        return []
    spec = spec.resolved(prediction.dtype, prediction.gpus)
    if recorded.compiles and recorded.compiles[-1].mode == "eager":
        spec = replace(spec, compile=False)
    engine = Engine.of(spec, prediction, measurements, recorded)
    again = _scenario(engine, "again", "the same again", spec, spec, _corrections(engine))
    assert again.total_seconds is not None
    expected = again.total_seconds.expected
    found = [again, *_batches(engine), *_evaluations(engine), *_models(engine)]
    found += [*_power_limit(engine, again, curve), *_cards(engine)]
    return [
        s.model_copy(update={"delta_s": s.total_seconds.expected - expected})
        if s.total_seconds is not None
        else s
        for s in found
    ]


def _scenario(
    engine: Engine, name: str, label: str, before: RunSpec, after: RunSpec, why: str
) -> Scenario:
    seconds = engine.seconds(after)
    peak, verdict = engine.memory(after)
    energy, cost = energy_and_cost(after, engine.power(), seconds)
    return Scenario(
        id=name,
        label=label,
        change=flags(before, after),
        total_seconds=seconds,
        delta_s=None,
        peak_process_bytes=peak,
        verdict=verdict,
        energy_kwh=energy,
        cost=cost,
        corrected=True,
        why=why,
    )


def flags(before: RunSpec, after: RunSpec) -> str:
    """Return the flags that turn one configuration into the other."""
    changed = (
        (key, after.setting(key)) for key in SETTINGS if after.setting(key) != before.setting(key)
    )
    return " ".join(f"--{key.replace('_', '-')} {value}" for key, value in changed)


def _corrections(engine: Engine) -> str:
    text = f"a step took {engine.step_factor:.3f} times what is predicted"
    if "eval_s" in engine.factors:
        text += f", an evaluation {engine.factors['eval_s']:.3f} times"
    text += "; without what happens in one night alone: throttling, restarts, slow steps"
    if engine.hardware.kind != "cpu" and engine.watts is None:
        text += "; the power is predicted, as none was measured"
    return text


def _batches(engine: Engine) -> Iterator[Scenario]:
    """Other micro-batches at the same tokens a step."""
    old, gpus = engine.spec, engine.spec.world_size
    sequences = old.micro_batch * old.grad_accum
    sizes = {"half": old.micro_batch / 2, "double": 2 * old.micro_batch}
    if engine.free_bytes is not None:
        free = engine.free_bytes / engine.memory_factor
        device = (engine.hardware, free)
        sizes["largest"] = largest_micro_batch(engine.spec, *device, "high") or 0
    tried: set[float] = {old.micro_batch}
    for name, micro in sizes.items():
        if micro in tried or micro < 1 or sequences % micro or sequences // micro % gpus:
            continue
        tried.add(micro)
        spec = in_micro_batches(engine.spec, int(micro))
        if engine.memory(spec)[1] == "does not fit":
            continue
        what = ", the largest that is sure to fit" if name == "largest" else ""
        label = f"micro-batch {micro:.0f} instead of {old.micro_batch}{what}"
        why = (
            f"the same tokens a step in {spec.grad_accum} micro-batches: weights and "
            f"gradients move {spec.grad_accum / old.grad_accum:.3g} times as often"
        )
        yield _scenario(engine, f"micro_batch_{name}", label, engine.spec, spec, why)


def _evaluations(engine: Engine) -> Iterator[Scenario]:
    every = engine.spec.eval_every or 0
    spec = replace(engine.spec, eval_every=2 * every)
    before, after = evaluations(engine.spec), evaluations(spec)
    if after < before:
        label = f"evaluation every {2 * every:,} steps instead of {every:,}"
        why = f"{after:,} evaluations instead of {before:,}"
        yield _scenario(engine, "eval_every_double", label, engine.spec, spec, why)


def _models(engine: Engine) -> Iterator[Scenario]:
    """Other widths and depths on the same tokens; GPT-2's with as many tokens a parameter."""
    spec, shape = engine.spec, engine.spec.shape
    heads, layers = max(1, shape.n_head // 3), max(1, shape.n_layer // 3)
    sizes = {
        "wider": (shape.n_layer, shape.n_head + heads),
        "narrower": (shape.n_layer, shape.n_head - heads),
        "deeper": (shape.n_layer + layers, shape.n_head),
        "shallower": (shape.n_layer - layers, shape.n_head),
    }
    others = {name: (name, reshaped(spec, *size)) for name, size in sizes.items() if min(size) > 0}
    ratio = spec.tokens_per_step * spec.steps / _parameters(spec)
    as_gpt2 = with_shape(spec, **_GPT2)
    if shape.vocabulary >= GPT2_VOCABULARY and as_gpt2.shape != shape:
        others["gpt2"] = ("GPT-2's 124M", trained_on(as_gpt2, ratio))
    for name, (word, other) in others.items():
        fitting = engine.made_to_fit(other)
        if fitting is None:
            continue
        tokens = f"the same {ratio:.3g} tokens a parameter" if name == "gpt2" else "the same tokens"
        yield _scenario(
            engine,
            name,
            f"{word}: {fitting.shape.n_layer} layers of {fitting.shape.n_embd}",
            spec,
            fitting,
            f"{_parameters(fitting) / 1e6:.1f} M parameters, {tokens}; its loss is not predicted",
        )


def _parameters(spec: RunSpec) -> int:
    return count_parameters(spec.shape).without_positions


def _power_limit(engine: Engine, again: Scenario, curve: PowerCurve | None) -> Iterator[Scenario]:
    """A lower power limit, between no slower at all and slower by as much as it draws less.

    More work is done per joule at lower power, so the time grows by less than the power falls. By
    how much follows from the curve of this card, where there is one.
    """
    limit = engine.hardware.power_limit_watts
    if engine.hardware.kind == "cpu" or limit is None:
        return
    lowered, seconds = LOWERED_LIMIT * limit, again.total_seconds
    assert seconds is not None
    said = {
        "id": "power_limit",
        "label": f"power limit {lowered:.0f} W instead of {limit:.0f}",
        "change": f"nvidia-smi -pl {lowered:.0f}",
        "peak_process_bytes": again.peak_process_bytes,
        "verdict": again.verdict,
        "delta_s": None,
    }
    if engine.watts is None:
        why = "what the board drew was not measured, so what a limit would cost is not known"
        yield Scenario(
            **said, total_seconds=None, energy_kwh=None, cost=None, corrected=True, why=why
        )
        return
    drew = engine.watts / engine.spec.world_size
    ratio = min(1.0, lowered / drew)
    slower = seconds * Interval(1.0, ratio**-POWER_EXPONENT, 1 / ratio)
    watts = SHARE_OF_LOWERED_LIMIT.map(
        lambda share: engine.spec.world_size * min(drew, share * lowered)
    )
    if curve is not None and curve.holds(lowered, limit):
        longer, draws = curve.slower(lowered, limit), curve.draws(lowered, limit)
        slower = seconds * longer
        energy, cost = energy_and_cost(engine.spec, engine.watts * draws, slower)
        yield Scenario(
            **said,
            total_seconds=slower,
            energy_kwh=energy,
            cost=cost,
            corrected=True,
            why=f"measured on this kind of card ({curve.workload}): a step takes "
            f"{longer.expected:.3f} times as long, and the board draws {draws.expected:.3f} times "
            "as much; the interval is from one measured limit to the next",
        )
        return
    energy, cost = energy_and_cost(engine.spec, watts, slower)
    why = f"the board drew {drew:.0f} W"
    if ratio < 1:
        why += (
            f"; expected (watts)^{POWER_EXPONENT:g} as between two H100 boards, no figure of this "
            "card is known: the low end is no slower, the high end as much slower as it draws less"
        )
    else:
        why += ", less than that: the limit would change nothing"
    yield Scenario(
        **said,
        total_seconds=slower,
        energy_kwh=energy,
        cost=cost,
        corrected=True,
        why=why,
    )


def _cards(engine: Engine) -> Iterator[Scenario]:
    """The next smaller and larger card of the family, and one of a data centre."""
    if engine.hardware.kind == "cpu":
        return
    dtype = resolve_dtype(engine.spec, on_gpu=True)
    for gpu in neighbours(engine.hardware, dtype):
        try:
            hardware = from_row(gpu, dtype)
        except BadInput:
            continue  # it cannot do this arithmetic
        other = engine.on(hardware, memory_left(hardware, engine.recorded))
        spec = other.made_to_fit(engine.spec)
        verdict: Verdict | None = "does not fit"
        peak, seconds = other.memory(engine.spec)[0], None
        energy = cost = None
        if spec is not None:
            peak, verdict = other.memory(spec)
            found = predict(spec, hardware).quantities
            seconds = found.get("total_seconds")
            if seconds is not None:
                energy, cost = energy_and_cost(engine.spec, other.power(), seconds)
        why = (
            f"as any run on this card is predicted: how far the {engine.hardware.name} was from "
            "its prediction says nothing of another card"
            if seconds is not None
            else "no micro-batch of it fits, or no time is predicted on this card"
        )
        yield Scenario(
            id="card_" + gpu.name.lower().replace(" ", "_"),
            label=gpu.name,
            change=" ".join(
                filter(None, (f'--gpu "{gpu.name}"', flags(engine.spec, spec or engine.spec)))
            ),
            total_seconds=seconds,
            delta_s=None,
            peak_process_bytes=peak,
            verdict=verdict,
            energy_kwh=energy,
            cost=cost,
            corrected=False,
            why=why,
        )


def neighbours(hardware: Hardware, dtype: str) -> list[Gpu]:
    """The cards below and above of the same family by their peaks, and one of a data centre."""
    own = find_gpu(hardware.name, hardware.memory_bytes)
    found: list[Gpu] = []
    if own is not None and (peak := own.peak_flops(dtype)) is not None:
        peaks = [
            (other, gpu)
            for gpu in all_gpus()
            if (gpu.architecture, gpu.kind) == (own.architecture, own.kind)
            and ("Laptop" in gpu.name) == ("Laptop" in own.name)
            and (other := gpu.peak_flops(dtype)) is not None
        ]
        by_memory = sorted(peaks, key=lambda pair: -(pair[1].memory_gib or 0))
        below = max((p for p in by_memory if p[0] < peak), key=lambda p: p[0], default=None)
        above = min((p for p in by_memory if p[0] > peak), key=lambda p: p[0], default=None)
        found += [pair[1] for pair in (below, above) if pair is not None]
    rented = next(name for name in DATACENTER_CARDS if name != hardware.name)
    known = find_gpu(rented)
    assert known is not None, "a row of hardware.toml"
    return found if known in found else [*found, known]
