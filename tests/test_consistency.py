"""What cannot be true is found, and what can be is left alone."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import pytest
from examples import SEED_CLAIMS, claims_of, documented_config, documented_prediction
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nanogauge.claims import load_claims
from nanogauge.consistency import Inconsistency, inconsistencies
from nanogauge.predict.flops import flops_per_token_palm
from nanogauge.predict.workload import shape_of

PEAK = 46 * 512 * 2.475e9
STEPS = 20_000
POWER_LIMIT = 200.0


def findings(*claims: str) -> list[Inconsistency]:
    """What cannot be true of these claims about the documented run on an RTX 4070."""
    with tempfile.TemporaryDirectory() as name:
        read = claims_of(Path(name), *claims)
    return inconsistencies(read, documented_config(), documented_prediction())


def claim(key: str, unit: str, low: float = -math.inf, high: float = math.inf) -> str:
    ends = [f"low = {low!r}"] * (low > -math.inf) + [f"high = {high!r}"] * (high < math.inf)
    return "\n".join([f'key = "{key}"', f'unit = "{unit}"', *ends])


def step_flops() -> float:
    config = documented_config()
    return flops_per_token_palm(shape_of(config.model)) * config.tokens_per_step


@pytest.fixture(scope="module")
def found() -> dict[tuple[str, ...], str]:
    """The findings about the shipped claims, by the claims they are about."""
    claims = load_claims(SEED_CLAIMS)
    return {
        tuple(finding.ids): finding.why
        for finding in inconsistencies(claims, documented_config(), documented_prediction())
    }


def test_a_thousandfold_slip_is_contradicted_by_arithmetic(
    found: dict[tuple[str, ...], str],
) -> None:
    """2,550 PFLOP are 2.55e18 FLOPs, not 2.55e15; the document has both, and 2.5 PFLOP."""
    assert "1,001 times" in found[("flops_total_6n.scientific",)]
    assert "1,021 times" in found[("flops_total_6n.summary",)]
    assert ("flops_total_6n.pflop",) not in found
    assert ("flops_total_6n.pflop", "flops_total_6n.scientific") in found


def test_mfu_and_step_time_that_exclude_each_other_are_found(
    found: dict[tuple[str, ...], str],
) -> None:
    """20-35 % of 58.3 TFLOP/s make 7.71-13.5 s a step by PaLM's count and 6.25-10.9 s by 6N."""
    for key in ("step_seconds.range", "step_seconds.usual"):
        why = found[("mfu_palm", key)]
        for number in ("20", "35 %", "7.71", "13.5 s", "6.25", "10.9 s"):
            assert number in why, why
    assert "2.5–4.5 s" in found[("mfu_palm", "step_seconds.range")]
    assert ("mfu_palm", "total_seconds.expected") in found


def test_a_step_faster_than_the_card_is_found(found: dict[tuple[str, ...], str]) -> None:
    """2.5 s would need 62.9 TFLOP/s, 108 % of the peak; with causal attention halved, 98 %."""
    why = found[("step_seconds.range",)]
    for number in ("2.5 s", "62.9 TFLOP/s", "108 %", "58.3", "98 %"):
        assert number in why, why
    assert ("step_seconds.usual",) not in found


def test_power_above_the_board_limit_is_found(found: dict[tuple[str, ...], str]) -> None:
    assert "220 W" in found[("power_watts",)]
    assert "200 W" in found[("power_watts",)]


def test_nothing_else_of_the_document_is_called_impossible(
    found: dict[tuple[str, ...], str],
) -> None:
    """Sums of the document that are right, and ranges that hold, are left alone."""
    blamed = {key for ids in found for key in ids}
    assert blamed == {
        "flops_total_6n.pflop",  # only beside the two that contradict it
        "flops_total_6n.scientific",
        "flops_total_6n.summary",
        "mfu_palm",
        "step_seconds.range",
        "step_seconds.usual",
        "total_seconds.expected",
        "total_seconds.reported",
        "power_watts",
    }


SHARES = st.floats(0.05, 0.95)
WIDTHS = st.floats(1.0, 1.5)


@st.composite
def around(
    draw: st.DrawFn, key: str, unit: str, value: float, least: float = 0.0, most: float = math.inf
) -> str:
    """A claimed range that holds the value, one of its ends perhaps open."""
    low, high = max(value / draw(WIDTHS), least), min(value * draw(WIDTHS), most)
    ends = draw(st.sampled_from(["both", "low", "high"]))
    return claim(
        key,
        unit,
        low=-math.inf if ends == "high" else low,
        high=math.inf if ends == "low" else high,
    )


@st.composite
def true_claims(draw: st.DrawFn) -> list[str]:
    """Claims about one thinkable run: its figures fit together, each claim holds its own."""
    fastest = step_flops() / PEAK
    mfu = draw(SHARES)
    step = fastest / mfu
    total = STEPS * step * draw(st.floats(1.0, 1.3))  # evaluations and compilation come on top
    watts = draw(st.floats(50, POWER_LIMIT))
    kwh = watts * total / 3.6e6
    claims = [
        around("mfu_palm", "1", mfu, most=1.0),
        around("step_seconds", "s", step, least=fastest),
        around("total_seconds", "s", total, least=STEPS * fastest),
        around("power_watts", "W", watts, most=POWER_LIMIT),
        around("energy_kwh", "kWh", kwh),
        around("cost", "currency", kwh * 0.15),  # the configured tariff
    ]
    return [draw(one) for one in draw(st.lists(st.sampled_from(claims), unique=True, min_size=1))]


@settings(max_examples=200, deadline=None)
@given(true_claims())
def test_claims_that_fit_together_are_left_alone(claims: list[str]) -> None:
    """No finding about ranges that one run can meet: a wrong accusation is worse than none.

    A card may draw up to its limit, a lower end alone bounds nothing from above, and a run takes
    longer than its steps, because it also evaluates and compiles.
    """
    assert findings(*claims) == []


@settings(max_examples=60, deadline=None)
@given(
    mfu=SHARES,
    shift=st.floats(1.2, 10),
    faster=st.booleans(),
    ends=st.sampled_from(["both", "near"]),
)
def test_an_mfu_out_of_reach_of_the_step_time_is_found(
    mfu: float, shift: float, faster: bool, ends: str
) -> None:
    """Move the claimed MFU away until no step in the claimed range can have it: one finding.

    The end of the range that faces the step time is enough: "at most 35 %" bounds time from below.
    """
    step = step_flops() / (PEAK * mfu)
    near = mfu * 1.1 * shift if faster else mfu / 1.1 / shift
    assume(near < 1)
    times = claim("step_seconds", "s", step, step * 1.1)
    if faster:
        share = claim("mfu_palm", "1", low=near, high=1.0 if ends == "both" else math.inf)
    else:
        share = claim("mfu_palm", "1", low=near / 2 if ends == "both" else -math.inf, high=near)
    assert [finding.ids for finding in findings(share, times)] == [["mfu_palm", "step_seconds"]]


def test_an_open_range_that_excludes_another_is_found_and_said() -> None:
    """At least 180 W for at least 15 h are at least 2.7 kWh; the sentence has an open end too."""
    (finding,) = findings(
        claim("power_watts", "W", low=180),
        claim("total_seconds", "h", low=15),
        claim("energy_kwh", "kWh", high=1),
    )
    assert sorted(finding.ids) == ["energy_kwh", "power_watts", "total_seconds"]
    assert "2.7" in finding.why
    assert not {"inf", "nan"} & set(finding.why.replace("-", " ").split())


def test_a_price_that_no_tariff_makes_is_found_and_said() -> None:
    """At most 5 for at least 400 kWh is at most 0.0125 a kWh; the configured tariff is 0.15."""
    (finding,) = findings(claim("cost", "currency", high=5), claim("energy_kwh", "kWh", low=400))
    assert sorted(finding.ids) == ["cost", "energy_kwh"]
    assert "0.0125" in finding.why
    assert "nan" not in finding.why


def test_steps_that_take_longer_than_the_whole_run_are_found() -> None:
    """20,000 steps of at least 4 s are 22.2 h, more than at most 20 h."""
    (finding,) = findings(claim("step_seconds", "s", 4, 5), claim("total_seconds", "h", 16, 20))
    assert sorted(finding.ids) == ["step_seconds", "total_seconds"]
    assert "22.2 h" in finding.why


def test_two_claims_of_one_quantity_that_do_not_meet_are_found() -> None:
    (finding,) = findings(
        claim("peak_process_bytes.a", "GB", 6, 7), claim("peak_process_bytes.b", "GB", 9, 10)
    )
    assert finding.ids == ["peak_process_bytes.a", "peak_process_bytes.b"]
