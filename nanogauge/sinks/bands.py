"""Charts of measured curves, each in one panel with its predicted interval."""

from collections import defaultdict
from typing import NamedTuple

from nanogauge.sinks.rows import HistoryRow

_MOST_POINTS = 300
"""Points of a line: all charts are sent again with each evaluation."""
_ENDS = {"_low": "low", "": "expected", "_high": "high"}


class Panel(NamedTuple):
    title: str
    measured: dict[str, str]
    """Key of the history -> label of its line."""
    row_id: str
    """Predicted quantity."""
    unit: str
    scale: float = 1.0
    """Factor from the rows to the unit."""

    @property
    def predicted(self) -> dict[str, str]:
        """Key of the history -> label of its line."""
        return {f"predicted/{self.row_id}{end}": f"predicted, {label}" for end, label in _ENDS.items()}


_FORECAST = {f"eval/forecast_final{end}": f"forecast, {label}" for end, label in _ENDS.items()}
_LOSSES = {"train/loss": "training", "eval/val_loss": "validation", **_FORECAST}
_MEMORY = {"memory/peak_process_bytes": "measured"}
PANELS = {
    "loss": Panel("Loss, with predicted and forecast final loss", _LOSSES, "val_loss", "nat per token"),
    "step_time": Panel("Step time", {"perf/step_seconds": "measured"}, "step_seconds", "s"),
    "mfu": Panel("MFU", {"perf/mfu_palm": "measured"}, "mfu_palm", "6N + 12LCT"),
    "vram": Panel("Peak memory of the process", _MEMORY, "peak_process_bytes", "GiB", 2.0**-30),
    "power": Panel("Power of the board", {"gpu/power_watts": "measured"}, "power_watts", "W"),
}
"""Name of a chart -> its panel."""


class Bands:
    """The points of all panels, from the rows of a run."""

    def __init__(self) -> None:
        self._points: dict[str, list[tuple[float, float]]] = defaultdict(list)
        self._predicted: HistoryRow = {}
        self._last_step = 0.0

    def add(self, row: HistoryRow) -> None:
        self._last_step = max(self._last_step, row["step"])
        for panel in PANELS.values():
            for key in panel.measured.keys() & row.keys():
                self._points[key].append((row["step"], row[key]))
            self._predicted |= {key: row[key] for key in panel.predicted.keys() & row.keys()}

    def lines(self, panel: Panel) -> list[tuple[str, list[float], list[float]]]:
        """Return label, steps and values of each line of a panel; none if nothing of it was measured."""
        lines = []
        for key, label in panel.measured.items():
            if points := self._points[key]:
                points = points[:: -(1 + len(points) // _MOST_POINTS)][::-1]  # with the last point
                lines.append((label, [step for step, _ in points], [value * panel.scale for _, value in points]))
        for key, label in panel.predicted.items():
            if lines and (predicted := self._predicted.get(key)) is not None:
                lines.append((label, [0.0, self._last_step], [predicted * panel.scale] * 2))
        return lines
