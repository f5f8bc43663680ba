"""The configuration: files and flags are read back exactly, and errors name the key."""

import json
import tempfile
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, Literal

import pytest
from commands import ROOT, run_here
from examples import DOCUMENTED
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic.fields import FieldInfo

from nanogauge.cli import Parser
from nanogauge.config import Config, add_config_flags, config_overrides, load_config, toml_value
from nanogauge.errors import BadInput

WORDS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=12)


def values_of(info: FieldInfo) -> st.SearchStrategy[Any]:
    """Draw any valid value of a key, with odd characters in free text."""
    kind = info.annotation
    if typing.get_origin(kind) is Literal:
        return st.sampled_from(typing.get_args(kind))
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return st.one_of(*(values_of(FieldInfo.from_annotation(k)) for k in typing.get_args(kind)))
    limits = {
        limit: getattr(part, limit)
        for part in info.metadata
        for limit in ("gt", "ge", "lt", "le", "pattern")
        if getattr(part, limit, None) is not None
    }
    low, high = limits.get("ge", limits.get("gt")), limits.get("le", limits.get("lt"))
    if kind is int:
        return st.integers(low + ("gt" in limits), high)
    if kind is float:
        ends = {"exclude_min": "gt" in limits, "exclude_max": "lt" in limits}
        return st.floats(low, high, allow_infinity=False, **ends)
    if kind is str and "A-Z" in limits.get("pattern", ""):
        return st.from_regex(limits["pattern"], fullmatch=True)
    plain: dict[Any, st.SearchStrategy[Any]] = {
        str: WORDS,
        bool: st.booleans(),
        type(None): st.none(),
        list[str]: st.lists(WORDS, max_size=3),
    }
    return plain[kind]


@st.composite
def configs(draw: st.DrawFn) -> Config:
    drawn: dict[str, dict[str, Any]] = {
        section: {
            key: draw(values_of(info))
            for key, info in field.annotation.model_fields.items()  # type: ignore[union-attr]
        }
        for section, field in Config.model_fields.items()
        if section != "alerts"  # its address is a secret, which no file holds
    }
    size = 2 * draw(st.integers(1, 128))
    drawn["model"] |= {"n_head": (heads := draw(st.integers(1, 64))), "n_embd": heads * size}
    drawn["data"]["embedded"] = drawn["data"]["path"] is None
    if drawn["optimizer"]["name"] == "muon":
        drawn["train"]["sharding"] = "none"
    return Config.model_validate(drawn)


def load_text(text: str, overrides: dict[str, dict[str, object]] | None = None) -> Config:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "run.toml"
        path.write_text(text, encoding="utf-8")
        return load_config(path, overrides)


def changed(right: str, wrong: str) -> str:
    text = DOCUMENTED.read_text(encoding="utf-8")
    assert right in text
    return text.replace(right, wrong)


@settings(max_examples=25, deadline=None)
@given(configs())
def test_the_resolved_configuration_reads_back_equal(config: Config) -> None:
    assert load_text(config.to_toml()) == config


@settings(max_examples=25, deadline=None)
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
    assert load_text(in_file.to_toml(), overrides) == wanted


def test_flags_of_a_command_beat_its_file() -> None:
    """With dashes or underscores, and `=` or a space."""
    flags = ["--model.n-embd", 768, "--model.n_layer=3", "--train.max-steps=1e3"]
    done = run_here("plan.py", DOCUMENTED, "--gpu", "RTX 4070", "--json", *flags)
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
def test_an_unknown_key_is_named_with_the_nearest_right_one(right: str, wrong: str, named: str, meant: str) -> None:
    with pytest.raises(BadInput) as refused:
        load_text(changed(right, wrong))
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
        ('path = "data/fineweb"', "embedded = false", "give either path"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_its_key(right: str, wrong: str, named: str) -> None:
    with pytest.raises(BadInput) as refused:
        load_text(changed(right, wrong))
    assert named in str(refused.value)


def test_counts_may_be_written_as_floats_and_floats_as_integers() -> None:
    config = load_text(changed("learning_rate = 1e-3", "learning_rate = 1"))
    assert config.data.tokens == 3_680_000_000
    assert isinstance(config.data.tokens, int)
    assert config.optimizer.learning_rate == 1.0


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda p: p.stem)
def test_every_shipped_configuration_is_valid(path: Path) -> None:
    config = load_config(path)
    assert config.run.name == path.stem  # the run folder shows which file it is from


DOCUMENTED_RUN = """
run = {dtype = "bfloat16", compile = true}
model = {n_layer = 12, n_head = 12, n_embd = 384, block_size = 1024, vocab_size = 50304,\
 bias = false, dropout = 0.1}
data = {tokens = 3_680_000_000, embedded = false}
train = {micro_batch = 16, grad_accum = 32, max_steps = 20000, eval_every = 500,\
 eval_batches = 200}
optimizer = {learning_rate = 1e-3, min_learning_rate = 1e-4, warmup_steps = 500,\
 schedule = "cosine", beta1 = 0.9, beta2 = 0.99, weight_decay = 0.1, grad_clip = 1.0}
"""


def test_the_documented_configuration_is_the_documented_run() -> None:
    """The claims of predictions/seed_zh.toml are about this run."""
    dumped = load_config(DOCUMENTED).model_dump()
    assert dumped["optimizer"]["decay_steps"] is None
    for section, values in tomllib.loads(DOCUMENTED_RUN).items():
        assert {key: dumped[section][key] for key in values} == values
