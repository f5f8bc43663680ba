"""Import of nanoGPT logs: evaluation and compilation are separated from the steps' times."""

import math

import pytest
from examples import documented_prediction
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from runs import LOG, imported, nanogpt_log, spec_of

from nanogauge.analysis.attribution import attribute
from nanogauge.errors import BadInput


@settings(max_examples=30, deadline=None)
@given(
    lines=st.integers(1, 40),
    log_every=st.integers(1, 300),
    eval_every=st.integers(2, 700),
    step_ms=st.floats(5, 60_000),
    evaluation=st.floats(0.2, 50),
    compiling=st.floats(0.2, 50),
    jitter=st.sampled_from([0.0, 0.003]),
)
def test_steps_evaluations_and_compilation_are_separated(
    lines: int, log_every: int, eval_every: int, step_ms: float, evaluation: float, compiling: float, jitter: float
) -> None:
    """At any interval of logging and evaluation; nanoGPT rounds times to 0.01 ms."""

    def time_of(i: int) -> float:
        return step_ms * (1 + jitter * math.sin(i))

    iterations = lines * log_every
    printed = range(0, iterations + 1, log_every)
    assume(any(i % eval_every for i in printed))  # else every time includes an evaluation
    evaluated = range(0, iterations + 1, eval_every)
    text = nanogpt_log(iterations, log_every, eval_every, time_of, evaluation * step_ms, compiling * step_ms)
    recorded, measurements = imported(text, max_steps=iterations)
    exact = jitter * step_ms / 1e3 + 2e-5
    median = measurements.median_step_seconds
    assert median == pytest.approx(step_ms / 1e3, abs=exact)
    timed = {e.step: e.seconds for e in recorded.evals if e.seconds is not None}
    assert set(timed) == set(printed) & set(evaluated) - {0}
    for step, seconds in timed.items():
        assert seconds == pytest.approx(evaluation * step_ms / 1e3, abs=2 * exact), step
    assert [e.step for e in recorded.evals] == list(evaluated)
    assert measurements.steps_done == iterations + 1
    assert measurements.status == "finished"
    if timed:
        assert recorded.compiles[0].seconds == pytest.approx(compiling * step_ms / 1e3, abs=4 * exact)
        whole = sum(time_of(i) for i in range(iterations + 1)) / 1e3
        whole += (len(evaluated) * evaluation + compiling) * step_ms / 1e3
        share = 3 * jitter + 1e-3 * (1 / step_ms)
        rounded = (iterations + 1 + 4 * len(evaluated)) * exact
        assert measurements.ledger.wall_s == pytest.approx(whole, rel=max(share, 1e-4), abs=rounded)


def test_quantities_of_a_log_and_those_it_lacks() -> None:
    """The first iteration of 31 s is a step of 2 s, an evaluation of 9 s and 20 s of compiling."""
    recorded, measurements = imported(LOG)
    assert measurements.values["first_step_seconds"].value == pytest.approx(31.0)
    assert recorded.compiles[0].seconds == pytest.approx(20.0)
    assert recorded.steps[0].step_seconds is None
    for row in ("peak_allocated_bytes", "peak_process_bytes", "power_watts", "energy_kwh", "cost"):
        assert row not in measurements.values
        assert measurements.missing[row] == "not in this log"
    assert measurements.ledger.checkpoint_s is None
    assert measurements.ledger.other_s is None


def test_lines_of_other_programs_are_skipped() -> None:
    noise = [
        "tokens per iteration will be: 524,288",
        "number of parameters: 40.56M",
        "wandb: Tracking run with wandb version 0.22.3",
        "/usr/lib/python3/x.py:12: UserWarning: iter 7: is no step",
        "  7%|7         | 70/1000 [00:01<00:09, 99.12it/s]",
        "",
        "\x1b[32mdone\x1b[0m größer 大",
        "iterations: 5",
        "step by step",
    ]
    lines = LOG.splitlines()
    mixed = [text for i, line in enumerate(lines) for text in (line, noise[i % len(noise)])]
    assert imported("\n".join(mixed))[0] == imported(LOG)[0]


def test_a_run_that_stopped_early_is_not_finished_and_one_too_long_is_refused() -> None:
    recorded, measurements = imported(LOG, max_steps=5000)
    assert measurements.status == "stopped"
    assert recorded.ends[0].steps == 1001
    assert "total_seconds" in measurements.missing
    with pytest.raises(BadInput, match=r"train\.max_steps = 500"):
        imported(LOG, max_steps=500)


def test_a_line_cut_before_its_last_field_gives_no_wrong_figure() -> None:
    """Cut at any place, also within the decimals: what is whole in it counts."""
    lines = LOG.splitlines()
    place = next(i for i, line in enumerate(lines) if line.startswith("iter 200"))
    figures = {s.step: (s.loss, s.step_seconds) for s in imported(LOG)[0].steps}
    for size in range(len("iter 2"), lines[place].index(", mfu")):
        cut = imported("\n".join([*lines[:place], lines[place][:size], *lines[place + 1 :]]))[0]
        found = {s.step: (s.loss, s.step_seconds) for s in cut.steps}
        assert found.pop(200, None) in (None, figures[200], (figures[200][0], None)), size
        assert found.items() <= figures.items()


@pytest.mark.parametrize("kind", ["step 0", "iter 0"])
def test_a_log_of_one_line_has_a_report(kind: str) -> None:
    found = imported("\n".join(line for line in LOG.splitlines() if line.startswith(kind)))[1]
    assert "step_seconds" in found.missing
    assert ("val_loss" in found.values) == (kind == "step 0")


def test_evaluations_without_a_printed_time_leave_the_total_unknown() -> None:
    """max_iters may be no multiple of log_interval: iteration 900 is the last one printed."""
    log = nanogpt_log(1000, 300, 500, lambda _: 2000.0, 9000.0, 20_000.0)
    assert log.splitlines()[-2].startswith("step 1000")
    recorded, found = imported(log)
    assert found.status == "finished"
    assert recorded.evals[-1].step == 1000
    assert found.ledger.step_s == pytest.approx(1001 * 2.0, abs=2.1)
    assert not recorded.compiles  # the first iteration also includes an evaluation
    assert found.ledger.eval_s is None
    assert "evaluation" in found.missing["total_seconds"]
    assert found.values["first_step_seconds"].value == pytest.approx(31.0)
    assert attribute(documented_prediction(), found, spec_of(1000), recorded) is None
