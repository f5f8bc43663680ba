"""The JSON Schema that report.py prints accepts every report.json and refuses wrong ones."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from commands import run
from examples import DOCUMENTED, SEED_CLAIMS
from runs import event, make_finished, make_folder, nanogpt_log, steps, write

from nanogauge.analysis.report_model import Report, report_schema

SCHEMA = report_schema()
NAMES = ("imported", "finished", "dead", "running")
KEYWORDS = {
    *("$schema", "$defs", "$ref", "title", "description", "default", "const", "enum"),
    *("type", "properties", "required", "items", "anyOf", "additionalProperties"),
}
TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "null": (type(None),),
    "integer": (int,),
    "number": (int, float),
}


def problems(value: Any, schema: dict[str, Any], where: str = "$") -> list[str]:
    """Return how a value violates a schema, by the keywords that our schema uses."""
    assert set(schema) <= KEYWORDS, set(schema) - KEYWORDS
    if "$ref" in schema:
        return problems(value, SCHEMA["$defs"][schema["$ref"].removeprefix("#/$defs/")], where)
    if "anyOf" in schema:
        found = [problems(value, one, where) for one in schema["anyOf"]]
        return [] if [] in found else [f"{where}: none of {len(found)}", *found[0]]
    if "const" in schema and value != schema["const"]:
        return [f"{where}: not {schema['const']}"]
    if "enum" in schema and value not in schema["enum"]:
        return [f"{where}: {value!r} is none of {schema['enum']}"]
    kind = schema.get("type")
    if kind is not None and (
        not isinstance(value, TYPES[kind])
        or (isinstance(value, bool) and kind in ("integer", "number"))
    ):
        return [f"{where}: {value!r} is no {kind}"]
    found_here: list[str] = []
    if isinstance(value, dict):
        known = schema.get("properties", {})
        found_here += [
            f"{where}.{k} is missing" for k in schema.get("required", []) if k not in value
        ]
        for key, inner in value.items():
            under = known.get(key, schema.get("additionalProperties"))
            if isinstance(under, dict):
                found_here += problems(inner, under, f"{where}.{key}")
            elif known:
                found_here.append(f"{where}.{key} is not in the schema")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            found_here += problems(inner, schema.get("items", {}), f"{where}[{index}]")
    return found_here


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the report.json of an imported, a finished, a dead and a running job."""
    root = tmp_path_factory.mktemp("schema")
    log = root / "log.txt"
    log.write_text(nanogpt_log(400, 100, 200, lambda _: 3900.0, 9000.0, 20_000.0))
    imported = run(
        "report.py",
        *("--nanogpt-log", log, "--config", DOCUMENTED, "--gpu", "RTX 4070"),
        *("--claims", SEED_CLAIMS, "--out", root / "imported"),
    )
    assert imported.returncode == 0, imported.stderr
    make_finished(root / "finished")
    make_folder(root / "dead")
    write(root / "dead", steps(0, 60) + event("!", "alarm") + b'{"kind": "ste')
    make_folder(root / "running")
    for name in NAMES[1:]:
        assert run("report.py", root / name).returncode == 0
    return {name: json.loads((root / name / "report.json").read_text("utf-8")) for name in NAMES}


def test_the_command_prints_a_valid_schema_and_nothing_else() -> None:
    printed = run("report.py", "--schema")
    assert printed.returncode == 0, printed.stderr
    assert json.loads(printed.stdout) == SCHEMA

    def check(schema: dict[str, Any]) -> None:
        assert set(schema) <= KEYWORDS, set(schema) - KEYWORDS
        if "$ref" in schema:
            assert schema["$ref"].removeprefix("#/$defs/") in SCHEMA["$defs"]
        assert set(schema.get("required", [])) <= set(schema.get("properties", {}))
        assert schema.get("type", "object") in TYPES
        inner = [*schema.get("anyOf", []), *schema.get("properties", {}).values()]
        inner += [*schema.get("$defs", {}).values()]
        inner += [schema[key] for key in ("items", "additionalProperties") if key in schema]
        for one in inner:
            if not isinstance(one, bool):  # as additionalProperties may be
                check(one)

    check(SCHEMA)


@pytest.mark.parametrize("name", NAMES)
def test_every_report_matches_the_schema_which_names_all_its_keys(
    reports: dict[str, Any], name: str
) -> None:
    assert problems(reports[name], SCHEMA) == []
    assert Report.model_validate(reports[name]).to_json() == reports[name]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["schema"], 2),
        (["run", "steps_done"], "many"),
        (["run", "steps_done"], True),
        (["run", "state"], "asleep"),
        (["rows", 0, "verdict"], "perhaps"),
        (["rows", 0, "why"], None),
        (["time_ledger", "wall_s"], "1 h"),
        (["warnings"], "one"),
    ],
)
def test_the_schema_refuses_wrong_and_missing_values(
    reports: dict[str, Any], path: list[Any], value: Any
) -> None:
    wrong = copy.deepcopy(reports["dead"])
    inner = wrong
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    assert problems(wrong, SCHEMA) != []
    del inner[path[-1]]
    assert problems(wrong, SCHEMA) != []
