"""The configuration: files and flags are read back exactly, and errors name the key."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from commands import ROOT, run
from examples import DOCUMENTED
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogauge.cli import Parser
from nanogauge.config import (
    Config,
    CostSection,
    DataSection,
    MeasureSection,
    ModelSection,
    OptimizerSection,
    RunSection,
    TrainSection,
    WandbSection,
    add_config_flags,
    config_overrides,
    load_config,
    toml_value,
)
from nanogauge.errors import BadInput

COUNTS = st.integers(1, 10**15)
NATURAL = st.integers(0, 10**15)
POSITIVE = st.floats(0, exclude_min=True, allow_infinity=False)
NOT_NEGATIVE = st.floats(0, allow_infinity=False)
TRAIN_WORDS = {"prompts", "head", "checkpointing", "sharding"}
FRACTIONS = st.floats(0, 1, exclude_max=True)
WORDS = st.text(
    st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=12
)


@st.composite
def models(draw: st.DrawFn) -> ModelSection:
    heads, size = draw(st.integers(1, 64)), draw(st.integers(1, 256))
    positions = draw(st.sampled_from(["learned", "rotary"] if size % 2 == 0 else ["learned"]))
    return ModelSection(
        n_layer=draw(COUNTS),
        n_head=heads,
        n_embd=heads * size,
        block_size=draw(COUNTS),
        vocab_size=draw(COUNTS),
        bias=draw(st.booleans()),
        dropout=draw(FRACTIONS),
        gelu=draw(st.sampled_from(["exact", "tanh"])),
        positions=positions,
        norm=draw(st.sampled_from(["layernorm", "rmsnorm"])),
        qk_norm=draw(st.booleans()),
        activation=draw(st.sampled_from(["gelu", "relu2"])),
        tied_head=draw(st.booleans()),
        zero_init=draw(st.booleans()),
        logit_softcap=draw(NOT_NEGATIVE),
    )


@st.composite
def configs(draw: st.DrawFn) -> Config:
    """Draw any valid configuration, with odd characters in free text."""
    path = draw(st.none() | WORDS)
    sharding = draw(st.sampled_from(["none", "full"]))
    return Config(
        run=RunSection(
            name=draw(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,8}", fullmatch=True)),
            out=draw(WORDS),
            device=draw(st.sampled_from(["auto", "cuda", "mps", "cpu"])),
            dtype=draw(st.sampled_from(["auto", "float32", "bfloat16", "float16"])),
            compile=draw(st.booleans()),
            init_from=draw(st.none() | WORDS),
            seed=draw(NATURAL),
            deterministic=draw(st.booleans()),
        ),
        model=draw(models()),
        data=DataSection(
            path=path,
            tokens=draw(st.none() | COUNTS),
            embedded=path is None,
            order=draw(st.sampled_from(["permutation", "random"])),
        ),
        train=draw(
            st.builds(
                TrainSection,
                **dict.fromkeys(TrainSection.model_fields.keys() - TRAIN_WORDS, COUNTS),
                head=st.sampled_from(["chunked", "plain"]),
                checkpointing=st.sampled_from(["none", "full"]),
                sharding=st.just(sharding),
                prompts=st.lists(WORDS, max_size=3),
            ),
        ),
        optimizer=OptimizerSection(
            # Muon is not for sharded matrices.
            name=draw(st.sampled_from(["adamw"] if sharding == "full" else ["adamw", "muon"])),
            learning_rate=draw(POSITIVE),
            matrix_learning_rate=draw(st.none() | POSITIVE),
            min_learning_rate=draw(NOT_NEGATIVE),
            warmup_steps=draw(NATURAL),
            decay_steps=draw(st.none() | COUNTS),
            schedule=draw(st.sampled_from(["cosine", "wsd", "constant"])),
            decay_share=draw(st.floats(0, 1, exclude_min=True)),
            beta1=draw(FRACTIONS),
            beta2=draw(FRACTIONS),
            momentum=draw(FRACTIONS),
            weight_decay=draw(NOT_NEGATIVE),
            grad_clip=draw(NOT_NEGATIVE),
        ),
        measure=MeasureSection(
            power_hz=draw(st.floats(0, 100, exclude_min=True)),
            gpu=draw(WORDS),
            idle_seconds=draw(st.floats(0, 600)),
            split_every=draw(COUNTS),
            hang_minutes=draw(NOT_NEGATIVE),
        ),
        cost=CostSection(
            price_per_kwh=draw(st.none() | POSITIVE),
            currency=draw(st.sampled_from(["EUR", "TWD"])),
            machine_watts=draw(st.none() | NOT_NEGATIVE),
        ),
        wandb=WandbSection(
            mode=draw(st.sampled_from(["auto", "online", "offline", "disabled"])),
            project=draw(WORDS),
        ),
    )


def load_text(text: str) -> Config:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "run.toml"
        path.write_text(text, encoding="utf-8")
        return load_config(path)


def test_the_strategy_draws_every_key() -> None:
    """A key that is not drawn would escape the tests below."""
    drawn: dict[str, set[str]] = {}

    @settings(max_examples=200, deadline=None)
    @given(configs())
    def collect(config: Config) -> None:
        for section, values in config.model_dump().items():
            for key, value in values.items():
                drawn.setdefault(f"{section}.{key}", set()).add(repr(value))

    collect()
    assert [name for name, values in drawn.items() if len(values) == 1] == []


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
