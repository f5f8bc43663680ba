"""Fits the constants of the step-time roofline to published runs, each held near its prior.

The prior of a constant is what physics or a data sheet says; `spread` is how far, as a factor, a
fit may comfortably move it. With few runs per constant a fit without priors would follow noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from published_runs import PublishedRun

from nanogauge.prediction.constants import Constants, DeviceClass
from nanogauge.prediction.step_time import predict_step_time

# name: (prior, spread). "class.field" is a field of a device class.
FREE: dict[str, tuple[float, float]] = {
    "products": (0.915, 1.05),
    "bandwidth_share": (0.85, 1.05),
    "exposed_per_100_sms": (0.65, 1.4),
    "kernel_tail_seconds": (2e-6, 1.4),
    "hidden_sms": (40, 1.3),
    "loss_bytes": (8.0, 1.3),
    "loss_bytes_eager": (32.0, 1.4),
    "norm_bytes": (60.0, 1.3),
    "norm_bytes_eager": (238.0, 1.3),
    "score_bytes": (24.0, 1.4),
    "score_bytes_eager": (80.0, 1.4),
    "unaligned_head": (1.3, 1.2),
    "newton_schulz": (0.65, 1.2),
    "newton_schulz_alone": (0.3, 1.4),
    "fp8_speed": (1.4, 1.2),
    "interference": (0.15, 1.5),
    "hidden_share_sharded": (0.9, 1.1),
    "ada.attention": (0.8, 1.2),
    "a100.attention": (0.4, 1.4),
    "hopper.attention": (0.22, 1.4),
    "hopper.attention_best": (0.33, 1.3),
    "b200.attention": (0.125, 1.4),
    "ampere.slowdown": (1.0, 1.3),
    "b200.slowdown": (1.0, 1.3),
    "ada.slowdown": (1.0, 1.05),
}
RUN_SPREAD = 0.08  # of the log of a run's time: set-ups, drivers and torch versions


def get(constants: Constants, name: str) -> float:
    owner, _, field = name.rpartition(".")
    return float(getattr(constants.classes[owner] if owner else constants, field))


def put(constants: Constants, values: dict[str, float]) -> Constants:
    classes: dict[str, DeviceClass] = dict(constants.classes)
    own: dict[str, float] = {}
    for name, value in values.items():
        owner, _, field = name.rpartition(".")
        if owner:
            classes[owner] = replace(classes[owner], **{field: value})  # type: ignore[arg-type]
        else:
            own[name] = value
    return replace(constants, classes=classes, **own)


def fitted_to(runs: Sequence[PublishedRun]) -> list[PublishedRun]:
    """The runs that a fit uses: 16-bit arithmetic, a time, a known class of device."""
    return [
        run
        for run in runs
        if run.work.dtype == "bfloat16"
        and run.step_seconds is not None
        and predict_step_time(run.work, run.hardware) is not None
    ]


def fit(runs: Sequence[PublishedRun], constants: Constants, rounds: int = 6) -> Constants:
    """Constants with every one of FREE fitted: robust least squares in logarithms, with priors."""
    names = list(FREE)
    prior = np.log([FREE[n][0] for n in names])
    stiff = 1 / np.log([FREE[n][1] for n in names])
    actual = np.log([run.step_seconds or math.nan for run in runs])

    trust = np.array([0.3 if run.confidence == "low" else 1.0 for run in runs])

    def predicted(logs: np.ndarray) -> np.ndarray:
        trial = put(constants, dict(zip(names, np.exp(logs).tolist(), strict=True)))
        steps = [predict_step_time(run.work, run.hardware, trial) for run in runs]
        return np.log([step.seconds for step in steps if step is not None])

    x = prior.copy()
    for _ in range(rounds):
        here = predicted(x)
        residual = here - actual
        moved = [(predicted(x + h) - here) / 0.01 for h in 0.01 * np.eye(len(names))]
        jacobian = np.stack(moved, axis=1)
        weight = trust / np.maximum(1.0, np.abs(residual) / RUN_SPREAD) / RUN_SPREAD**2  # Huber
        left = jacobian.T @ (weight[:, None] * jacobian) + np.diag(stiff**2)
        right = -jacobian.T @ (weight * residual) - stiff**2 * (x - prior)
        x = x + np.clip(np.linalg.solve(left, right), -0.3, 0.3)
    return put(constants, dict(zip(names, np.exp(x).tolist(), strict=True)))
