"""Check that a resumed run would compute the same numbers as the run that it continues."""

import difflib
import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nanogauge.config import CONFIG_KEYS, Config
from nanogauge.errors import BadInput

FREE_SECTIONS = ("measure", "cost", "wandb", "trackio", "alerts")
FREE_KEYS = (
    *("run.name", "run.out", "data.dataset", "data.val_tokens", "train.log_every", "train.prompts"),
    *("train.checkpoint_every", "train.checkpoint_minutes", "train.keep_checkpoints"),
    *("train.max_skipped", "train.max_rollbacks"),
)
SHAPING_KEYS = (
    *("model.n_layer", "model.n_embd", "model.vocab_size", "model.bias", "model.positions"),
    *("model.norm", "model.tied_head", "optimizer.name"),
)
"""Keys that determine the tensors of a checkpoint; with learned positions, block_size too."""
IDENTITY = {"code": "the code that trains", "torch": "torch", "device": "kind of device", "dtype": "arithmetic"}
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
    names = [*CONFIG_KEYS, *IDENTITY, DATA]
    for name in allowed:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"give a key, or {', '.join(IDENTITY)}."
            raise BadInput(f"--allow-change {name}: there is nothing of that name; {hint}")


@dataclass(frozen=True)
class Difference:
    """A difference between a run and the command that would resume it."""

    name: str
    """Key of the configuration, name in IDENTITY, or DATA: as for --allow-change."""
    text: str
    """Old and new value, as in "the run has 2, this command 12"."""
    fits: bool = True
    """Whether the run's checkpoints can be loaded in spite of it."""


def config_differences(old: Config, new: Config) -> list[Difference]:
    """Compare the configuration in the run folder, `old`, with the requested one, `new`."""
    found = []
    before, after = old.model_dump(), new.model_dump()
    shaping = SHAPING_KEYS + ("model.block_size",) * (old.model.positions == "learned")
    for name in CONFIG_KEYS:
        section, _, key = name.partition(".")
        if section in FREE_SECTIONS or name in FREE_KEYS:
            continue
        was, value = before[section][key], after[section][key]
        if was != value:
            text = f"the run has {was!r}, this command {value!r}"
            found.append(Difference(name, text, fits=name not in shaping))
    return found


def identity_differences(old: Mapping[str, object], new: Mapping[str, object]) -> Iterator[Difference]:
    """Compare the code, torch, device and dtype of a checkpoint with the present ones."""
    for name, words in IDENTITY.items():
        before, after = _short(old.get(name)), _short(new[name])
        if before != after:
            text = f"the run has {before} as {words}, here it is {after}"
            yield Difference(name, text)


def _short(value: object) -> str:
    text = "not known" if value is None else str(value)
    return text[:12] if len(text) == 64 else text  # the beginning of a sha256


def data_differences(old: Mapping[str, object], new: Mapping[str, object]) -> list[Difference]:
    """Compare the position in the data of a checkpoint with that of this command."""
    if old == new:
        return []
    text = f"the run was trained on {_describe(old)}, this command reads {_describe(new)}"
    return [Difference(DATA, text)]


def refuse_differences(differences: Sequence[Difference], allowed: Collection[str] = ()) -> list[str]:
    """Return a sentence for each difference, all of which must be allowed by name.

    Raises:
        BadInput: if not, or if the checkpoints do not fit; names all such differences and the flag that allows them.
    """
    unfit = [d for d in differences if not d.fits]
    refused = unfit + [d for d in differences if d.fits and d.name not in allowed]
    if not refused:
        return [f"Resumed with another {d.name}: {d.text}." for d in differences]
    each = "; ".join(f"another {d.name}: {d.text}" for d in refused)
    old = "the old value" if len(refused) == 1 else "the old values"
    if unfit:
        one = ", ".join(d.name for d in unfit)
        raise BadInput(
            f"cannot resume with {each}; with another {one} its checkpoints do not fit; use {old}, "
            "or begin a new run with --run.name."
        )
    names = " ".join(dict.fromkeys([*allowed, *(d.name for d in refused)]))
    raise BadInput(
        f"cannot resume with {each}; use {old}, begin a new run with --run.name, or take all "
        f"changes with --allow-change {names}"
    )


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
