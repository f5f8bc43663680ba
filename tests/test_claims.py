"""Claims files: parsing, units, formulas and verdicts."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from commands import run
from examples import (
    SEED_CLAIMS,
    SHARED,
    claims_of,
    claims_text,
    documented_prediction,
    documented_spec,
    needs_shared,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nanogauge.analysis.claims import Claim, evaluate, load_claims
from nanogauge.analysis.measured import measure
from nanogauge.analysis.verdicts import build_rows
from nanogauge.errors import BadInput
from nanogauge.quantities import QUANTITIES, UNITS
from nanogauge.runlog.history import RunHistory
from nanogauge.schema import Start, Step

NAMES = {"micro_batch": 16.0, "max_steps": 20000.0, "share": 0.35}


@st.composite
def formulas(draw: st.DrawFn, depth: int = 4) -> str:
    """Draw Python arithmetic over floats and names."""
    if depth == 0 or draw(st.integers(0, 3)) == 0:
        number = st.floats(0, 1e6, allow_subnormal=False).map(repr)
        return draw(number | st.sampled_from(sorted(NAMES)))
    inner = formulas(depth=depth - 1)
    match draw(st.sampled_from(["+", "-", "*", "/", "**", "minus", "brackets"])):
        case "minus":
            return f"-{draw(inner)}"
        case "brackets":
            return f"({draw(inner)})"
        case sign:
            return f"{draw(inner)} {sign} {draw(inner)}"


@settings(max_examples=100, deadline=None)
@given(formulas())
def test_a_formula_has_the_value_that_python_gives_it(formula: str) -> None:
    try:
        expected = eval(formula, {"__builtins__": {}}, dict(NAMES))
    except ArithmeticError:
        expected = math.nan
    if isinstance(expected, complex) or not math.isfinite(expected):
        with pytest.raises(ValueError, match="has no"):
            evaluate(formula, NAMES)
    else:
        assert evaluate(formula, NAMES) == expected


@pytest.mark.parametrize(
    "formula",
    [
        *("__import__('os').getcwd()", "max(1, 2)", "tokens.real", "[1][0]", "1 if 2 else 3"),
        *("'a' * 9", "True", "1 < 2", "7 // 2", "7 % 2", "2j", "lambda: 1", "(x := 3)", "", "1 +"),
        *("1; 2", "(" * 500 + "1" + ")" * 500, "-" * 100_000 + "1"),
    ],
)
def test_a_formula_is_arithmetic_and_nothing_else(formula: str) -> None:
    """Claims files are untrusted: nothing in them is called or looked up."""
    for names in (None, NAMES):
        with pytest.raises(ValueError, match="is not arithmetic"):
            evaluate(formula, names)


def test_a_formula_without_a_finite_value_or_with_an_unknown_name_is_refused() -> None:
    """9**9**9**9 would not end in integers; in floating point it overflows."""
    for formula in ("1 / 0", "9**9**9**9", "1e400", "(-8)**0.5", "0**-1"):
        with pytest.raises(ValueError, match="has no"):
            evaluate(formula, NAMES)
    with pytest.raises(ValueError, match="unknown name max_step; known: .*max_steps"):
        evaluate("2.5 * max_step", NAMES)


STEP = 'key = "step_seconds"\nunit = "s"\n'


@pytest.mark.parametrize(
    ("claim", "words"),
    [
        (['key = "step_second"\nunit = "s"\nvalue = 1'], "did you mean step_seconds?"),
        (['key = "step_seconds"\nunit = "sec"\nvalue = 1'], "use ms, s, min, h, d"),
        (['key = "power_watts"\nunit = "h"\nvalue = 1'], "use W, kW"),
        ([STEP + "lwo = 1\nhigh = 3"], "did you mean low?"),
        ([STEP + 'value = 3\nlabl = "x"'], "did you mean label?"),
        ([STEP + "value = 3\nroundin = 0.1"], "did you mean rounding?"),
        ([STEP + "low = 3\nhigh = 2"], "low is above high"),
        ([STEP + "value = 3\nrounding = -1"], "low is above high"),
        ([STEP + "value = 3\nlow = 1"], "either value"),
        ([STEP], "give low or high"),
        ([STEP + "value = nan"], "finite"),
        ([STEP + 'value = "three"'], "must be numbers"),
        ([STEP + 'low = "three"'], "low"),
        ([STEP + "value = 3", STEP + "value = 4"], "duplicate key step_seconds"),
        ([STEP + 'value = 3\nformula = "exit()"'], "is not arithmetic"),
    ],
)
def test_a_wrong_claim_is_refused_in_one_sentence_that_names_it(
    tmp_path: Path, claim: list[str], words: str
) -> None:
    with pytest.raises(BadInput) as refused:
        claims_of(tmp_path, *claim)
    text = str(refused.value)
    assert words in text
    assert "\n" not in text
    assert not re.search(r"\?\.|: :|::|\.\.$", text), "two sentences run together"


@settings(max_examples=60, deadline=None)
@given(
    low=st.floats(-1e9, 1e9),
    width=st.floats(1e-6, 1e9),
    share=st.floats(-1, 2),
    row=st.sampled_from(sorted(QUANTITIES.keys() - {"dataset"})),
    data=st.data(),
)
def test_a_claim_holds_inside_its_range_in_any_unit(
    low: float, width: float, share: float, row: str, data: st.DataObject
) -> None:
    unit, scale = data.draw(st.sampled_from(sorted(UNITS[QUANTITIES[row].unit].items())))
    assume(width > 1e-6 * abs(low) and not -1e-3 < share < 1e-3 and not 0.999 < share < 1.001)
    claim = Claim(key=row, unit=unit, low=low, high=low + width, quote="q", english="e").in_si()
    value = (low + share * width) * scale
    assert claim.holds(value) == (0 <= share <= 1)
    if claim.holds(value):
        assert claim.factor(value) == 1.0
    else:
        end = claim.low if share < 0 else claim.high
        assert claim.factor(value) == (value / end if end else None)


OTHER_CONFIG = """
[run]
name = "other"
[model]
n_layer = 6
n_head = 8
n_embd = 512
block_size = 512
vocab_size = 32000
[data]
path = "tokens"
tokens = 1e9
[train]
micro_batch = 32
max_steps = 1000
"""
OTHER_CLAIMS = claims_text(
    'key = "tokens_per_step"\nunit = "ktokens"\nvalue = 16.4\nrounding = 0.05',
    'key = "tokens_total"\nunit = "Gtokens"\nvalue = 16.4\nrounding = 0.05',
    'key = "parameters.round"\nunit = "M"\nlow = 35\nhigh = 36',
    'key = "weights_bytes"\nunit = "GB"\nvalue = 70\nformula = "2 * parameters_total"',
    'key = "total_seconds.sum"\nunit = "min"\nvalue = 5\nrounding = 0.5\n'
    'formula = "0.3 * max_steps"',
    'key = "step_seconds"\nunit = "ms"\nhigh = 300',
    'key = "power_watts"\nunit = "kW"\nlow = 0.3\nhigh = 0.6',
)


def test_claims_about_another_model_and_gpu_are_judged(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(OTHER_CONFIG)
    (tmp_path / "claims.toml").write_text(OTHER_CLAIMS)
    arguments = ["--gpu", "RTX 4090", "--claims", tmp_path / "claims.toml", "--json"]
    done = run("plan.py", tmp_path / "run.toml", *arguments)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    rows = {row["claim"]: row for row in plan["rows"] if row["claim"]}
    assert {claim: row["verdict"] for claim, row in rows.items()} == {
        "tokens_per_step": "held",
        "tokens_total": "contradicted",  # 16.4 million, not billion
        "parameters.round": "held",
        "weights_bytes": "contradicted",
        "total_seconds.sum": "held",
        "step_seconds": "likely",
        "power_watts": "likely",
    }
    assert rows["tokens_total"]["factor"] == pytest.approx(0.016384 / 16.4)
    assert rows["tokens_total"]["claimed"]["low"] == pytest.approx(16.35e9)
    assert all(row["measured"] is None for row in plan["rows"])
    found = {tuple(finding["ids"]) for finding in plan["inconsistencies"]}
    assert {("tokens_total",), ("weights_bytes",), ("power_watts",)} <= found
    assert ("tokens_per_step",) not in found


@pytest.mark.parametrize(("step", "verdict"), [(2.0, "held"), (3.0, "held"), (3.1, "missed")])
def test_the_verdict_on_a_measured_claim_is_whether_it_lies_inside(
    step: float, verdict: str
) -> None:
    spec, prediction = documented_spec(), documented_prediction()
    recorded = RunHistory()
    recorded.add(Start(max_steps=20000, prediction_sha256="", device="RTX 4070"))
    for number in range(4):
        recorded.add(Step(step=number, step_seconds=step, elapsed_seconds=(number + 1) * step))
    claim = Claim(key="step_seconds", unit="s", low=2.0, high=3.0, quote="", english="")
    claims = load_claims(SEED_CLAIMS).model_copy(update={"claim": [claim]})
    rows, _ = build_rows(claims, spec, prediction, measure(recorded, spec, prediction))
    row = next(row for row in rows if row.id == "step_seconds")
    assert row.measured is not None and row.measured.value == step
    assert row.verdict == verdict
    assert len(rows) == sum(not quantity.optional for quantity in QUANTITIES.values())


def plain(text: str) -> str:
    """Remove Markdown asterisks and list dashes, and collapse spaces."""
    return " ".join(re.sub(r"\*\*|^- ", "", text, flags=re.MULTILINE).split())


def test_the_shipped_claims_have_quotations_translations_and_rows() -> None:
    claims = load_claims(SEED_CLAIMS)
    assert len(claims.claim) >= 25
    for statement in (*claims.claim, *claims.unscored):
        assert statement.quote.strip()
        assert statement.english.strip()
        assert statement.english.isascii()
    rows, _ = build_rows(claims, documented_spec(), documented_prediction(), None)
    assert {row.claim for row in rows if row.claim} == {claim.key for claim in claims.claim}


def test_the_translation_defaults_to_the_quotation(tmp_path: Path) -> None:
    claims_of(tmp_path, 'key = "parameters"\nunit = "M"\nvalue = 1')
    path = tmp_path / "claims.toml"
    path.write_text(path.read_text().replace('english = "e"\n', ""))
    (claim,) = load_claims(path).claim
    assert (claim.quote, claim.english) == ("q", "q")


def test_a_claim_without_a_key_is_named_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "claims.toml"
    path.write_text('claim = [1]\n[document]\ntitle = "t"\n')
    with pytest.raises(BadInput, match="claim 1: "):
        load_claims(path)


@needs_shared("seed.zh-Hant.txt")
def test_the_shipped_quotations_are_in_the_document() -> None:
    """Word for word, without Markdown; `|` separates table cells, `[…]` quotations."""
    document = plain((SHARED / "seed.zh-Hant.txt").read_text(encoding="utf-8"))
    claims = load_claims(SEED_CLAIMS)
    for statement in (*claims.claim, *claims.unscored):
        for piece in re.split(r"\||\[…\]", statement.quote):
            assert plain(piece) in document, statement.quote
