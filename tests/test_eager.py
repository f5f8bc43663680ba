"""Prediction of the total time without compilation."""

from __future__ import annotations

from dataclasses import replace

from examples import documented_prediction, documented_spec

from nanogauge.hardware import lookup
from nanogauge.prediction.prediction import eager_sentence, eager_total, predict
from nanogauge.quantities import format_seconds


def test_the_total_without_compilation_is_the_prediction_of_an_eager_run() -> None:
    spec, hardware = documented_spec(), lookup("RTX 4070", "bfloat16")
    eager = eager_total(spec, hardware, None)
    again = predict(replace(spec, compile=False), hardware)
    compiled = documented_prediction().quantities["total_seconds"]
    assert eager == again.quantities["total_seconds"]
    assert eager is not None and eager.expected > compiled.expected
    more = format_seconds(eager.expected - compiled.expected)
    assert f"{more} more than was predicted with it." in eager_sentence(eager, compiled)
    unknown = hardware.model_copy(update={"peak_flops": None, "bandwidth_bytes_per_second": None})
    assert eager_total(spec, unknown, None) is None
