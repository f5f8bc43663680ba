"""Charts lose no spike, label every axis, and add up the time of a resumed run."""

import re

import numpy as np
import pytest
from examples import documented_prediction, documented_spec
from hypothesis import given
from hypothesis import strategies as st

from nanogauge.analysis.ledger import LEDGER_NAMES
from nanogauge.report.charts import Timeline, make_charts
from nanogauge.report.html import MAX_SAMPLES, samples_of, spread, templates
from nanogauge.report.svg import (
    HEIGHT,
    TOP,
    Chart,
    Series,
    downsample,
    exact_axis,
    format_number,
    line_chart,
    round_axis,
    stacked_bar,
)
from nanogauge.runlog.history import RunHistory
from nanogauge.schema import Compile, Eval, Event, Sensor, Start, Step

numbers = st.floats(-1e9, 1e9)
START = Start(max_steps=20_000, prediction_sha256="x", device="RTX 4070", elapsed_seconds=1.0)


def drawn(y: np.ndarray, clipped: bool = False) -> Chart:
    x = np.arange(len(y), dtype=np.float64)
    chart = line_chart(("c", "A chart", "s"), ("step", x[-1]), [Series("a", x, y)], clipped=clipped)
    assert chart is not None
    return chart


@given(st.lists(numbers, min_size=1, max_size=300), st.integers(1, 40))
def test_downsampling_keeps_the_extremes(values: list[float], most: int) -> None:
    y = np.array(values)
    x, low, median, high = downsample(np.arange(len(y), dtype=np.float64), y, most)
    assert len(x) <= most
    assert (low <= median).all() and (median <= high).all()
    assert (low.min(), high.max()) == (y.min(), y.max())
    assert (np.diff(x) > 0).all()


def test_one_slow_step_in_a_million_is_visible() -> None:
    y = np.full(1_000_000, 4.0)
    y[654_321] = 5.0
    svg = drawn(y).svg
    assert len(svg) < 20_000
    heights = [float(h) for h in re.findall(r"[\d.]+,([\d.]+)", re.search('"area" d="M([^"]*)"', svg)[1])]
    top = TOP + (HEIGHT - TOP) / 3
    assert min(heights) < top < sorted(heights)[len(heights) // 2]


def test_outliers_beyond_a_clipped_axis_are_marked_and_counted() -> None:
    y = np.full(5000, 3.9)
    y[::7] = 4.0
    y[[100, 3000]] = 61.0
    chart = drawn(y, clipped=True)
    assert chart.svg.count('class="beyond"') == 2
    assert "2 beyond the axis, marked at its end" in chart.notes
    assert "max 61" in chart.svg
    ticks = [float(t) for t in re.findall('class="tick"[^>]*end">([0-9.]+)<', chart.svg)]
    assert max(ticks) < 5


@given(st.one_of(numbers, st.sampled_from([0.0, 66.0, 3.9, 1e-6])), st.floats(0, 1e6))
def test_the_ticks_of_an_axis_have_distinct_labels(low: float, span: float) -> None:
    axis = round_axis(low, low + span)
    texts = [axis.text(tick) for tick in axis.ticks]
    assert 3 <= len(texts) <= 8
    assert len(set(texts)) == len(texts)
    slack = 1e-8 * (axis.high - axis.low)
    assert axis.low - slack <= low
    assert low + span <= axis.high + slack


@pytest.mark.parametrize("value", [5e-324, 1e-300, -1e308, 1.7e308])
def test_any_finite_value_can_be_drawn(value: float) -> None:
    y = np.array([1.0, 2.0, value] * 300)
    assert f"{value:.3e}" in drawn(y).svg
    assert len(drawn(np.full(3, value)).svg) < 5000


@given(st.floats(0, 1e6), st.floats(1e-3, 1e6))
def test_both_ends_of_the_x_axis_are_labelled(low: float, span: float) -> None:
    axis = exact_axis(low, low + span)
    assert axis.ticks[0] == low
    assert axis.ticks[-1] == low + span
    assert all(b > a for a, b in zip(axis.ticks, axis.ticks[1:], strict=False))


def test_the_text_alternative_contains_the_statistics_of_a_line() -> None:
    spoken = re.search('aria-label="([^"]*)"', drawn(np.array([9.0, 3.0, 5.0, 4.0, 3.5])).svg)[1]
    assert spoken == "A chart, over step 0 to 4. a: first 9, min 3, median 4, max 9, last 3.5 s."
    texts = [format_number(value) for value in (0, 5.813e-05, 3.90987, 20000, -1.5)]
    assert texts == ["0", "0.00005813", "3.91", "20,000", "-1.5"], "no exponents"


def resumed() -> RunHistory:
    """Return the log of a run that died after step 5 and was resumed from step 3."""
    log = RunHistory()
    log.add(START)
    for step in range(6):
        log.add(Step(step=step, elapsed_seconds=50.0 + 10 * step, step_seconds=10.0, loss=4.0))
        log.add(Sensor(elapsed_seconds=50.0 + 10 * step, energy_joules=1000.0 * step))
    log.add(Event(what="sample", step=4, text="old", elapsed_seconds=100.0))
    log.add(START.model_copy(update={"first_step": 3}))
    for step in range(3, 6):
        elapsed = 150.0 + 10 * step
        log.add(Step(step=step, elapsed_seconds=elapsed, step_seconds=10.0, loss=3.0))
        log.add(Sensor(elapsed_seconds=elapsed - 120, energy_joules=1000.0 * (step - 2)))
    log.add(Event(what="sample", step=4, text="new", elapsed_seconds=200.0))
    return log


def test_the_time_of_a_resumed_run_adds_up() -> None:
    log = resumed()
    timeline = Timeline(log)
    steps = log.steps
    hours = timeline.x_of_steps(steps.column("step"), steps.column("elapsed_seconds"))
    assert hours * timeline.seconds == pytest.approx([50, 60, 70, 280, 290, 300])
    readings = timeline.x_of_readings(log.sensors.column("elapsed_seconds"))
    assert (readings * timeline.seconds)[-1] == pytest.approx(180)
    assert timeline.axis == ("minutes of the run", pytest.approx(5))


def charts_of(log: RunHistory) -> dict[str, Chart]:
    return {c.id: c for c in make_charts(log, documented_spec(), documented_prediction(), [])}


def test_a_log_without_a_clock_is_drawn_over_steps() -> None:
    log = RunHistory()
    log.add(START.model_copy(update={"elapsed_seconds": None}))
    for step in (0, 200, 400):
        log.add(Step(step=step, step_seconds=4.0, loss=3.0))
    log.add(Eval(step=400, val_loss=3.1))
    charts = charts_of(log)
    assert "over step 0 to 400" in charts["loss"].svg
    assert {"loss", "step-time", "mfu"} == set(charts)


def test_recompilations_and_alarms_are_marked_where_they_happened() -> None:
    log = resumed()
    log.add(Compile(step=4, seconds=9.0, mode="compiled", elapsed_seconds=188.0))
    log.add(Event(level="alarm", what="slow", text="t", step=5, elapsed_seconds=200.0))
    times = charts_of(log)["step-time"]
    assert ("compile", "recompilations (1)") in times.legend
    assert ("alarm", "alarms (1)") in times.legend
    assert times.svg.count('class="alarm"') == 1


def test_samples_are_in_order_without_repetitions_and_a_page_shows_some() -> None:
    log = resumed()
    log.add(Event(what="sample", step=2, text="early"))
    assert samples_of(log) == [(2, "early"), (4, "new")]
    for step in range(100, 200):
        log.add(Event(what="sample", step=step, text="t"))
    shown = spread(samples_of(log))
    assert len(shown) == MAX_SAMPLES
    assert (shown[0][0], shown[-1][0]) == (2, 199)


def test_every_part_of_the_time_ledger_has_its_own_colour() -> None:
    bar = stacked_bar([(name, 1.0) for name in LEDGER_NAMES.values()])
    classes = re.findall(r'class="(s\d+)"', bar)
    assert len(set(classes)) == len(LEDGER_NAMES)
    sheet = templates().get_template("style.css.j2").render()
    colours = [re.findall(rf"--c{name[1:]}:(#\w+)", sheet) for name in classes]
    assert [len(each) for each in colours] == [2] * len(LEDGER_NAMES)  # light and dark
    assert all(f".{name}{{fill:var(--c{name[1:]})}}" in sheet for name in classes)
