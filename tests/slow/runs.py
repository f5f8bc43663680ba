"""Short real runs of train.py, and whether what they wrote is intact."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from commands import ROOT

from trainer.checkpoints.checkpoint import intact_meta, list_checkpoints


def begin(*flags: object, **environment: str) -> subprocess.Popen[str]:
    """Start train.py on the demo's configuration."""
    return subprocess.Popen(
        [sys.executable, "train.py", "configs/demo.toml", "--force", *map(str, flags)],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except ValueError:
        return False
    return True


def damaged(folder: Path) -> list[str]:
    """Return the files of a run folder that have their final name but are not intact."""
    found = [
        path.name for path in list_checkpoints(folder / "checkpoints") if intact_meta(path) is None
    ]
    for name in ("prediction.json", "report.json"):
        if (folder / name).exists() and not is_json((folder / name).read_bytes()):
            found.append(name)
    log = folder / "log.jsonl"
    lines = log.read_bytes().split(b"\n")[:-1] if log.exists() else []
    return found + [f"log.jsonl: {line[:200]!r}" for line in lines if not is_json(line)]


def weights(folder: Path, step: int) -> bytes:
    return (folder / "checkpoints" / f"step_{step:08d}" / "model.safetensors").read_bytes()
