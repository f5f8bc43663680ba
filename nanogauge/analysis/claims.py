"""Read claims files: claimed ranges with their quotations, and formulas that check them."""

from __future__ import annotations

import ast
import difflib
import math
import operator
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, TypeGuard

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from nanogauge.config import explain, read_toml
from nanogauge.errors import BadInput
from nanogauge.quantities import QUANTITIES, UNITS, format_digits, format_value, span_of
from nanogauge.runspec import RunSpec, with_shape
from nanogauge.schema import Prediction
from nanogauge.spec_parts import SETTINGS

Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class _Statement(_Data):
    quote: str
    """Verbatim quotation; " | " separates cells of a table, " […] " several quotations."""
    english: str
    """English translation; defaults to the quotation."""

    @model_validator(mode="before")
    @classmethod
    def _default_english(cls, values: object) -> object:
        if isinstance(values, dict) and "quote" in values:
            return {"english": values["quote"]} | values
        return values


class Claim(_Statement):
    """A claimed range of one quantity; load_claims converts it to SI units."""

    key: str
    unit: str = "name"
    low: float = -math.inf
    high: float = math.inf
    """Upper end of the claimed range; infinite, like `low`, if omitted."""
    value: Finite | None = None
    """The claimed number; None if a range was claimed."""
    rounding: Finite = 0
    says: str | None = None
    """The claimed name, of a quantity that has no number; else None."""
    label: str | None = None
    """Assumption or subject of the claim, shown beside the range."""
    formula: str | None = None
    about: dict[str, int | float | str | bool] | None = None
    """Settings in which the run that the claim is about differs from this run, and its gpu. Such a claim is judged by a
    prediction for that run. None: it is about this run."""
    reading: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _range_of_value(cls, values: object) -> object:
        if not isinstance(values, dict) or "value" not in values:
            return values
        value, rounding = values["value"], values.get("rounding", 0)
        if "low" in values or "high" in values:
            raise ValueError("give either value (and rounding), or low and high")
        if not _is_number(value) or not _is_number(rounding):
            raise ValueError("value and rounding must be numbers")
        return values | {"low": value - rounding, "high": value + rounding}

    @model_validator(mode="after")
    def _known_and_ordered(self) -> Claim:
        _check_name("id", self.row, QUANTITIES)
        units = UNITS[QUANTITIES[self.row].unit]
        if self.unit not in units:
            raise ValueError(f"unknown unit {self.unit!r} for {self.row}; use {', '.join(units)}")
        for key in self.about or ():
            _check_name("setting in about", key, (*SETTINGS, "gpu"))
        if (self.unit == "name") != (self.says is not None):
            raise ValueError(f"{self.row} takes {'says' if self.unit == 'name' else 'a number'}")
        if self.says is not None:
            return self
        if math.isinf(self.low) and math.isinf(self.high):
            raise ValueError("give low or high, or both, or value")
        if math.isnan(self.low) or math.isnan(self.high) or self.low > self.high:
            raise ValueError("low is above high")
        return self

    @property
    def row(self) -> str:
        """Id of the report row that the claim is about: its key up to the first dot."""
        return self.key.partition(".")[0]

    @property
    def is_about_this_run(self) -> bool:
        return self.about is None and (self.formula is None or QUANTITIES[self.row].exact)

    @property
    def middle(self) -> float | None:
        """Middle of the range; None if an end is open."""
        middle = (self.low + self.high) / 2
        return middle if math.isfinite(middle) else None

    def text(self, value: float, currency: str = "") -> str:
        """Format a value of the claim's row; FLOPs and counts in the unit of the document."""
        unit = QUANTITIES[self.row].unit
        scale = UNITS[unit][self.unit]
        if unit not in ("FLOP", "1") or scale <= 1:
            return format_value(self.row, value, currency)
        return f"{format_digits(value / scale, 4)} {self.unit}"

    def range_text(self, currency: str = "") -> str:
        """Format the claimed range; an open end reads 'at least' or 'at most'."""
        if self.says is not None:
            return self.says
        if self.value is not None:
            return self.text(self.value, currency)
        if math.isinf(self.high):
            return f"at least {self.text(self.low, currency)}"
        if math.isinf(self.low):
            return f"at most {self.text(self.high, currency)}"
        return span_of(self.text(self.low, currency), self.text(self.high, currency))

    def holds(self, value: float) -> bool:
        """Return True if the value lies in the claimed range, ends included."""
        slack = 1e-9 * abs(value)
        return self.low - slack <= value <= self.high + slack

    def factor(self, value: float) -> float | None:
        """Return value / claimed number or nearest end of its range; 1 inside, None if it is 0."""
        if self.holds(value):
            return 1.0
        end = self.value or (self.low if value < self.low else self.high)
        return value / end if end else None

    def in_si(self) -> Claim:
        """Return the claim converted to the SI unit of its report row."""
        scale = UNITS[QUANTITIES[self.row].unit][self.unit]

        def convert(number: float) -> float:
            return float(f"{number * scale:.12g}")  # 35 x 0.01 must give 0.35

        value = None if self.value is None else convert(self.value)
        return self.model_copy(update={"low": convert(self.low), "high": convert(self.high), "value": value})


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_name(what: str, name: str, known: Collection[str]) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known ones: {', '.join(known)}"
        raise ValueError(f"unknown {what} {name!r}; {hint}")


class Unscored(_Statement):
    """A statement of the document that has no matching report row, and the reason."""

    why: str


class Document(_Data):
    title: str
    author: str | None = None
    language: str | None = None


class Claims(_Data):
    document: Document
    claim: list[Claim]
    unscored: list[Unscored] = []

    @model_validator(mode="after")
    def _keys_are_unique(self) -> Claims:
        keys = [c.key for c in self.claim]
        duplicates = sorted({k for k in keys if keys.count(k) > 1})
        if duplicates:
            raise ValueError(f"duplicate key {duplicates[0]}; give each claim its own key")
        return self


def load_claims(path: Path) -> Claims:
    """Read a claims file and convert its ranges to SI units.

    Raises:
        BadInput: if it is missing, not TOML, or has an unknown id, unit, key or formula.
    """
    values = read_toml(path, "claims", "predictions/ holds an example")
    try:
        claims = Claims.model_validate(values)
    except ValidationError as error:
        raise BadInput(f"{path}: {_name_claims(explain(error, Claims), values)}") from None
    for claim in claims.claim:
        if claim.formula is not None:
            try:
                evaluate(claim.formula, None)
            except ValueError as error:
                raise BadInput(f"{path}: the formula of {claim.key}: {error}.") from None
    return claims.model_copy(update={"claim": [claim.in_si() for claim in claims.claim]})


def _name_claims(sentence: str, values: dict[str, Any]) -> str:
    """Replace positions of claims in an error message by the claims' keys."""

    def named(match: re.Match[str]) -> str:
        claim = values["claim"][int(match[1])]
        key = claim.get("key") if isinstance(claim, dict) else None
        return f"claim {int(match[1]) + 1}" if key is None else f"the claim {key}"

    return re.sub(r"\bclaim\.(\d+)", named, sentence)


def spec_of_subject(spec: RunSpec, about: Mapping[str, Any]) -> RunSpec:
    """Return the run that a claim is about: `spec` with other settings."""
    traced = None if about.keys() - {"gpu"} else spec.traced  # a trace is of this run's settings alone
    spec = replace(spec, traced=traced, unknown=tuple(key for key in spec.unknown if key not in about))
    for key in about.keys() - {"gpu"}:
        part, _, field = SETTINGS[key].rpartition(".")
        changes: dict[str, Any] = {field: about[key]}
        if part:
            changes = {part: replace(getattr(spec, part), **changes)}
        spec = replace(spec, **changes)
    shape, given = spec.shape, about.get("model.n_embd", spec.shape.n_embd)
    if "model.n_embd" in about or "model.n_head" in about:
        heads = about.get("model.n_head", shape.n_head)
        spec = with_shape(spec, n_kv_head=heads, head_size=given // heads, mlp_width=4 * given)
    return spec


def formula_names(spec: RunSpec, prediction: Prediction) -> dict[str, float]:
    """Return the values that a claim's formula may use, by name.

    Numeric settings, data_tokens (the unique tokens), and quantities that follow exactly from the configuration.
    """
    names: dict[str, float] = {}
    for key in SETTINGS:
        value = spec.setting(key)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and key not in spec.unknown:
            names[key.partition(".")[2]] = value
    if spec.unique_tokens is not None:
        names["data_tokens"] = spec.unique_tokens
    for row, estimate in prediction.quantities.items():
        if QUANTITIES[row].exact:
            names[row] = estimate.expected
    return names


_OPERATORS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}


def formula_text(formula: str, names: Mapping[str, float]) -> str:
    """Return the formula with its names replaced by their values."""
    filled = re.sub(r"(?<![\w.])[A-Za-z_]\w*", lambda name: f"{names[name[0]]:,.12g}", formula)
    return filled.replace("**", "^").replace("*", "x")


def evaluate(formula: str, names: Mapping[str, float] | None) -> float:
    """Evaluate arithmetic on numbers and names: + - * / ** and parentheses.

    If `names` is None, check the syntax only: every name counts as 1.

    Raises:
        ValueError: for other syntax, an unknown name, or a result that is not finite.
    """

    def value_of(node: ast.expr) -> float:
        match node:
            case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
                return float(number)
            case ast.Name(id=name):
                if names is None:
                    return 1.0
                if name not in names:
                    raise ValueError(f"unknown name {name}; known: {', '.join(sorted(names))}")
                return float(names[name])
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                return _OPERATORS[type(op)](value_of(left), value_of(right))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -value_of(operand)
            case ast.UnaryOp(op=ast.UAdd(), operand=operand):
                return value_of(operand)
            case _:
                raise ValueError(f"{ast.unparse(node)!r} is not arithmetic")

    try:
        tree = ast.parse(formula.strip(), mode="eval")
    except (SyntaxError, MemoryError, RecursionError):  # the last two: nested too deeply
        raise ValueError(f"{formula[:60]!r} is not arithmetic") from None
    try:
        result = value_of(tree.body)
    except (ZeroDivisionError, OverflowError, RecursionError) as error:
        if names is None:  # with 1 for every name, a divisor may be 0 that really is not
            return math.nan
        raise ValueError(f"{formula!r} has no value: {error}") from None
    if names is not None and (isinstance(result, complex) or not math.isfinite(result)):
        raise ValueError(f"{formula!r} has no finite value")
    return result
