"""Claims that cannot be true are found, possible ones are not."""

import math
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from examples import SEED_CLAIMS, claims_of, documented_prediction, documented_spec
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nanogauge.analysis.claims import load_claims
from nanogauge.analysis.consistency import Inconsistency, inconsistencies
from nanogauge.hardware import lookup
from nanogauge.prediction.flops import flops_per_token_6n, flops_per_token_palm
from nanogauge.prediction.prediction import predict
from nanogauge.quantities import QUANTITIES

PEAK = 46 * 512 * 2.475e9
STEPS = 20_000
POWER_LIMIT = 200.0


def findings(*claims: str) -> list[Inconsistency]:
    """Return the findings about claims on the documented run on an RTX 4070."""
    with tempfile.TemporaryDirectory() as name:
        read = claims_of(Path(name), *claims)
    return inconsistencies(read, documented_spec(), documented_prediction())


def claim(key: str, unit: str, low: float = -math.inf, high: float = math.inf) -> str:
    ends = [f"low = {low!r}"] * (low > -math.inf) + [f"high = {high!r}"] * (high < math.inf)
    return "\n".join([f'key = "{key}"', f'unit = "{unit}"', *ends])


def step_flops() -> float:
    spec = documented_spec()
    return flops_per_token_palm(spec.shape) * spec.tokens_per_step


@pytest.fixture(scope="module")
def found() -> dict[tuple[str, ...], str]:
    """Certain findings about the shipped claims, by claim keys."""
    claims = load_claims(SEED_CLAIMS)
    return {
        tuple(finding.ids): finding.why
        for finding in inconsistencies(claims, documented_spec(), documented_prediction())
        if finding.certain
    }


def test_what_cannot_be_true_in_the_document_is_found_and_nothing_else(found: dict[tuple[str, ...], str]) -> None:
    """2,550 PFLOP are 2.55e18 FLOPs; the document also has 2.55e15 and 2.5 PFLOP.

    20-35 % of 58.3 TFLOP/s give 7.71-13.5 s by PaLM's count. Claims about other runs are left out.
    """
    for key, words in {
        ("flops_total_6n.scientific", "flops_total_6n.summary"): ["1,001 times and 1,021 times"],
        ("tokens_total.against_gpt2",): ["2.16 times"],
        ("parameters.a_little_smaller",): ["2.44 times"],
        ("peak_process_bytes", "peak_process_bytes.ample"): ["10–11.5 GB", "9.66 GB"],
        (
            *("mfu_palm", "step_seconds.range", "step_seconds.usual"),
            *("total_seconds.expected", "total_seconds.overnight"),
        ): ["20–35 %", "7.71–13.5 s", "42.8–74.9 h", "2.5–4.5 s, 3–3.5 s, 15–20 h"],
    }.items():
        why = found.pop(key)
        assert all(word in why for word in words), why
    assert found == {}


def test_what_a_better_board_or_another_count_allows_is_unlikely_and_not_impossible() -> None:
    claims = load_claims(SEED_CLAIMS)
    all_findings = inconsistencies(claims, documented_spec(), documented_prediction())
    step, power = (finding for finding in all_findings if not finding.certain)
    assert (step.ids, power.ids) == (["step_seconds.range"], ["power_watts"])
    assert all(words in step.why for words in ("2.5 s", "108 %", "98 %"))
    assert "220 W" in power.why and "200 W" in power.why
    for impossible in (claim("power_watts", "W", 300, 330), claim("step_seconds", "s", 1.0, 1.5)):
        (finding,) = findings(impossible)
        assert finding.certain and finding.whole


WIDTHS = st.floats(1.0, 1.5)


@st.composite
def around(draw: st.DrawFn, key: str, unit: str, value: float, least: float = 0.0, most: float = math.inf) -> str:
    """Draw a claimed range that holds the value, perhaps with an open end."""
    low, high = max(value / draw(WIDTHS), least), min(value * draw(WIDTHS), most)
    ends = draw(st.sampled_from(["both", "low", "high"]))
    return claim(key, unit, low=-math.inf if ends == "high" else low, high=math.inf if ends == "low" else high)


@st.composite
def worlds(draw: st.DrawFn, fastest_mfu: float = 0.95) -> dict[str, float]:
    """Draw consistent values of a run of the documented configuration, in claims' units."""
    spec, exact = documented_spec(), documented_prediction().quantities
    shape = spec.shape
    mfu = draw(st.floats(0.05, fastest_mfu))
    step = step_flops() / PEAK / mfu
    first = step + draw(st.floats(0, 100))
    total = STEPS * step * draw(st.floats(1.0, 1.3)) + first  # evaluations, compilation on top
    watts = draw(st.floats(50, POWER_LIMIT))
    process = draw(st.floats(1e9, 12.8e9))
    return {
        "mfu_palm": mfu,
        "mfu_6n": mfu * flops_per_token_6n(shape) / flops_per_token_palm(shape),
        "step_seconds": step,
        "first_step_seconds": first,
        "total_seconds": total,
        "peak_process_bytes": process,
        "peak_allocated_bytes": process * draw(st.floats(0.5, 1)),
        "power_watts": watts,
        "energy_kwh": watts * total / 3.6e6,
        "cost": watts * total / 3.6e6 * 0.15,  # the configured tariff
    } | {row: e.expected for row, e in exact.items() if QUANTITIES[row].exact}


MOST = {
    "mfu_palm": 1.0,
    "mfu_6n": 1.0,
    "power_watts": POWER_LIMIT,
    "peak_process_bytes": 12 * 2**30,
    "peak_allocated_bytes": 12 * 2**30,
}


@st.composite
def true_claims(draw: st.DrawFn) -> list[str]:
    """Draw claims that all hold for one run."""
    world = draw(worlds())
    fastest = step_flops() / PEAK
    least = {"step_seconds": fastest, "total_seconds": STEPS * fastest}
    rows = draw(st.lists(st.sampled_from(sorted(world)), unique=True, min_size=1))
    return [
        draw(around(row, QUANTITIES[row].unit, world[row], least.get(row, 0.0), MOST.get(row, math.inf)))
        for row in rows
    ]


@settings(max_examples=40, deadline=None)
@given(claims=true_claims())
def test_claims_that_hold_for_one_run_have_no_findings(claims: list[str]) -> None:
    assert findings(*claims) == []


RELATIONS = [
    # rows of a relation, and a factor that makes only the first of them wrong
    (("tokens_per_step",), 3),
    (("tokens_total",), 3),
    (("parameters",), 3),
    (("parameters_total",), 3),
    (("weights_bytes",), 2),
    (("flops_total_6n",), 1e-3),
    (("flops_total_palm",), 1e-3),
    (("power_watts",), 10),
    (("peak_process_bytes",), 20),
    (("step_seconds",), 1 / 50),
    (("total_seconds",), 1 / 100),
    (("mfu_palm",), 30),
    (("step_seconds", "mfu_palm"), 2),
    (("total_seconds", "mfu_palm"), 1 / 2),
    (("total_seconds", "step_seconds"), 1 / 2),
    (("first_step_seconds", "step_seconds"), 1 / 1000),
    (("first_step_seconds", "total_seconds"), 1e6),
    (("peak_allocated_bytes", "peak_process_bytes"), 2.2),
    (("energy_kwh", "power_watts", "total_seconds"), 1 / 2),
    (("energy_kwh", "power_watts", "total_seconds"), 2),
]


@pytest.mark.parametrize(("rows", "factor"), RELATIONS)
@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_one_wrong_value_is_one_finding(rows: tuple[str, ...], factor: float, data: st.DataObject) -> None:
    world = data.draw(worlds(fastest_mfu=0.3))
    if rows[0] == "peak_allocated_bytes":
        assume(2.3 * world["peak_allocated_bytes"] < 12 * 2**30)
    true = {row: world[row] * (factor if row == rows[0] else 1) for row in rows}
    narrow = [
        claim(row, QUANTITIES[row].unit, value / 1.01, min(value * 1.01, MOST.get(row, math.inf)))
        if row != rows[0]
        else claim(row, QUANTITIES[row].unit, value / 1.01, value * 1.01)
        for row, value in true.items()
    ]
    (finding,) = findings(*narrow)
    assert set(finding.ids) == set(rows)
    assert any(character.isdigit() for character in finding.why)
    assert finding.why.endswith(".")


def test_an_open_mfu_out_of_reach_of_the_step_time_is_found() -> None:
    """One end is enough: "at most 35 %" bounds the time from below."""
    step = step_flops() / (PEAK * 0.5)
    times = claim("step_seconds", "s", step, step * 1.1)
    for share in (claim("mfu_palm", "1", low=0.6), claim("mfu_palm", "1", high=0.4)):
        assert [finding.ids for finding in findings(share, times)] == [["mfu_palm", "step_seconds"]]


def test_an_open_range_that_excludes_another_is_found() -> None:
    """At least 180 W for at least 15 h are at least 2.7 kWh."""
    (finding,) = findings(
        claim("power_watts", "W", low=180), claim("total_seconds", "h", low=15), claim("energy_kwh", "kWh", high=1)
    )
    assert sorted(finding.ids) == ["energy_kwh", "power_watts", "total_seconds"]
    assert "2.7" in finding.why
    assert not {"inf", "nan"} & set(finding.why.replace("-", " ").split())


def test_the_limits_of_eight_gpus_are_eight_times_those_of_one() -> None:
    """1,500 W and half a second per step exceed one RTX 4070, not eight."""
    spec = replace(documented_spec(), world_size=8)
    eight = predict(spec, lookup("RTX 4070", "bfloat16"))
    claims = [claim("power_watts", "W", 1400, 1500), claim("step_seconds", "s", 0.5, 0.6)]
    assert len(findings(*claims)) == 2
    with tempfile.TemporaryDirectory() as name:
        assert inconsistencies(claims_of(Path(name), *claims), spec, eight) == []
