"""Claims files: parsing, units, formulas and verdicts."""

import json
import math
import re
from pathlib import Path

import pytest
from commands import run
from examples import SEED_CLAIMS, SHARED, claims_of, claims_text, needs_shared
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nanogauge.analysis.claims import Claim, evaluate, load_claims
from nanogauge.analysis.sentences import draft, problems, sentences
from nanogauge.commands.claims import main as claims_command
from nanogauge.errors import BadInput
from nanogauge.quantities import QUANTITIES, UNITS

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
def test_a_wrong_claim_is_refused_in_one_sentence_that_names_it(tmp_path: Path, claim: list[str], words: str) -> None:
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
    'key = "total_seconds.sum"\nunit = "min"\nvalue = 5\nrounding = 0.5\nformula = "0.3 * max_steps"',
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


def test_a_claim_without_a_key_is_named_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "claims.toml"
    path.write_text('claim = [1]\n[document]\ntitle = "t"\n')
    with pytest.raises(BadInput, match="claim 1: "):
        load_claims(path)


@needs_shared("seed.zh-Hant.txt")
def test_every_sentence_of_the_document_is_quoted_word_for_word() -> None:
    document = (SHARED / "seed.zh-Hant.txt").read_text(encoding="utf-8")
    assert len(sentences(document)) >= 31
    assert list(problems(document, load_claims(SEED_CLAIMS))) == []


ENGLISH = """# Will it run?

A step takes 9-10 seconds, and 20,000 of them about 52.5 hours.
- Expect **10 GB** of VRAM in use.
Good luck!
"""
CHINESE = "---\ntype: note\n---\n每步大约 4 秒，全部训练约 22 小时。祝你好运！\n"


@pytest.mark.parametrize(
    ("text", "claims", "count"),
    [
        (ENGLISH, {"step_seconds": (9, 10), "total_seconds": (52.45, 52.55)} | {"peak_process_bytes": (9.5, 10.5)}, 3),
        (CHINESE, {"step_seconds": (3.5, 4.5), "total_seconds": (21.5, 22.5)}, 2),
    ],
)
def test_a_draft_has_every_sentence_and_lacks_only_what_a_person_adds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, claims: dict[str, tuple[float, float]], count: int
) -> None:
    (tmp_path / "answer.md").write_text(text, encoding="utf-8")
    path = tmp_path / "claims.toml"
    path.write_text(draft(text, "t"), encoding="utf-8")
    scales = {"total_seconds": 3600, "peak_process_bytes": 1e9}
    found = {c.key: (c.low, c.high) for c in load_claims(path).claim}
    for key, ends in claims.items():
        assert found[key] == pytest.approx([end * scales.get(key, 1) for end in ends])
    assert found.keys() == claims.keys()
    assert claims_command(["check", str(path), str(tmp_path / "answer.md")]) == 1
    assert f"{count} of {count} sentences covered" in capsys.readouterr().out
    path.write_text(path.read_text(encoding="utf-8").replace("TODO", "done"), encoding="utf-8")
    assert list(problems(text, load_claims(path))) == []


def test_a_check_names_what_is_not_quoted_word_for_word_or_in_another_unit() -> None:
    text = "A step takes 9 seconds. It needs 10 GB of VRAM. Have fun!"
    given = [
        Claim(key="step_seconds", unit="min", high=9, quote="A step takes 9 seconds.", english="e"),
        Claim(key="peak_process_bytes", unit="GB", high=11, quote="11 GB of VRAM", english="e"),
        Claim(key="power_watts", unit="W", high=1, quote=text, english="e"),
    ]
    claims = load_claims(SEED_CLAIMS).model_copy(update={"claim": given, "unscored": []})
    assert list(problems(text, claims)) == [
        "step_seconds: the unit is min, the quotation has s",
        "peak_process_bytes: the quotation is not in the text: 11 GB of VRAM",
        f"power_watts: the quotation spans several sentences: {text}",
        "not covered: It needs 10 GB of VRAM.",
        "not covered: Have fun!",
    ]
