"""Load a run's model from a checkpoint, and its tokenizer."""

from dataclasses import dataclass
from pathlib import Path

from model import GPT
from nanogauge.config import Config, DataSection, load_config
from nanogauge.errors import BadInput
from nanogauge.runlog.folder import CONFIG_TOML, RunFolder, load_with_log
from nanogauge.runlog.history import RunHistory
from trainer.checkpoints.checkpoint import intact_meta, list_checkpoints, load_weights, step_of
from trainer.data.dataset import open_dataset
from trainer.data.tokenizer import Tokenizer, load_tokenizer
from trainer.step.device import DTYPES, choose_device

CHECKPOINT_HELP = "newest, best (the least validation loss of those that are kept), or a step"
TOKENIZER_HELP = "if the run's data is missing: its tokenizer, as prepare_fineweb.py takes it"


@dataclass(frozen=True)
class Trained:
    folder: RunFolder
    config: Config
    recorded: RunHistory
    step: int
    """Number of steps made before the checkpoint."""
    model: GPT
    """In eval mode, on the device."""
    skipped: list[str]
    """A sentence for each damaged checkpoint that was skipped."""


def open_trained(path: Path, which: str, device: str, half: bool) -> Trained:
    """Load a run's model from a checkpoint, in eval mode.

    Args:
        path: the run folder.
        which: "newest", "best" (lowest validation loss), or a step number.
        device: name of a device, with the values of run.device.
        half: on a GPU, convert the weights to the run's dtype.

    Raises:
        BadInput: if the run folder, an intact checkpoint or the device is missing.
    """
    folder, recorded = load_with_log(path)
    checkpoint, skipped = find_checkpoint(path / "checkpoints", which)
    place = choose_device(device)
    config = load_config(path / CONFIG_TOML)
    model = GPT(config.model).to(place)
    load_weights(checkpoint, model, place)
    if half and place.type == "cuda":
        model.to(DTYPES[folder.prediction.dtype])
    step = step_of(checkpoint)
    return Trained(folder, config, recorded, step, model.eval(), skipped)


def find_checkpoint(folder: Path, which: str) -> tuple[Path, list[str]]:
    """Return the checkpoint that `which` selects, and a sentence for each damaged one skipped.

    Raises:
        BadInput: if no intact one exists, or `which` is invalid.
    """
    if which not in ("newest", "best") and not which.isdecimal():
        raise BadInput(f"--checkpoint takes newest, best or a step, not {which!r}.")
    skipped: list[str] = []
    intact: list[tuple[float, Path]] = []
    present = list_checkpoints(folder)
    matching = [path for path in present if not which.isdecimal() or step_of(path) == int(which)]
    if present and not matching:
        steps = ", ".join(str(step_of(path)) for path in present)
        raise BadInput(f"{folder} has no checkpoint of step {which}; there are: {steps}.")
    for path in reversed(matching):
        meta = intact_meta(path)
        if meta is None:
            skipped.append(f"the checkpoint {path} is damaged and was skipped.")
        elif which != "best":
            return path, skipped
        elif meta.val_loss is not None:
            intact.append((meta.val_loss, path))
    if intact:
        return min(intact, key=lambda item: item[0])[1], skipped
    extra = " with a validation loss" if which == "best" else ""
    damage = ": " + " ".join(skipped) if skipped else "; train the run up to its first."
    raise BadInput(f"{folder} has no intact checkpoint{extra}{damage}")


def tokenizer_of(data: DataSection, given: str | None) -> Tokenizer:
    """Return the tokenizer of a run.

    Args:
        data: data section of the run's configuration.
        given: name of another tokenizer, as load_tokenizer takes it; None for the data's own.

    Raises:
        BadInput: if the data is missing or does not name it, or it cannot be loaded.
        RunFailed: if a download fails.
    """
    if given is not None:
        return load_tokenizer(given)
    try:
        opened = open_dataset(data)
    except BadInput as error:
        raise BadInput(
            f"the run's data names its tokenizer, but cannot be opened ({error}) "
            "Bring it back, or name the tokenizer with --tokenizer."
        ) from None
    if opened.tokenizer is None:
        raise BadInput(f"nothing in {data.path} names its tokenizer; name it with --tokenizer.")
    return opened.load_tokenizer()
