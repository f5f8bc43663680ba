"""Energy of the processor packages, as Linux counts it (RAPL, under /sys/class/powercap)."""

from __future__ import annotations

import re
from pathlib import Path

from nanogauge.measure.absences import Absences

RAPL_ROOT = Path("/sys/class/powercap")
FIELD = "cpu_package_joules"

_MOST_WATTS = 1000.0
"""no package draws more: how long its counter takes at least to go around once"""


class Rapl:
    """Counts the joules of all packages together since it was made.

    Their parts (cores, memory) have zones of their own below them, and a whole notebook another
    beside them (psys): neither is a package, and to add them would count joules twice.
    """

    def __init__(self, root: Path, absences: Absences, now: float) -> None:
        self._absences = absences
        self._joules = 0.0
        self._then = now
        self._last: dict[Path, int] = {}  # microjoules, by zone
        self._range: dict[Path, int] = {}
        try:
            for zone in sorted(_packages(root)):
                self._range[zone] = int((zone / "max_energy_range_uj").read_text())
                self._last[zone] = int((zone / "energy_uj").read_text())
        except (OSError, ValueError) as error:
            absences.missing(FIELD, now, "the energy of the processor is not readable", error)
            self._last = {}
        else:
            if self._last:
                absences.present(FIELD, now)
            else:
                absences.missing(FIELD, now, f"the system counts no energy under {root}")

    @property
    def there(self) -> bool:
        """Whether there was anything to count when it was made."""
        return bool(self._last)

    def joules(self, now: float) -> float | None:
        """Joules since the start; None while a counter cannot be read.

        After so long a pause that a counter may have gone around more than once, what it counted
        is not known: None from then on.
        """
        if not self._last:
            return None
        try:
            seen = {zone: int((zone / "energy_uj").read_text()) for zone in self._last}
        except (OSError, ValueError) as error:
            self._absences.missing(FIELD, now, "the energy of the processor is not readable", error)
            return None
        if now - self._then > min(self._range.values()) * 1e-6 / _MOST_WATTS:
            pause = f"the counter may have gone around more than once in {now - self._then:.0f} s"
            self._absences.missing(FIELD, now, pause)
            self._last = {}
            return None
        for zone, microjoules in seen.items():
            rise = microjoules - self._last[zone]
            self._joules += (rise if rise >= 0 else rise + self._range[zone]) * 1e-6
        self._last, self._then = seen, now
        self._absences.present(FIELD, now)
        return round(self._joules, 2)


def _packages(root: Path) -> list[Path]:
    zones = [zone for zone in root.glob("intel-rapl:*") if re.fullmatch(r"\D+:\d+", zone.name)]
    return [zone for zone in zones if (zone / "name").read_text().startswith("package")]
