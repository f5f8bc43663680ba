"""Store calibrations: one file per device and torch version, in the user's data folder.

Another torch version changes a step by 4-8 %, so each version starts without measurements.
"""

from __future__ import annotations

import re
from pathlib import Path

import platformdirs
from pydantic import ValidationError

from nanogauge.files import write_atomic
from nanogauge.prediction.calibrated import Calibration


def path_of(device: str, torch_version: str, threads: int | None) -> Path:
    """Return the path of a device's calibration, which may not exist."""
    computing = f" {threads} threads" if threads is not None else ""
    name = re.sub(r"[^A-Za-z0-9.+]+", "-", f"{device}{computing} torch {torch_version}").strip("-")
    return (
        platformdirs.user_data_path("nanogauge", appauthor=False) / "calibrations" / f"{name}.json"
    )


def load_calibration(
    device: str, torch_version: str, threads: int | None
) -> tuple[Calibration | None, str | None]:
    """Return the calibration of a device, and a warning if its file is damaged; None if absent."""
    path = path_of(device, torch_version, threads)
    try:
        return Calibration.model_validate_json(path.read_bytes()), None
    except FileNotFoundError:
        return None, None
    except (OSError, ValidationError):
        return (
            None,
            f"The calibration {path} is damaged: it is ignored, and the next one replaces it",
        )


def add_to_calibration(newer: Calibration) -> tuple[Calibration, str | None]:
    """Merge newer measurements into the stored calibration and return the result.

    The second value is a warning if the file could not be written.
    """
    known, _ = load_calibration(newer.device, newer.torch, newer.threads)
    together = newer if known is None else known.updated(newer)
    path = path_of(newer.device, newer.torch, newer.threads)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, together.model_dump_json(indent=1).encode())
    except OSError as error:
        return together, f"The calibration {path} could not be written: {error.strerror}"
    return together, None
