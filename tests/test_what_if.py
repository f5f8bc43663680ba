"""The same night at other settings: the prediction, corrected by one run, on that card alone."""

from __future__ import annotations

import re
import statistics
import time
from dataclasses import replace

import pytest
from examples import CPU, documented_config, documented_spec
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import GIB, MadeUp

from nanogauge.cli import Parser
from nanogauge.config import Config, add_config_flags, config_overrides
from nanogauge.hardware import lookup
from nanogauge.predict.prediction import predict
from nanogauge.records import Compile, Prediction
from nanogauge.report.attribution import attribute
from nanogauge.report.measured import measure
from nanogauge.report.what_if import Scenario, neighbours, what_if
from nanogauge.runlog import Recorded
from nanogauge.runspec import RunSpec, with_shape


def scenarios(run: MadeUp, prediction: Prediction | None = None) -> dict[str, Scenario]:
    recorded, spec = run.recorded(), run.spec
    prediction = prediction or run.prediction
    found = measure(recorded, spec, prediction)
    told = what_if(spec, prediction, found, recorded)
    assert len({s.id for s in told}) == len(told)
    return {s.id: s for s in told}


def seconds(scenario: Scenario) -> float:
    assert scenario.total_seconds is not None
    return scenario.total_seconds.expected


def test_the_same_again_is_the_run_without_what_happened_only_in_it() -> None:
    """Restarts and slow steps are not repeated; everything else takes what it took."""
    calm = MadeUp(checkpoint=2.0)
    wall = calm.measured().ledger.wall_s
    assert seconds(scenarios(calm)["again"]) == pytest.approx(wall)
    rough = replace(
        calm, died_at=[(35, 20)], step=lambda step: 3.9 if step % 10 else 30.0, start_up=6.0
    )
    assert seconds(scenarios(rough)["again"]) == pytest.approx(wall, rel=1e-6)


@settings(max_examples=20, deadline=None)
@given(step=st.floats(0.5, 9), evaluation=st.floats(0.1, 60), start_up=st.floats(0.1, 60))
def test_a_run_of_any_speed_corrects_every_part_of_its_own_time(
    step: float, evaluation: float, start_up: float
) -> None:
    run = MadeUp(
        step=lambda _: step,
        evaluation=evaluation,
        start_up=start_up,
        checkpoint=1.0,
        sensors=False,
    )
    told = scenarios(run)
    assert seconds(told["again"]) == pytest.approx(run.measured().ledger.wall_s)
    saved = told["eval_every_double"].delta_s
    assert saved == pytest.approx(-evaluation)  # at 0, 40 and 60 instead of 0, 20, 40 and 60
    for scenario in told.values():
        if scenario.total_seconds is not None:
            span = scenario.total_seconds
            assert span.low <= span.expected <= span.high
            assert scenario.delta_s == pytest.approx(span.expected - seconds(told["again"]))


def test_a_step_that_was_slower_than_predicted_makes_other_shapes_slower_too() -> None:
    """By the same factor, as a finished run corrects the next prediction of its device."""
    slow = MadeUp(sensors=False, step=lambda _: 2 * 3.9, evaluation=15.0, checkpoint=2.0)
    spec, told = slow.spec, scenarios(slow)
    shape = {"n_head": 16, "n_kv_head": 16, "n_embd": 512, "mlp_width": 2048}
    card = lookup("RTX 4070", "bfloat16")
    narrow, wide = (predict(s, card).ledger for s in (spec, with_shape(spec, **shape)))
    took = {"step_s": 60 * 2 * 3.9, "eval_s": 4 * 15.0, "checkpoint_s": 3 * 2.0}
    longer = sum(seconds * (wide[part] / narrow[part] - 1) for part, seconds in took.items())
    assert told["wider"].delta_s == pytest.approx(longer)


def test_the_advice_on_evaluation_is_the_what_if_of_it() -> None:
    """One saving, told in two places: they cannot differ."""
    run = MadeUp(evaluation=20.0)
    recorded, spec, prediction = run.recorded(), run.spec, run.prediction
    found = measure(recorded, spec, prediction)
    told = what_if(spec, prediction, found, recorded)
    attribution = attribute(prediction, found, spec, recorded, told)
    assert attribution is not None
    (advice,) = (p.advice for p in attribution.parts if p.cause == "evaluation")
    (scenario,) = (s for s in told if s.id == "eval_every_double")
    assert scenario.delta_s == pytest.approx(-20.0)
    assert advice is not None and "saves 20 s" in advice


def with_flags(change: str) -> RunSpec:
    """Return the run of MadeUp() with these flags."""
    parser = Parser("")
    add_config_flags(parser)
    values = documented_config().model_dump()
    values["train"] |= {"max_steps": 60, "eval_every": 20, "checkpoint_every": 20}
    for section, keys in config_overrides(parser.parse(change.split())).items():
        values[section] |= keys
    return Config.model_validate(values).to_spec()


def test_the_flags_of_a_scenario_make_a_valid_configuration_of_its_kind() -> None:
    """What is shown can be typed: the flags parse, and keep the tokens of a step."""
    run = MadeUp()
    for scenario in scenarios(run).values():
        if scenario.change.startswith("--") and "--gpu" not in scenario.change:
            changed = with_flags(scenario.change)
            assert changed != run.spec
            assert changed.tokens_per_step == run.spec.tokens_per_step, scenario.id


def test_another_card_is_predicted_without_this_cards_correction() -> None:
    """How slow one card was says nothing of another: the same figures whatever was measured."""
    quick, slow = MadeUp(), MadeUp(step=lambda _: 9.0)
    for name in ("card_rtx_4060_ti_16gb", "card_rtx_4070_super", "card_h100_sxm"):
        before, after = scenarios(quick)[name], scenarios(slow)[name]
        assert before.total_seconds == after.total_seconds
        assert not before.corrected
        assert "says nothing of another card" in before.why
    card = lookup("RTX 4070 SUPER", "bfloat16")
    total = predict(quick.spec, card).quantities["total_seconds"]
    told = scenarios(quick)["card_rtx_4070_super"].total_seconds
    assert told is not None
    assert (told.low, told.expected, told.high) == (total.low, total.expected, total.high)


def test_the_neighbours_of_a_card_are_of_its_family() -> None:
    def names(card: str) -> list[str]:
        return [gpu.name for gpu in neighbours(lookup(card, "bfloat16"), "bfloat16")]

    assert names("RTX 4070") == ["RTX 4060 Ti 16GB", "RTX 4070 SUPER", "H100 SXM"]
    assert names("RTX 4090") == ["RTX 4090 D", "H100 SXM"]
    assert names("RTX 4070 Laptop")[:2] == ["RTX 4060 Laptop", "RTX 4080 Laptop"]
    assert "H100 SXM" not in names("H100 SXM")


def test_a_measured_peak_decides_what_fits() -> None:
    """A run that held more than predicted leaves less room, and fits itself, as it ran."""
    run = MadeUp()
    assert scenarios(run)["micro_batch_double"].verdict != "does not fit"
    heavy = replace(run, scale={"process_used_bytes": 10.9 / 6})
    told = scenarios(heavy)
    assert told["again"].peak_process_bytes == pytest.approx(10.9 * GIB)
    assert told["again"].verdict == "fits"
    assert "micro_batch_double" not in told
    assert told["gpt2"].change.count("--train.micro-batch") == 1  # made to fit


def test_energy_is_measured_power_over_the_scenarios_time() -> None:
    told = scenarios(MadeUp(watts=150.0))
    energy, span = told["again"].energy_kwh, told["again"].total_seconds
    assert energy is not None and span is not None
    assert energy.expected == pytest.approx(150 * span.expected / 3.6e6)
    cost = told["again"].cost
    assert cost is not None
    assert cost.expected == pytest.approx(0.15 * energy.expected)
    assert "power is predicted" not in told["again"].why
    assert "power is predicted" in scenarios(MadeUp(sensors=False))["again"].why


def test_a_lower_power_limit_costs_no_more_time_than_the_power_it_takes() -> None:
    """From no slower to as much slower as it draws less; nothing where it drew less anyway."""
    told = scenarios(MadeUp(watts=200.0))
    low, again = told["power_limit"].total_seconds, told["again"].total_seconds
    assert low is not None and again is not None
    assert low.low == again.low
    assert low.high == pytest.approx(again.high * 200 / 160)
    assert low.expected == pytest.approx(again.expected * (200 / 160) ** 0.28)
    energy, before = told["power_limit"].energy_kwh, told["again"].energy_kwh
    assert energy is not None and before is not None
    assert energy.expected < before.expected
    idle = scenarios(MadeUp(watts=120.0))["power_limit"]
    assert idle.delta_s == 0
    assert "would change nothing" in idle.why
    unknown = scenarios(MadeUp(sensors=False))["power_limit"]
    assert unknown.total_seconds is None and unknown.delta_s is None
    assert "not measured" in unknown.why


def test_another_micro_batch_evaluates_as_many_tokens() -> None:
    """Half a micro-batch would halve the evaluation, and look cheaper for it: it never is."""
    run = MadeUp(evaluation=100.0)
    for name in ("micro_batch_half", "micro_batch_double"):
        spec = with_flags(scenarios(run)[name].change)
        assert spec.eval_batches is not None
        assert spec.eval_batches * spec.micro_batch == 200 * 16
    half, double = (scenarios(run)[f"micro_batch_{name}"].delta_s for name in ("half", "double"))
    assert half is not None and double is not None
    assert double < 0 < half


def test_a_run_that_went_on_without_compilation_is_corrected_as_such() -> None:
    """Its slowness is that of an eager run, not of the card: other shapes are not blamed for it."""
    run = MadeUp(sensors=False)
    recorded = Recorded()
    for line in run.lines():
        eager = line.model_copy(update={"mode": "eager"}) if isinstance(line, Compile) else line
        recorded.add(eager)
    found = measure(recorded, run.spec, run.prediction)
    told = {s.id: s for s in what_if(run.spec, run.prediction, found, recorded)}
    factor = re.match(r"a step took ([\d.]+) times", told["again"].why)
    assert factor is not None
    eager = predict(replace(run.spec, compile=False), run.prediction.hardware)
    expected = eager.quantities["step_seconds"]
    assert float(factor[1]) == pytest.approx(3.9 / expected.expected, abs=1e-3)


def test_nothing_is_said_without_a_steady_step_or_a_prediction() -> None:
    run = MadeUp()
    nothing = run.prediction.model_copy(update={"ledger": {}})
    assert scenarios(run, nothing) == {}
    recorded = Recorded()
    recorded.add(run.lines()[0])
    found = measure(recorded, run.spec, run.prediction)
    assert what_if(run.spec, run.prediction, found, recorded) == []


def test_a_run_on_a_cpu_has_no_cards_and_no_watts() -> None:
    run = MadeUp(sensors=False)
    told = scenarios(run, predict(replace(run.spec, dtype="float32"), CPU))
    assert not [name for name in told if name.startswith(("card", "power"))]
    assert all(s.energy_kwh is None for s in told.values())
    assert told["wider"].total_seconds is not None


def test_the_whole_of_it_takes_less_than_150_ms() -> None:
    """A report is there in under two seconds; this is a small part of it."""
    run = MadeUp()
    recorded, spec, prediction = run.recorded(), documented_spec(), run.prediction
    found = measure(recorded, spec, prediction)
    took = []
    for _ in range(5):
        begin = time.perf_counter()
        what_if(spec, prediction, found, recorded)
        took.append(time.perf_counter() - begin)
    assert statistics.median(took) < 0.15
