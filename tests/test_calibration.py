"""The calibrated prediction: arithmetic, order of evidence, its store, and the commands."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
from commands import DEMO, TINY, rows_of, run, run_here, steps_of, train_tiny
from examples import DOCUMENTED, documented_prediction, documented_spec
from hypothesis import given
from hypothesis import strategies as st

from nanogauge.hardware import lookup
from nanogauge.prediction.calibrated import (
    COPY,
    Calibration,
    Figure,
    FinishedRun,
    MeasuredParts,
    add_to_calibration,
    calibrated_step,
    load_calibration,
    matrix_product_name,
    path_of,
)
from nanogauge.prediction.constants import FITTED
from nanogauge.prediction.prediction import predict
from nanogauge.prediction.step_time import predict_step_time
from nanogauge.prediction.workload import Workload, workload_of
from nanogauge.runspec import Shape

pytestmark = pytest.mark.alone

CARD = lookup("RTX 4070", "bfloat16")
WORK = workload_of(documented_spec(), on_gpu=True)
OTHER = Workload(Shape(12, 768, 6, 2048, 50304, 6, 128, 3072), micro_batch=1, grad_accum=8)
seconds = st.floats(1e-5, 10)


def finished(work: Workload, step_seconds: float) -> FinishedRun:
    return FinishedRun(
        name="last_night",
        workload=work,
        step_seconds=step_seconds,
        p10_seconds=0.99 * step_seconds,
        p90_seconds=1.01 * step_seconds,
        n=100,
        finished_unix=1.7e9,
    )


def measured(work: Workload, layer: float, rest: float, update: float) -> MeasuredParts:
    return MeasuredParts(
        workload=work,
        layer_seconds=layer,
        rest_seconds=rest,
        layer_update_seconds=update,
        rest_update_seconds=update,
        spread=0.02,
        sequences=work.micro_batch,
        measured_unix=1.7e9,
    )


def figure(name: str, value: float, unit: str) -> Figure:
    return Figure(name=name, value=value, low=value, high=value, n=9, unit=unit, detail="")


def known(*evidence: FinishedRun | MeasuredParts | Figure) -> Calibration:
    def of(kind: type) -> tuple[object, ...]:
        return tuple(e for e in evidence if isinstance(e, kind))

    return Calibration(
        device=CARD.name,
        torch="2.13.0",
        threads=None,
        created_unix=1.7e9,
        figures=of(Figure),
        parts=of(MeasuredParts),
        runs=of(FinishedRun),
    )


def analytic_seconds(work: Workload) -> float:
    step = predict_step_time(work, CARD)
    assert step is not None
    return step.seconds


def calibrated_seconds(work: Workload, calibration: Calibration) -> float:
    found = calibrated_step(work, CARD, calibration, predict_step_time(work, CARD))
    assert found is not None
    assert found.seconds.low < found.seconds.expected < found.seconds.high
    return found.seconds.expected


def test_the_best_evidence_is_taken() -> None:
    rates = (figure(matrix_product_name("bfloat16"), 4e13, "FLOP/s"), figure(COPY, 3e11, "B/s"))
    left = [*rates, finished(OTHER, 2.0), measured(WORK, 0.005, 0.05, 0.001), finished(WORK, 3.9)]
    for words in ("the same workload", "a layer, the rest", "of other shapes", "matrix products"):
        found = calibrated_step(WORK, CARD, known(*left), predict_step_time(WORK, CARD))
        assert found is not None
        assert words in found.source
        del left[-1]
    assert calibrated_step(WORK, CARD, known(), predict_step_time(WORK, CARD)) is None


@given(seconds, seconds, seconds, st.integers(1, 48), st.integers(1, 64))
def test_parts_add_up_for_any_depth_and_accumulation(
    layer: float, rest: float, update: float, layers: int, accumulation: int
) -> None:
    shape = replace(WORK.shape, n_layer=layers)
    work = replace(WORK, shape=shape, grad_accum=accumulation)
    expected = accumulation * (layers * layer + rest) + (layers + 1) * update
    calibration = known(measured(WORK, layer, rest, update))
    assert calibrated_seconds(work, calibration) == pytest.approx(expected)


@given(st.floats(0.5, 2))
def test_one_run_corrects_other_shapes_by_its_own_error(factor: float) -> None:
    """The analytic error of a device is about the same for every shape."""
    calibration = known(finished(OTHER, factor * analytic_seconds(OTHER)))
    assert calibrated_seconds(WORK, calibration) == pytest.approx(factor * analytic_seconds(WORK))


def test_a_run_of_another_kind_is_no_evidence() -> None:
    calibration = known(finished(replace(OTHER, compiled=False), 9.0))
    assert calibrated_step(WORK, CARD, calibration, predict_step_time(WORK, CARD)) is None


def test_measured_rates_replace_those_of_the_datasheet() -> None:
    ceiling, bandwidth = 5e13, CARD.bandwidth_bytes_per_second
    assert bandwidth is not None
    rated = CARD.model_copy(update={"matmul_flops": ceiling})
    expected = predict_step_time(WORK, rated)
    assert expected is not None
    calibration = known(
        figure(f"{matrix_product_name('bfloat16')}, MLP", ceiling, "FLOP/s"),
        figure(f"{matrix_product_name('float32')}, MLP", 9e13, "FLOP/s"),
        figure(COPY, FITTED.bandwidth_share * bandwidth, "B/s"),
    )
    assert calibrated_seconds(WORK, calibration) == pytest.approx(expected.seconds)


def test_quantities_derived_from_the_step_are_calibrated() -> None:
    spec, plain = documented_spec(), documented_prediction()
    twice = 2 * plain.quantities["step_seconds"].expected
    prediction = predict(spec, CARD, known(finished(WORK, twice)))
    assert prediction.quantities == plain.quantities
    found = prediction.calibrated
    assert found["step_seconds"].expected == pytest.approx(twice)
    assert "last_night" in found["step_seconds"].source
    for row in ("mfu_palm", "mfu_6n"):
        assert found[row].expected == pytest.approx(plain.quantities[row].expected / 2)
        assert found[row].low < found[row].expected < found[row].high
    more = plain.ledger["step_s"] + plain.ledger["eval_s"]
    assert found["total_seconds"].expected == pytest.approx(
        plain.quantities["total_seconds"].expected + more
    )


def test_a_step_that_the_peak_does_not_allow_has_no_mfu() -> None:
    fast = 0.4 * documented_prediction().quantities["step_seconds"].expected
    prediction = predict(documented_spec(), CARD, known(finished(WORK, fast)))
    assert prediction.quantities["mfu_palm"].expected > 0.4
    assert "mfu_palm" not in prediction.calibrated
    assert prediction.calibrated["step_seconds"].expected == fast


def test_a_device_without_a_known_peak_is_calibrated() -> None:
    unknown = CARD.model_copy(update={"peak_flops": None, "architecture": "unknown"})
    prediction = predict(documented_spec(), unknown, known(finished(WORK, 4.0)))
    assert "step_seconds" not in prediction.quantities
    assert prediction.calibrated["step_seconds"].expected == 4.0


def test_newer_measurements_replace_older_ones_and_runs_gather() -> None:
    deeper = replace(WORK, shape=replace(WORK.shape, n_layer=99))
    old = known(measured(WORK, 1, 1, 1), measured(OTHER, 2, 2, 2), finished(WORK, 4.0))
    new = known(measured(deeper, 3, 3, 3), finished(WORK, 4.2), figure(COPY, 1e9, "B/s"))
    both = old.updated(new)
    assert [p.layer_seconds for p in both.parts] == [2, 3]
    assert [r.step_seconds for r in both.runs] == [4.0, 4.2]
    assert calibrated_seconds(WORK, both) == pytest.approx(4.1)


def test_a_calibration_is_stored_and_a_damaged_one_is_named_and_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert load_calibration(CARD.name, "2.13.0", None) == (None, None)
    calibration = known(finished(WORK, 4.0), measured(OTHER, 1, 2, 3))
    assert add_to_calibration(calibration) == (calibration, None)
    assert load_calibration(CARD.name, "2.13.0", None) == (calibration, None)
    assert load_calibration(CARD.name, "2.14.0", None) == (None, None)
    path = path_of(CARD.name, "2.13.0", None)
    path.write_bytes(path.read_bytes()[:-100])
    none, warning = load_calibration(CARD.name, "2.13.0", None)
    assert none is None
    assert warning is not None
    assert str(path) in warning
    shutil.copy(path, path_of(CARD.name, metadata.version("torch"), None))
    printed = run_here("plan.py", DOCUMENTED, "--gpu", CARD.name).stdout
    assert "is damaged" in " ".join(printed.split())
    add_to_calibration(known(finished(WORK, 5.0)))
    assert load_calibration(CARD.name, "2.13.0", None) == (known(finished(WORK, 5.0)), None)


def test_a_plan_calibrates_this_machine_and_a_run_refines_it(tmp_path: Path) -> None:
    home = {"XDG_DATA_HOME": str(tmp_path / "data")}
    arguments = (DEMO, *TINY, "--train.max-steps=30", f"--run.out={tmp_path}")
    began = time.monotonic()
    done = run("plan.py", *arguments, "--calibrate", **home)
    assert time.monotonic() - began < 60
    assert done.returncode == 0, done.stderr
    printed = " ".join(done.stdout.split())
    assert "quantity expected predicted calibrated claimed" in printed
    assert "Calibrated by a layer, the rest and the update of this shape measured" in printed

    assert train_tiny(tmp_path, "--train.max-steps=30", **home).returncode == 0
    rows = rows_of(tmp_path / "demo")
    for row_id in ("step_seconds", "total_seconds"):
        assert rows[row_id]["analytic"] is not None
        assert rows[row_id]["calibrated"]["low"] < rows[row_id]["calibrated"]["high"]
    assert rows["parameters"]["calibrated"] is None
    row = rows["step_seconds"]
    assert "a layer, the rest" in row["calibrated"]["source"]
    assert row["calibrated"]["expected"] == pytest.approx(row["measured"]["value"], rel=0.8)
    again = ("--run.name=again", "--train.max-steps=12")
    assert train_tiny(tmp_path, *again, **home).returncode == 0
    assert len(steps_of(tmp_path / "again")) == 12
    last = ("--run.name=last", "--train.max-steps=2")
    assert train_tiny(tmp_path, *last, **home).returncode == 0
    seen = rows_of(tmp_path / "last")["step_seconds"]["calibrated"]
    assert "the run demo of" in seen["source"]
    assert seen["expected"] == row["measured"]["value"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--calibrate"),
        (("--calibrate", "--gpu=RTX 4070", "--run.device=cpu"), "leave out --gpu"),
        (("--calibrate", "--run.device=cpu", "--run.dtype=float16"), "use float32"),
    ],
)
def test_a_plan_without_its_device_is_refused(arguments: tuple[str, ...], words: str) -> None:
    done = run_here("plan.py", DEMO, *arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
