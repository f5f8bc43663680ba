"""Conversion of log lines to W&B's rows, without W&B."""

import pytest
from mirrored import GOLDEN, PREDICTION, SPEC, TOKENS, lines_of_a_run, start_line

from nanogauge.schema import Checkpoint, Compile, End, Eval, Line, LogLine, Sensor, Start, Step
from nanogauge.sinks import rows as sink_rows
from nanogauge.sinks.rows import Rows, final_summary, summary_of, verdict_rows

Row = dict[str, float]


def rows_of(*lines: LogLine, log_every: int = 1) -> list[Row]:
    rows = Rows(SPEC, PREDICTION, log_every)
    return [row for line in lines if (row := rows.row(line))]


def sensor(**fields: object) -> Sensor:
    return Sensor.model_validate(fields)


NOT_MIRRORED = {
    Start: {
        *("unix_time", "max_steps", "prediction_sha256", "first_step", "wandb_id", "source"),
        *("continues", "restart", "rollbacks", "micro_batch", "ranks"),
    },
    Step: {"tokens"},
    Sensor: set(),
    Eval: set(),
    Checkpoint: {"path"},
    Compile: set(),
    End: {"restartable"},
}
"""Fields that are no measurement, or an axis."""
COMPUTED = {
    "other_programs": "memory/other_programs_bytes",
    "throttle": "gpu/throttled",
    "energy_source": "gpu/energy_from_counter",
    "mode": "run/mode",
}


@pytest.mark.parametrize("kind", NOT_MIRRORED)
def test_every_field_of_a_line_has_its_key(kind: type[Line]) -> None:
    """Or is listed above as no measurement."""
    table = getattr(sink_rows, f"{kind.__name__.upper()}_KEYS")
    fields = kind.model_fields.keys() - {"kind", "step", "elapsed_seconds"} - NOT_MIRRORED[kind]
    assert fields - COMPUTED.keys() == table.keys()
    keys = [*table.values(), *COMPUTED.values()]
    assert all(key.split("/")[0] in NAMESPACES for key in keys)


NAMESPACES = {"train", "perf", "gpu", "cpu", "memory", "eval", "checkpoint", "run", "data"}


def test_a_rollback_keeps_the_clock_and_the_energy() -> None:
    """In a process that resumes the run both begin at zero."""
    back = start_line().model_copy(update={"first_step": 1, "elapsed_seconds": 3700.0})
    for continues, hours, kwh in ((True, 1.1, 1.1), (None, 2.1, 2.1)):
        lines = [
            start_line(),
            sensor(elapsed_seconds=3600.0, energy_joules=3.6e6),
            back.model_copy(update={"continues": continues}),
            sensor(elapsed_seconds=3960.0, energy_joules=3.96e6),
        ]
        row = rows_of(*lines)[-1]
        assert row["gpu/energy_kwh"] == pytest.approx(kwh)
        assert row["hours"] == pytest.approx(hours, abs=0.03)
        assert row["step"] == 1


def test_the_rows_of_a_run_with_every_field_are_the_golden_ones() -> None:
    assert rows_of(*lines_of_a_run(), log_every=5) == GOLDEN


def test_hours_and_energy_add_up_over_processes() -> None:
    rows = rows_of(
        start_line(),
        sensor(elapsed_seconds=3600.0, energy_joules=3.6e6),
        Eval(elapsed_seconds=5400.0, step=3, val_loss=4.0),
        start_line(first_step=2),
        sensor(elapsed_seconds=1800.0, energy_joules=1.8e6),
        Step(elapsed_seconds=3600.0, step=2, loss=1.0),
    )
    assert [row["hours"] for row in rows] == [1.0, 1.5, 2.0, 2.5]
    assert [row["gpu/energy_kwh"] for row in rows if "gpu/energy_kwh" in row] == [1.0, 1.5]
    assert [row["tokens"] for row in rows] == [0, 3 * TOKENS, 2 * TOKENS, 3 * TOKENS]


def test_an_imported_log_has_no_hours() -> None:
    (row,) = rows_of(Start(max_steps=5, prediction_sha256="0", device="x"), Step(step=3, loss=2.0))
    assert row == {"train/loss": 2.0, "step": 3, "tokens": 4 * TOKENS}


def test_a_measurement_has_its_best_prediction_and_interval() -> None:
    (row,) = rows_of(Step(step=0, step_seconds=3.0, tokens=TOKENS))
    assert row["predicted/step_seconds"] == 4.0
    assert (row["predicted/step_seconds_low"], row["predicted/step_seconds_high"]) == (3.6, 4.4)
    assert row["predicted/mfu_6n"] == PREDICTION.quantities["mfu_6n"].expected
    assert "predicted/power_watts" not in row and "predicted/peak_allocated_bytes" not in row
    (row,) = rows_of(Eval(step=0, val_loss=4.0))
    assert row == {"eval/val_loss": 4.0, "step": 0, "tokens": 0}, "the loss has no prediction"


def test_an_mfu_above_1_is_left_out() -> None:
    (row,) = rows_of(Step(step=0, step_seconds=1e-9, tokens=TOKENS))
    assert row["perf/achieved_flops_per_second"] > 58.3e12
    assert not {"perf/mfu_palm", "perf/mfu_6n"} & row.keys()


def test_a_past_reason_for_throttling_is_zero() -> None:
    hot, cool = ["thermal slowdown (hardware)"], ["power limit"]
    rows = rows_of(*(sensor(throttle=words) for words in ([], hot, cool, [])))
    assert [row["gpu/throttled"] for row in rows] == [0, 1, 1, 0]
    key = "gpu/throttle_thermal_slowdown_hardware"
    assert [row.get(key) for row in rows] == [None, 1, 0, 0]
    assert [row.get("gpu/throttle_power_limit") for row in rows] == [None, None, 1, 0]
    (row,) = rows_of(sensor(power_watts=1.0))
    assert "gpu/throttled" not in row, "unknown, not zero"


def test_on_a_cpu_the_process_memory_is_host_memory() -> None:
    hardware = PREDICTION.hardware.model_copy(update={"kind": "cpu"})
    prediction = PREDICTION.model_copy(update={"hardware": hardware})
    row = Rows(SPEC, prediction, 1).row(Step(step=0, peak_host_bytes=7))
    assert row["memory/peak_process_bytes"] == row["memory/peak_host_bytes"] == 7


def test_the_start_is_in_the_summary() -> None:
    assert summary_of(start_line()) == {
        "run/device": "RTX 4070",
        "run/status": "running",
        "data/train_tokens": 3700,
        "gpu/idle_power_watts": 12.5,
        "gpu/idle_utilization": 0.01,
        "memory/other_programs_bytes": 1000,
    }


def test_the_verdicts_are_formatted_as_in_the_report() -> None:
    absent = dict.fromkeys(("claimed", "analytic", "calibrated", "measured", "factor"))
    cost = {
        **{"id": "cost", "quantity": "Cost", "unit": "EUR", "verdict": "held", "why": "it is"},
        **{"claimed": {"text": "0.50–1.00 EUR"}, "measured": {"value": 0.55}, "factor": 1.0},
        "analytic": {"low": 0.4, "expected": 0.5, "high": 0.6},
    }
    loss = {"id": "val_loss", "quantity": "Loss", "unit": "nat", "verdict": "not measured"}
    run = {"headline": "5 h.", "predictions_held": 3, "predictions_judged": 4}
    report = {
        "run": run | {"verdicts": {"held": 2, "not measured": 1}},
        "rows": [absent | cost, absent | loss | {"why": "no evaluation"}],
    }
    assert verdict_rows(report) == [
        ["Cost", "0.50–1.00 EUR", "0.40–0.60 EUR", "", "0.55 EUR", "held", 1.0, "it is"],
        ["Loss", "", "", "", "", "not measured", None, "no evaluation"],
    ]
    claims = {"final/claims_held": 2, "final/claims_not_measured": 1}
    figures = {f"final/{name}": value for name, value in run.items()}
    assert final_summary(report) == figures | claims | {"final/cost": 0.55}
