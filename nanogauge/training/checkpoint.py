"""What a checkpoint is: a folder of three files that any flipped bit makes damaged, without pickle.

checkpoints/step_00001000/ holds model.safetensors, state.pt (optimizer, loss scaler, random states)
and meta.json, which has the sha256 of both and, in its last line, one of itself. How it comes to be
there is in checkpoint_writer.py.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import safetensors.torch
import torch
from torch import nn

from nanogauge.files import read_whole, sha256_file
from nanogauge.training.optimizer import load_state
from nanogauge.training.sharding import is_sharded, load_parts, local_part, sharded_state

WEIGHTS, STATE, META = "model.safetensors", "state.pt", "meta.json"
REPLACED = ".replaced"
"""ends the name of a checkpoint while one of the same step takes its place"""
_NAME = re.compile(rf"step_(\d{{8,}})({re.escape(REPLACED)})?")
_OWN_DIGEST = "sha256_of_the_above"
_HEAD = "lm_head.weight"
_EMBEDDING = "transformer.wte.weight"


class RandomState(TypedDict):
    """Where the generators of one rank stand, as bytes."""

    cpu: torch.Tensor
    device: torch.Tensor | None
    """of the GPU that the rank computes on; None on a CPU"""


@dataclass(frozen=True)
class Meta:
    """What meta.json tells of a checkpoint."""

    step: int
    """updates that were made before it"""
    data: Mapping[str, object]
    """the position in the data"""
    run: Mapping[str, Any]
    """whatever the run wanted to be kept with it"""
    val_loss: float | None
    """nats per token at this very step; None where there was no evaluation, or no finite loss"""


def random_state(device: torch.device) -> RandomState:
    """The state of the CPU's generator, and of that of the device."""
    if device.type == "cpu":
        return {"cpu": torch.get_rng_state(), "device": None}
    with torch.accelerator.device_index(device.index):
        there = torch.get_device_module(device).get_rng_state()
    return {"cpu": torch.get_rng_state(), "device": there}


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest intact checkpoint, and a sentence for each damaged one that was passed over."""
    damaged: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        if intact_meta(path) is not None:
            return path, damaged
        damaged.append(f"the checkpoint {path} is damaged and was passed over")
    return None, damaged


def read_meta(path: Path) -> Meta:
    """What a checkpoint tells of itself.

    Raises:
        OSError: if there is no such checkpoint.
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
    """Put everything back as it was after the checkpoint's step.

    Of a model that is sharded each reads its part, whatever made the checkpoint.

    Returns whether the random states were among it: they are not where there were another number of
    ranks, or another kind of device.
    """
    sharded = is_sharded(next(model.parameters()))
    state: dict[str, Any] = torch.load(
        path / STATE, map_location="cpu", weights_only=True, mmap=sharded
    )
    if sharded:
        load_parts(path / WEIGHTS, own_weights(model))
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
    """Put the weights of a checkpoint into a model."""
    weights = safetensors.torch.load_file(path / WEIGHTS, device=str(device))
    model.load_state_dict({_HEAD: weights[_EMBEDDING]} | weights)


def own_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights by their names, each once: what model.safetensors holds.

    A tied head is the embedding under a second name, which is left out.
    """
    weights: dict[str, torch.Tensor] = dict(model.state_dict())
    if local_part(weights[_HEAD]).data_ptr() == local_part(weights[_EMBEDDING]).data_ptr():
        del weights[_HEAD]
    return weights


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, intact or not, by their steps."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: (step_of(path), not path.name.endswith(REPLACED)))


def step_of(path: Path) -> int:
    """The step that the name of a checkpoint's folder tells."""
    named = _NAME.fullmatch(path.name)
    assert named is not None
    return int(named[1])


def intact_meta(path: Path) -> Meta | None:
    """What a checkpoint tells of itself; None if a bit of it is not as it was written."""
    try:
        hashes = _content(path)["sha256"]
        whole = all(sha256_file(path / name) == hashes[name] for name in (WEIGHTS, STATE))
        return read_meta(path) if whole else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def meta_bytes(content: Mapping[str, object]) -> bytes:
    """meta.json with this content: its one serialisation, which ends with a digest of itself."""
    digest = hashlib.sha256(json.dumps(content, indent=1).encode()).hexdigest()
    return json.dumps({**content, _OWN_DIGEST: digest}, indent=1).encode()


def _content(path: Path) -> dict[str, Any]:
    data = read_whole(path / META)
    content = json.loads(data)
    if not isinstance(content, dict) or content.pop(_OWN_DIGEST, None) is None:
        raise ValueError(f"{path / META} has no digest of itself")
    if meta_bytes(content) != data:
        raise ValueError(f"{path / META} is not what its digest was made of")
    return content


def _sizes(state: RandomState) -> tuple[int, int | None]:
    on_device = state["device"]
    return state["cpu"].numel(), on_device.numel() if on_device is not None else None
