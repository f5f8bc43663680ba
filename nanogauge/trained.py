"""A run's model, for what comes after training: one of its checkpoints, and its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tiktoken

from model import GPT
from nanogauge.config import Config, DataSection, load_config
from nanogauge.errors import BadInput
from nanogauge.prepare.embedded import byte_encoding
from nanogauge.prepare.opening import open_dataset
from nanogauge.prepare.tokenizer import load_encoding
from nanogauge.recorded import Recorded
from nanogauge.runfolder import CONFIG_TOML, RunFolder, load_with_log
from nanogauge.training.checkpoint import intact_meta, list_checkpoints, load_weights, step_of
from nanogauge.training.device import DTYPES, choose_device

CHECKPOINT_HELP = "newest, best (the least validation loss of those that are kept), or a step"
TOKENIZER_HELP = "where the run's data is not there: gpt2, or a file of ranks"


@dataclass(frozen=True)
class Trained:
    folder: RunFolder
    config: Config
    recorded: Recorded
    step: int
    """updates that the weights have seen"""
    model: GPT
    """in eval mode, on the device"""
    passed_over: list[str]
    """a sentence for each damaged checkpoint that would have come first"""


def open_trained(path: Path, which: str, device: str, half: bool) -> Trained:
    """Load the model of a run.

    Args:
        path: the run folder.
        which: newest, best, or a step.
        device: as run.device.
        half: on a GPU, weights in the run's 16 bits; fp32 elsewhere.

    Raises:
        BadInput: if it is no run folder, there is no such checkpoint that is whole, or no such
            device.
    """
    folder, recorded = load_with_log(path)
    checkpoint, passed_over = find_checkpoint(path / "checkpoints", which)
    place = choose_device(device)
    config = load_config(path / CONFIG_TOML)
    model = GPT(config.model).to(place)
    load_weights(checkpoint, model, place)
    if half and place.type == "cuda":
        model.to(DTYPES[folder.prediction.dtype])
    step = step_of(checkpoint)
    return Trained(folder, config, recorded, step, model.eval(), passed_over)


def find_checkpoint(folder: Path, which: str) -> tuple[Path, list[str]]:
    """The checkpoint that is asked for, and a sentence for each damaged one before it.

    Raises:
        BadInput: if there is none that is whole, or `which` is not understood.
    """
    if which not in ("newest", "best") and not which.isdecimal():
        raise BadInput(f"--checkpoint takes newest, best or a step, not {which!r}.")
    passed_over: list[str] = []
    whole: list[tuple[float, Path]] = []
    there = list_checkpoints(folder)
    wanted = [path for path in there if not which.isdecimal() or step_of(path) == int(which)]
    if there and not wanted:
        known = ", ".join(str(step_of(path)) for path in there)
        raise BadInput(f"{folder} has no checkpoint of step {which}; there are: {known}.")
    for path in reversed(wanted):
        meta = intact_meta(path)
        if meta is None:
            passed_over.append(f"the checkpoint {path} is damaged and was passed over.")
        elif which != "best":
            return path, passed_over
        elif meta.val_loss is not None:
            whole.append((meta.val_loss, path))
    if whole:
        return min(whole, key=lambda found: found[0])[1], passed_over
    extra = " with a validation loss" if which == "best" else ""
    damage = ": " + " ".join(passed_over) if passed_over else "; train the run up to its first."
    raise BadInput(f"{folder} has no whole checkpoint{extra}{damage}")


def tokenizer_of(data: DataSection) -> tuple[str, str]:
    """The tokenizer of a run's data as load_tokenizer takes it, and its pattern of words.

    Raises:
        BadInput: if the data is not there, or nothing in it tells.
    """
    assert data.folder is not None
    try:
        opened = open_dataset(data.folder)
    except BadInput as error:
        raise BadInput(
            f"the run's tokenizer is told by its data, which cannot be opened ({error}) "
            "Bring it back, or name the tokenizer with --tokenizer."
        ) from None
    if opened.tokenizer is None:
        raise BadInput(f"nothing in {data.path} tells its tokenizer; name it with --tokenizer.")
    return opened.tokenizer, opened.pattern


def encoding_of(data: DataSection, given: str | None) -> tiktoken.Encoding:
    """The tokenizer of a run, as tiktoken has it.

    Args:
        data: of the run's configuration.
        given: a name that the user gives instead, as load_tokenizer takes it.

    Raises:
        BadInput: if nothing tells, or it is none of tiktoken's.
        RunFailed: if it has to be downloaded and cannot be.
    """
    if given is not None:
        return load_encoding(given)
    return byte_encoding() if data.embedded else load_encoding(*tokenizer_of(data))
