"""Time of a run that trains without compilation because compiling failed."""

from __future__ import annotations

from dataclasses import replace

from nanogauge.predict.calibration import Calibration
from nanogauge.predict.prediction import predict
from nanogauge.quantities import format_range, format_seconds
from nanogauge.records import Estimate, Hardware
from nanogauge.runspec import RunSpec


def eager_total(
    spec: RunSpec, hardware: Hardware, calibration: Calibration | None
) -> Estimate | None:
    """Return seconds of the whole run without compilation; None if the device has no prediction.

    Args:
        spec: the compiled run.
        hardware: what it runs on.
        calibration: what is known of this device; without one it is the analytic prediction.
    """
    return predict(replace(spec, compile=False), hardware, calibration).best("total_seconds")


def eager_sentence(eager: Estimate, compiled: Estimate | None) -> str:
    """How long the run takes without compilation, and how much more that is.

    Args:
        eager: seconds of the whole run, as eager_total gives them.
        compiled: the same as it was predicted with compilation; None where it was not.
    """
    interval = format_range("total_seconds", eager.low, eager.high)
    takes = f"Without compilation the whole run takes about {format_seconds(eager.expected)}"
    if compiled is None:
        return f"{takes} ({interval})."
    more = eager.expected - compiled.expected
    difference = f"{format_seconds(abs(more))} {'more' if more >= 0 else 'less'}"
    return f"{takes} ({interval}), {difference} than was predicted with it."
