"""Check that a resumed run would compute the same numbers as the run that it continues."""

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
    "data.dataset",
    "data.val_tokens",
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
"""Keys that determine the tensors of a checkpoint; with learned positions, block_size too."""
IDENTITY = {
    "code": "the code that trains",
    "torch": "torch",
    "device": "kind of device",
    "dtype": "arithmetic",
}
"""Names in messages of what a run's numbers depend on besides its configuration."""
DATA = "data"
_ROOT = Path(__file__).parents[2]
_CODE = ("model.py", "train.py", "trainer/data/loader.py", "nanogauge/schedule.py")


def code_sha256() -> str:
    """Return the SHA-256 of the source files that determine a run's numbers."""
    digest = hashlib.sha256()
    files = [_ROOT / name for name in _CODE]
    for path in [*files, *sorted((_ROOT / "trainer" / "step").glob("*.py"))]:
        digest.update(path.name.encode() + b"\n")
        digest.update(path.read_bytes())
    return digest.hexdigest()


def check_names(allowed: Collection[str]) -> None:
    """Check the names given with --allow-change.

    Raises:
        BadInput: for an unknown name, with the nearest one that exists.
    """
    names = [
        f"{section}.{key}"
        for section, field in Config.model_fields.items()
        for key in getattr(field.annotation, "model_fields", {})
    ]
    names += [*IDENTITY, DATA]
    for name in allowed:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"give a key, or {', '.join(IDENTITY)}."
            raise BadInput(f"--allow-change {name}: there is nothing of that name; {hint}")


def refuse_changes(old: Config, new: Config, allowed: Collection[str] = ()) -> list[str]:
    """Compare the configuration in the run folder, `old`, with the requested one, `new`.

    Returns a sentence for each difference that matters and is allowed by name.

    Raises:
        BadInput: for the first difference that matters and is not allowed, or that does not fit the
            checkpoints, with its old and new value.
    """
    changes = []
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
            changes.append(f"{name} was {value!r} and is {after[section][key]!r} from here on.")
    return changes


def refuse_other_identity(
    old: Mapping[str, object], new: Mapping[str, object], allowed: Collection[str] = ()
) -> list[str]:
    """Compare the code, torch, device and dtype of a checkpoint with the present ones.

    Returns a sentence for each difference that is allowed by name.

    Raises:
        BadInput: for the first difference that is not allowed.
    """
    changes = []
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
        changes.append(f"{name} ({words}) was {before} and is {after} from here on.")
    return changes


def _short(value: object) -> str:
    text = "not known" if value is None else str(value)
    return text[:12] if len(text) == 64 else text  # the beginning of a sha256


def refuse_other_data(
    old: Mapping[str, object], new: Mapping[str, object], allowed: Collection[str] = ()
) -> list[str]:
    """Refuse to resume on other data than the checkpoint was trained on.

    Returns one sentence about the difference if it is allowed, and nothing if there is none.

    Raises:
        BadInput: if the data differs and `allowed` does not name it; the message describes both.
    """
    if old == new:
        return []
    both = f"the run was trained on {_describe(old)}, this command reads {_describe(new)}"
    if DATA not in allowed:
        raise BadInput(
            f"cannot resume on other data: {both}; bring the old data back, begin a new run with "
            "--run.name, or take the change with --allow-change data."
        )
    return [f"The data is another from here on: {both}."]


def _describe(position: Mapping[str, object]) -> str:
    if not position:
        return "data that its checkpoint does not describe"
    return (
        f"{position['train_tokens']:,} training and {position['val_tokens']:,} validation tokens "
        f"(fingerprint {str(position['fingerprint'])[:12]}, order {position['order']}, "
        f"{position['samples']:,} samples seen)"
    )


def micro_batch_to_use(config: Config, run: Mapping[str, object]) -> int:
    """Return the micro-batch to resume with: a reduced one if the configured one did not fit.

    Args:
        config: configuration of the run.
        run: Meta.run of the checkpoint; empty for a new run.
    """
    configured = config.train.micro_batch
    if run.get("configured_micro_batch") != configured:
        return configured
    used = run["micro_batch"]
    assert isinstance(used, int)
    return used
