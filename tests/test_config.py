"""The configuration: files and flags are read back exactly, and errors name the key."""

from __future__ import annotations

import json
import tempfile
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from commands import ROOT, run
from examples import DOCUMENTED
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic.fields import FieldInfo

from nanogauge.cli import Parser
from nanogauge.config import (
    Config,
    CostSection,
    DataSection,
    MeasureSection,
    ModelSection,
    OptimizerSection,
    RunSection,
    Section,
    TrainSection,
    WandbSection,
    add_config_flags,
    config_overrides,
    load_config,
    toml_value,
)
from nanogauge.errors import BadInput

ANY_TEXT = r"^[^\x00]+$"
WORDS = st.text(
    st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=12
)


def values(annotation: Any, metadata: Sequence[Any]) -> st.SearchStrategy[Any]:
    """Draw the values that a field of the configuration accepts, with odd characters in texts."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return st.sampled_from(inner)
    if origin is list:
        return st.lists(WORDS, max_size=3)
    if origin is typing.Annotated:
        return values(inner[0], [*metadata, *inner[1:]])
    if inner:
        return st.none() | values(inner[0], metadata)
    if annotation is bool:
        return st.booleans()
    rules = [r for m in metadata for r in (m.metadata if isinstance(m, FieldInfo) else [m])]
    names = ("pattern", "gt", "ge", "lt", "le")
    rule = {name: getattr(r, name) for r in rules for name in names if hasattr(r, name)}
    if annotation is str:
        pattern = rule.get("pattern", ANY_TEXT)
        return WORDS if pattern == ANY_TEXT else st.from_regex(pattern, fullmatch=True)
    if annotation is int:
        return st.integers(rule.get("ge", 1), rule["le"])
    low, high = rule.get("ge", rule.get("gt")), rule.get("le", rule.get("lt"))
    exclude = {"exclude_min": "gt" in rule, "exclude_max": "lt" in rule}
    return st.floats(low, high, allow_nan=False, allow_infinity=False, **exclude)


def sections(model: type[Section], **fixed: object) -> st.SearchStrategy[Any]:
    """Draw a section of the configuration; its fixed fields have the given values."""
    fields = {n: values(f.annotation, f.metadata) for n, f in model.model_fields.items()}
    return st.builds(model, **(fields | {name: st.just(value) for name, value in fixed.items()}))


@st.composite
def configs(draw: st.DrawFn) -> Config:
    """Draw any valid configuration."""
    heads, size = draw(st.integers(1, 64)), draw(st.integers(1, 256))
    shape: dict[str, Any] = {"n_head": heads, "n_embd": heads * size}
    if size % 2:
        shape["positions"] = "learned"
    path = draw(st.none() | WORDS)
    optimizer = draw(sections(OptimizerSection))
    sharding = {"sharding": "none"} if optimizer.name == "muon" else {}
    return Config(
        run=draw(sections(RunSection)),
        model=draw(sections(ModelSection, **shape)),
        data=draw(sections(DataSection, path=path, embedded=path is None)),
        train=draw(sections(TrainSection, **sharding)),
        optimizer=optimizer,
        measure=draw(sections(MeasureSection)),
        cost=draw(sections(CostSection)),
        wandb=draw(sections(WandbSection)),
    )


def load_text(text: str) -> Config:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "run.toml"
        path.write_text(text, encoding="utf-8")
        return load_config(path)


@settings(max_examples=40, deadline=None)
@given(configs())
def test_the_resolved_configuration_reads_back_equal(config: Config) -> None:
    assert load_text(config.to_toml()) == config


@settings(max_examples=40, deadline=None)
@given(configs(), configs())
def test_every_key_has_a_flag_that_beats_the_file(wanted: Config, in_file: Config) -> None:
    flags = []
    for section, values in wanted.model_dump().items():
        for key, value in values.items():
            if value is not None:
                text = str(value).lower() if isinstance(value, bool) else str(value)
                text = toml_value(value) if isinstance(value, list) else text
                flags.append(f"--{section}.{key.replace('_', '-')}={text}")
    parser = Parser("test")
    add_config_flags(parser)
    overrides = config_overrides(parser.parse(flags))
    for section, values in wanted.model_dump().items():
        # A flag cannot set None. model_copy does not validate: flags may correct the file.
        absent = {key: None for key, value in values.items() if value is None}
        changed = getattr(in_file, section).model_copy(update=absent)
        in_file = in_file.model_copy(update={section: changed})
    text = in_file.to_toml()
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "run.toml"
        path.write_text(text, encoding="utf-8")
        assert load_config(path, overrides) == wanted


def test_flags_of_a_command_beat_its_file() -> None:
    """With dashes or underscores, and `=` or a space."""
    flags = ["--model.n-embd", 768, "--model.n_layer=3", "--train.max-steps=1e3"]
    done = run("plan.py", DOCUMENTED, "--gpu", "RTX 4070", "--json", *flags)
    assert done.returncode == 0, done.stderr
    rows = {row["id"]: row["analytic"] for row in json.loads(done.stdout)["rows"]}
    assert rows["tokens_total"]["expected"] == 524_288 * 1000
    assert rows["parameters"]["expected"] == 3 * (12 * 768**2 + 2 * 768) + 50304 * 768 + 768


@pytest.mark.parametrize(
    ("right", "wrong", "named", "meant"),
    [
        ("beta1 =", "beta_1 =", "optimizer.beta_1", "optimizer.beta1"),
        ("[optimizer]", "[optimiser]", "optimiser", "optimizer"),
        ("[run]", "n_layer = 3\n[run]", "n_layer", "model.n_layer"),
        ("n_layer =", "n_layers =", "model.n_layers", "model.n_layer"),
        ("max_steps =", "maxsteps =", "train.maxsteps", "train.max_steps"),
        ("[model]", "[modle]", "modle", "model"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_right_one(
    right: str, wrong: str, named: str, meant: str
) -> None:
    text = DOCUMENTED.read_text(encoding="utf-8")
    assert right in text
    with pytest.raises(BadInput) as refused:
        load_text(text.replace(right, wrong))
    assert f"unknown key {named}; did you mean {meant}?" in str(refused.value)


@pytest.mark.parametrize(
    ("right", "wrong", "named"),
    [
        ("n_layer = 12", 'n_layer = "12"', "model.n_layer"),
        ("n_layer = 12", "n_layer = true", "model.n_layer"),
        ("n_layer = 12", "n_layer = 12.5", "model.n_layer"),
        ("n_layer = 12", "n_layer = 0", "model.n_layer"),
        ("n_embd = 384", "n_embd = 385", "n_embd 385 is not a multiple of n_head 12"),
        ("compile = true", "compile = 1", "run.compile"),
        ("dropout = 0.1", "dropout = nan", "model.dropout"),
        ("tokens = 3.68e9", "tokens = inf", "data.tokens"),
        ('dtype = "bfloat16"', 'dtype = "bf16"', "run.dtype"),
        ('path = "data/fineweb_edu"', "embedded = false", "give either path"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_its_key(
    right: str, wrong: str, named: str
) -> None:
    text = DOCUMENTED.read_text(encoding="utf-8")
    assert right in text
    with pytest.raises(BadInput) as refused:
        load_text(text.replace(right, wrong))
    assert named in str(refused.value)


def test_counts_may_be_written_as_floats_and_floats_as_integers() -> None:
    text = DOCUMENTED.read_text(encoding="utf-8")
    config = load_text(text.replace("learning_rate = 1e-3", "learning_rate = 1", 1))
    assert config.data.tokens == 3_680_000_000
    assert isinstance(config.data.tokens, int)
    assert config.optimizer.learning_rate == 1.0


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda p: p.stem)
def test_every_shipped_configuration_is_valid(path: Path) -> None:
    config = load_config(path)
    assert config.run.name == path.stem  # the run folder shows which file it is from


def test_the_documented_configuration_is_the_documented_run() -> None:
    """The run that the claims of predictions/seed_zh.toml are about."""
    config = load_config(DOCUMENTED)
    expected = {
        "run": {"dtype": "bfloat16", "compile": True},
        "model": {
            "n_layer": 12,
            "n_head": 12,
            "n_embd": 384,
            "block_size": 1024,
            "vocab_size": 50304,
            "bias": False,
            "dropout": 0.1,
        },
        "data": {"tokens": 3_680_000_000, "embedded": False},
        "train": {
            "micro_batch": 16,
            "grad_accum": 32,
            "max_steps": 20000,
            "eval_every": 500,
            "eval_batches": 200,
        },
        "optimizer": {
            "learning_rate": 1e-3,
            "min_learning_rate": 1e-4,
            "warmup_steps": 500,
            "decay_steps": None,
            "schedule": "cosine",
            "beta1": 0.9,
            "beta2": 0.99,
            "weight_decay": 0.1,
            "grad_clip": 1.0,
        },
    }
    dumped = config.model_dump()
    for section, values in expected.items():
        assert {key: dumped[section][key] for key in values} == values
