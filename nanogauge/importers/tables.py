"""A table that somebody exported, as CSV or Parquet, row by row: never the whole of it at once."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Protocol

from nanogauge.errors import BadInput
from nanogauge.importers.parsed import number_of
from nanogauge.importers.text import TextLines, open_log, shown

_Row = dict[str, float]


class ColumnTable(Protocol):
    columns: list[str]
    too_long: list[int]

    def rows(self, wanted: Collection[str]) -> Iterator[tuple[int, _Row | None]]:
        """Each row with its number: the figures in the wanted columns; None where it is damaged.

        Raises:
            BadInput: if the file is damaged as a whole.
        """


def open_table(path: Path, what: str) -> ColumnTable:
    """Open a table, whichever of the two it is.

    Raises:
        BadInput: if it cannot be read, or two of its columns bear one name.
    """
    with open_log(path, what) as file:
        is_parquet = file.read(4) == b"PAR1"
    table: ColumnTable = _Parquet(path) if is_parquet else _Csv(path, what)
    twice = [name for name, n in Counter(table.columns).items() if name and n > 1]
    if twice:
        raise BadInput(f"{path} has two columns {shown(min(twice))}; export one run alone.")
    return table


class _Csv:
    def __init__(self, path: Path, what: str) -> None:
        self._path = path
        self._lines = TextLines(path, what)
        self.too_long = self._lines.too_long
        self._reader = csv.reader(f"{line}\n" for _, line in self._lines)
        header = next(self._guarded(), [])
        self.columns = _without_run_name(path, header)

    def rows(self, wanted: Collection[str]) -> Iterator[tuple[int, _Row | None]]:
        for cells in self._guarded():
            if not cells:
                continue
            number = self._reader.line_num + len(self.too_long)
            row = None
            if len(cells) == len(self.columns):
                named = zip(self.columns, cells, strict=True)
                row = _figures({name: cell for name, cell in named if name in wanted})
            yield number, row

    def _guarded(self) -> Iterator[list[str]]:
        try:
            yield from self._reader
        except csv.Error:
            raise BadInput(
                f"line {self._reader.line_num} of {self._path} is no line of a CSV file; "
                "export it again."
            ) from None


def _without_run_name(path: Path, columns: list[str]) -> list[str]:
    """The columns of an exported chart bear the run's name, and its step another name."""
    named = {c.rsplit(" - ", 1)[0] for c in columns if " - " in c}
    if len(named) > 1:
        raise BadInput(f"{path} holds the columns of {len(named)} runs; export one run alone.")
    plain = [c.rsplit(" - ", 1)[-1] for c in columns]
    return ["_step" if c == "Step" and named else c for c in plain]


class _Parquet:
    def __init__(self, path: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        self._path = path
        self._errors = (pyarrow.ArrowException, OSError, ValueError)
        self.too_long: list[int] = []
        try:
            self._file = pyarrow.parquet.ParquetFile(path)
            self.columns: list[str] = list(self._file.schema_arrow.names)
        except self._errors:
            raise self._refused() from None

    def rows(self, wanted: Collection[str]) -> Iterator[tuple[int, _Row | None]]:
        names = [name for name in self.columns if name in wanted]
        number = 0
        batches = self._file.iter_batches(batch_size=4096, columns=names)
        while True:
            try:
                batch = next(batches, None)
                found = [] if batch is None else batch.to_pylist()
            except self._errors:
                raise self._refused() from None
            if batch is None:
                return
            for row in found:
                number += 1
                yield number, _figures(row)

    def _refused(self) -> BadInput:
        return BadInput(f"{self._path} is a damaged Parquet file; export it again.")


def _figures(cells: dict[str, object]) -> _Row | None:
    """The numbers of a row, without the empty ones; None where a cell holds anything else."""
    found: _Row = {}
    for name, cell in cells.items():
        if cell is None or cell == "":
            continue
        try:
            if isinstance(cell, bool) or not isinstance(cell, str | int | float):
                return None
            value = number_of(cell) if isinstance(cell, str) else float(cell)
        except (ValueError, OverflowError):
            return None
        if not math.isnan(value):
            found[name] = value
    return found
