"""Final loss: laws of the prediction, its limits, the forecast, the search and both benches."""

import csv
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commands import ROOT, run
from examples import DOCUMENTED, SHARED
from hypothesis import given
from hypothesis import strategies as st

from nanogauge.config import load_config
from nanogauge.prediction.forecast import FinalLoss, forecast_loss, forecast_sigma, joined
from nanogauge.prediction.loss import (
    CONSTANTS,
    FITTED_CURVES,
    FITTED_RUNS,
    GPT2_124M,
    HELLASWAG_PARITY,
    VALUES,
    FinishedLoss,
    LossEstimate,
    LossInputs,
    NoEstimate,
    Recipe,
    effective_tokens,
    hellaswag_accuracy,
    predict_loss,
)
from nanogauge.quantities import Interval
from nanogauge.runspec import RunSpec
from nanogauge.schedule import learning_rate
from nanogauge.schema import Eval

RUNS = SHARED / "data" / "loss_runs_dev.csv"
CURVES = SHARED / "data" / "loss_curves_dev.csv"
FAST = Recipe(tuned_rotary=True, muon=True, modern_blocks=True)
SHAPE: dict[str, Any] = {"parameters": 12 * 12 * 768**2 + 50304 * 768, "layers": 12, "width": 768}
GPT2 = LossInputs(**SHAPE, tokens=10e9, steps=19_073, dataset="FineWeb", recipe=Recipe())

sizes = st.floats(12e6, 1.6e9)
token_counts = st.floats(1e8, 1e12)
recipes = st.builds(Recipe, *[st.booleans()] * 5) | st.none()


def number(run: LossInputs, finished: FinishedLoss | None = None) -> LossEstimate:
    estimate = predict_loss(run, finished)
    assert isinstance(estimate, LossEstimate), estimate
    return estimate


@given(sizes, token_counts, st.floats(1.01, 10), recipes)
def test_more_parameters_or_tokens_never_raise_the_expected_loss(
    parameters: float, tokens: float, factor: float, recipe: Recipe | None
) -> None:
    run = replace(GPT2, parameters=parameters, tokens=tokens, recipe=recipe)
    assert replace(run, parameters=parameters * factor).laws()[1] < run.laws()[1]
    assert replace(run, tokens=tokens * factor).laws()[1] < run.laws()[1]


@given(sizes, token_counts, st.floats(500, 1e6), recipes, st.floats(0, 1), st.floats(1e3, 1e9))
def test_the_interval_contains_the_expected_loss(
    parameters: float, tokens: float, steps: float, recipe: Recipe | None, end: float, val: float
) -> None:
    run = replace(GPT2, parameters=parameters, tokens=tokens, steps=steps, recipe=recipe)
    estimate = predict_loss(replace(run, end_rate=end, validation_tokens=val))
    if isinstance(estimate, LossEstimate):
        assert 0 < estimate.low < estimate.expected < estimate.high
        assert estimate.high - estimate.low >= 0.119
        below = [estimate.probability_below(mark) for mark in (0.5, estimate.expected, 9.0)]
        assert below == sorted(below)
        assert below[1] == pytest.approx(0.5)
        assert estimate.probability_below(estimate.high) == pytest.approx(0.95, abs=0.001)
        assert estimate.probability_below(estimate.low) == pytest.approx(0.05, abs=0.001)


@given(token_counts, token_counts)
def test_repeated_tokens_are_worth_less_than_unique_ones(tokens: float, unique: float) -> None:
    worth = effective_tokens(tokens, unique)
    assert min(tokens, unique) * (1 - 1e-9) <= worth <= tokens * (1 + 1e-9)
    assert worth <= 16.39 * unique * (1 + 1e-9)
    assert effective_tokens(2 * tokens, unique) >= worth


def test_each_constant_has_a_source_and_a_deviation() -> None:
    for name, constant in CONSTANTS.items():
        assert constant.source, name
        assert (constant.sigma > 0) == ("fit to" in constant.source), name
        assert constant.sigma < 0.3 * abs(constant.value), name
    assert len(FITTED_RUNS) > 30 and len(FITTED_CURVES) > 20
    assert all(mark.source for mark in GPT2_124M.values())
    assert hellaswag_accuracy(HELLASWAG_PARITY.loss) == pytest.approx(0.2945, abs=0.002)
    assert hellaswag_accuracy(2.5) is hellaswag_accuracy(4.0) is None


# Published: karpathy/llm.c at 10 G tokens; KellerJordan/modded-nanogpt, 2024-10-14.
@pytest.mark.parametrize(
    ("run", "loss"), [(GPT2, 3.2847), (replace(GPT2, tokens=2.6739e9, steps=5100, recipe=FAST), 3.2741)]
)
def test_known_runs_are_within_their_interval(run: LossInputs, loss: float) -> None:
    estimate = number(run)
    assert estimate.expected == pytest.approx(loss, abs=0.03)
    assert estimate.low < loss < estimate.high
    assert not estimate.caveats


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tokens": 0.5e9}, "tokens a parameter"),
        ({"steps": 400}, "400 steps"),
        ({"parameters": 5e6}, "5 M parameters"),
        ({"layers": 3}, "3 layers"),
        ({"unique_tokens": 0.4e9}, "25 passes over 0.4 G"),
        ({"rate_ratio": 4.0}, "diverges"),
        ({"tokenizer": "bytes"}, "bytes"),
        ({"context": 2048}, "2,048"),
    ],
)
def test_outside_the_law_there_is_no_number_and_a_reason(changes: dict[str, Any], reason: str) -> None:
    estimate = predict_loss(replace(GPT2, **changes))
    assert isinstance(estimate, NoEstimate)
    assert reason in estimate.why


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tokens": 0.9e9}, "validated from 8"),
        ({"tokens": 60e9}, "validated to 400"),
        ({"steps": 700}, "0.14-0.27"),
        ({"parameters": 30e6, "tokens": 0.3e9}, "0.3 G tokens"),
        ({"layers": 5}, "5 layers"),
        ({"recipe": FAST, "parameters": 40e6}, "40 M parameters"),
        ({"steps": 8_000}, "1.2 M tokens a step"),
        ({"unique_tokens": 0.4e9 - 1, "tokens": 4e9}, "10 passes"),
        ({"end_rate": 0.5}, "0.5 of its peak"),
        ({"rate_ratio": 0.2}, "0.2 times the usual rate"),
        ({"recipe": None}, "recipe not known"),
        ({"recipe": Recipe(muon=True)}, "combines"),
        ({"validation_tokens": 0.5e6}, "500,000 validation tokens"),
    ],
)
def test_outside_the_validated_range_the_interval_is_wider_and_says_why(changes: dict[str, Any], reason: str) -> None:
    estimate = number(replace(GPT2, **changes))
    assert any(reason in caveat for caveat in estimate.caveats), estimate.caveats
    assert estimate.high - estimate.low > 0.122


def test_an_unfinished_schedule_costs_loss_and_a_small_validation_set_certainty() -> None:
    assert number(replace(GPT2, end_rate=1.0)).expected > number(GPT2).expected + 0.05
    sets = [number(replace(GPT2, validation_tokens=tokens)) for tokens in (1e9, 1e7, 1e6, 1e5)]
    widths = [estimate.high - estimate.low for estimate in sets]
    assert widths == sorted(widths)
    assert widths[-1] > 1.2 * widths[0]


def test_a_finished_run_sets_the_level_of_unknown_data() -> None:
    """configs/demo.toml, a byte a token, ends at 1.640; the others are of 5 layers, and of width 160 in 1,000 steps."""
    scale: dict[str, Any] = {"tokens": 1_228_800, "steps": 1200, "unique_tokens": 430_083}
    demo = replace(GPT2, parameters=820_224, layers=4, width=128, dataset="demo", tokenizer="bytes", **scale)
    finished = FinishedLoss(demo, 1.640)
    assert isinstance(predict_loss(demo), NoEstimate)
    again = number(replace(demo, unique_tokens=None), finished)
    assert (again.expected, again.high - again.low) == (pytest.approx(1.640), pytest.approx(0.1))
    assert "finished run" in again.caveats[0]
    for changes, loss in (
        ({"parameters": 1_016_832, "layers": 5}, 1.640),
        ({"parameters": 1_271_040, "width": 160, "tokens": 1_024_000, "steps": 1000}, 1.656),
    ):
        assert number(replace(demo, **changes), finished).expected == pytest.approx(loss, abs=0.05)
    assert isinstance(predict_loss(demo, replace(finished, inputs=replace(demo, dataset="other"))), NoEstimate)
    offset = number(GPT2, FinishedLoss(GPT2, number(GPT2).expected + 0.1))
    assert offset.expected == pytest.approx(number(GPT2).expected + 0.1)


def rate(total: int, warmup: int, late_decay: bool) -> Callable[[float], float]:
    def share(step: float) -> float:
        if step < warmup:
            return step / warmup
        if late_decay:
            return min(1.0, (total - step) / (0.28 * total))
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))

    return share


@pytest.mark.parametrize("late_decay", [False, True])
def test_the_forecast_recovers_a_curve_of_its_own_form(late_decay: bool) -> None:
    total, kind = 20_000, "wsd" if late_decay else "cosine"
    share = rate(total, 500, late_decay)

    def loss(step: float) -> float:
        power = (step / total) ** -VALUES[f"{kind}_exponent"]
        return 3.0 + 0.05 * power + VALUES[f"{kind}_rate_loss"] * share(step)

    for done in (3000, 5000, 10_000, 18_000, total):
        steps = list(range(250, done + 1, 250))
        found = forecast_loss(steps, [loss(s) for s in steps], share, total, 500)
        assert isinstance(found, LossEstimate)
        assert found.expected == pytest.approx(loss(total), abs=1e-6)


def test_a_forecast_and_the_plan_are_joined_by_their_variances() -> None:
    plan = LossEstimate(3.2, 3.25, 3.32, ("caveat",))
    close, far = LossEstimate(3.18, 3.2, 3.22), LossEstimate(3.0, 3.2, 3.4)
    both = joined(plan, close)
    assert close.expected < both.expected < (plan.expected + close.expected) / 2
    assert both.high - both.low < close.high - close.low
    assert joined(plan, far).expected > both.expected
    assert both.caveats == plan.caveats
    deviations = [forecast_sigma(share) for share in (0.05, 0.1, 0.15, 0.25, 0.4, 0.5, 1.0)]
    assert deviations == sorted(deviations, reverse=True)


@pytest.mark.parametrize("above", [0.0, 0.15])
def test_a_run_forecasts_its_end_and_raises_one_alarm_off_its_plan(above: float) -> None:
    """The curve of a run of 20,000 steps that ends at 3.05, evaluated every 500; then resumed."""
    spec = RunSpec.from_config(load_config(DOCUMENTED))
    assert spec.schedule is not None
    schedule, plan = spec.schedule, Interval(2.99 - above, 3.05 - above, 3.12 - above)
    follower = FinalLoss(spec, plan, {})
    found, alarms = [], []
    for step in range(500, 20_001, 500):
        rate = learning_rate(step, schedule, spec.steps) / schedule.learning_rate
        power = (step / spec.steps) ** -VALUES["cosine_exponent"]
        loss = 2.988 + 0.05 * power + VALUES["cosine_rate_loss"] * rate
        line, alarm = follower.evaluated(Eval(step=step, val_loss=loss))
        found.append(line)
        alarms += [(step, alarm)] if alarm is not None else []
        if step == 10_000:
            follower = FinalLoss(spec, plan, {e.step: e.val_loss or 0.0 for e in found})
    assert found[1].final is None, "too few steps"
    assert all(e.final_low < e.final < e.final_high for e in found[5:])
    assert found[-1].final == pytest.approx(3.05, abs=0.03)
    assert found[20].final_high - found[20].final_low < found[5].final_high - found[5].final_low
    assert [step for step, _ in alarms] == ([5000, 10_500] if above else [])
    assert all("the plan at 2.900" in text for _, text in alarms)


COLUMNS = (
    "use,source,dataset,val_tokens,tokenizer,metric,n_layer,n_embd,context,tied,params_n_m,"
    "params_total_m,tokens_b,unique_tokens_b,batch_tokens,recipe,schedule,final_val_loss,"
    "final_train_loss,note"
)
PUBLISHED = (
    "fit,one,FineWeb,10M,gpt2,nats/token,12,768,1024,yes,123.568,123.57,10,10,524288,gpt2-adamw,cosine to 0.1,3.30,,"
)
ROW = dict(zip(COLUMNS.split(","), PUBLISHED.split(","), strict=True))


def table(path: Path, *rows: dict[str, str]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["id", *ROW])
        writer.writeheader()
        writer.writerows({"id": f"row-{i}"} | ROW | row for i, row in enumerate(rows))
    return path


def bench(script: str, *arguments: object) -> Any:
    done = run(script, *arguments, "--json", PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["results"]


def test_the_benches_take_any_such_table_and_refuse_others(tmp_path: Path) -> None:
    rows = [
        {},
        {"source": "two", "dataset": "FineWeb-Edu", "final_val_loss": "3.10"},
        {"source": "two", "recipe": "modern-muon", "tokens_b": "2.67", "final_val_loss": "3.27"},
        {"use": "no", "recipe": "unheard of"},
        {"use": "grid", "dataset": "C4", "tokens_b": "5", "final_val_loss": "3.5"},
        {"use": "grid", "dataset": "C4", "final_val_loss": "3.45"},
        {"use": "reference", "tokens_b": "", "n_layer": ""},
    ]
    runs = table(tmp_path / "runs.csv", *rows)
    validated = bench("bench/validate_loss.py", runs)
    headline = {row["id"]: row for row in validated}
    assert headline["loss_median_error"]["n"] == 3, "the runs with use = fit"
    assert headline["loss_worst_error"]["value"] < 0.1
    assert any("C4" in row["case"] for row in validated)
    fitted = {row["id"]: row for row in bench("bench/fit_loss.py", runs)}
    assert fitted["irreducible"]["value"] == pytest.approx(2.2, abs=0.2)
    assert fitted["muon"]["low"] < fitted["muon"]["value"] < fitted["muon"]["high"]
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    for path in (other, tmp_path / "missing.csv", table(tmp_path / "none.csv", {"use": "no"})):
        for script in ("bench/validate_loss.py", "bench/fit_loss.py"):
            refused = run(script, path, PYTHONPATH=str(ROOT))
            assert refused.returncode == 2
            assert str(path) in refused.stderr
            assert "Traceback" not in refused.stderr


needs_runs = pytest.mark.skipif(not CURVES.exists(), reason="the published losses are not here")


@needs_runs
def test_published_losses_are_predicted_within_the_bars() -> None:
    results = bench("bench/validate_loss.py", RUNS, "--curves", CURVES)
    headline = {row["id"]: row for row in results}
    bars = {"median_error": 0.02, "p90_error": 0.04, "worst_error": 0.06, "width": 0.15}
    for prefix in ("loss", "strict_loss"):
        for name, bar in bars.items():
            assert headline[f"{prefix}_{name}"]["value"] <= bar, name
        assert headline[f"{prefix}_coverage"]["value"] >= 0.92
        assert headline[f"{prefix}_coverage"]["n"] >= 33
    medians = {r["case"]: r["value"] for r in results if r["id"] == "forecast_median_error"}
    for case, bar in {"15 %": 0.045, "25 %": 0.022, "50 %": 0.013}.items():
        assert medians[case] <= bar, case


@needs_runs
def test_the_constants_are_those_that_the_bench_fits() -> None:
    for row in bench("bench/fit_loss.py", RUNS, "--curves", CURVES):
        assert VALUES[row["id"]] == pytest.approx(row["value"], rel=1e-3), row["id"]
