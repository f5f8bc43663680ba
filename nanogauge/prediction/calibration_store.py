"""Where calibrations are kept: a file per device and version of torch, in the user's data folder.

Another version of torch moves a step by 4-8 %, so each begins with nothing.
"""

from __future__ import annotations

import re
from pathlib import Path

import platformdirs
from pydantic import ValidationError

from nanogauge.files import write_atomic
from nanogauge.prediction.calibrated import Calibration


def path_of(device: str, torch_version: str, threads: int | None) -> Path:
    """Where the calibration of a device lies, whether there is one or not."""
    computing = f" {threads} threads" if threads is not None else ""
    name = re.sub(r"[^A-Za-z0-9.+]+", "-", f"{device}{computing} torch {torch_version}").strip("-")
    return (
        platformdirs.user_data_path("nanogauge", appauthor=False) / "calibrations" / f"{name}.json"
    )


def load_calibration(
    device: str, torch_version: str, threads: int | None
) -> tuple[Calibration | None, str | None]:
    """What is known of a device; and a warning, where there is a file that cannot be used."""
    path = path_of(device, torch_version, threads)
    try:
        return Calibration.model_validate_json(path.read_bytes()), None
    except FileNotFoundError:
        return None, None
    except (OSError, ValidationError):
        return None, f"The calibration {path} is damaged: it is left out, and the next replaces it"


def add_to_calibration(newer: Calibration) -> tuple[Calibration, str | None]:
    """Keep newer figures with what is already known of their device; returns both together.

    The second value is a warning, where they could not be written.
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
