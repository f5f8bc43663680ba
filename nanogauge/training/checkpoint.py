"""Checkpoints: a folder per step, written aside, flushed and renamed; read without pickle.

checkpoints/step_00001000/ holds model.safetensors, state.pt (optimizer, loss scaler, random states)
and meta.json with the sha256 of both and the position in the data.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

KEEP = 2  # the newest, and the one before it should the newest be damaged
_TIED = "lm_head.weight"  # the embedding under a second name


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    position: Mapping[str, object],
) -> tuple[Path, int]:
    """Write the state after `step` updates, at a position in the data; returns folder and bytes.

    The folder takes its name only once it is whole and flushed; older ones beyond KEEP are removed
    after that.

    Raises:
        OSError: if the disk is full or not writable; earlier checkpoints stay as they are.
    """
    final = folder / f"step_{step:08d}"
    aside = folder / f".step_{step:08d}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        weights = {k: v.contiguous() for k, v in model.state_dict().items() if k != _TIED}
        safetensors.torch.save_file(weights, aside / "model.safetensors")
        state = {
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            "rng_cpu": torch.get_rng_state(),
            "rng_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        torch.save(state, aside / "state.pt")
        files = ("model.safetensors", "state.pt")
        hashes = {name: _sha256(aside / name) for name in files}
        meta = {"step": step, "data": position, "sha256": hashes}
        (aside / "meta.json").write_text(json.dumps(meta, indent=1))
        for name in (*files, "meta.json"):
            _flush(aside / name)
        _flush(aside)
        shutil.rmtree(final, ignore_errors=True)  # an interrupted run may come by here again
        os.replace(aside, final)
        _flush(folder)
    except (OSError, safetensors.SafetensorError, RuntimeError) as error:
        # Both writers wrap the operating system's error in one of their own.
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, OSError):
            raise
        raise OSError(errno.EIO, str(error).splitlines()[0]) from error
    for old in _newest_first(folder)[KEEP:]:
        shutil.rmtree(old)
    return final, sum(f.stat().st_size for f in final.iterdir())


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest intact checkpoint, and a sentence for each damaged one that was passed over."""
    damaged: list[str] = []
    for path in _newest_first(folder):
        if is_whole(path):
            return path, damaged
        damaged.append(f"the checkpoint {path} is damaged and was passed over")
    return None, damaged


def is_whole(path: Path) -> bool:
    """Whether a checkpoint's files are those that were written."""
    try:
        meta = json.loads((path / "meta.json").read_bytes())
        return all(_sha256(path / name) == want for name, want in meta["sha256"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def load_weights(path: Path, model: nn.Module, device: torch.device) -> None:
    """Put the weights of a checkpoint into a model."""
    weights = safetensors.torch.load_file(path / "model.safetensors", device=str(device))
    model.load_state_dict(weights | {_TIED: weights["transformer.wte.weight"]})


def load_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    device: torch.device,
) -> int:
    """Put everything back as it was after the checkpoint's step; returns that step."""
    load_weights(path, model, device)
    state: dict[str, Any] = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    torch.set_rng_state(state["rng_cpu"])
    if state["rng_cuda"]:
        torch.cuda.set_rng_state_all(state["rng_cuda"])
    step = json.loads((path / "meta.json").read_bytes())["step"]
    assert isinstance(step, int)
    return step


def data_position(path: Path) -> dict[str, object]:
    """The position in the data that a checkpoint was saved with."""
    position = json.loads((path / "meta.json").read_bytes()).get("data", {})
    assert isinstance(position, dict)
    return position


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step_*"), reverse=True) if folder.is_dir() else []


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
