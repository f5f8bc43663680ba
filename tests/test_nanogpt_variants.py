"""Logs of nanoGPT as people have them: cut, appended, resumed, with a dump, from any shell."""

from __future__ import annotations

import re

import pytest
from examples import documented_prediction
from runs import LOG, imported, nanogpt_log, spec_of, texts

from nanogauge.analysis.attribution import attribute
from nanogauge.errors import BadInput


@pytest.mark.parametrize("kind", ["iter 1000", "step 1000"])
def test_a_cut_last_line_is_left_out_and_said(kind: str) -> None:
    """The file was copied while the run wrote it, or the disk was full: what is whole is good."""
    lines = LOG.splitlines()
    place = next(i for i, line in enumerate(lines) if line.startswith(kind))
    recorded, _ = imported("\n".join([*lines[:place], lines[place][:-2]]))
    (said,) = texts(recorded, "cut_line")
    assert f"Line {place + 1}, the last of the log, is cut" in said
    assert recorded.steps[-1].step == 900
    assert recorded.ends[0].steps == (1000 if kind.startswith("iter") else 901)


def test_of_several_runs_the_last_is_taken_and_said() -> None:
    """Appending is what `>>` and `tee -a` do: the runs are told apart, never mixed."""
    other = nanogpt_log(500, 50, 250, lambda _: 3000.0, 9000.0, 20_000.0)
    recorded, measurements = imported(other + "$ python train.py\n" + LOG)
    assert measurements.median_step_seconds == pytest.approx(2.0)
    assert recorded.steps == imported(LOG)[0].steps
    (said,) = texts(recorded, "several_runs")
    assert "holds 2 runs (1: steps 0 to 500 from line 1 on; 2: steps 0 to 1,000" in said
    assert "This is number 2, the last" in said
    first, found = imported(other + LOG, run_number=1)
    assert found.median_step_seconds == pytest.approx(3.0)
    assert first.ends[0].steps == 501
    with pytest.raises(BadInput, match="holds 2 runs; there is no --run-number 3"):
        imported(other + LOG, run_number=3)


RESUMED = "Resuming training from out\nnumber of parameters: 40.56M\n"


@pytest.mark.parametrize("header", [RESUMED, ""], ids=["with its header", "by its numbers"])
def test_a_resumed_run_counts_each_step_once(header: str) -> None:
    """It died after 800 and went on from the checkpoint at 500: 500 to 800 were made twice."""
    lines = LOG.splitlines(keepends=True)
    until = next(i for i, line in enumerate(lines) if line.startswith("iter 900"))
    again = next(i for i, line in enumerate(lines) if line.startswith("step 500"))
    later = "".join(lines[again:]).replace("time 11000.00ms", "time 16000.00ms", 1)
    recorded, measurements = imported("".join(lines[:until]) + header + later)
    assert [start.first_step for start in recorded.starts] == [0, 500]
    assert [s.step for s in recorded.steps] == list(range(0, 1001, 100))
    assert [e.step for e in recorded.evals] == [0, 500, 1000]
    assert [c.seconds for c in recorded.compiles] == pytest.approx([20.0, 5.0])
    assert measurements.ledger.step_s == pytest.approx(1001 * 2.0)
    assert measurements.status == "finished"
    (said,) = texts(recorded, "resumed")
    assert "resumed at step 500" in said
    assert "301 steps" in said
    assert "is not in the total" in said


def test_the_end_of_a_log_is_no_whole_run() -> None:
    """Its steps are measured; the first step, the total and the speed-up have no figure."""
    lines = LOG.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("iter 500"))
    recorded, measurements = imported("\n".join(lines[begin:]))
    assert recorded.starts[0].first_step == 500
    assert recorded.steps[0].step_seconds is None  # an evaluation may have been cut off before it
    assert recorded.compiles == []
    assert measurements.median_step_seconds == pytest.approx(2.0)
    assert measurements.steps_done == 1001
    assert measurements.status == "finished"
    for row in ("first_step_seconds", "total_seconds"):
        assert measurements.missing[row] == "not in this log: it begins at step 500"
    assert measurements.missing["speedup_after_warmup"].startswith("not in this log")
    assert not measurements.timed_whole
    assert "begins at step 500" in texts(recorded, "begins_late")[0]
    assert attribute(documented_prediction(), measurements, spec_of(1000), recorded) is None


def test_lines_that_are_gone_from_the_middle_are_said() -> None:
    lines = [x for x in LOG.splitlines() if not re.match("iter [567]00|step 500", x)]
    recorded, _ = imported("\n".join(lines))
    (said,) = texts(recorded, "gap")
    assert "from step 400 to 800, and elsewhere by 100" in said


def test_a_line_printed_twice_is_one_step() -> None:
    lines = [text for line in LOG.splitlines() for text in (line, line)]
    assert imported("\n".join(lines))[0] == imported(LOG)[0]


@pytest.mark.parametrize(
    "prefix",
    [
        "2024-01-01 12:00:00 ",
        "2024-01-01T12:00:00.123456Z ",
        "[2024-01-01 12:00:00,123][INFO] - ",
        "[rank0]: ",
        "Jan  1 12:00:00 host python[123]: ",
        "\x1b[36m12:00:00\x1b[0m | ",
        "INFO:root:",
        "100%|██████████| 10/10 [00:00<00:00, 55.5it/s]",
        "\r  0%|          | 0/10\r 50%|#####     | 5/10\r",
    ],
)
def test_what_loggers_write_before_a_line_makes_no_difference(prefix: str) -> None:
    """Times of others, colours, and progress bars that end without a new line."""
    assert (
        imported("".join(prefix + line + "\n" for line in LOG.splitlines()))[0] == imported(LOG)[0]
    )


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_log_redirected_by_a_windows_shell_reads_the_same(encoding: str) -> None:
    """PowerShell writes a byte order mark, and before version 6 UTF-16."""
    data = LOG.replace("\n", "\r\n").encode(encoding)
    assert imported(data)[0] == imported(LOG)[0]


def test_a_line_of_many_megabytes_is_passed_over_with_its_number() -> None:
    lines = LOG.splitlines()
    recorded, _ = imported("\n".join([*lines[:4], "iter 5: " + "9" * 3_000_000, *lines[4:]]))
    assert recorded.steps == imported(LOG)[0].steps
    assert "line 5." in texts(recorded, "long_line")[0]


def test_zeros_of_a_power_failure_and_control_characters_are_no_text() -> None:
    """They neither hide the line after them nor reach a message as they are."""
    lines = LOG.splitlines()
    zeros = "\0" * 4096
    assert imported("\n".join([*lines[:6], zeros + lines[6], *lines[7:]]))[0] == imported(LOG)[0]
    with pytest.raises(BadInput, match="line 7 of") as refused:
        imported("\n".join([*lines[:6], "iter 200: \x1b]0;title\x07\x1b[2Jlo\x9bss", *lines[7:]]))
    assert str(refused.value).isprintable()


def test_variants_that_print_more_or_no_mfu_are_read() -> None:
    """nanoGPT of early 2023 printed no MFU; descendants append a figure of their own."""
    early = re.sub(r", mfu .*", "", LOG)
    assert imported(early)[0].steps == imported(LOG)[0].steps
    assert imported(LOG.replace("%\n", "%, tok/s 123,456\n"))[0].steps == imported(LOG)[0].steps


DUMP = """\
Overriding config with config/train_fineweb.py:
# tokens: batch_size = 99 in a comment
batch_size = 16 # the largest that fits
gradient_accumulation_steps = 4 * 8
block_size = 1024
dropout = 0.1
wandb_log = False
max_iters = 1000
dtype = 'bfloat16'
lr_decay_iters = int(1e4)
warmup_iters = first_iters
min_lr = learning_rate / 10
Overriding: eval_interval = 500
tokens per iteration will be: 524,288
found vocab_size = 50304 (inside data/fineweb/meta.pkl)
Initializing a new model from scratch
number of parameters: 40.56M
num decayed parameter tensors: 50, with 40,943,616 parameters
num non-decayed parameter tensors: 25, with 9,600 parameters
using fused AdamW: True
compiling the model... (takes a ~minute)
"""


def test_a_configuration_dump_that_agrees_changes_nothing() -> None:
    """Four ranks print it four times, and a process that ran out of memory before, another one."""
    other = DUMP.replace("batch_size = 16", "batch_size = 64").replace("524,288", "2,097,152")
    assert imported(DUMP + LOG)[0] == imported(LOG)[0]
    assert imported(other + DUMP * 4 + LOG + DUMP)[0] == imported(LOG)[0]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("batch_size = 16", "batch_size = 12", "batch_size = 12, but .* train.micro_batch = 16"),
        ("4 * 8", "5 * 8", r"gradient_accumulation_steps = 5 \* 8, .* train.grad_accum = 32"),
        ("524,288", "491,520", "tokens per step = 491,520, .* train.grad_accum = 524,288"),
        ("40.56M", "123.59M", "parameters = 123.59M, .* position embeddings = 40,560,000"),
        ("40,943,616", "123", "with position embeddings = 9723, .* = 40,953,216"),
        ("vocab_size = 50304", "vocab_size = 65", "vocab_size = 65, but .*= 50,304"),
        ("max_iters = 1000", "max_iters = 5000", "max_iters = 5000, but .* = 1,000"),
        ("eval_interval = 500", "eval_interval = 250", "eval_interval = 250, but .* = 500"),
        ("'bfloat16'", "'float16'", "dtype = 'float16', but the .* run.dtype = bfloat16"),
    ],
)
def test_a_configuration_dump_that_contradicts_is_refused(old: str, new: str, words: str) -> None:
    """The report of another configuration would be wrong in every row."""
    assert DUMP.count(old) == 1
    with pytest.raises(BadInput, match=words):
        imported(DUMP.replace(old, new) + LOG)
