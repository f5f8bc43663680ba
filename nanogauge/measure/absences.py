"""What cannot be measured at the moment, since when and why: told once each time it changes."""

from __future__ import annotations

import threading
from dataclasses import dataclass


@dataclass(frozen=True)
class Change:
    """Something that is not measured any more, or again."""

    field: str
    """of the Sensor line, or energy_counter; gpu is the whole card, driver its whole driver"""
    text: str
    """one sentence: since when, in seconds since the process began, and why"""
    midway: bool
    """false for what was not there from the very start"""


class Absences:
    """The fields that are not measured. Any thread may tell it and ask it; nobody waits long.

    Args:
        whose: what of several it is that lacks them: "card 1"; empty where there is only one.
    """

    def __init__(self, whose: str = "") -> None:
        self._whose = whose
        self._lock = threading.Lock()
        self._reasons: dict[str, str] = {}
        self._seen: set[str] = set()
        self._changes: list[Change] = []

    def missing(self, field: str, now: float, what: str, error: object = None) -> None:
        """A field could not be measured at `now` seconds; said again it is no news."""
        with self._lock:
            if field in self._reasons:
                return
            midway = field in self._seen
            because = "" if error is None else f": {error}"
            reason = f"{what} from {now:.1f} s on{because}" if midway else f"{what}{because}"
            if self._whose:
                reason = f"{self._whose}: {reason}"
            self._reasons[field] = reason
            start = "" if midway else " from the start"
            self._changes.append(Change(field, f"{field} is not measured{start}: {reason}", midway))

    def present(self, field: str, now: float) -> None:
        """A field was measured at `now` seconds."""
        if field in self._seen and field not in self._reasons:
            return
        with self._lock:
            self._seen.add(field)
            if self._reasons.pop(field, None) is not None:
                of = f" of {self._whose}" if self._whose else ""
                text = f"{field}{of} is measured from {now:.1f} s on"
                self._changes.append(Change(field, text, midway=True))

    def reasons(self) -> dict[str, str]:
        """Why what is absent now is absent, by the name of the field."""
        with self._lock:
            return dict(self._reasons)

    def drain(self) -> list[Change]:
        """What changed since the last call, in the order in which it did."""
        with self._lock:
            drained, self._changes = self._changes, []
        return drained
