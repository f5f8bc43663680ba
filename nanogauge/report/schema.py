"""The JSON Schema of report.json, made of the models that write it."""

from __future__ import annotations

from typing import Any

from nanogauge.records import SCHEMA
from nanogauge.report.build import Report


def report_schema() -> dict[str, Any]:
    """Return the JSON Schema of Report.to_json; keys it does not name may be added later."""
    schema = Report.model_json_schema(mode="serialization")
    version = {"const": SCHEMA, "description": "goes up when a key changes its meaning or goes"}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "report.json of nanogauge",
        "description": "Prediction and actual of one training run. SI units: s, B, W, FLOP; energy "
        "in kWh; MFU and other ratios as fractions.",
        "type": "object",
        "properties": {"schema": version, **schema["properties"]},
        "required": ["schema", *schema["required"]],
        "$defs": schema["$defs"],
    }
