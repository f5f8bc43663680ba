"""Scenarios: predictions at other settings, calibrated by the run on its own device."""

import re
from dataclasses import replace

import pytest
from examples import CPU, documented_config
from runs import GIB, MadeUp

from nanogauge.analysis.measured import measure
from nanogauge.analysis.what_if import Scenario, faster_gpu, what_if
from nanogauge.cli import Parser
from nanogauge.config import Config, add_config_flags, config_overrides
from nanogauge.hardware import lookup
from nanogauge.prediction.prediction import predict
from nanogauge.runlog.history import RunHistory
from nanogauge.runspec import RunSpec
from nanogauge.schema import Compile, Prediction


def scenarios(run: MadeUp, prediction: Prediction | None = None) -> dict[str, Scenario]:
    recorded, spec = run.recorded(), run.spec
    prediction = prediction or run.prediction
    rows = what_if(spec, prediction, measure(recorded, spec, prediction), recorded)
    assert len({row.id for row in rows}) == len(rows) <= 5
    return {row.id: row for row in rows}


@pytest.mark.parametrize("step", [0.5, 3.9, 9.0])
def test_the_measured_step_calibrates_every_row_of_its_own_gpu(step: float) -> None:
    run = MadeUp(step=lambda _: step, checkpoint=1, sensors=False)
    rows = scenarios(run)
    again = rows["again"]
    assert again.step_seconds.expected == pytest.approx(step)
    assert again.delta_s == 0
    assert rows["evaluations"].step_seconds == again.step_seconds
    assert rows["evaluations"].delta_s < 0
    for row in rows.values():
        span = row.total_seconds
        assert span.low <= span.expected <= span.high
        if row.corrected:
            assert row.delta_s == pytest.approx(span.expected - again.total_seconds.expected)


def test_restarts_and_slow_steps_are_not_repeated() -> None:
    calm = MadeUp(checkpoint=2.0)
    rough = replace(calm, died_at=[(35, 20)], step=lambda step: 3.9 if step % 10 else 30.0)
    expected = scenarios(calm)["again"].total_seconds.expected
    assert scenarios(rough)["again"].total_seconds.expected == pytest.approx(expected, rel=1e-6)


def with_flags(change: str) -> RunSpec:
    """Return the spec of MadeUp() with these flags."""
    parser = Parser("")
    add_config_flags(parser)
    values = documented_config().model_dump()
    values["train"] |= {"max_steps": 60, "eval_every": 20, "checkpoint_every": 20}
    for section, keys in config_overrides(parser.parse(change.split())).items():
        values[section] |= keys
    return RunSpec.from_config(Config.model_validate(values))


def test_the_flags_of_a_scenario_parse_and_keep_the_tokens_per_step() -> None:
    run = MadeUp()
    for row in scenarios(run).values():
        if row.change.startswith("--train"):
            changed = with_flags(row.change)
            assert changed != run.spec
            assert changed.tokens_per_step == run.spec.tokens_per_step, row.id
            if row.id == "micro_batch":
                assert (changed.eval_batches or 0) * changed.micro_batch == 200 * 16
                assert row.delta_s < 0


def test_another_gpu_is_predicted_without_calibration() -> None:
    quick, slow = scenarios(MadeUp()), scenarios(MadeUp(step=lambda _: 9.0))
    for name in ("card_rtx_4070_super",):
        assert quick[name].total_seconds == slow[name].total_seconds
        assert quick[name].delta_s == slow[name].delta_s < 0
        assert not quick[name].corrected
        assert "says nothing of another card" in quick[name].why
    card = lookup("RTX 4070 SUPER", "bfloat16")
    planned = predict(MadeUp().spec, card).quantities
    row = quick["card_rtx_4070_super"]
    assert row.total_seconds.expected == planned["total_seconds"].expected


def test_the_other_gpu_is_the_next_of_the_family() -> None:
    for card, faster in (("RTX 4070", "RTX 4070 SUPER"), ("RTX 4090", None), ("RTX 4070 Laptop", "RTX 4080 Laptop")):
        gpu = faster_gpu(lookup(card, "bfloat16"), "bfloat16")
        assert (gpu and gpu.name) == faster


def test_the_measured_peak_decides_what_fits() -> None:
    """The run itself fits, as it ran."""
    run = MadeUp()
    assert scenarios(run)["micro_batch"].verdict == "doubtful"
    rows = scenarios(replace(run, scale={"process_used_bytes": 10.9 / 6}))
    assert rows["again"].peak_process_bytes == pytest.approx(10.9 * GIB)
    assert rows["again"].verdict == rows["evaluations"].verdict == "fits"
    assert "micro_batch" not in rows


def test_a_lower_power_limit_is_slower_and_takes_less_energy() -> None:
    rows = scenarios(MadeUp())
    again, limited = rows["again"], rows["power_limit"]
    assert limited.change == "--power-limit 160"
    assert limited.step_seconds.expected > again.step_seconds.expected
    assert limited.energy_kwh is not None and again.energy_kwh is not None
    assert limited.energy_kwh.expected < again.energy_kwh.expected


def test_an_eager_run_is_compared_with_an_eager_prediction() -> None:
    run = MadeUp(sensors=False)
    recorded = RunHistory()
    for line in run.lines():
        eager = line.model_copy(update={"mode": "eager"}) if isinstance(line, Compile) else line
        recorded.add(eager)
    found = measure(recorded, run.spec, run.prediction)
    rows = {row.id: row for row in what_if(run.spec, run.prediction, found, recorded)}
    factor = re.match(r"a step took ([\d.]+) times", rows["again"].why)
    assert factor is not None
    eager_run = predict(replace(run.spec, compile=False), run.prediction.hardware)
    expected = eager_run.quantities["step_seconds"]
    assert float(factor[1]) == pytest.approx(3.9 / expected.expected, abs=1e-3)


def test_there_are_no_scenarios_without_a_steady_step_or_a_prediction() -> None:
    run = MadeUp()
    nothing = run.prediction.model_copy(update={"ledger": {}})
    assert scenarios(run, nothing) == {}
    recorded = RunHistory()
    recorded.add(run.lines()[0])
    found = measure(recorded, run.spec, run.prediction)
    assert what_if(run.spec, run.prediction, found, recorded) == []


def test_a_run_on_a_cpu_has_no_other_gpus_and_no_energy() -> None:
    run = MadeUp(sensors=False)
    rows = scenarios(run, predict(replace(run.spec, dtype="float32"), CPU))
    assert not [name for name in rows if name.startswith("card")]
    assert all(row.energy_kwh is None for row in rows.values())
    assert "evaluations" in rows
