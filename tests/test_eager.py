"""What it costs that the compilation failed."""

from __future__ import annotations

from examples import documented_config, documented_prediction

from nanogauge.hardware import lookup
from nanogauge.prediction.eager import eager_sentence, eager_total
from nanogauge.prediction.prediction import predict
from nanogauge.quantities import format_seconds


def test_the_total_without_compilation_is_the_prediction_of_such_a_run() -> None:
    """The documented run takes longer, by as many hours as the sentence says."""
    config, hardware = documented_config(), lookup("RTX 4070", "bfloat16")
    eager = eager_total(config, hardware, "bfloat16", None)
    run = config.run.model_copy(update={"compile": False})
    again = predict(config.model_copy(update={"run": run}), hardware, "bfloat16")
    compiled = documented_prediction().quantities["total_seconds"]
    assert eager == again.quantities["total_seconds"]
    assert eager is not None and eager.expected > compiled.expected
    more = format_seconds(eager.expected - compiled.expected)
    assert f"{more} more than was predicted with it." in eager_sentence(eager, compiled)
    unknown = hardware.model_copy(update={"peak_flops": None, "bandwidth_bytes_per_second": None})
    assert eager_total(config, unknown, "bfloat16", None) is None
