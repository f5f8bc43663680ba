"""What may differ between a run and its resumption: nothing that changes what is trained."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path

from nanogauge.config import Config
from nanogauge.errors import BadInput

FREE_SECTIONS = ("measure", "cost", "wandb")
FREE_KEYS = (
    "run.name",
    "run.out",
    "train.log_every",
    "train.prompts",
    "train.checkpoint_every",
    "train.checkpoint_minutes",
    "train.keep_checkpoints",
    "train.max_skipped",
    "train.max_rollbacks",
)
SHAPING_KEYS = (
    *("model.n_layer", "model.n_embd", "model.vocab_size", "model.bias", "model.positions"),
    *("model.norm", "model.tied_head", "optimizer.name"),
)
"""what says which tensors a checkpoint holds; block_size too, where positions are a table"""
IDENTITY = {
    "code": "the code that trains",
    "torch": "torch",
    "device": "kind of device",
    "dtype": "arithmetic",
}
"""what a run was trained with beside its configuration, in words"""
DATA = "data"
_ROOT = Path(__file__).parents[2]


def code_sha256() -> str:
    """Of the files on which the numbers of a run depend: the model, the loop and what it uses."""
    digest = hashlib.sha256()
    for path in (
        _ROOT / "model.py",
        _ROOT / "train.py",
        *sorted((_ROOT / "trainer" / "step").glob("*.py")),
        _ROOT / "trainer" / "data" / "loader.py",
        _ROOT / "nanogauge" / "training" / "schedule.py",
    ):
        digest.update(path.name.encode() + b"\n")
        digest.update(path.read_bytes())
    return digest.hexdigest()


def check_names(allowed: Collection[str]) -> None:
    """Whether what is allowed to change is something that could be refused.

    Raises:
        BadInput: for a name that is nothing of the kind, with the nearest one that is.
    """
    known = [
        f"{section}.{key}"
        for section, field in Config.model_fields.items()
        for key in getattr(field.annotation, "model_fields", {})
    ]
    known += [*IDENTITY, DATA]
    for name in allowed:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"give a key, or {', '.join(IDENTITY)}."
            raise BadInput(f"--allow-change {name}: there is nothing of that name; {hint}")


def refuse_changes(old: Config, new: Config, allowed: Collection[str] = ()) -> list[str]:
    """Compare the configuration in the run folder with the one that is asked for.

    Returns a sentence for each difference that matters and is allowed by name.

    Raises:
        BadInput: for the first key that differs, matters and is not allowed, with its old and new
            value; allowed or not, for one with which the checkpoints do not fit.
    """
    told = []
    before, after = old.model_dump(), new.model_dump()
    shaping = SHAPING_KEYS + ("model.block_size",) * (old.model.positions == "learned")
    for section, values in before.items():
        for key, value in values.items():
            name = f"{section}.{key}"
            if section in FREE_SECTIONS or name in FREE_KEYS or value == after[section][key]:
                continue
            both = f"the run has {value!r}, this command {after[section][key]!r}"
            if name in shaping:
                raise BadInput(
                    f"cannot resume with another {name}: {both}, and with that its checkpoints do "
                    "not fit; use the old value, or begin a new run with --run.name."
                )
            if name not in allowed:
                raise BadInput(
                    f"cannot resume with another {name}: {both}; use the old value, begin a new "
                    f"run with --run.name, or take the change with --allow-change {name}."
                )
            told.append(f"{name} was {value!r} and is {after[section][key]!r} from here on.")
    return told


def refuse_other_identity(
    old: Mapping[str, object], new: Mapping[str, object], allowed: Collection[str] = ()
) -> list[str]:
    """Compare what a checkpoint was trained with, beside its configuration, with what is here.

    Returns a sentence for each difference that is allowed by name.

    Raises:
        BadInput: for the first one that is not.
    """
    told = []
    for name, words in IDENTITY.items():
        before, after = _short(old.get(name)), _short(new[name])
        if before == after:
            continue
        if name not in allowed:
            raise BadInput(
                f"cannot resume with another {name}: the run has {before} as {words}, here it is "
                f"{after}; go back to the old one, begin a new run with --run.name, or take the "
                f"change with --allow-change {name}."
            )
        told.append(f"{name} ({words}) was {before} and is {after} from here on.")
    return told


def _short(value: object) -> str:
    text = "not known" if value is None else str(value)
    return text[:12] if len(text) == 64 else text  # of a sha256, enough to tell it from another


def refuse_other_data(
    old: Mapping[str, object], new: Mapping[str, object], allowed: Collection[str] = ()
) -> list[str]:
    """Compare the position in the data that a checkpoint holds with what its step comes to now.

    Returns a sentence if they differ and that is allowed.

    Raises:
        BadInput: if the data, or the order it is seen in, is another; with old and new beside each
            other.
    """
    if old == new:
        return []
    both = f"the run was trained on {_described(old)}, this command reads {_described(new)}"
    if DATA not in allowed:
        raise BadInput(
            f"cannot resume on other data: {both}; bring the old data back, begin a new run with "
            "--run.name, or take the change with --allow-change data."
        )
    return [f"The data is another from here on: {both}."]


def _described(position: Mapping[str, object]) -> str:
    if not position:
        return "data that its checkpoint does not tell of"
    return (
        f"{position['train_tokens']:,} training and {position['val_tokens']:,} validation tokens "
        f"(fingerprint {str(position['fingerprint'])[:12]}, order {position['order']}, "
        f"{position['samples']:,} samples seen)"
    )


def micro_batch_to_use(config: Config, run: Mapping[str, object]) -> int:
    """What is configured, or what had room when memory ran out under that very configuration.

    Args:
        run: what a checkpoint holds of the run; empty for a new one.
    """
    configured = config.train.micro_batch
    if run.get("configured_micro_batch") != configured:
        return configured
    used = run["micro_batch"]
    assert isinstance(used, int)
    return used
