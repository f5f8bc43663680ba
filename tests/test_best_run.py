"""plan --best: the run with the lowest predicted loss in a given time."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commands import ROOT, run_here
from examples import DOCUMENTED

from nanogauge.config import load_config
from nanogauge.hardware import lookup, usually_free_bytes
from nanogauge.prediction.best_run import best_runs
from nanogauge.prediction.prediction import predict
from nanogauge.prediction.search import with_micro_batch
from nanogauge.runspec import RunSpec, with_shape
from nanogauge.schema import Prediction

BASE = ROOT / "nanogauge" / "base.toml"


def best(*flags: str) -> dict[str, Any]:
    done = run_here("plan.py", *flags, "--gpu", "RTX 4070", "--json")
    assert done.returncode == 0, done.stderr
    runs: dict[str, Any] = json.loads(done.stdout)["best"]["runs"]
    return runs


@pytest.mark.parametrize(
    ("card", "hours"),
    [("RTX 4070", 4), ("RTX 4070", 8), ("RTX 4070", 24), ("RTX 3060", 8), ("RTX 4090", 8), ("RTX 5070", 8), ("T4", 12)],
)
def test_the_best_run_is_that_of_a_full_grid(card: str, hours: int) -> None:
    """Every depth to 24 and every width in heads of 64, with the micro-batch of the best run."""
    dtype = "float16" if card == "T4" else "bfloat16"
    hardware = lookup(card, dtype)
    like, free = RunSpec.from_config(load_config(BASE), dtype), usually_free_bytes(hardware)
    assert free is not None

    def predicted(spec: RunSpec) -> Prediction:
        return predict(spec, hardware)

    began = time.process_time()
    runs = best_runs(like, predicted, free, 3600 * hours)
    assert time.process_time() - began < 1
    first, lowest = runs["best"], 9.0
    found = [run for name, run in runs.items() if name.startswith(("best", "alternative"))]
    for layers in range(6, 25):
        for heads in range(layers * 13 // 64 + 1, layers * 80 // 64 + 1):
            sizes = {"n_head": heads, "n_kv_head": heads, "n_embd": 64 * heads}
            spec = with_shape(first, **sizes, n_layer=layers, mlp_width=256 * heads)
            plan = predicted(spec)
            share = (3600 * hours - 60) / (plan["total_seconds"].expected - 60)
            steps, parameters = int(first.steps * share), plan["parameters"].expected
            tokens = steps * spec.tokens_per_step
            if tokens >= max(1e9, 10 * parameters) and parameters > 12e6:
                lowest = min(lowest, predicted(replace(spec, steps=steps))["val_loss"].expected)
    assert predicted(first)["val_loss"].expected <= lowest + 0.005
    for run in found:
        seconds, loss = (predicted(run)[row].expected for row in ("total_seconds", "val_loss"))
        assert 0.95 * 3600 * hours < seconds <= 3600 * hours
        assert loss <= lowest + 0.02
        assert run.steps * run.tokens_per_step >= 10 * predicted(run)["parameters"].expected
        assert 6 <= run.shape.n_layer <= 36 and 13 <= run.shape.n_embd / run.shape.n_layer <= 80
        assert predicted(run)["peak_process_bytes"].expected <= free
        larger = with_micro_batch(run, 2 * run.micro_batch)
        assert run.micro_batch == 64 or predicted(larger)["peak_process_bytes"].high > free


def test_a_night_of_eight_hours_reaches_gpt2_and_the_given_model_does_not() -> None:
    plan = best("--best=8h")
    assert plan["best"]["val_loss"]["high"] < 3.2924
    assert 110e6 < plan["best"]["parameters"] < 140e6
    assert "alternative 2" in plan
    loss = plan["best"]["val_loss"]["expected"]
    assert plan["20 a parameter"]["val_loss"]["expected"] > loss + 0.02
    documented = best(str(DOCUMENTED), "--best", "--start=23:00", "--by=07:00")
    assert documented["as given"]["n_embd"] == 384
    lower = documented["best"]["val_loss"]["expected"]
    assert 3.425 < lower < documented["as given"]["val_loss"]["expected"] - 0.02
    mine = best("--best=8h", "--data.dataset=mine")["best"]
    assert (mine["n_embd"], mine["val_loss"]) == (plan["best"]["n_embd"], None)
    sure = best("--best=8h", "--sure")["best"]
    assert sure["total_seconds"]["high"] <= 8 * 3600
    assert sure["val_loss"]["expected"] > loss


def test_the_written_configuration_is_the_best_run(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    plan = best("--best=8h", f"--write={path}", "--train.log-every=7")
    config = load_config(path)
    assert (config.run.name, config.train.log_every) == ("mine", 7)
    written = predict(RunSpec.from_config(config), lookup("RTX 4070", "bfloat16"))
    for row in ("total_seconds", "val_loss"):
        assert written[row].expected == pytest.approx(plan["best"][row]["expected"])
    assert config.data.tokens is not None
    assert config.data.tokens >= config.tokens_per_step * config.train.max_steps
    assert "prepare_fineweb.py --dataset HuggingFaceFW/fineweb-edu" in path.read_text()
    assert "# optimizer steps of the whole run" in path.read_text()
    again = run_here("plan.py", "--best=8h", "--gpu=RTX 4070", f"--write={path}")
    assert (again.returncode, "exists" in again.stderr) == (2, True)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--best"], "--best 8h, or --best --by 07:00"),
        (["--best=soon"], "takes a time such as 8h"),
        (["--best=2min"], "no other run of 120 s is within the bounds"),
        (["--write=x.toml"], "give the configuration of a run"),
    ],
)
def test_a_search_that_finds_nothing_says_why(flags: list[str], words: str) -> None:
    done = run_here("plan.py", *flags, "--gpu", "RTX 4070")
    assert done.returncode == 2
    assert words in done.stderr
