"""What a validation found, as one sentence that says what would be right."""

from __future__ import annotations

import difflib
import typing
from typing import Any

from pydantic import BaseModel, ValidationError


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """One finding of a validation, as a sentence naming the key and what would be right.

    A misspelt key comes first: it is often the cause of a missing one.
    """
    findings = error.errors()
    misspelt = (finding for finding in findings if finding["type"] == "extra_forbidden")
    first = next(misspelt, findings[0])
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        near = _nearest(first["loc"], model)
        return f"unknown key {where}; {f'did you mean {near}?' if near else 'remove it.'}"
    if first["type"] == "missing":
        return f"the key {where} is missing."
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    got = first["input"]
    shown = "" if isinstance(got, dict) else f", not {got!r}"
    sentence = ": ".join(filter(None, (where, message + shown)))
    return sentence if sentence.endswith("?") else sentence + "."


def _nearest(where: tuple[int | str, ...], model: type[BaseModel]) -> str | None:
    """The right name most like an unknown key: one beside it, else the same key elsewhere."""
    owner: type[BaseModel] | None = model
    for part in where[:-1]:
        if owner is not None and isinstance(part, str):
            owner = _model_in(owner.model_fields[part].annotation)
    assert owner is not None, "an unknown key lies in a table"
    key, beside = str(where[-1]), list(owner.model_fields)
    if near := difflib.get_close_matches(key, beside, n=1):
        in_list = any(isinstance(part, int) for part in where)
        return near[0] if in_list else ".".join([*map(str, where[:-1]), near[0]])
    for name, field in model.model_fields.items():
        section = _model_in(field.annotation)
        if section is not None and key in section.model_fields:
            return f"{name}.{key}"
    return None


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model of a section, of a list's items, or of an optional one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, typing.get_args(annotation))), None)
