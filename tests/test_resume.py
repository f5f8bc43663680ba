"""Changes that a resumed run allows by name."""

import re
from typing import Any

import pytest
from examples import beyond_gpt2, documented_config, optimizers
from hypothesis import given, settings
from hypothesis import strategies as st

from model import GPT
from nanogauge.config import CONFIG_KEYS, Config, ModelSection, OptimizerSection
from nanogauge.errors import BadInput
from trainer.run.resume import config_differences, refuse_differences
from trainer.step.optimizer import load_state, make_optimizer


@st.composite
def models(draw: st.DrawFn) -> ModelSection:
    heads = draw(st.integers(1, 2))
    return ModelSection(
        n_layer=draw(st.integers(1, 2)),
        n_head=heads,
        n_embd=heads * draw(st.sampled_from([4, 8])),
        block_size=draw(st.sampled_from([4, 8])),
        vocab_size=draw(st.sampled_from([16, 24])),
        bias=draw(st.booleans()),
        dropout=draw(st.sampled_from([0.0, 0.1])),
        gelu=draw(st.sampled_from(["exact", "tanh"])),
        **draw(beyond_gpt2()),
    )


@st.composite
def one_key_apart(draw: st.DrawFn) -> tuple[Config, Config]:
    """Draw two configurations that differ in one key of model or optimizer."""
    sections = {"model": (draw(models()), draw(models())), "optimizer": (draw(optimizers()), draw(optimizers()))}
    name = draw(st.sampled_from(list(sections)))
    one, other = sections[name]
    key = draw(st.sampled_from(list(type(one).model_fields)))
    update: dict[str, Any] = {key: getattr(other, key)}
    if key in ("n_head", "n_embd"):
        update = {size: getattr(other, size) for size in ("n_head", "n_embd")}
    first = {section: pair[0] for section, pair in sections.items()}
    old = documented_config().model_copy(update=first)
    return old, old.model_copy(update={name: one.model_copy(update=update)})


def fits(old: Config, new: Config) -> bool:
    """Return True if weights and optimizer of one load into the other."""
    before, after = GPT(old.model), GPT(new.model)
    trained = make_optimizer(before, old.optimizer)
    try:
        after.load_state_dict(before.state_dict())
        load_state(make_optimizer(after, new.optimizer), trained.state_dict())
    except (RuntimeError, ValueError):
        return False
    return True


@settings(max_examples=150, deadline=None)
@given(one_key_apart())
def test_a_change_is_refused_unless_allowed_and_loadable(pair: tuple[Config, Config]) -> None:
    old, new = pair
    before, after = old.model_dump(), new.model_dump()
    differ = [
        f"{section}.{key}"
        for section, values in before.items()
        for key, value in values.items()
        if value != after[section][key]
    ]
    found = config_differences(old, new)
    if not differ:
        assert refuse_differences(found) == []
        return
    with pytest.raises(BadInput) as refused:
        refuse_differences(found)
    assert all(name in str(refused.value) for name in differ), "all differences at once"
    if fits(old, new):
        assert str(refused.value).endswith(f"with --allow-change {' '.join(differ)}")
        changes = refuse_differences(found, CONFIG_KEYS)
        assert [re.split("[ :]", sentence)[3] for sentence in changes] == differ
    else:
        with pytest.raises(BadInput, match="its checkpoints do not fit"):
            refuse_differences(found, CONFIG_KEYS)


@settings(max_examples=30, deadline=None)
@given(models(), optimizers(), optimizers())
def test_an_allowed_change_of_the_optimizer_takes_effect(
    model: ModelSection, before: OptimizerSection, after: OptimizerSection
) -> None:
    after = after.model_copy(update={"name": before.name, "weight_decay": 0.3, "beta2": 0.5})
    gpt = GPT(model)
    optimizer, fresh = make_optimizer(gpt, after), make_optimizer(gpt, after)
    load_state(optimizer, make_optimizer(gpt, before).state_dict())
    for group, wanted in zip(optimizer.param_groups, fresh.param_groups, strict=True):
        assert group == wanted
