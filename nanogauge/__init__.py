"""Predict the time, memory, energy and cost of a training run, measure them, explain errors.

The public API, loaded on first use: RunSpec describes a run, predict predicts it, and run measures a training loop and
writes its report. docs/library.md has examples.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanogauge.device import local_hardware
    from nanogauge.instrument import Run, run
    from nanogauge.prediction.prediction import predict
    from nanogauge.runspec import RunSpec

__version__ = "0.1.0"
__all__ = ["Run", "RunSpec", "local_hardware", "predict", "run"]

_MODULES = {
    "Run": "instrument",
    "RunSpec": "runspec",
    "local_hardware": "device",
    "predict": "prediction.prediction",
    "run": "instrument",
}

if sys.version_info < (3, 11):  # noqa: UP036  pip checks this, a checkout cannot
    sys.stderr.write("nanogauge needs Python 3.11 or newer: run .venv/bin/python (make setup)\n")
    sys.exit(2)
if sys.platform == "win32":
    sys.stderr.write("nanogauge does not run on Windows itself: install it inside WSL2\n")
    sys.exit(2)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module nanogauge has no attribute {name}")
    return getattr(import_module(f"nanogauge.{_MODULES[name]}"), name)
