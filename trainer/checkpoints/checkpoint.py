"""The format of a checkpoint: a folder of three files with hashes, without pickled code.

checkpoints/step_00001000/ holds model.safetensors, state.pt (optimizer, loss scaler, random states) and meta.json,
which has the sha256 of both and, in its last line, its own. checkpoint_writer.py writes it atomically.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import safetensors
import safetensors.torch
import torch
from torch import nn

from nanogauge.files import read_whole, sha256_file, sync_folder
from trainer.step.fsdp import is_sharded, load_shards, local_tensor, sharded_state
from trainer.step.optimizer import load_state

WEIGHTS, STATE, META = "model.safetensors", "state.pt", "meta.json"
REPLACED = ".replaced"
"""Suffix of the old folder while a new checkpoint of the same step takes its name."""
_NAME = re.compile(rf"step_(\d{{8,}})({re.escape(REPLACED)})?")
_OWN_DIGEST = "sha256_of_the_above"
_HEAD = "lm_head.weight"
_EMBEDDING = "transformer.wte.weight"


class RandomState(TypedDict):
    """Random states of one rank, as bytes."""

    cpu: torch.Tensor
    device: torch.Tensor | None
    """Random state of the rank's GPU; None on a CPU."""


@dataclass(frozen=True)
class Meta:
    """The contents of meta.json without its hashes."""

    step: int
    """Number of steps made before the checkpoint."""
    data: Mapping[str, object]
    """Position in the training data, as Batches.position returns it."""
    run: Mapping[str, Any]
    """State of the run that is not a tensor, such as the number of rollbacks."""
    val_loss: float | None
    """Validation loss at this step in nats per token; None without one, or if non-finite."""


def random_state(device: torch.device) -> RandomState:
    """Return the random states of the CPU and the device."""
    if device.type == "cpu":
        return {"cpu": torch.get_rng_state(), "device": None}
    with torch.accelerator.device_index(device.index):
        on_device = torch.get_device_module(device).get_rng_state()
    return {"cpu": torch.get_rng_state(), "device": on_device}


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest intact checkpoint (None without one) and a sentence per damaged one."""
    damaged: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        if intact_meta(path) is not None:
            return path, damaged
        damaged.append(f"the checkpoint {path} is damaged and was skipped")
    return None, damaged


def read_meta(path: Path) -> Meta:
    """Read the meta.json of a checkpoint.

    Raises:
        OSError: if the checkpoint does not exist.
        ValueError: if its meta.json is damaged.
    """
    content = _content(path)
    return Meta(content["step"], content["data"], content["run"], content["val_loss"])


def load_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
) -> bool:
    """Restore model, optimizer, scaler and random states from a checkpoint.

    If the model is sharded, each rank reads only its shard; the checkpoint is never sharded.

    Returns True if random states were restored, False if the checkpoint has another world size or kind of device.
    """
    sharded = is_sharded(next(model.parameters()))
    state: dict[str, Any] = torch.load(path / STATE, map_location="cpu", weights_only=True, mmap=sharded)
    if sharded:
        load_shards(path / WEIGHTS, own_weights(model))
        load_state(optimizer, sharded_state(optimizer, state["optimizer"]))
    else:
        load_weights(path, model, device)
        load_state(optimizer, state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    of_ranks: list[RandomState] = state["random"]
    if len(of_ranks) != world or _sizes(of_ranks[rank]) != _sizes(random_state(device)):
        return False
    torch.set_rng_state(of_ranks[rank]["cpu"])
    if (on_device := of_ranks[rank]["device"]) is not None:
        with torch.accelerator.device_index(device.index):
            torch.get_device_module(device).set_rng_state(on_device)
    return True


def load_weights(path: Path, model: nn.Module, device: torch.device) -> None:
    """Load the weights of a checkpoint into a model."""
    weights = safetensors.torch.load_file(path / WEIGHTS, device=str(device))
    model.load_state_dict({_HEAD: weights[_EMBEDDING]} | weights)


def own_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights by name; a head tied to the embedding is listed once."""
    weights: dict[str, torch.Tensor] = dict(model.state_dict())
    if local_tensor(weights[_HEAD]).data_ptr() == local_tensor(weights[_EMBEDDING]).data_ptr():
        del weights[_HEAD]
    return weights


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoint folders in a folder, sorted by step, without checking for damage."""
    if not folder.is_dir():
        return []
    paths = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(paths, key=lambda path: (step_of(path), not path.name.endswith(REPLACED)))


def step_of(path: Path) -> int:
    """Return the step in the name of a checkpoint's folder."""
    named = _NAME.fullmatch(path.name)
    assert named is not None
    return int(named[1])


def intact_meta(path: Path) -> Meta | None:
    """Read the meta.json of a checkpoint; return None if any file is damaged."""
    try:
        hashes = _content(path)["sha256"]
        intact = all(sha256_file(path / name) == hashes[name] for name in (WEIGHTS, STATE))
        return read_meta(path) if intact else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def meta_bytes(content: Mapping[str, object]) -> bytes:
    """Serialise meta.json, which ends with its own hash."""
    digest = hashlib.sha256(json.dumps(content, indent=1).encode()).hexdigest()
    return json.dumps({**content, _OWN_DIGEST: digest}, indent=1).encode()


def _content(path: Path) -> dict[str, Any]:
    data = read_whole(path / META)
    content = json.loads(data)
    if not isinstance(content, dict) or content.pop(_OWN_DIGEST, None) is None:
        raise ValueError(f"{path / META} has no hash of itself")
    if meta_bytes(content) != data:
        raise ValueError(f"{path / META} does not match its hash")
    return content


def _sizes(state: RandomState) -> tuple[int, int | None]:
    on_device = state["device"]
    return state["cpu"].numel(), on_device.numel() if on_device is not None else None


def write_files(
    folder: Path, weights: Mapping[str, torch.Tensor], state: Mapping[str, object], content: Mapping[str, object]
) -> int:
    """Write the files of a checkpoint into an empty folder and fsync them; return their size.

    Both libraries write without copying tensors and without the interpreter lock, so training continues meanwhile.

    Args:
        folder: empty folder to write to; it is fsynced as well.
        weights: tensors by name, in host memory.
        state: optimizer, scaler and random states, in host memory.
        content: entries of meta.json, without the hashes.

    Raises:
        OSError: if a file cannot be written completely.
    """
    try:
        safetensors.torch.save_file(dict(weights), folder / WEIGHTS)
        torch.save(state, folder / STATE)
    except safetensors.SafetensorError as error:
        raise OSError(str(error)) from error
    except RuntimeError as error:  # torch's writer does not pass on the system's error
        raise OSError(f"torch could not write {STATE}, as when the disk is full") from error
    hashes = {name: sha256_file(folder / name) for name in (WEIGHTS, STATE)}
    (folder / META).write_bytes(meta_bytes({**content, "sha256": hashes}))
    for name in (WEIGHTS, STATE, META):
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)
    return sum((folder / name).stat().st_size for name in (WEIGHTS, STATE, META))
