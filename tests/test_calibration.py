"""The calibrated prediction: arithmetic, order of evidence, its store, and the commands."""

import math
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
    Calibration,
    FinishedRun,
    MeasuredParts,
    Rates,
    add_to_calibration,
    calibrated_step,
    load_calibration,
    path_of,
)
from nanogauge.prediction.constants import FITTED
from nanogauge.prediction.prediction import predict
from nanogauge.prediction.step_time import predict_step_time
from nanogauge.prediction.workload import Workload, workload_of
from nanogauge.quantities import Interval
from nanogauge.spec_parts import Shape

CARD = lookup("RTX 4070", "bfloat16")
WORK = workload_of(documented_spec(), on_gpu=True)
OTHER = Workload(Shape(12, 768, 6, 2048, 50304, 6, 128, 3072), micro_batch=1, grad_accum=8)
seconds = st.floats(1e-5, 10)


def finished(work: Workload, step_seconds: float, others_share: float = 0.0) -> FinishedRun:
    return FinishedRun(
        name="last_night",
        workload=work,
        step_seconds=step_seconds,
        p10_seconds=0.99 * step_seconds,
        p90_seconds=1.01 * step_seconds,
        n=100,
        finished_unix=1.7e9,
        others_share=others_share,
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
        others_share=0.0,
        measured_unix=1.7e9,
    )


def rated(dtype: str, matmul_flops: float, bandwidth: float) -> Rates:
    return Rates(dtype=dtype, matmul_flops=matmul_flops, bandwidth_bytes_per_second=bandwidth)


def known(*evidence: FinishedRun | MeasuredParts | Rates) -> Calibration:
    def of(kind: type) -> tuple[object, ...]:
        return tuple(e for e in evidence if isinstance(e, kind))

    return Calibration(
        device=CARD.name, torch="2.13.0", threads=None, rates=of(Rates), parts=of(MeasuredParts), runs=of(FinishedRun)
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
    rates = rated("bfloat16", 4e13, 3e11)
    left = [rates, finished(OTHER, 2.0), measured(WORK, 0.005, 0.05, 0.001), finished(WORK, 3.9)]
    for words in ("the same workload", "a layer, the rest", "of other shapes", "matrix product"):
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
def test_one_run_corrects_shapes_alike_by_its_own_error(factor: float) -> None:
    """The analytic error of a device is about the same for shapes alike."""
    like = replace(WORK, micro_batch=2 * WORK.micro_batch)
    calibration = known(finished(like, factor * analytic_seconds(like)))
    ratio = calibrated_seconds(WORK, calibration) / analytic_seconds(WORK)
    assert math.log(ratio) == pytest.approx(math.log(factor), rel=0.1)


def calibrated(work: Workload, *evidence: FinishedRun | MeasuredParts | Rates) -> Interval:
    """The calibrated step over the analytic one."""
    found = calibrated_step(work, CARD, known(*evidence), predict_step_time(work, CARD))
    assert found is not None
    return found.seconds * (1 / analytic_seconds(work))


def test_a_run_bound_by_launches_leaves_the_plan_of_another_alone() -> None:
    """The demo on a card takes 2 to 4 times the analytic step, its kernels being launched."""
    demo = Workload(Shape(4, 128, 4, 128, 256, 4, 32, 512), micro_batch=8, grad_accum=1)
    alone = calibrated(WORK, finished(demo, 4 * analytic_seconds(demo)))
    assert alone.expected == pytest.approx(1, abs=0.05)
    assert alone.low < 1 / 1.1
    assert alone.high > 1.1
    wider = replace(demo, shape=replace(demo.shape, n_embd=256, head_size=64, mlp_width=1024))
    again = calibrated(wider, finished(demo, 4 * analytic_seconds(demo)))
    assert again.expected > 1.5


def test_a_run_beside_other_programs_widens_the_interval_and_moves_it_little() -> None:
    slow = 2 * analytic_seconds(OTHER)
    quiet, busy = (calibrated(WORK, finished(OTHER, slow, share)) for share in (0.0, 0.5))
    assert quiet.expected > 1.5
    assert busy.expected < 1.2
    undisturbed = finished(OTHER, analytic_seconds(OTHER))
    assert calibrated(WORK, undisturbed, finished(OTHER, slow, 0.5)).expected < 1.05


def test_contradicting_runs_widen_the_interval_around_the_analytic_step() -> None:
    one, two = (finished(OTHER, factor * analytic_seconds(OTHER)) for factor in (1.0, 2.0))
    both = calibrated(WORK, one, two)
    assert both.expected == pytest.approx(1, abs=0.1)
    assert both.high > 1.4
    most = calibrated(WORK, one, one, one, two)
    assert most.expected == pytest.approx(1, abs=0.03)
    assert most.high < both.high


def test_a_run_of_another_kind_is_no_evidence() -> None:
    calibration = known(finished(replace(OTHER, compiled=False), 9.0))
    assert calibrated_step(WORK, CARD, calibration, predict_step_time(WORK, CARD)) is None


def test_measured_rates_replace_those_of_the_datasheet() -> None:
    ceiling, bandwidth = 5e13, CARD.bandwidth_bytes_per_second
    assert bandwidth is not None
    expected = predict_step_time(WORK, CARD.model_copy(update={"matmul_flops": ceiling}))
    assert expected is not None
    calibration = known(rated("bfloat16", ceiling, FITTED.bandwidth_share * bandwidth), rated("float32", 9e13, 1e12))
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
    assert found["total_seconds"].expected == pytest.approx(plain.quantities["total_seconds"].expected + more)


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
    new = known(measured(deeper, 3, 3, 3), finished(WORK, 4.2), rated("bfloat16", 4e13, 1e9))
    both = old.updated(new)
    assert [p.layer_seconds for p in both.parts] == [2, 3]
    assert [r.step_seconds for r in both.runs] == [4.0, 4.2]
    assert calibrated_seconds(WORK, both) == pytest.approx(4.1, rel=1e-3)


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


@pytest.mark.alone
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
    assert seen["expected"] == pytest.approx(row["measured"]["value"], rel=0.8)
    (store,) = (tmp_path / "data" / "nanogauge" / "calibrations").iterdir()
    (stored,) = Calibration.model_validate_json(store.read_bytes()).runs
    assert stored.step_seconds == row["measured"]["value"]
    assert stored.others_share is not None
    assert 0 <= stored.others_share <= 1


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
