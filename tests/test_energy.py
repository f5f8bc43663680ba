"""Predicted power against published runs, and the cost of electricity."""

from dataclasses import replace

import pytest
from examples import documented_prediction, documented_spec
from test_measured import read, start, steps

from nanogauge.analysis.measured import measure
from nanogauge.hardware import find_gpu, from_row
from nanogauge.prediction.energy import power_share
from nanogauge.prediction.prediction import predict
from nanogauge.schema import End, Hardware, Sensor

# BERT fine-tuning: ml-energy/zeus, examples/research_reproducibility/zeus_nsdi23/trace/
# summary_power_*.csv. GB10: baseline-training-loop-on-spark, 354 M parameters, nvidia-smi.
PUBLISHED_WATTS = [
    # architecture, the board's own limit, the limit in force, measured
    ("volta", 250, 250, 223.44),
    ("volta", 250, 250, 228.22),
    ("ampere", 300, 300, 274.61),
    ("ampere", 300, 100, 103.88),
    ("turing", 260, 260, 249.43),
    ("gb10", 140, 140, 55.1),
    ("gb10", 140, 140, 62.8),
]


def board(architecture: str, own_watts: float, limit_watts: float) -> Hardware:
    """Return an RTX 4070 limited to the same share of its default limit as the published GPU."""
    row = find_gpu("RTX 4070")
    assert row is not None
    assert row.power_watts is not None
    hardware = from_row(row, "bfloat16", row.power_watts * limit_watts / own_watts)
    return hardware.model_copy(update={"architecture": architecture})


@pytest.mark.parametrize(("architecture", "own", "limit", "watts"), PUBLISHED_WATTS)
def test_published_watts_lie_in_an_interval_of_15_percent(
    architecture: str, own: float, limit: float, watts: float
) -> None:
    """An A40 at a third of its limit exceeds it by 4 %; GB10 is limited by its memory."""
    share = power_share(board(architecture, own, limit))
    low, expected, high = share.low, share.expected, share.high
    assert low <= watts / limit <= high
    assert low < expected < high
    assert high - low <= 0.15 + 1e-9


def test_prediction_and_measurement_add_the_same_power_of_the_machine_to_cost_and_co2() -> None:
    """300 W of GPU for an hour are 0.3 kWh; with 100 W of machine 0.4 kWh are paid."""
    spec, prediction = documented_spec(), documented_prediction()
    whole = replace(spec, cost=replace(spec.cost, machine_watts=100.0, grams_co2_per_kwh=400.0))
    reading = Sensor(elapsed_seconds=3600, power_watts=300, energy_joules=300 * 3600, energy_source="counter")
    end = End(elapsed_seconds=3600, status="stopped", steps=4, wall_seconds=3600)
    log = read(start(0), *steps(0, 4), reading, end)
    alone = measure(log, spec, prediction).values
    both = measure(log, whole, prediction).values
    assert alone["energy_kwh"].value == both["energy_kwh"].value == pytest.approx(0.3)
    assert alone["cost"].value == pytest.approx(0.3 * 0.15)
    assert both["cost"].value == pytest.approx(0.4 * 0.15)
    assert "co2_grams" not in alone
    assert both["co2_grams"].value == pytest.approx(0.4 * 400)
    predicted = predict(whole, prediction.hardware).quantities
    for end_of_range in ("low", "expected", "high"):
        kwh, seconds, cost = (getattr(predicted[row], end_of_range) for row in ("energy_kwh", "total_seconds", "cost"))
        assert cost == pytest.approx((kwh + 100 * seconds / 3.6e6) * 0.15)
        assert getattr(predicted["co2_grams"], end_of_range) == pytest.approx(cost / 0.15 * 400)
    assert "100 W of the machine" in predicted["cost"].formula
    assert "100 W of the machine" in both["cost"].how
    assert "the board alone" in alone["cost"].how
