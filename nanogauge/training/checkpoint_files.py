"""The files of a checkpoint, streamed to the disk from tensors in the host's memory.

Nothing is copied on the way, and the interpreter is free while bytes are hashed and written: the
training loop goes on meanwhile.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from nanogauge.files import sync_file, sync_folder
from nanogauge.training.checkpoint import META, STATE, WEIGHTS, meta_bytes

_CHUNK_BYTES = 2**22
"""hashed and written at once, while they are in the processor's cache"""
_SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.bool: "BOOL",
}


def write_files(
    folder: Path,
    weights: Mapping[str, torch.Tensor],
    state: Mapping[str, object],
    content: Mapping[str, object],
) -> int:
    """Write and flush the files of a checkpoint into an empty folder; returns their bytes.

    Args:
        folder: where they go; it is flushed too.
        weights: by name, in the host's memory.
        state: optimizer, scaler and random states, in the host's memory.
        content: of meta.json, without the hashes of the other files.

    Raises:
        OSError: if one cannot be written whole.
    """
    model_file = _HashedFile(folder / WEIGHTS)
    _write_safetensors(weights, model_file)
    model_file.finish()
    state_file = _HashedFile(folder / STATE)
    try:
        torch.save(state, cast(BinaryIO, state_file))
    finally:
        state_file.finish()
    hashes = {WEIGHTS: model_file.sha256, STATE: state_file.sha256}
    meta_file = _HashedFile(folder / META)
    meta_file.write(meta_bytes({**content, "sha256": hashes}))
    meta_file.finish()
    sync_folder(folder)
    return model_file.bytes + state_file.bytes + meta_file.bytes


class _HashedFile:
    """A new file, hashed as it is written from beginning to end.

    torch's writer turns an error of the system into one of its own that does not name it. So the
    first error is kept, what comes after it is dropped, and finish() raises it.
    """

    def __init__(self, path: Path) -> None:
        self.bytes = 0
        self._hash = hashlib.sha256()
        self._error: OSError | None = None
        self._file = path.open("xb")

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data)
        try:
            if self._error is None:
                for start in range(0, len(view), _CHUNK_BYTES):
                    chunk = view[start : start + _CHUNK_BYTES]
                    self._hash.update(chunk)
                    self._file.write(chunk)
        except OSError as error:
            self._error = error
        self.bytes += len(view)
        return len(view)

    def flush(self) -> None:
        """What torch's writer calls at its end; finish() does it."""

    def finish(self) -> None:
        """Bring everything to the disk, and close.

        Raises:
            OSError: if any of it could not be written.
        """
        try:
            with self._file:
                if self._error is None:
                    sync_file(self._file)
        except OSError as error:
            self._error = self._error or error
        if self._error is not None:
            raise self._error


def _write_safetensors(tensors: Mapping[str, torch.Tensor], file: _HashedFile) -> None:
    """As safetensors.torch.save_file writes it, byte for byte, which copies every tensor first.

    Source: github.com/huggingface/safetensors, "Format": eight bytes with the length of the header,
    the header in JSON, padded to a multiple of eight, and the tensors.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header: dict[str, Any] = {}
    end = 0
    for name in names:
        tensor, begin = tensors[name], end
        end += tensor.nbytes
        header[name] = {
            "dtype": _SAFETENSORS_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        file.write(tensors[name].flatten().view(torch.uint8).numpy().data)
