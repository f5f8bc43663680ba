"""Loss and score of a run: what a configuration says about them, and a finished run's part."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commands import DEMO, ROOT, TINY, run_here, succeed, train_tiny
from examples import DOCUMENTED

from nanogauge.config import load_config
from nanogauge.prediction.loss import FinishedLoss, Recipe
from nanogauge.prediction.quality import loss_inputs, mark_sentence, predict_quality
from nanogauge.runspec import RunSpec

FAST = ROOT / "configs" / "rtx4070_fineweb_fast.toml"


def spec_of(path: Path, **sections: dict[str, Any]) -> RunSpec:
    return RunSpec.from_config(load_config(path, sections))


def test_a_configuration_is_a_recipe_with_a_rate_and_an_end() -> None:
    documented, fast = loss_inputs(spec_of(DOCUMENTED)), loss_inputs(spec_of(FAST))
    assert documented.recipe == Recipe()
    assert fast.recipe == Recipe(tuned_rotary=True, muon=True, modern_blocks=True)
    assert (documented.end_rate, fast.end_rate) == (pytest.approx(0.1), 0.0)
    assert documented.rate_ratio == 1.0
    assert fast.rate_ratio == pytest.approx(0.82, abs=0.01)
    assert documented.parameters == 12 * 12 * 384**2 + 50304 * 384
    assert documented.validation_tokens == 200 * 16 * 1024
    small = spec_of(DOCUMENTED, data={"val_tokens": 5700}, optimizer={"learning_rate": 1e-2})
    assert loss_inputs(small).validation_tokens == 5700
    assert loss_inputs(small).rate_ratio > 4
    early = spec_of(DOCUMENTED, optimizer={"decay_steps": 40_000})
    assert loss_inputs(early).end_rate == pytest.approx(0.55, abs=0.02)


def test_loss_and_score_are_predicted_where_the_data_are_known() -> None:
    rows, _, _, notes = predict_quality(spec_of(DOCUMENTED))
    assert rows["val_loss"].contains(3.609)  # its evaluation of the training split
    assert not notes
    assert rows["quality_vs_gpt2"].high < 1
    sentence = mark_sentence("FineWeb", rows["val_loss"])
    assert sentence is not None and "3.425" in sentence and "not expected" in sentence
    for sections, why in (
        ({"data": {"dataset": "my notes"}}, "level of my notes"),
        ({"run": {"init_from": "gpt2"}}, "trained weights"),
        ({"train": {"max_steps": 400}}, "400 steps"),
    ):
        rows, _, unpredicted, _ = predict_quality(spec_of(DOCUMENTED, **sections))
        assert rows == {}
        assert why in unpredicted["val_loss"]
        assert "follows from the loss" in unpredicted["quality_vs_gpt2"]


def test_a_finished_run_on_the_same_data_calibrates_the_next() -> None:
    spec = spec_of(DOCUMENTED)
    other = replace(spec, steps=10_000)
    finished = [
        FinishedLoss(loss_inputs(replace(spec, dataset="FineWeb-Edu")), 3.0),
        FinishedLoss(loss_inputs(other), 3.80),
        FinishedLoss(loss_inputs(spec), 3.70, "mine"),
    ]
    _, calibrated, _, _ = predict_quality(spec, finished)
    assert calibrated["val_loss"].expected == pytest.approx(3.70)
    assert "mine" in calibrated["val_loss"].source
    _, calibrated, _, _ = predict_quality(replace(spec, steps=11_000), finished)
    assert 3.75 < calibrated["val_loss"].expected < 3.80
    assert predict_quality(spec, finished[:1])[1] == {}


def test_the_demo_has_no_loss_before_its_first_run_and_a_close_one_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second run has other initial weights and another order of the data."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    losses, plans = [], []
    for seed in (1, 2):
        plan = run_here("plan.py", DEMO, *TINY, "--train.max-steps=24", "--gpu=RTX 4070")
        plans.append(" ".join(plan.stdout.split()))
        succeed(train_tiny(tmp_path, f"--run.name={seed}", "--train.max-steps=24", f"--run.seed={seed}"))
        report = json.loads((tmp_path / str(seed) / "report.json").read_text())
        losses += [row for row in report["rows"] if row["id"] == "val_loss"]
    first, second = losses
    assert (first["analytic"], first["calibrated"], second["analytic"]) == (None, None, None)
    assert "Validation loss: not predicted: no published run gives the level of embedded" in plans[0]
    assert f"Validation loss {first['measured']['value']:.3f} nat" in plans[1]
    assert abs(second["calibrated"]["expected"] - second["measured"]["value"]) < 0.05
    assert (first["prediction"], second["prediction"]) == (None, "held"), "by the validation loss, as it is calibrated"
    assert second["measured"]["predicted_part"] is None
