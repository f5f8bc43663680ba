"""What may differ between a run and its resumption: nothing that changes what is trained."""

from __future__ import annotations

from collections.abc import Mapping

from nanogauge.config import Config
from nanogauge.errors import BadInput

FREE_SECTIONS = ("measure", "cost", "wandb")
FREE_KEYS = ("run.name", "run.out", "train.log_every", "train.prompts")


def refuse_changes(old: Config, new: Config) -> None:
    """Compare the configuration in the run folder with the one that is asked for.

    Raises:
        BadInput: for the first key that differs and matters, with its old and new value.
    """
    before, after = old.model_dump(), new.model_dump()
    for section, values in before.items():
        for key, value in values.items():
            name = f"{section}.{key}"
            if section in FREE_SECTIONS or name in FREE_KEYS or value == after[section][key]:
                continue
            raise BadInput(
                f"cannot resume with another {name}: the run has {value!r}, this command "
                f"{after[section][key]!r}; use the old value, or begin a new run with --run.name."
            )


def refuse_other_data(old: Mapping[str, object], new: Mapping[str, object]) -> None:
    """Compare the position in the data that a checkpoint holds with what its step comes to now.

    Raises:
        BadInput: if the data, or the order it is seen in, is another; with old and new beside each
            other.
    """
    if old != new:
        raise BadInput(
            f"cannot resume on other data: the run was trained on {_described(old)}, this command "
            f"reads {_described(new)}; bring the old data back, or begin a new run with --run.name."
        )


def _described(position: Mapping[str, object]) -> str:
    if not position:
        return "data that its checkpoint does not tell of"
    return (
        f"{position['train_tokens']:,} training and {position['val_tokens']:,} validation tokens "
        f"(fingerprint {str(position['fingerprint'])[:12]}, order {position['order']}, "
        f"{position['samples']:,} samples seen)"
    )
