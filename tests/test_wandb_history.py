"""Import of a history exported from W&B: known columns are read, others are listed."""

import csv
import io
import math
from dataclasses import replace

import pytest
from mirrored import GOLDEN
from runs import MadeUp, imported, texts

from nanogauge.analysis.measured import Measurements
from nanogauge.errors import BadInput
from nanogauge.runlog.history import RunHistory
from nanogauge.sinks.rows import Rows as MirrorRows

TOKENS = 16 * 1024 * 32
Rows = list[dict[str, object]]


def as_csv(rows: Rows) -> bytes:
    """Write rows as pandas does: an unnamed index, empty cells for missing figures."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(["", *columns])
    for index, row in enumerate(rows):
        writer.writerow([index, *(row.get(name, "") for name in columns)])
    return file.getvalue().encode()


def history(data: Rows | bytes, max_steps: int = 1000) -> tuple[RunHistory, Measurements]:
    text = data if isinstance(data, bytes) else as_csv(data)
    return imported(text, max_steps, name="history.csv")


def nanogpt_rows() -> Rows:
    """nanoGPT logs only at its evaluations: 500 steps of 2 s and an evaluation of 10 s."""
    return [
        {
            "_step": n,
            "_runtime": 30.0 + n * 1010.0,
            "_timestamp": 1.7e9 + n * 1010.0,
            "iter": 500 * n,
            "train/loss": 9.0 - n,
            "val/loss": 9.5 - n,
            "lr": 1e-3,
            "mfu": 12.5,
        }
        for n in range(3)
    ]


def nanochat_rows() -> Rows:
    rows: Rows = []
    for step in range(0, 1001, 100):
        clock = {"_step": len(rows), "_runtime": 40.0 + 4 * step, "step": step}
        if step % 500 == 0:
            rows.append({**clock, "total_training_time": 4.0 * step, "val/bpb": 1.5 - step / 5000})
        if step < 1000:
            seconds = 34.0 if step == 0 else 4.0
            speed = int(TOKENS / seconds)
            figures = {"train/loss": 8.0, "train/dt": seconds, "train/tok_per_sec": speed}
            rows.append({**clock, "total_training_time": 4.0 * step, **figures, "train/mfu": 41.0})
    return rows


MADE = MadeUp(steps=100, every=50, evaluation=9.0, checkpoint=2.0, step=lambda n: 4.0 + n / 1000)


def our_rows(run: MadeUp = MADE) -> Rows:
    """W&B's export of a run that our mirror sent."""
    rows = MirrorRows(run.spec, run.prediction, 10)
    sent = enumerate(rows.row(line) for line in run.lines())
    return [{"_step": 100 * n, "_runtime": 3.0 * n, **row} for n, row in sent if row]


def torchtitan_rows() -> Rows:
    return [
        {
            "_step": step,
            "_runtime": 20.0 + 4.0 * step,
            "loss_metrics/global_avg_loss": 8.0,
            "loss_metrics/global_max_loss": 8.5,
            "time_metrics/end_to_end(s)": 0.4 if step == 1 else 4.0,
            "throughput(tps)": TOKENS / 4.0,
            "memory/max_reserved(GiB)": 9.25,
            "memory/max_active(GiB)": 8.75,
        }
        for step in (1, *range(10, 1001, 10))
    ]


def test_nanogpt_has_no_step_times_but_a_mean_with_evaluation() -> None:
    recorded, measurements = history(nanogpt_rows())
    assert [(e.step, e.val_loss) for e in recorded.evals] == [(0, 9.5), (500, 8.5), (1000, 7.5)]
    assert recorded.steps == []
    for row in ("step_seconds", "mfu_palm", "mfu_6n"):
        assert "a step took 2.02 s, with its share of the evaluation" in measurements.missing[row]
    assert measurements.values["total_seconds"].value == pytest.approx(2050.0)
    assert measurements.ledger.step_s is None
    assert measurements.values["val_loss"].value == 7.5


def test_nanochat_has_step_times_and_bits_per_byte() -> None:
    recorded, measurements = history(nanochat_rows())
    assert measurements.median_step_seconds == pytest.approx(4.0)
    assert recorded.compiles[0].seconds == pytest.approx(30.0)
    assert measurements.steps_done == 1000
    assert measurements.values["total_seconds"].value == pytest.approx(4040.0)
    assert "1.3000 bits per byte" in measurements.missing["val_loss"]


@pytest.mark.parametrize("run", [MADE, replace(MADE, died_at=[(75, 50)], start_up=8.0)])
def test_the_history_of_our_own_mirror_reads_back(run: MadeUp) -> None:
    """Steps, losses, time, power, memory and energy of all processes, at the mirrored steps."""
    recorded, measured = history(our_rows(run), run.steps)
    sent = {step.step: step for step in run.recorded().steps if step.step % 10 == 0}
    assert {step.step: (step.loss, step.step_seconds) for step in recorded.steps} == {
        number: (step.loss, step.step_seconds) for number, step in sent.items()
    }
    kept = ("step", "val_loss", "seconds")
    evals, theirs = recorded.evals, run.recorded().evals
    assert [[getattr(e, k) for k in kept] for e in evals] == [[getattr(e, k) for k in kept] for e in theirs]
    assert [c.seconds for c in recorded.compiles] == [c.seconds for c in run.recorded().compiles]
    assert len(recorded.sensors) == len(run.recorded().sensors)
    assert len(recorded.processes) == 1 + len(run.died_at)
    whole = run.measured()
    for row in ("step_seconds", "first_step_seconds", "val_loss", "power_watts", "energy_kwh"):
        assert measured.values[row].value == pytest.approx(whole.values[row].value, rel=0.01), row
    for row in ("peak_allocated_bytes", "peak_process_bytes"):
        assert measured.values[row].value == whole.values[row].value, row
    # The log's last line is no row of the history.
    total = whole.values["total_seconds"].value
    assert measured.values["total_seconds"].value == pytest.approx(total, abs=1.0 + 1e-6)
    assert "at the steps that are in the log" in measured.values["power_watts"].how


def test_the_mirror_of_a_log_with_every_field_reads_back() -> None:
    other_rate = "perf/tokens_per_second"  # not that of the documented run
    rows: Rows = [{k: v for k, v in row.items() if k != other_rate} for row in GOLDEN]
    recorded, measured = history(rows)
    assert [s.step for s in recorded.steps] == [0, 5, 8, 10, 15, 16]
    assert [s.step_seconds for s in list(recorded.steps)[1:3]] == [3.905, 3.908]
    assert [c.step for c in recorded.compiles] == [None, 7]
    assert recorded.ends[0].peak_allocated_bytes == 9_000_000_016
    assert measured.ledger.checkpoint_s == 0.5


def test_torchtitan_counts_from_one_and_its_first_time_is_left_out() -> None:
    """Its first row divides the time of one step by log_freq."""
    recorded, measurements = history(torchtitan_rows())
    assert [s.step for s in list(recorded.steps)[:3]] == [0, 9, 19]
    assert recorded.steps[0].step_seconds is None
    assert measurements.median_step_seconds == pytest.approx(4.0)
    assert measurements.steps_done == 1000
    assert recorded.ends[0].peak_reserved_bytes == 9.25 * 2**30
    assert "peak_allocated_bytes" not in measurements.values


def test_unknown_columns_are_not_read() -> None:
    rows = [{**row, "system/power": 5, "<b>\x1b[31m": 1} for row in torchtitan_rows()]
    assert history(rows)[0] == history(torchtitan_rows())[0]


def test_the_export_of_a_chart_is_read_without_its_run_name() -> None:
    """Its columns are NAME - column, NAME - column__MIN and __MAX."""
    rows = [{("Step" if k == "_step" else f"night - 2 - {k}"): v for k, v in row.items()} for row in torchtitan_rows()]
    named = [{**row, "night - 2 - train/loss__MIN": 1.0} for row in rows]
    recorded, _ = history(named)
    assert [s.loss for s in recorded.steps] == [8.0] * 101
    two = [{**row, "other - loss_metrics/global_avg_loss": 1.0} for row in rows]
    with pytest.raises(BadInput, match="the columns of 2 runs; export one run alone"):
        history(two)


def test_a_resumed_history_has_no_total() -> None:
    """W&B's clock includes the time between the processes."""
    rows = nanogpt_rows()
    again = [{**row, "_runtime": 5000.0 + i} for i, row in enumerate(rows[1:])]
    recorded, measurements = history([*rows[:2], {**rows[2], "iter": 700}, *again])
    assert [start.first_step for start in recorded.starts] == [0, 500]
    assert [e.step for e in recorded.evals] == [0, 500, 1000]
    assert "total_seconds" not in measurements.values


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "has not the columns of a program"),
        (b"loss,step\n1,2\n", "has not the columns of a program"),
        (b"step,step,perf/step_seconds\n0,0,1\n", "two columns 'step'"),
        (b'step,perf/step_seconds\n0,"' + b"9" * 200_000 + b'"\n', "is no line of a CSV file"),
        (b"step,perf/step_seconds\n", "holds no whole step"),
        (b"iter,train/loss,val/loss\n0,5,5\n2000,5,5\n", "train.max_steps = 1,000"),
    ],
)
def test_a_file_without_a_known_history_is_refused(data: bytes, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        history(data)


@pytest.mark.parametrize("row", ["0,abc,1", "0.5,1,1", "0,inf,1", "0,-4,1", "0", "0,4,1e999"])
def test_a_damaged_row_is_left_out_with_a_warning(row: str) -> None:
    data = f"step,perf/step_seconds,hours\n{row}\n1,2,1\n2,2,1\n".encode()
    recorded, _ = history(data)
    assert [step.step for step in recorded.steps] == [1, 2]
    assert texts(recorded, "cut_line") == ["Left out, cut or damaged: line 2."]


def test_a_step_with_an_infinite_loss_is_kept() -> None:
    rows = [{**row, "train/loss": math.inf} for row in nanochat_rows()]
    recorded, _ = history(rows)
    assert {s.loss for s in recorded.steps} == {None}
