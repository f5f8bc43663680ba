"""nanoGPT's configuration files (config/*.py) and printed configurations, read without running."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nanogauge.config import Config, make_config
from nanogauge.errors import BadInput
from nanogauge.files import package_table, read_whole

Value = bool | int | float | str
_LONGEST_EXPRESSION = 200
_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: operator.pow,
}
_GPT2_ROWS = 50304
"""Rows of the embedding for a data set that brings no vocabulary of its own."""


def literal(text: str, names: Mapping[str, Value] | None = None) -> Value | None:
    """Return the value of a Python expression of literals, `names` and arithmetic, else None."""

    def value_of(node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=bool() | int() | float() | str() as value):
                return value
            case ast.Name(id=name):
                return (names or {})[name]
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -value_of(operand)
            case ast.BinOp(left=left, op=op, right=right):
                a, b = (abs(x) and x for x in map(value_of, (left, right)))  # numbers alone
                if isinstance(op, ast.Pow) and (abs(a) > 2**20 or abs(b) > 64):
                    raise ValueError
                return _OPERATORS[type(op)](a, b)
            case ast.Call(func=ast.Name(id="int"), args=[argument], keywords=[]):
                return int(value_of(argument))
            case _:
                raise ValueError

    if len(text) > _LONGEST_EXPRESSION:
        return None
    try:
        value = value_of(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, TypeError, KeyError, ArithmeticError, RecursionError):
        return None
    return value if isinstance(value, bool | int | float | str) else None


def read_nanogpt_config(path: Path) -> dict[str, Value]:
    """Return the settings of a nanoGPT config/*.py by key of our configuration.

    The file is parsed and never executed: assignments of literals and arithmetic count, all else is
    ignored. What it does not set has the default of nanoGPT's train.py.

    Raises:
        BadInput: if the file cannot be read or is not Python.
    """
    try:
        tree = ast.parse(read_whole(path))
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}.") from None
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise BadInput(f"{path} is not a Python file; give a configuration of nanoGPT.") from None
    settings: dict[str, Value] = {}
    for statement in tree.body:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=node):
                value = literal(ast.unparse(node), settings)
                if value is not None:
                    settings[name] = value
    pretrained: dict[str, Value] = package_table("names.toml")["pretrained"].get(
        settings.get("init_from"), {}
    )
    return nanogpt_keys(settings) | pretrained


def load_nanogpt_config(path: Path, overrides: Mapping[str, Mapping[str, object]]) -> Config:
    """Return the configuration that trains here what a nanoGPT config/*.py trains there.

    Raises:
        BadInput: as read_nanogpt_config, or if the file leaves a key open that `overrides` lacks.
    """
    values: dict[str, dict[str, object]] = {"run": {"name": re.sub(r"[^\w.-]", "_", path.stem)}}
    for key, value in read_nanogpt_config(path).items():
        values.setdefault(key.partition(".")[0], {})[key.partition(".")[2]] = value
    values["data"] |= {"path": f"data/{values['data']['dataset']}", "order": "random"}
    if not {"vocab_size"} & (values["model"].keys() | overrides.get("model", {}).keys()):
        raise BadInput(
            f"{path}: nanoGPT counts the characters of this data set when it trains; give their "
            "number with --model.vocab-size: 65 for shakespeare_char."
        )
    return make_config(values, path, overrides)


def nanogpt_keys(settings: Mapping[str, Value]) -> dict[str, Value]:
    """Return nanoGPT's settings, with its defaults, by key of our configuration."""
    table = package_table("importers/formats.toml")["nanogpt"]
    names: dict[str, str] = table["names"]
    keys: dict[str, Value] = dict(table["defaults"])
    keys |= {names[name]: value for name, value in settings.items() if name in names}
    if "model.vocab_size" not in keys:
        character_level = str(keys["data.dataset"]).endswith("_char")
        keys |= {} if character_level else {"model.vocab_size": _GPT2_ROWS}
    keys["run.device"] = str(keys["run.device"]).partition(":")[0]
    # An evaluation that is the best so far, or with always_save_checkpoint any, is saved.
    keys["train.checkpoint_every"] = keys["train.eval_every"]
    if settings.get("decay_lr") is False:
        keys["optimizer.schedule"] = "constant"
    return keys
