"""Attribution: causes that add up to the difference, and their advice."""

from dataclasses import replace

import pytest
from examples import CPU, SEED_CLAIMS
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import MadeUp

from nanogauge.analysis.attribution import Attribution, Cause, attribute
from nanogauge.analysis.claims import Claims, load_claims
from nanogauge.analysis.measured import measure
from nanogauge.analysis.telemetry import arithmetic_share
from nanogauge.analysis.verdicts import build_rows
from nanogauge.hardware import lookup
from nanogauge.prediction.prediction import predict
from nanogauge.prediction.step_time import counted_clock_hz

SECONDS = st.floats(0.001, 6.0)


@st.composite
def runs(draw: st.DrawFn) -> MadeUp:
    """Draw runs with uneven steps, restarts and throttling, with and without a clock."""
    base, other, every = draw(SECONDS), draw(SECONDS), draw(st.integers(2, 9))
    hot_from, hot_to = sorted((draw(st.floats(0, 300)), draw(st.floats(0, 300))))
    hot = (draw(st.floats(1e8, 3e9)), ["thermal (software)"])
    died = draw(st.lists(st.tuples(st.integers(21, 59), st.integers(0, 20)), max_size=3))
    return MadeUp(
        step=lambda step: base if step % every else other,
        wait=draw(st.floats(0, 0.001)),
        evaluation=draw(SECONDS),
        checkpoint=draw(st.floats(0, 9)),
        compilation=draw(SECONDS),
        start_up=draw(SECONDS),
        died_at=died,
        went_back=draw(st.sets(st.integers(0, 2))),
        gap=draw(st.one_of(st.none(), st.floats(0, 1e6))),
        throttled=lambda now: hot if hot_from < now < hot_to else None,
        clock_hz=draw(st.one_of(st.none(), st.floats(1e9, 3e9))),
        clocked=draw(st.booleans()),
        sensors=draw(st.booleans()),
    )


def attribution(run: MadeUp, claims: Claims | None = None) -> Attribution:
    spec, prediction, recorded = run.spec, run.prediction, run.recorded()
    found = measure(recorded, spec, prediction)
    result = attribute(prediction, found, spec, recorded, claims)
    assert result is not None
    return result


def part(run: MadeUp, cause: str, claims: Claims | None = None) -> Cause:
    (found,) = (p for p in attribution(run, claims).parts if p.cause == cause)
    return found


def unexplained(result: Attribution) -> float:
    return sum(p.seconds for p in result.parts) - (result.actual_s - result.predicted_s)


@settings(max_examples=20, deadline=None)
@given(run=runs())
def test_the_causes_always_add_up_to_the_difference(run: MadeUp) -> None:
    for claims in (None, load_claims(SEED_CLAIMS)):
        assert abs(unexplained(attribution(run, claims))) < 1e-6


@settings(max_examples=20, deadline=None)
@given(run=runs())
def test_the_ledger_has_the_generated_times_and_adds_up_to_the_wall_time(run: MadeUp) -> None:
    """other_s is the first start-up and the end; a rollback on the same clock counts once."""
    parts = run.measured().ledger.model_dump()
    wall = parts.pop("wall_s")
    known = [value for value in parts.values() if value is not None]
    assert sum(known) == pytest.approx(wall, rel=0.005)
    assert min(known) >= -1e-6 * wall
    measured = replace(run, clocked=True).measured()
    ledger = measured.ledger
    later = sum(place not in run.went_back for place in range(len(run.died_at)))
    assert ledger.other_s == pytest.approx(run.start_up + 1.0, abs=1e-6)
    assert ledger.startup_s == pytest.approx(run.start_up * later, abs=1e-6)
    gap = 0.0 if not later else run.gap and run.gap * later
    assert ledger.gap_s == (gap if gap is None else pytest.approx(gap, abs=1e-5))
    again = sum(died - goes_on for died, goes_on in run.died_at)
    assert run.recorded().lost_steps == again
    total = measured.values["total_seconds"].value
    assert total == pytest.approx((ledger.wall_s or 0.0) - (gap or 0.0), abs=1e-5)


def test_a_lower_clock_is_separated_from_a_lower_efficiency() -> None:
    """At half the assumed clock, only the arithmetic takes twice as long."""
    assumed = counted_clock_hz(lookup("RTX 4070", "bfloat16"))
    assert assumed == pytest.approx(2.475e9 * 1.06)  # Ada exceeds its datasheet's peak
    run = MadeUp(clock_hz=assumed / 2)
    expected = run.prediction.quantities["step_seconds"].expected
    share = arithmetic_share(run.prediction)
    assert share is not None
    slow = replace(run, step=lambda _: expected * (1 + share))
    clock, efficiency = (part(slow, f"step: {c}") for c in ("clock", "efficiency"))
    assert clock.seconds == pytest.approx(60 * share * expected)
    assert efficiency.seconds == pytest.approx(0, abs=1e-9 * expected * 60)
    assert "datasheet's 2.475 GHz" in clock.why


def test_without_a_clock_efficiency_and_clock_are_one_part() -> None:
    for run in (MadeUp(sensors=False), MadeUp(clock_hz=None)):
        both = part(run, "step: clock and efficiency")
        assert "the clock was not measured" in both.why


def test_throttling_is_separated_from_uneven_steps() -> None:
    """A quarter of the steps run at half the clock."""
    run = MadeUp()
    share = arithmetic_share(run.prediction)
    assert share is not None
    slow = 4.0 * (1 + share)
    hot = replace(
        run,
        step=lambda step: slow if 40 < step <= 55 else 4.0,
        throttled=lambda now: (1.3e9, ["thermal (hardware)"]) if 240 < now <= 240 + 60 else None,
    )
    throttling = part(hot, "throttling")
    assert throttling.seconds == pytest.approx(60 * (1 - 1 / (1 + share)))
    assert "thermal (hardware)" in throttling.why
    assert throttling.advice is not None and "more air" in throttling.advice
    uneven = part(hot, "uneven steps")
    assert uneven.seconds == pytest.approx(15 * (slow - 4.0) - throttling.seconds)


def test_the_cost_of_throttling_is_bounded_by_what_the_steps_lost() -> None:
    """From the median step if throttled for most of the run; never more than the steps lost."""
    mostly = MadeUp(
        step=lambda step: 5.0 if step > 10 else 4.0,
        throttled=lambda now: (1.3e9, ["power brake"]) if now > 90 else None,
    )
    assert part(mostly, "throttling").seconds > 0
    assert part(mostly, "uneven steps").seconds == 0
    even = MadeUp(throttled=lambda now: (1.3e9, ["power brake"]) if 60 < now < 120 else None)
    assert part(even, "throttling").seconds == pytest.approx(0, abs=1e-9)
    assert part(even, "uneven steps").seconds == pytest.approx(0, abs=1e-9)
    capped = part(MadeUp(throttled=lambda _: (2.0e9, ["power cap"])), "throttling")
    assert (capped.seconds, capped.why) == (0, "in no reading")
    always = part(MadeUp(throttled=lambda _: (1e9, ["power brake"])), "throttling")
    assert always.seconds == 0 and "not known" in always.why


def test_a_restart_costs_repeated_work_start_up_and_compilation() -> None:
    run = MadeUp(died_at=[(35, 20)], start_up=9.0, checkpoint=2.0)
    restarts = part(run, "restarts and lost work")
    repeated = 15 * 3.9 + 15.0  # steps 20 to 34, and the evaluation before step 20
    assert restarts.seconds == pytest.approx(repeated + 9.0 + 12.0)
    assert "15 steps" in restarts.why
    assert part(run, "compilation").seconds == pytest.approx(12.0 - run.prediction.ledger["compile_s"])


def test_a_run_on_a_cpu_has_causes_without_a_clock() -> None:
    run = MadeUp(sensors=False)
    spec = run.spec
    prediction = predict(replace(spec, dtype="float32"), CPU)
    result = attribute(prediction, run.measured(), spec, run.recorded())
    assert result is not None
    assert abs(unexplained(result)) < 1e-6
    assert result.parts[0].cause == "steady step"


FOLLOWS = {
    "step_seconds": {"step_seconds", "mfu_palm", "mfu_6n", "first_step_seconds"},
    "elapsed_seconds": {"total_seconds"},
    "power_watts": {"power_watts"},
    "energy_joules": {"energy_kwh", "cost"},
    "val_loss": {"val_loss"},
    "peak_allocated_bytes": {"peak_allocated_bytes"},
    "process_used_bytes": {"peak_process_bytes"},
    "sm_clock_hz": set(),
    "loss": set(),
}
"""Log field -> rows computed from it, if the log has a clock."""


def measured_rows(run: MadeUp) -> dict[str, float]:
    rows, _ = build_rows(None, run.spec, run.prediction, run.measured())
    return {row.id: row.measured.value for row in rows if row.measured is not None}


@pytest.mark.parametrize("factor", [0.9, 1.1])
@pytest.mark.parametrize("field", FOLLOWS)
def test_a_changed_figure_changes_its_rows_and_no_others(field: str, factor: float) -> None:
    run = MadeUp(compilation=0.0)
    before, after = measured_rows(run), measured_rows(replace(run, scale={field: factor}))
    assert before.keys() == after.keys()
    changed = {row for row in before if after[row] != pytest.approx(before[row], rel=1e-9)}
    assert changed == FOLLOWS[field]
    for row in changed:
        grown = 1 / factor if row.startswith("mfu") else factor
        assert after[row] == pytest.approx(grown * before[row], rel=1e-9)


def test_without_a_clock_the_total_follows_from_the_parts() -> None:
    run = MadeUp(clocked=False, compilation=0.0, sensors=False)
    before = measured_rows(run)
    for field, rows in (
        ("step_seconds", {"step_seconds", "mfu_palm", "mfu_6n", "total_seconds"}),
        ("seconds", {"total_seconds"}),
    ):
        after = measured_rows(replace(run, scale={field: 1.1}))
        changed = {row for row in before if after[row] != pytest.approx(before[row], rel=1e-9)}
        assert changed - {"first_step_seconds"} == rows
