"""Import of nanoGPT logs that are cut, appended, resumed, labelled or redirected by any shell."""

import re

import pytest
from examples import documented_prediction
from runs import LOG, imported, nanogpt_log, spec_of, texts

from nanogauge.analysis.attribution import attribute
from nanogauge.errors import BadInput


@pytest.mark.parametrize("kind", ["iter 1000", "step 1000"])
def test_a_cut_last_line_is_left_out_with_a_warning(kind: str) -> None:
    lines = LOG.splitlines()
    place = next(i for i, line in enumerate(lines) if line.startswith(kind))
    recorded, _ = imported("\n".join([*lines[:place], lines[place][:-2]]))
    assert texts(recorded, "cut_line") == [f"Left out, cut or damaged: line {place + 1}."]
    assert recorded.steps[-1].step == 900
    assert recorded.ends[0].steps == (1000 if kind.startswith("iter") else 901)


def test_the_last_of_several_appended_runs_is_imported_with_a_warning() -> None:
    other = nanogpt_log(500, 50, 250, lambda _: 3000.0, 9000.0, 20_000.0)
    recorded, measurements = imported(other + "$ python train.py\n" + LOG)
    assert measurements.median_step_seconds == pytest.approx(2.0)
    assert recorded.steps == imported(LOG)[0].steps
    (message,) = texts(recorded, "several_runs")
    assert "holds 2 runs (1: steps 0 to 500 from line 1 on; 2: steps 0 to 1,000" in message
    assert "This is number 2, the last" in message
    first, found = imported(other + LOG, run_number=1)
    assert found.median_step_seconds == pytest.approx(3.0)
    assert first.ends[0].steps == 501
    with pytest.raises(BadInput, match="holds 2 runs; there is no --run-number 3"):
        imported(other + LOG, run_number=3)


RESUMED = "Resuming training from out\nnumber of parameters: 40.56M\n"


@pytest.mark.parametrize("header", [RESUMED, ""], ids=["by header", "by step numbers"])
def test_a_resumed_run_counts_each_step_once(header: str) -> None:
    """It died after step 800 and resumed from the checkpoint at 500."""
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
    (message,) = texts(recorded, "resumed")
    assert "resumed at step 500" in message
    assert "301 steps" in message
    assert "is not in the total" in message


def test_a_log_without_its_begin_has_no_first_step_and_no_total() -> None:
    lines = LOG.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("iter 500"))
    recorded, measurements = imported("\n".join(lines[begin:]))
    assert recorded.starts[0].first_step == 500
    assert recorded.steps[0].step_seconds is None  # may include an evaluation
    assert recorded.compiles == []
    assert measurements.median_step_seconds == pytest.approx(2.0)
    assert measurements.steps_done == 1001
    assert measurements.status == "finished"
    for row in ("first_step_seconds", "total_seconds"):
        assert measurements.missing[row] == "not in this log: it begins at step 500"
    assert measurements.missing["speedup_after_warmup"] == "step 0 is not in the log"
    assert not measurements.timed_whole
    assert "begins at step 500" in texts(recorded, "begins_late")[0]
    assert attribute(documented_prediction(), measurements, spec_of(1000), recorded) is None


PREFIXES = [
    "2024-01-01T12:00:00.123456Z ",
    "[2024-01-01 12:00:00,123][INFO] - ",
    "\x1b[36m12:00:00\x1b[0m | ",
    "INFO:root:",
    "100%|██████████| 10/10 [00:00<00:00, 55.5it/s]",
    "\r  0%|          | 0/10\r 50%|#####     | 5/10\r",
]
SAME_RUN = {
    **{prefix: re.sub("^(?=.)", prefix, LOG, flags=re.M) for prefix in PREFIXES},
    **{repr(end): LOG.replace("\n", end) for end in ("\r\n", "\r", "\n   ")},
    # PowerShell writes a byte order mark, and before version 6 UTF-16.
    **{name: LOG.replace("\n", "\r\n").encode(name) for name in ("utf-8-sig", "utf-16")},
    "repeated lines": re.sub("(.*\n)", r"\1\1", LOG),
    "more figures of a fork": LOG.replace("%\n", "%, tok/s 262,144\n"),
    "zeros of a power failure": LOG.replace("iter 200", "\0" * 4096 + "iter 200"),
}


def test_lines_without_the_mfu_of_later_versions_are_read() -> None:
    assert imported(re.sub(r", mfu .*", "", LOG))[0].steps == imported(LOG)[0].steps


@pytest.mark.parametrize("log", SAME_RUN.values(), ids=SAME_RUN)
def test_labels_line_ends_encodings_and_repeated_lines_do_not_matter(log: str | bytes) -> None:
    assert imported(log)[0] == imported(LOG)[0]


def test_a_line_of_many_megabytes_is_skipped_with_a_warning() -> None:
    lines = LOG.splitlines()
    recorded, _ = imported("\n".join([*lines[:4], "iter 5: " + "9" * 3_000_000, *lines[4:]]))
    assert recorded.steps == imported(LOG)[0].steps
    assert "line 5." in texts(recorded, "long_line")[0]


def test_control_characters_reach_no_message() -> None:
    lines = LOG.splitlines()
    name = "iter 200: \x1b]0;title\x07\x1b[2Jlo\x9bss"
    (message,) = texts(imported("\n".join([*lines[:6], name, *lines[7:]]))[0], "cut_line")
    assert "line 7." in message
    assert message.isprintable()


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
    """Printed by four ranks, after that of a process that ended before its first step."""
    other = DUMP.replace("batch_size = 16", "batch_size = 64").replace("524,288", "2,097,152")
    assert imported(DUMP + LOG)[0] == imported(LOG)[0]
    assert imported(other + DUMP * 4 + LOG + DUMP)[0] == imported(LOG)[0]
