"""nanoGPT's configuration files (config/*.py) and printed configurations, read without running."""

import ast
from collections.abc import Mapping
from pathlib import Path

from nanogauge.analysis.claims import evaluate
from nanogauge.config import Config, make_config, run_name
from nanogauge.errors import BadInput
from nanogauge.files import package_table, read_whole
from nanogauge.importers.formats import TEXT_FORMATS

Value = bool | int | float | str
GPT2_ROWS = 50304
"""Rows of the embedding for a data set that brings no vocabulary of its own."""


def literal(text: str, names: Mapping[str, Value] | None = None) -> Value | None:
    """Return the value of a Python expression of literals, `names` and arithmetic, else None."""
    numbers = {name: v for name, v in (names or {}).items() if not isinstance(v, str | bool)}
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        try:
            value = evaluate(text, numbers)
        except ValueError:
            return None
        value = int(value) if value.is_integer() else value
    return value if isinstance(value, bool | int | float | str) else None


def read_nanogpt_config(path: Path) -> dict[str, Value]:
    """Return the settings of a nanoGPT config/*.py by key of our configuration.

    The file is parsed and never executed: assignments of literals and arithmetic count, all else is ignored. What it
    does not set has the default of nanoGPT's train.py.

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
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            value = literal(ast.unparse(statement.value), settings)
            if value is not None:
                settings[statement.targets[0].id] = value
    nanogpt = TEXT_FORMATS["nanogpt"]
    keys: dict[str, Value] = dict(nanogpt.defaults)
    keys |= {nanogpt.names[name]: v for name, v in settings.items() if name in nanogpt.names}
    if not str(keys["data.dataset"]).endswith("_char"):
        keys.setdefault("model.vocab_size", GPT2_ROWS)
    keys["run.device"] = str(keys["run.device"]).partition(":")[0]
    # An evaluation that is the best so far, or with always_save_checkpoint any, is saved.
    keys["train.checkpoint_every"] = keys["train.eval_every"]
    if settings.get("decay_lr") is False:
        keys["optimizer.schedule"] = "constant"
    keys |= package_table("names.toml")["pretrained"].get(settings.get("init_from"), {})
    return keys


def load_nanogpt_config(path: Path, overrides: Mapping[str, Mapping[str, object]]) -> Config:
    """Return the configuration that trains here what a nanoGPT config/*.py trains there.

    Raises:
        BadInput: as read_nanogpt_config, or if the file leaves a key open that `overrides` lacks.
    """
    values: dict[str, dict[str, object]] = {"run": {"name": run_name(path)}}
    for key, value in read_nanogpt_config(path).items():
        values.setdefault(key.partition(".")[0], {})[key.partition(".")[2]] = value
    values["data"] |= {"path": f"data/{values['data']['dataset']}", "order": "random"}
    if not {"vocab_size"} & (values["model"].keys() | overrides.get("model", {}).keys()):
        raise BadInput(
            f"{path}: nanoGPT counts the characters of this data set when it trains; give their "
            "number with --model.vocab-size: 65 for shakespeare_char."
        )
    return make_config(values, path, overrides)
