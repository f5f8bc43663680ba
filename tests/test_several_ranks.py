"""The log and the report of a run of several processes."""

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from commands import ROOT, build_fake_driver, log_lines, rows_of
from runs import GIB, MadeUp
from test_ranks import torchrun

from nanogauge.analysis.instruments import Instrument, instruments
from nanogauge.analysis.measured import Measurements, measure
from nanogauge.hardware import lookup
from nanogauge.prediction.prediction import predict
from nanogauge.runlog.history import RunHistory
from nanogauge.schema import LogLine, Prediction, Rank, Start

MADE = MadeUp(steps=40)


def prediction(gpus: int) -> Prediction:
    return predict(replace(MADE.spec, world_size=gpus), lookup("RTX 4070", "bfloat16"))


def recorded(ranks: int, cards: int | None, *more: LogLine) -> RunHistory:
    """Return the made-up run as if of several ranks and sensed GPUs."""
    result = RunHistory()
    for line in MADE.lines():
        of_several = {"ranks": ranks, "sensed_cards": cards}
        result.add(line.model_copy(update=of_several) if isinstance(line, Start) else line)
    for line in more:
        result.add(line)
    return result


def measured(ranks: int, cards: int | None, predicted: int) -> Measurements:
    return measure(recorded(ranks, cards), MADE.spec, prediction(predicted))


def panel(run: RunHistory, gpus: int) -> dict[str, Instrument]:
    found = measure(run, MADE.spec, prediction(gpus))
    return {i.id: i for i in instruments(run, MADE.spec, prediction(gpus), found)}


@pytest.mark.parametrize("cards", [None, 2])
def test_power_of_some_gpus_is_not_compared_with_that_of_all(cards: int | None) -> None:
    """The sensors of several machines, and of older logs, cover fewer GPUs than trained."""
    found = measured(4, cards, predicted=4)
    for row in ("power_watts", "energy_kwh", "cost"):
        assert row not in found.values
        assert f"sensors cover {cards or 1} GPU" in found.missing[row]
        assert "4 trained" in found.missing[row]
    assert panel(recorded(4, cards), 4).keys().isdisjoint({"joules_per_token"})


def test_power_of_all_gpus_is_compared_with_that_of_all() -> None:
    found = measured(4, 4, predicted=4)
    assert found.values["power_watts"].value == 190
    assert "4 boards together" in found.values["power_watts"].how
    assert "the 4 boards alone" in found.values["energy_kwh"].how
    assert "joules_per_token" in panel(recorded(4, 4), 4)


def test_a_run_resumed_on_fewer_gpus_has_energy_but_no_mean_power() -> None:
    found = measured(2, 2, predicted=4)
    assert "power_watts" not in found.values
    assert "trained on 2 GPUs, not all on 4" in found.missing["power_watts"]
    assert "energy_kwh" in found.values


def test_the_slowest_and_the_fullest_rank_are_named_with_their_spread() -> None:
    lines = [
        Rank(
            step=step,
            rank=rank,
            step_seconds=30.0 if step == 0 else 2.0,
            data_wait_seconds=0.0,
            forward_seconds=1.0 if rank == 2 else 0.75,
            peak_allocated_bytes=(3 + rank) * GIB,
        )
        for step in (0, 50, 100)
        for rank in range(4)
    ]
    found = panel(recorded(4, 4, *lines), 4)
    assert found["rank_step_seconds"].value == 2
    assert found["rank_forward_seconds"].text == "1 s, rank 2; the least is 25 % lower"
    assert found["rank_peak_allocated_bytes"].text.startswith("6.44 GB, rank 3; ")
    assert "rank_data_wait_seconds" not in found
    whole = measure(recorded(4, 4, *lines), MADE.spec, prediction(4))
    assert whole.values["peak_allocated_bytes"].value == 6 * GIB


@pytest.mark.alone  # it compares the times of two processes
def test_each_rank_logs_its_times_and_rank_0_reads_all_gpus(tmp_path: Path) -> None:
    script = tmp_path / "script.txt"
    script.write_text("cards 2\ncard 1 0 watts 150\ncard 1 0 celsius 77\n")
    driver = {"FAKE_NVML_SCRIPT": str(script), "LD_LIBRARY_PATH": str(build_fake_driver(tmp_path))}
    flags = ["--measure.gpu=0,1", "--measure.split-every=10", "--train.micro-batch=64"]
    done = subprocess.run(
        ["env", *(f"{k}={v}" for k, v in driver.items()), *torchrun(2, tmp_path, *flags)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "demo"
    lines = log_lines(folder)
    logged = [(line["step"], line["rank"]) for line in lines if line["kind"] == "rank"]
    assert logged == [(0, 0), (0, 1), (10, 0), (10, 1)]
    steps = {line["step"]: line for line in lines if line["kind"] == "step"}
    for line in (line for line in lines if line["kind"] == "rank"):
        assert line["step_seconds"] == pytest.approx(steps[line["step"]]["step_seconds"], rel=0.5)
        assert 0 < line["forward_seconds"] < line["step_seconds"]
        assert line["peak_host_bytes"] > 50e6
    (start,) = (line for line in lines if line["kind"] == "start")
    assert (start["ranks"], start["sensed_cards"]) == (2, 2)
    assert start["idle_power_watts"] == 250
    readings = [line for line in lines if line["kind"] == "sensor" and "power_watts" in line]
    assert {line["power_watts"] for line in readings} == {250}
    assert {(line["temperature_celsius"], line["hottest_card"]) for line in readings} == {(77, 1)}
    rows = rows_of(folder)
    assert rows["power_watts"]["measured"]["value"] == 250
    assert rows["power_watts"]["quantity"].endswith("all 2 processes")
    assert "of the fullest rank" in rows["peak_process_bytes"]["measured"]["how"]
    report = (folder / "report.md").read_text()
    assert "Forward passes of the slowest rank" in report
    assert {line["hottest_card"] for line in log_lines(folder) if line["kind"] == "sensor"} == {1}
