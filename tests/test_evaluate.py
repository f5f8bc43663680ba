"""evaluate.py scores the model of a run and another on the same items, for log and report."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import log_lines, rows_of, run
from examples import claims_text
from gpt2_shaped import gpt2_folder, hub_of_model
from test_model import fill_by_formula, small_model
from torch.nn import functional as F

from evaluate import main
from nanogauge.analysis.measured import quality_figures
from nanogauge.errors import BadInput
from nanogauge.schema import Benchmark
from trainer.data.dataset import embedded_tokens
from trainer.data.tokenizer import byte_encoding
from trainer.evaluation.benchmarks import Items, Scorer
from trainer.evaluation.export import tokenizer_files
from trainer.evaluation.load import open_trained

EXAMPLES = [
    {"ctx": "The import statement", "endings": ["finds a module", "eats", "é", "a b"], "label": 0},
    {"ctx": "A string is", "endings": ["zzzz", "a sequence of characters", "q", "0"], "label": "1"},
    {"ctx": "x" * 90, "endings": ["and more", "or less than that", "!", "?"], "label": 2},
]


@pytest.fixture
def copy(tiny_run: Path, tmp_path: Path) -> Path:
    """Return a writable copy of the tiny run with a claim that it is better than GPT-2."""
    folder = tmp_path / "demo"
    shutil.copytree(tiny_run, folder)
    claim = 'key = "quality_vs_gpt2"\nunit = "1"\nlow = 1'
    (folder / "claims.toml").write_text(claims_text(claim), encoding="utf-8")
    return folder


def gpt2_of_bytes(folder: Path) -> Path:
    """Return a substitute for GPT-2 with the demo's tokenizer."""
    gpt2_folder(folder, vocab_size=264, block_size=48)
    files = tokenizer_files(byte_encoding(), 48)
    assert files is not None
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def test_gpt2_of_the_hub_decides_the_claim(copy: Path, tmp_path: Path) -> None:
    assert rows_of(copy)["quality_vs_gpt2"]["verdict"] == "not measured"
    examples = tmp_path / "hellaswag.jsonl"
    examples.write_text("\n".join(map(json.dumps, EXAMPLES)))
    with hub_of_model("gpt2", gpt2_of_bytes(tmp_path / "gpt2")) as hub:
        flags = ["--against=gpt2", "--tasks=hellaswag", f"--hellaswag={examples}", "--tokens=4000"]
        home = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf")}
        home["HF_HUB_DISABLE_XET"] = "1"
        done = run("evaluate.py", copy, *flags, "--device=cpu", **home)
    assert done.returncode == 0, done.stderr
    lines = {(x["name"], x["metric"]): x for x in log_lines(copy) if x["kind"] == "benchmark"}
    held_out = {("held_out", "nats_per_token"), ("held_out", "bits_per_byte")}
    assert set(lines) == held_out | {("hellaswag", "acc"), ("hellaswag", "acc_norm")}
    assert all(x["against"] == "gpt2" and x["step"] == 12 for x in lines.values())
    counted = lines["hellaswag", "acc_norm"]
    assert counted["n"] == 3
    row = rows_of(copy)["quality_vs_gpt2"]
    if counted["against_value"]:
        ratio = counted["value"] / counted["against_value"]
    else:  # nothing has a ratio to a score of nothing: the losses decide
        bits = lines["held_out", "bits_per_byte"]
        ratio = bits["against_value"] / bits["value"]
    assert row["measured"]["value"] == pytest.approx(ratio)
    assert row["verdict"] == ("held" if ratio >= 1 else "missed")
    assert "95 % of the difference" in row["why"]


def test_the_held_out_loss_covers_every_window_of_the_validation_split_once(copy: Path) -> None:
    assert main([str(copy), "--tokens=1e9", "--device=cpu", "--json"]) == 0
    found = {x["metric"]: x for x in log_lines(copy) if x["kind"] == "benchmark"}
    tokens, block = embedded_tokens()[1].astype(np.int64), 32
    count = len(tokens) // block - 1
    model = open_trained(copy, "newest", "cpu", half=False).model
    windows = np.stack([tokens[i * block : (i + 1) * block + 1] for i in range(count)])
    nats, bits, size = 0.0, 0.0, 0
    with torch.no_grad():
        for part in torch.from_numpy(windows).split(256):
            logits = model.lm_head(model.hidden(part[:, :-1])).flatten(0, 1)
            losses = F.cross_entropy(logits, part[:, 1:].flatten(), reduction="none").double()
            text = part[:, 1:].flatten() < 256
            nats, size = nats + losses.sum().item(), size + int(text.sum())
            bits += losses[text].sum().item() / math.log(2)
    line = found["nats_per_token"]
    assert line["n"] == len(windows)
    assert line["value"] == pytest.approx(nats / (len(windows) * block), rel=1e-5)
    assert line["low"] < line["value"] < line["high"]
    assert "against" not in line
    assert found["bits_per_byte"]["value"] == pytest.approx(bits / size, rel=1e-5)


def test_an_ending_has_the_same_score_in_any_batch() -> None:
    """Padding changes nothing; a row that is too long loses its beginning."""
    model = small_model().eval()
    fill_by_formula(model)
    scorer = Scorer(model, "float32")
    rows = [([1, 2, 3], [4, 5]), ([6], [7, 8, 9, 10]), (list(range(20)), [3, 1]), ([2], [5])]
    sums, means = scorer.ending_losses(rows)
    for k, (context, ending) in enumerate(rows):
        kept = [*context, *ending][-13:]
        losses = scorer.losses(torch.tensor([kept[:-1]]), torch.tensor([kept[1:]]))[0]
        assert sums[k] == pytest.approx(losses[-len(ending) :].sum().item(), rel=1e-5)
        assert means[k] == pytest.approx(losses[-len(ending) :].mean().item(), rel=1e-5)


def test_the_bootstrap_is_paired() -> None:
    chance = np.random.default_rng(2)
    hard = chance.normal(3, 1, 400)
    better = hard - 0.1 + chance.normal(0, 0.01, 400)
    found = Items(better, hard, np.ones(400)).figures()
    low, high = found["low"], found["high"]
    assert low is not None and high is not None
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=0.15)
    less, more = found["difference_low"], found["difference_high"]
    assert less is not None and more is not None
    assert -0.102 < less < -0.1 < more < -0.098 or more - less < 0.003


def line(name: str, value: float, against: float | None, model: str | None = "gpt2") -> Benchmark:
    better = "lower" if name == "held_out" else "higher"
    return Benchmark(
        step=1, name=name, metric="m", better=better, value=value, n=9, against=model,
        against_value=against,
    )  # fmt: skip


def test_the_score_is_hellaswags_and_held_out_text_counts_only_without_it() -> None:
    """Held-out text resembles the training data."""
    held_out, task = line("held_out", 2, 3), line("hellaswag", 0.8, 0.2)
    assert quality_figures([held_out, task])[0]["quality_vs_gpt2"].value == pytest.approx(4)
    assert quality_figures([held_out])[0]["quality_vs_gpt2"].value == pytest.approx(1.5)
    assert quality_figures([line("hellaswag", 1, 2, "gpt2-xl"), line("held_out", 1, None, None)]) == (
        {},
        {"quality_vs_gpt2": "benchmarks were compared with gpt2-xl, not GPT-2 124M"},
    )


def test_a_model_of_another_vocabulary_is_refused(copy: Path, tmp_path: Path) -> None:
    other = gpt2_of_bytes(tmp_path / "other")
    before = log_lines(copy)
    vocabulary = json.loads((other / "vocab.json").read_text(encoding="utf-8"))
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    with pytest.raises(BadInput, match="has another vocabulary than the run"):
        main([str(copy), f"--against={other}", "--device=cpu"])
    (other / "vocab.json").unlink()
    with pytest.raises(BadInput, match=r"has no vocab\.json"):
        main([str(copy), f"--against={other}", "--device=cpu"])
    assert log_lines(copy) == before
