"""nanoGPT's config/*.py are parsed as literals, never executed."""

import json
from pathlib import Path

import pytest
from commands import run_here

from nanogauge.config import load_config
from nanogauge.errors import BadInput
from nanogauge.importers.nanogpt_config import literal, read_nanogpt_config


def test_a_configuration_is_read_with_the_defaults_of_train_py(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "import os; os.remove(__file__)\n"
        "batch_size = 8\ngradient_accumulation_steps = 5 * 8\nmax_iters = 2**10\n"
        "lr_decay_iters = max_iters\nlearning_rate = 1e-3\nmin_lr = learning_rate / 10\n"
        "dataset = 'shakespeare_char'\ndevice = 'cuda:1'\nvocab_size = len(open('x').read())\n"
    )
    keys = read_nanogpt_config(path)
    assert path.exists()
    assert keys["train.grad_accum"] == 40
    assert keys["optimizer.decay_steps"] == keys["train.max_steps"] == 1024
    assert keys["optimizer.min_learning_rate"] == pytest.approx(1e-4)
    assert (keys["model.n_layer"], keys["run.device"]) == (12, "cuda")
    assert "model.vocab_size" not in keys, "its characters are counted by prepare.py alone"


def test_a_configuration_is_converted_and_trains(tmp_path: Path) -> None:
    """As nanoGPT's own files: one data set, one pretrained model, one of characters."""
    source, target = tmp_path / "train gpt2.py", tmp_path / "new" / "mine.toml"
    source.write_text("batch_size = 4\nblock_size = 64\nn_layer = 2\nwandb_log = True\n")
    done = run_here("plan.py", source, "--write", target, "--train.max-steps", "9")
    assert done.returncode == 0, done.stderr
    config = load_config(target)
    assert (config.run.name, config.data.path) == ("train_gpt2", "data/openwebtext")
    assert (config.train.micro_batch, config.train.max_steps) == (4, 9)
    assert (config.data.order, config.model.n_embd) == ("random", 768)
    again = run_here("plan.py", source, "--write", target)
    assert again.returncode == 2 and "takes the name of a new file" in again.stderr
    source.write_text("init_from = 'gpt2-xl'\ndataset = 'shakespeare'\n")
    done = run_here("plan.py", source, "--gpu", "A100 40GB", "--json")
    assert done.returncode == 0, done.stderr
    rows = {row["id"]: row["analytic"] for row in json.loads(done.stdout)["rows"]}
    assert rows["parameters"]["expected"] == pytest.approx(1.556e9, rel=1e-3)
    source.write_text("dataset = 'shakespeare_char'\n")
    assert "65 for shakespeare_char" in run_here("plan.py", source, "--gpu", "T4").stderr


@pytest.mark.parametrize("text", ["9**9**9", "f()", "1/0", "a", "(" * 500, "[1]", "'" * 3, "'a' * 10**9"])
def test_what_is_no_literal_has_no_value(text: str) -> None:
    assert literal(text) is None


def test_a_file_that_is_no_python_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("n_layer = = 3")
    with pytest.raises(BadInput, match="is not a Python file"):
        read_nanogpt_config(tmp_path / "bad.py")
