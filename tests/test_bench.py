"""Every benchmark runs at its smallest size."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from commands import ROOT, run, succeed
from gpt2_vocabulary import gpt2_vocabulary  # noqa: F401  (a fixture)
from test_published_runs import GPT2, table

TOOLS = {"fitting", "make_run", "presets", "published_runs", "results", "training_pair"}
TESTED_ON_PUBLISHED_LOSSES = {"fit_loss", "validate_loss"}
TESTED_BELOW = {"recipe"}
BENCHES = sorted(
    path.stem
    for path in (ROOT / "bench").glob("*.py")
    if path.stem not in TOOLS | TESTED_ON_PUBLISHED_LOSSES | TESTED_BELOW
)
NANOGPT = os.environ.get("NANOGPT")
NEED_NANOGPT = {"first_step", "sample", "step_vs_nanogpt"}
ARGUMENTS = {"scaling": []}
KEYS = {"id", "case", "value", "low", "high", "n", "peer"}


@pytest.mark.parametrize("name", BENCHES)
def test_each_bench_runs_at_its_smallest_size(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    arguments: list[object] = ["--json", *ARGUMENTS.get(name, ["--smallest"])]
    environment = {"PYTHONPATH": str(ROOT)}
    if name in NEED_NANOGPT:
        if NANOGPT is None:
            pytest.skip(f"bench/{name}.py needs nanoGPT: set NANOGPT to the folder of a clone")
        arguments.append(NANOGPT)
    elif name == "validate_predictions":
        arguments.append(table(tmp_path, GPT2))
    elif name == "prepare":
        environment["TIKTOKEN_CACHE_DIR"] = str(request.getfixturevalue("gpt2_vocabulary"))
    results_of(name, run(f"bench/{name}.py", *arguments, **environment))


def results_of(name: str, done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    """Return what a bench printed, after checking its form."""
    printed = json.loads(succeed(done).stdout)
    assert printed["bench"] == name and printed["results"]
    for result in printed["results"]:
        assert set(result) == KEYS, result
        assert result["n"] == 0 or result["low"] <= result["high"], result
    return printed["results"]  # type: ignore[no-any-return]


def test_changes_of_the_fast_recipe_are_measured_once(tmp_path: Path) -> None:
    results, environment = tmp_path / "results.jsonl", {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    flags = ("bench/recipe.py", "--smallest", f"--results={results}", "--json")
    first = run(*flags, "--changes=value embeddings,half the batch", **environment)
    cases = [row["case"] for row in results_of("recipe", first)]
    assert cases == ["1x32, 64 steps", "1x32, 64 steps, value embeddings", "1x32, 64 steps, half the batch"]
    trained = results.read_text()
    assert [json.loads(line)["run"]["steps"] for line in trained.splitlines()] == [64, 64, 128]
    again = run(*flags, "--changes=value embeddings,half the batch", **environment)
    assert (again.stdout, results.read_text()) == (first.stdout, trained)
