"""Import of nanochat and build-nanogpt logs."""

import re
import textwrap

import pytest
from examples import SHARED, needs_shared
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import imported, texts

from nanogauge.analysis.measured import Measurements
from nanogauge.errors import BadInput
from nanogauge.importers.reader import parse_log
from nanogauge.runlog.history import RunHistory

TOKENS = 16 * 1024 * 32
STEPS = 60


def nanochat_line(step: int, seconds: float, old: bool, mfu: float = 41.2) -> str:
    begin = f"step {step:05d}/{STEPS:05d} ({100 * step / STEPS:.2f}%) | loss: {9 - step / 20:.6f}"
    middle = f" | dt: {1e3 * seconds:.2f}ms | tok/sec: {int(TOKENS / seconds):,}"
    clock = f" | total time: {max(step - 10, 0) * seconds / 60:.2f}m"
    if old:
        return f"{begin} | grad norm: 0.4321 | lrm: 1.00{middle} | mfu: {mfu:.2f}{clock}"
    more = f" | bf16_mfu: {mfu:.2f} | epoch: 1 pq: 9 rg: 772"
    return f"{begin} | lrm: 1.00{middle}{more}{clock} | eta: 3.1m"


def nanochat_log(old: bool = False, mfu: float = 41.2) -> str:
    """Output of base_train: an evaluation every 20 steps and after the last, outside of dt."""
    lines = ["Vocab size: 50,304", "Number of parameters: 185,598,720"]
    for step in range(STEPS):
        if step % 20 == 0:
            lines.append(f"Step {step:05d} | Validation bpb: {2 - step / 100:.4f}")
        lines.append(nanochat_line(step, 31.5 if step == 0 else 1.5, old, mfu))
    lines.append(f"Step {STEPS:05d} | Validation bpb: 1.2345")
    lines += ["Peak memory usage: 9436.49MiB", "Total training time: 1.23m"]
    return "\n".join(lines) + "\n"


def from_nanochat(text: str, max_steps: int = STEPS) -> tuple[RunHistory, Measurements]:
    return imported(text, max_steps)


def test_what_a_nanochat_log_lacks_is_explained() -> None:
    recorded, measurements = from_nanochat(nanochat_log(mfu=0.0))
    assert recorded.evals[-1].val_bits_per_byte == 1.2345
    assert recorded.evals[-1].val_loss is None
    assert not {"val_loss", "total_seconds"} & measurements.values.keys()
    assert "1.2345 bits per byte after 60 steps" in measurements.missing["val_loss"]
    assert "stands still" in measurements.missing["total_seconds"]
    assert "73.8 s of training in 60 steps" in measurements.missing["total_seconds"]
    note = "printed 0.00 %, because nanochat does not know"
    assert note in measurements.notes["mfu_palm"][0]


@settings(max_examples=20, deadline=None)
@given(width=st.integers(50, 220), at_spaces=st.booleans(), old=st.booleans())
def test_lines_wrapped_at_any_width_are_joined(width: int, at_spaces: bool, old: bool) -> None:
    whole = nanochat_log(old)
    rows = []
    for line in whole.splitlines():
        pieces = [line[i : i + width].rstrip() for i in range(0, len(line), width)]
        rows += textwrap.wrap(line, width, break_on_hyphens=False) if at_spaces else pieces
    assert from_nanochat("\n".join(rows))[0] == from_nanochat(whole)[0]


def test_steps_of_another_number_or_size_are_refused() -> None:
    with pytest.raises(BadInput, match="num_iterations = 00060, .* train.max_steps = 70"):
        from_nanochat(nanochat_log(), max_steps=70)
    text = re.sub("tok/sec: [0-9,]+", "tok/sec: 43,690", nanochat_log())
    with pytest.raises(BadInput, match="made steps of 65,535 tokens, but .* 524,288"):
        from_nanochat(text)


@needs_shared("data/rtx4070_nanochat_d12_train_log.txt")
def test_the_end_of_a_public_nanochat_run() -> None:
    """399 wrapped lines of a d12 on an RTX 4070: 199 steps of 1.18 s, and a cut one."""
    parsed = parse_log(SHARED / "data" / "rtx4070_nanochat_d12_train_log.txt")
    (process,) = parsed.processes
    assert (process.first_step, process.updates, len(process.steps)) == (86_019, 86_218, 199)
    assert not process.start_logged
    times = sorted(e.seconds or 0 for e in process.steps)
    assert times[99] == pytest.approx(1.1773, abs=2e-4)
    assert {e.mfu for e in process.steps} == {0.0}
    assert process.training_seconds == pytest.approx(60 * 1690.84)
    assert [e.what for e in parsed.events] == ["cut_line"]


def build_nanogpt_output() -> str:
    """Output of train_gpt2.py: a step's time includes the evaluation before it."""
    lines = ["total desired batch size: 524288", "=> calculated gradient accumulation steps: 32"]
    for step in range(STEPS):
        milliseconds = 2000.0 + 9000.0 * (step % 25 == 0 or step == STEPS - 1)
        if step % 25 == 0 or step == STEPS - 1:
            lines.append(f"validation loss: {9 - step / 20:.4f}")
            lines.append(f"HellaSwag accuracy: {2500 + step}/10042={(2500 + step) / 10042:.4f}")
        milliseconds += 20_000.0 * (step == 0)
        lines.append(
            f"step {step:5d} | loss: {9 - step / 20:.6f} | lr 6.0000e-04 | norm: 1.2345 | "
            f"dt: {milliseconds:.2f}ms | tok/sec: {TOKENS / milliseconds * 1e3:.2f}"
        )
    return "\n".join(lines) + "\n"


def build_nanogpt_file() -> str:
    """log.txt of train_gpt2.py."""
    lines = []
    for step in range(STEPS):
        if step % 25 == 0 or step == STEPS - 1:
            lines.append(f"{step} val {9 - step / 20:.4f}")
            lines.append(f"{step} hella {(2500 + step) / 10042:.4f}")
        lines.append(f"{step} train {9 - step / 20:.6f}")
    return "\n".join(lines) + "\n"


def from_build_nanogpt(text: str) -> tuple[RunHistory, Measurements]:
    return imported(text, STEPS)


def test_the_output_of_build_nanogpt_gives_steps_evaluations_and_compilation() -> None:
    recorded, measurements = from_build_nanogpt(build_nanogpt_output())
    assert measurements.median_step_seconds == pytest.approx(2.0)
    assert [e.step for e in recorded.evals] == [0, 25, 50, 59]
    assert [e.seconds for e in recorded.evals[1:]] == pytest.approx([9.0, 9.0, 9.0])
    assert recorded.compiles[0].seconds == pytest.approx(20.0)
    whole = STEPS * 2.0 + 4 * 9.0 + 20.0
    assert measurements.values["total_seconds"].value == pytest.approx(whole)
    assert measurements.values["val_loss"].value == pytest.approx(9 - 59 / 20, abs=1e-4)
    assert recorded.steps[3].learning_rate == 6e-4
    assert "HellaSwag is 0.2548 after 59 steps" in measurements.missing["quality_vs_gpt2"]
    text = build_nanogpt_output().replace("524288", "262144")
    with pytest.raises(BadInput, match="tokens per step = 262144, .* = 524,288"):
        from_build_nanogpt(text)


@pytest.mark.parametrize("text", [nanochat_log(), build_nanogpt_output(), build_nanogpt_file()])
def test_a_cut_line_is_left_out_with_a_warning(text: str) -> None:
    lines = text.splitlines()
    place = max(i for i, line in enumerate(lines) if re.match(r"step|\d+ train", line))
    line = lines[place]
    cut = [*lines[:place], line[:-3] if "dt" not in line else line[: line.index("dt") + 6]]
    recorded, _ = imported("\n".join(cut), STEPS)
    assert recorded.steps[-1].step == STEPS - 2
    assert texts(recorded, "cut_line") == [f"Left out, cut or damaged: line {place + 1}."]
