"""The JSON Schema that report.py prints has all keys of every report.json."""

import json
from typing import Any

import pytest
from commands import run
from examples import DOCUMENTED, SEED_CLAIMS
from runs import LOG, event, make_finished, make_folder, steps, write

from nanogauge.analysis.report_model import Report, build_report, report_schema
from nanogauge.importers.described import Given
from nanogauge.importers.import_run import import_log

SCHEMA = report_schema()
NAMES = ("imported", "finished", "dead", "running")


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the report.json of an imported, a finished, a dead and a running job."""
    root = tmp_path_factory.mktemp("schema")
    (root / "log.txt").write_text(LOG)
    given = Given(DOCUMENTED, {"train": {"max_steps": 1000}}, "RTX 4070")
    import_log(root / "log.txt", given, SEED_CLAIMS, root / "imported")
    make_finished(root / "finished")
    make_folder(root / "dead")
    write(root / "dead", steps(0, 60) + event("!", "alarm") + b'{"kind": "ste')
    make_folder(root / "running")
    return {name: build_report(root / name, None)[0].to_json() for name in NAMES}


def check_keys(value: Any, schema: dict[str, Any]) -> None:
    """Check that the schema names every key of the value, at any depth."""
    names = [s.get("$ref", "").rpartition("/")[2] for s in schema.get("anyOf", [schema])]
    schemas = [SCHEMA["$defs"][name] for name in names if name] or schema.get("anyOf", [schema])
    if isinstance(value, dict):
        known = next((s for s in schemas if s.get("type") == "object"), {})
        if "properties" in known:
            assert set(known.get("required", [])) <= value.keys() <= known["properties"].keys()
        for key, inner in value.items():
            check_keys(inner, known.get("properties", {}).get(key, {}))
    elif isinstance(value, list):
        items = next((s["items"] for s in schemas if s.get("type") == "array"), {})
        for inner in value:
            check_keys(inner, items)


def test_the_command_prints_the_schema_and_nothing_else() -> None:
    printed = run("report.py", "--schema")
    assert printed.returncode == 0, printed.stderr
    assert json.loads(printed.stdout) == SCHEMA


@pytest.mark.parametrize("name", NAMES)
def test_the_schema_names_all_keys_of_every_report(reports: dict[str, Any], name: str) -> None:
    check_keys(reports[name], SCHEMA)
    assert Report.model_validate(reports[name]).to_json() == reports[name]
