"""RunSpec, and the schedule of evaluations and checkpoints."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from commands import ROOT, run
from examples import documented_prediction, documented_spec
from hypothesis import given
from hypothesis import strategies as st
from runs import make_finished

from nanogauge.config import load_config
from nanogauge.errors import BadInput
from nanogauge.hardware import lookup
from nanogauge.prediction.prediction import predict
from nanogauge.programs import program_named
from nanogauge.runlog.folder import load
from nanogauge.runspec import RunSpec
from nanogauge.schedule import checkpoints, evaluations, is_checkpointed, is_evaluated, is_sampled
from nanogauge.spec_parts import SETTINGS

CONFIGS = sorted((ROOT / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_spec_survives_json_and_agrees_with_its_configuration(path: Path) -> None:
    config = load_config(path)
    spec = RunSpec.from_config(config)
    assert RunSpec.from_json(spec.to_json()) == RunSpec.from_toml(path) == spec
    assert spec.tokens_per_step == config.tokens_per_step
    for key in SETTINGS:
        section, _, name = key.partition(".")
        value = getattr(getattr(config, section), name)
        assert spec.setting(key) == (None if value == "auto" else value), key


def test_a_run_is_described_in_one_call() -> None:
    """The documented run, without evaluations and checkpoints."""
    sizes = {"n_layer": 12, "n_embd": 384, "n_head": 12, "context": 1024, "vocabulary": 50304}
    ours = {"dropout": 0.1, "head": "chunked", "program": program_named("nanogauge")}
    spec = RunSpec.gpt(**sizes, micro_batch=16, grad_accum=32, steps=20_000, **ours)
    found = predict(spec, lookup("RTX 4070", "bfloat16")).quantities
    documented = documented_prediction().quantities
    assert found["step_seconds"] == documented["step_seconds"]
    assert found["total_seconds"].expected < documented["total_seconds"].expected


@pytest.mark.parametrize("field", [{"n_head": 5}, {"steps": 0}, {"micro_batch": -1}, {"step": 1}])
def test_an_impossible_run_is_refused(field: dict[str, int]) -> None:
    sizes = {"n_layer": 2, "n_embd": 64, "n_head": 4, "context": 64, "vocabulary": 256}
    with pytest.raises(ValueError, match=r"n_embd|steps|micro_batch|step"):
        RunSpec.gpt(**{**sizes, "micro_batch": 4, "steps": 10, **field})


@pytest.mark.parametrize(
    ("unknown", "absent"),
    [
        ({"compile": None}, {"step_seconds", "total_seconds", "mfu_palm", "energy_kwh"}),
        ({"eval_every": None}, {"total_seconds", "energy_kwh"}),
        ({"checkpoint_every": None}, {"total_seconds", "energy_kwh"}),
        ({"unique_tokens": None}, {"data_epochs"}),
        ({"schedule": None, "dropout": None, "dtype": None, "zero_init": None}, set()),
    ],
)
def test_an_unknown_field_removes_only_the_quantities_that_need_it(unknown: dict[str, None], absent: set[str]) -> None:
    documented = documented_prediction()
    found = predict(replace(documented_spec(), **unknown), lookup("RTX 4070", "bfloat16"))
    gone = documented.quantities.keys() - found.quantities.keys()
    assert absent <= gone <= absent | {"first_step_seconds", "mfu_6n", "power_watts", "cost"}
    assert gone <= found.unpredicted.keys()


@given(steps=st.integers(1, 300), every=st.integers(1, 400), first=st.integers(0, 300))
def test_counts_of_evaluations_and_checkpoints_match_the_due_steps(steps: int, every: int, first: int) -> None:
    spec = replace(documented_spec(), steps=steps, eval_every=every, checkpoint_every=every)
    first = min(first, steps)
    due = [step for step in range(first, steps + 1) if is_evaluated(step, spec)]
    assert due == sorted({*range(0, steps, every), steps} & {*range(first, steps + 1)})
    assert evaluations(spec, first) == len(due)
    saved = [step for step in range(first, steps + 1) if is_checkpointed(step, spec)]
    assert checkpoints(spec, first) == len(saved) == len([step for step in due if step])
    evaluated = [step for step in range(steps + 1) if is_evaluated(step, spec)]
    assert sum(is_sampled(step, spec) for step in evaluated) == min(4, len(evaluated) - 1)


def test_a_folder_of_the_old_layout_gives_the_same_spec(tmp_path: Path) -> None:
    """A run of an earlier version has config.toml and no spec.json."""
    make_finished(tmp_path / "new")
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    (tmp_path / "old" / "spec.json").unlink()
    with pytest.raises(BadInput, match=r"neither spec\.json nor config\.toml"):
        load(tmp_path / "old")
    config = load_config(ROOT / "configs" / "rtx4070_fineweb.toml", {"run": {"name": "made"}})
    train = config.train.model_copy(update={"max_steps": 100, "eval_every": 50, "checkpoint_every": 50})
    text = config.model_copy(update={"train": train}).to_toml()
    (tmp_path / "old" / "config.toml").write_text(text)
    assert load(tmp_path / "old").spec == replace(load(tmp_path / "new").spec, world_size=1)


def test_a_damaged_or_newer_spec_is_refused(tmp_path: Path) -> None:
    make_finished(tmp_path / "run")
    path = tmp_path / "run" / "spec.json"
    whole = path.read_bytes()
    for data in (whole[:-20], whole.replace(b'"schema_version": 1', b'"schema_version": 2')):
        path.write_bytes(data)
        with pytest.raises(BadInput, match="spec.json is damaged or of a newer nanogauge"):
            load(tmp_path / "run")


def test_the_readers_time_zone_changes_no_byte_of_a_report(tmp_path: Path) -> None:
    """Times are those of the machine that trained."""
    make_finished(tmp_path / "run")
    machine = tmp_path / "run" / "machine.json"
    machine.write_text('{"time_zone": {"name": "CEST", "utc_offset_seconds": 7200}}')
    pages = []
    for zone in ("UTC", "America/New_York", "Asia/Tokyo"):
        assert run("report.py", tmp_path / "run", TZ=zone).returncode == 0
        names = ("report.html", "report.md", "report.json")
        pages.append([(tmp_path / "run" / name).read_bytes() for name in names])
    assert pages[0] == pages[1] == pages[2]
    assert b"CEST" in pages[0][0]
