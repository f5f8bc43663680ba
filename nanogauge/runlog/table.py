"""Many lines of one kind, kept as columns: a night has 20,000 steps, a long run a million.

A table reads like a list of records. What is asked of all of them at once is asked of a column,
which costs eight bytes a value where a record costs a thousand.
"""

from __future__ import annotations

import types
import typing
from array import array
from collections.abc import Iterator, Mapping, Sequence
from math import isnan
from typing import Annotated, Any, Generic, TypeVar, overload

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter

from nanogauge.schema import Stored

_Record = TypeVar("_Record", bound=Stored)
_NAN = float("nan")
_MOST = 2**53


class Table(Sequence[_Record], Generic[_Record]):
    """Records of one model, in the order in which they came.

    A field that holds numbers is a column of float64, in which NaN stands for None: no record holds
    a NaN. Whole numbers are exact up to 2**53. The values of any other field are kept as they are,
    each distinct one once.
    """

    def __init__(self, model: type[_Record]) -> None:
        self._model = model
        self._length = 0
        self._numbers: dict[str, array[float]] = {}
        self._whole: set[str] = set()
        self._others: dict[str, array[int]] = {}
        self._checks: dict[str, TypeAdapter[Any]] = {}
        self._values: list[Any] = [None]
        self._codes: dict[str, int] = {}
        self._required: list[str] = []
        for name, field in model.model_fields.items():
            kinds = _kinds(field.annotation)
            if name == "kind":
                continue
            if field.is_required():
                self._required.append(name)
            if kinds <= {int, float}:
                self._numbers[name] = array("d")
                if float not in kinds:
                    self._whole.add(name)
            else:
                self._others[name] = array("q")
                self._checks[name] = TypeAdapter(field.annotation or Any)

    def append(self, record: _Record) -> None:
        self.append_values(record.__dict__)

    def append_values(self, values: Mapping[str, Any]) -> None:
        """Append a record by its fields; names that are none are passed over.

        Raises:
            ValueError: if a required field is missing, or one that holds a number holds none.
        """
        self.extend_values([values])

    def extend_values(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append many records by their fields, all of them or, where one is refused, none.

        A field at a time, which costs a tenth of what a record at a time does.

        Raises:
            ValueError: as append_values.
        """
        columns = [self._column_of(name, [row.get(name) for row in rows]) for name in self._numbers]
        codes = [self._codes_of(name, [row.get(name) for row in rows]) for name in self._others]
        for known, more in zip(self._numbers.values(), columns, strict=True):
            known.extend(more)
        for other, coded in zip(self._others.values(), codes, strict=True):
            other.extend(coded)
        self._length += len(rows)

    def _column_of(self, name: str, values: list[Any]) -> array[float]:
        """The values of a field of numbers, NaN for None."""
        kinds = set(map(type, values))
        if type(None) in kinds:
            if name in self._required:
                raise ValueError(f"{name} is missing")
            values = [_NAN if value is None else value for value in values]
            numbers = [value for value in values if value is not _NAN]
        else:
            numbers = values
        allowed = {int, type(None)} if name in self._whole else {int, float, type(None)}
        if kinds <= allowed and (int not in kinds or _exact(numbers)):
            column = array("d", values)
            if int(np.isfinite(np.frombuffer(column)).sum()) == len(numbers):
                return column
        raise ValueError(f"{name} is no finite number")

    def _codes_of(self, name: str, values: list[Any]) -> array[int]:
        """For each value of a field that holds no numbers its place in the list of values."""
        codes = array("q")
        for value in values:
            if value is None:
                codes.append(0)
                continue
            key = f"{name} {value!r}"
            if key not in self._codes:
                checked = self._checks[name].validate_python(value)
                self._codes[key] = len(self._values)
                self._values.append(checked)
            codes.append(self._codes[key])
        return codes

    def column(self, name: str) -> npt.NDArray[np.float64]:
        """All values of a field of numbers, NaN where a record has none."""
        return np.frombuffer(self._numbers[name], dtype=np.float64).copy()

    def known(self, name: str) -> npt.NDArray[np.float64]:
        """The values of a field of numbers, without those that are None."""
        column = self.column(name)
        return column[~np.isnan(column)]

    def codes(self, name: str) -> tuple[npt.NDArray[np.int64], list[Any]]:
        """A field that holds no numbers: for each record the place of its value in a list."""
        return np.frombuffer(self._others[name], dtype=np.int64).copy(), self._values

    def distinct(self, name: str) -> list[Any]:
        """The different values of a field that holds no numbers; None among them if it occurs."""
        return [self._values[code] for code in sorted(set(self._others[name]))]

    def last(self, name: str) -> float | None:
        """A number of the newest record; None where it has none, or there is no record."""
        if not self._length or isnan(value := self._numbers[name][-1]):
            return None
        return value

    def cut(self, length: int) -> None:
        """Forget the records after the first so many."""
        for column in self._numbers.values():
            del column[length:]
        for codes in self._others.values():
            del codes[length:]
        self._length = min(self._length, length)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Table | list) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # it grows

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[_Record]:
        return (self._record(index) for index in range(self._length))

    @overload
    def __getitem__(self, index: int) -> _Record: ...

    @overload
    def __getitem__(self, index: slice) -> list[_Record]: ...

    def __getitem__(self, index: int | slice) -> _Record | list[_Record]:
        if isinstance(index, slice):
            return [self._record(i) for i in range(*index.indices(self._length))]
        if not -self._length <= index < self._length:
            raise IndexError(index)
        return self._record(index % self._length)

    def _record(self, index: int) -> _Record:
        values: dict[str, Any] = {}
        for name, column in self._numbers.items():
            value = column[index]
            if not isnan(value):
                values[name] = int(value) if name in self._whole else value
        for name, codes in self._others.items():
            if codes[index]:
                values[name] = self._values[codes[index]]
        return self._model(**values)


def _exact(numbers: list[Any]) -> bool:
    """Whether a column of float64 holds them exactly, where they are whole."""
    return all(type(n) is float or -_MOST <= n <= _MOST for n in (min(numbers), max(numbers)))


def _kinds(annotation: Any) -> set[Any]:
    """The types of a field that may be None, without None."""
    if typing.get_origin(annotation) is Annotated:
        return _kinds(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return {kind for part in typing.get_args(annotation) for kind in _kinds(part)}
    return set() if annotation is type(None) else {annotation}
