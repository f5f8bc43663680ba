"""The public API: a loop of the user's own is predicted, measured and reported."""

import doctest
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import nanogauge as ng

SPEC = ng.RunSpec.gpt(n_layer=1, n_embd=32, n_head=2, context=32, vocabulary=64, micro_batch=2, steps=12, device="cpu")


def rows_of(folder: Path) -> dict[str, float | None]:
    report = json.loads((folder / "report.json").read_text())
    return {r["id"]: (r["measured"] or {}).get("value") for r in report["rows"]}


def test_three_lines_measure_a_loop_and_report_it(tmp_path: Path) -> None:
    seconds = []
    with ng.run("mine", spec=SPEC, folder=tmp_path) as run:
        for step in range(SPEC.steps):
            if step % 6 == 0:
                with run.phase("evaluation"):
                    time.sleep(0.05)
                    run.log(val_loss=torch.tensor(3.5))
            with run.step():
                began = time.perf_counter()
                time.sleep(0.03)
                seconds.append(time.perf_counter() - began)
            run.log(loss=torch.tensor(4.0 - step / 10), learning_rate=1e-3)
    measured = rows_of(tmp_path / "mine")
    assert measured["step_seconds"] == pytest.approx(statistics.median(seconds), rel=0.05)
    assert measured["val_loss"] == 3.5
    assert measured["power_watts"] is None
    lines = [json.loads(x) for x in (tmp_path / "mine" / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "step"]
    assert losses == pytest.approx([4.0 - step / 10 for step in range(12)])
    evaluated = [line["seconds"] for line in lines if line["kind"] == "eval"]
    assert len(evaluated) == 2 and min(evaluated) > 0.05
    page = (tmp_path / "mine" / "report.md").read_text()
    assert "finished after 12 steps" in page.lower()
    assert "made after the run" not in page


def test_without_a_spec_a_run_is_measured_and_each_other_row_says_what_it_needs(tmp_path: Path) -> None:
    with ng.run("mine", folder=tmp_path) as run:
        for _ in range(4):
            with run.step():
                time.sleep(0.02)
            run.log(loss=3.0)
    report = json.loads((tmp_path / "mine" / "report.json").read_text())
    assert (report["run"]["status"], report["run"]["steps_done"], report["run"]["max_steps"]) == ("finished", 4, 4)
    rows = {row["id"]: row for row in report["rows"]}
    assert rows["step_seconds"]["measured"]["value"] > 0.02
    assert not any(row["analytic"] for row in rows.values())
    for row in ("tokens_total", "parameters", "flops_total_6n", "mfu_palm", "weights_bytes"):
        assert rows[row]["measured"] is None
        assert "give nanogauge.run a spec" in rows[row]["why"]
    assert not any("FLOP/s" in instrument["unit"] for instrument in report["instruments"])


def test_the_example_of_each_public_name_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").symlink_to(Path("configs").resolve())
    monkeypatch.chdir(tmp_path)
    for name in ng.__all__:
        documented = doctest.DocTestFinder().find(getattr(ng, name), name, globs={"ng": ng})
        assert any(test.examples for test in documented), name
        for test in documented:
            assert doctest.DocTestRunner().run(test).failed == 0, test.name


def test_a_loop_that_fails_keeps_its_error_and_its_report(tmp_path: Path) -> None:
    def fail() -> None:
        with ng.run("broken", spec=SPEC, folder=tmp_path) as run:
            with run.step():
                pass
            with run.step():
                raise RuntimeError("no more data")

    with pytest.raises(RuntimeError, match="no more data"):
        fail()
    report = json.loads((tmp_path / "broken" / "report.json").read_text())
    assert (report["run"]["status"], report["run"]["steps_done"]) == ("failed", 1)


def test_a_run_is_never_overwritten(tmp_path: Path) -> None:
    with ng.run("mine", spec=SPEC, folder=tmp_path) as run, run.step():
        pass
    before = (tmp_path / "mine" / "log.jsonl").read_bytes()
    for name, meant in (("mine", "give this one another name"), ("../mine", "no name of a folder below")):
        with pytest.raises(ValueError, match=meant):
            ng.run(name, spec=SPEC, folder=tmp_path)
    assert (tmp_path / "mine" / "log.jsonl").read_bytes() == before


def test_each_step_has_its_own_loss_and_a_mistake_is_raised_where_it_is_made(tmp_path: Path) -> None:
    with ng.run("mine", spec=SPEC, folder=tmp_path) as run:
        loss = torch.zeros(())
        for step in range(SPEC.steps):
            with run.step():
                loss.fill_(step)  # as a program that adds up its loss in place
                with pytest.raises(ValueError, match="end that first"), run.phase("evaluation"):
                    pass
            run.log(loss=loss)
            with pytest.raises(ValueError, match="loss has 5 values"):
                run.log(loss=torch.zeros(5))
            with pytest.raises(ValueError, match="lossy cannot be logged here: loss, learning_rate"):
                run.log(lossy=1.0)
    lines = [json.loads(x) for x in (tmp_path / "mine" / "log.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines if line["kind"] == "step"] == [*range(SPEC.steps)]


def test_ranks_other_than_0_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with ng.run("mine", spec=SPEC, folder=tmp_path) as run:
        with run.step():
            run.log(loss=1.0)
        with run.phase("evaluation"):
            run.log(val_loss=1.0)
    assert list(tmp_path.iterdir()) == []


def test_the_package_loads_without_torch_and_its_plan_names_what_is_missing() -> None:
    code = (
        "import sys, nanogauge as ng\n"
        "assert 'pydantic' not in sys.modules\n"
        "plan = ng.predict(ng.RunSpec.from_toml('configs/demo.toml'), gpu='RTX 4070')\n"
        "assert plan.fits(free_gib=11) and not plan.fits(free_gib=0.1)\n"
        "assert 'torch' not in sys.modules\n"
        "try: plan['cost']\n"
        "except KeyError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "cost: " in done.stdout
