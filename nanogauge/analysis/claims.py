"""Claims about a run, as data: each a range with its quotation, some with a formula that checks it.

A claims file can be written about any run; nothing here knows a particular document.
"""

from __future__ import annotations

import ast
import difflib
import math
import operator
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeGuard

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from nanogauge.config import explain, read_toml
from nanogauge.errors import BadInput
from nanogauge.quantities import QUANTITIES, UNITS
from nanogauge.runspec import SETTINGS, RunSpec
from nanogauge.schema import Prediction

Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Reference(_Data):
    """A published figure that bears on a claim which was not itself measured."""

    row: str
    value: Finite
    text: str
    source: str


class _Statement(_Data):
    quote: str
    english: str
    """the same in English; the quotation itself where that is left out"""

    @model_validator(mode="before")
    @classmethod
    def _english_as_it_is(cls, values: object) -> object:
        if isinstance(values, dict) and "quote" in values:
            return {"english": values["quote"]} | values
        return values


class Claim(_Statement):
    """One statement about one quantity; low and high are in the row's SI unit once it is read."""

    key: str
    unit: str
    low: float = -math.inf
    high: float = math.inf
    """an end that is not given is open"""
    value: Finite | None = None
    """the number itself where one was claimed, not a range"""
    rounding: Finite = 0
    label: str | None = None
    """what the row says beside its quantity, where a claim rests on an assumption"""
    formula: str | None = None
    reading: str | None = None
    reference: Reference | None = None

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
        _check_row(self.row)
        if self.reference is not None:
            _check_row(self.reference.row)
        units = UNITS[QUANTITIES[self.row].unit]
        if self.unit not in units:
            raise ValueError(f"unknown unit {self.unit!r} for {self.row}; use {', '.join(units)}")
        if math.isinf(self.low) and math.isinf(self.high):
            raise ValueError("give low or high, or both, or value")
        if math.isnan(self.low) or math.isnan(self.high) or self.low > self.high:
            raise ValueError("low is above high")
        return self

    @property
    def row(self) -> str:
        """The row id: the key up to its first dot."""
        return self.key.partition(".")[0]

    @property
    def middle(self) -> float | None:
        """The middle of a range with two ends."""
        middle = (self.low + self.high) / 2
        return middle if math.isfinite(middle) else None

    def holds(self, value: float) -> bool:
        """Whether the value lies in the claimed range, its ends included."""
        slack = 1e-9 * abs(value)
        return self.low - slack <= value <= self.high + slack

    def factor(self, value: float) -> float | None:
        """The value over the claimed number or the nearest end of the range; 1 where it holds.

        None where that number is 0.
        """
        if self.holds(value):
            return 1.0
        end = self.value or (self.low if value < self.low else self.high)
        return value / end if end else None

    def in_si(self) -> Claim:
        scale = UNITS[QUANTITIES[self.row].unit][self.unit]

        def convert(number: float) -> float:
            return float(f"{number * scale:.12g}")  # 35 x 0.01 is 0.35

        value = None if self.value is None else convert(self.value)
        ends = {"low": convert(self.low), "high": convert(self.high), "value": value}
        return self.model_copy(update=ends)


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_row(row: str) -> None:
    if row not in QUANTITIES:
        near = difflib.get_close_matches(row, QUANTITIES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known ids: {', '.join(QUANTITIES)}"
        raise ValueError(f"unknown id {row!r}; {hint}")


class Unscored(_Statement):
    """A statement that no row can hold, with the reason."""

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
        twice = sorted({k for k in keys if keys.count(k) > 1})
        if twice:
            raise ValueError(f"the key {twice[0]} stands twice; give each claim a key of its own")
        return self


def load_claims(path: Path) -> Claims:
    """Read a claims file; ranges are converted to SI units.

    Raises:
        BadInput: if it is missing, no TOML, or has an unknown id, unit or key.
    """
    values = read_toml(path, "claims", "predictions/ holds an example")
    try:
        claims = Claims.model_validate(values)
    except ValidationError as error:
        raise BadInput(f"{path}: {_by_key(explain(error, Claims), values)}") from None
    for claim in claims.claim:
        if claim.formula is not None:
            try:
                evaluate(claim.formula, None)
            except ValueError as error:
                raise BadInput(f"{path}: the formula of {claim.key}: {error}.") from None
    return claims.model_copy(update={"claim": [claim.in_si() for claim in claims.claim]})


def _by_key(sentence: str, values: dict[str, Any]) -> str:
    """Name a claim by its own key instead of its number in the file."""

    def named(match: re.Match[str]) -> str:
        claim = values["claim"][int(match[1])]
        key = claim.get("key") if isinstance(claim, dict) else None
        return f"claim {int(match[1]) + 1}" if key is None else f"the claim {key}"

    return re.sub(r"\bclaim\.(\d+)", named, sentence)


def names_for_formulas(spec: RunSpec, prediction: Prediction) -> dict[str, float]:
    """Return what a formula may name: numbers of the configuration, and the exact rows."""
    names: dict[str, float] = {}
    for key in SETTINGS:
        value = spec.setting(key)
        if isinstance(value, int | float) and not isinstance(value, bool):
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


def evaluate(formula: str, names: Mapping[str, float] | None) -> float:
    """The value of an arithmetic formula: numbers, names, + - * / ** and parentheses.

    With names None only the form is checked, each name standing for 1.

    Raises:
        ValueError: for anything else, an unknown name, or a result that is no finite number.
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
                raise ValueError(f"{ast.unparse(node)!r} is no arithmetic")

    try:
        tree = ast.parse(formula.strip(), mode="eval")
    except (SyntaxError, MemoryError, RecursionError):  # nested too deeply, too
        raise ValueError(f"{formula[:60]!r} is no arithmetic") from None
    try:
        result = value_of(tree.body)
    except (ZeroDivisionError, OverflowError, RecursionError) as error:
        if names is None:  # ones for names may cancel where the real numbers do not
            return math.nan
        raise ValueError(f"{formula!r} has no value: {error}") from None
    if names is not None and (isinstance(result, complex) or not math.isfinite(result)):
        raise ValueError(f"{formula!r} has no finite value")
    return result
