"""plan.py --compare: each line equals the plan of its configuration."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import pytest
from commands import DEMO, ROOT, run_here
from examples import DOCUMENTED

FLAGS = ["--gpu", "RTX 4070", "--gpus=2", "--train.grad-accum=8", "--cost.price-per-kwh=0.5"]
SPAN = ("low", "expected", "high")


def test_each_line_of_a_comparison_is_that_configurations_own_plan(tmp_path: Path) -> None:
    wider = tmp_path / "wider.toml"
    wider.write_text(DOCUMENTED.read_text().replace("n_embd = 384", "n_embd = 768"))
    files = [str(wider), str(DOCUMENTED), str(DEMO)]
    done = run_here("plan.py", "--compare", *files, *FLAGS, "--json")
    assert done.returncode == 0, done.stderr
    table = json.loads(done.stdout)
    plans = table["plans"]
    assert [plan["config"] for plan in plans] == [str(DEMO), str(DOCUMENTED), str(wider)]
    for plan in plans:
        alone = json.loads(run_here("plan.py", plan["config"], *FLAGS, "--json").stdout)
        rows = {row["id"]: row["calibrated"] or row["analytic"] for row in alone["rows"]}
        for name in ("step_seconds", "total_seconds", "peak_process_bytes", "energy_kwh", "cost"):
            assert plan[name] == pytest.approx({end: rows[name][end] for end in SPAN}), name
        assert plan["verdict"] == alone["fit"]["verdict"]
        assert plan["free_bytes"] == alone["fit"]["free_bytes"]
        tokens, parameters = rows["tokens_total"]["expected"], rows["parameters"]["expected"]
        assert plan["tokens_per_parameter"] == pytest.approx(tokens / parameters)
        per_step, seconds = rows["tokens_per_step"]["expected"], rows["step_seconds"]["low"]
        assert plan["tokens_per_second"]["high"] == pytest.approx(per_step / seconds)
        start = datetime.fromisoformat(table["start"])
        took = datetime.fromisoformat(plan["finish"]["expected"]) - start
        assert took.total_seconds() == pytest.approx(rows["total_seconds"]["expected"], abs=1)


def test_the_table_is_as_wide_as_its_figures() -> None:
    done = run_here("plan.py", "--compare", DEMO, DOCUMENTED, *FLAGS)
    title, header, first, second, memory = done.stdout.splitlines()
    assert title == "2 configurations on 2 x RTX 4070"
    assert header.split()[:2] == ["configuration", "time"]
    assert first.startswith(str(DEMO))
    assert second.startswith(str(DOCUMENTED))
    assert "kWh" in second
    assert "fits" in second
    assert "…" not in done.stdout
    assert memory == "Memory: 11.0 GiB are free on each."


def test_another_recipe_is_named_below_the_table() -> None:
    fast = ROOT / "configs" / "rtx4070_fineweb_fast.toml"
    arguments = ["--compare", DOCUMENTED, fast, "--gpu", "RTX 4070"]
    lines = run_here("plan.py", *arguments).stdout.splitlines()
    header, quick, slow = lines[1:4]
    assert (quick.split()[0], slow.split()[0]) == (str(fast), str(DOCUMENTED))
    assert quick[: header.index("tokens") + len("tokens")].endswith(" 3.4603 G")
    assert " ".join(lines[5:]).startswith(f"{fast}: Recipe: GPT-2 with rotary positions")
    table = json.loads(run_here("plan.py", *arguments, "--json").stdout)["plans"]
    assert [plan["recipe"] is None for plan in table] == [False, True]
    first, second = (plan["step_seconds"]["expected"] for plan in table)
    assert first != second, "the same tokens a step, by other operations"
    assert table[0]["tokens"] / table[1]["tokens"] == pytest.approx(0.33)


def test_a_broken_configuration_is_named_in_one_sentence(tmp_path: Path) -> None:
    broken = tmp_path / "broken.toml"
    broken.write_text(DOCUMENTED.read_text().replace("n_embd", "n_emb"))
    for file, flag, words in (
        (broken, "--gpus=1", "unknown key model.n_emb"),
        (tmp_path / "none.toml", "--gpus=1", "none.toml"),
        (DOCUMENTED, "--gpus=7", "cannot share 32 micro-batches"),
    ):
        done = run_here("plan.py", "--compare", file, DEMO, "--gpu", "RTX 4070", flag)
        assert done.returncode == 2
        assert done.stdout == ""
        (sentence,) = done.stderr.splitlines()
        assert str(file) in sentence
        assert words in sentence


@pytest.mark.parametrize("flag", ["--calibrate", "--fit", "--by=08:00", "--claims=x.toml"])
def test_flags_of_a_single_run_are_refused(flag: str) -> None:
    done = run_here("plan.py", "--compare", DEMO, "--gpu", "RTX 4070", flag)
    assert done.returncode == 2
    assert f"{flag.split('=', maxsplit=1)[0]} belongs to the plan of one run" in done.stderr
