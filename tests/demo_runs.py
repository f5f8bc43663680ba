"""Short real runs of train.py, and whether what they wrote is intact."""

from __future__ import annotations

import json
from pathlib import Path

from trainer.checkpoints.checkpoint import intact_meta, list_checkpoints


def damaged(folder: Path) -> list[str]:
    """Return the files of a run folder that have their final name but are not intact."""
    checkpoints = list_checkpoints(folder / "checkpoints")
    found = [path.name for path in checkpoints if intact_meta(path) is None]
    log, files = folder / "log.jsonl", ("prediction.json", "report.json")
    texts = [(name, (folder / name).read_bytes()) for name in files if (folder / name).exists()]
    lines = log.read_bytes().split(b"\n")[:-1] if log.exists() else []
    for name, text in texts + [("log.jsonl", line) for line in lines]:
        try:
            json.loads(text)
        except ValueError:
            found.append(f"{name}: {text[:200]!r}")
    return found


def weights(folder: Path, step: int) -> bytes:
    return (folder / "checkpoints" / f"step_{step:08d}" / "model.safetensors").read_bytes()
