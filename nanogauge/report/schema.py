"""report.schema.json: the JSON Schema of report.json, made of the models that write it.

python -m nanogauge.report.schema      writes the file anew after a model has changed
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nanogauge.records import SCHEMA
from nanogauge.report.build import Report

SCHEMA_PATH = Path(__file__).with_name("report.schema.json")


def report_schema() -> dict[str, Any]:
    """What Report.to_json gives, as JSON Schema; keys that it does not name may be added later."""
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


def schema_text() -> str:
    return json.dumps(report_schema(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    SCHEMA_PATH.write_text(schema_text(), encoding="utf-8")
