"""A copy of the training state in the host's memory, which the next copy uses again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trainer.step.device import synchronize
from trainer.step.fsdp import whole


class HostCopy:
    """Buffers for the tensors of a nested state, allocated when a tensor is first seen.

    From a CUDA device the copy goes at the speed of the bus into pinned memory, of which torch
    takes the next power of two of every buffer.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[object, ...], Tensor] = {}

    @property
    def bytes(self) -> int:
        """of all tensors"""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    @property
    def tensors(self) -> int:
        return len(self._buffers)

    def take(self, state: Mapping[str, object], device: torch.device) -> Any:
        """Copy a state of mappings, lists, tensors and plain values; waits until it is whole.

        A tensor that is sharded is gathered, while the others give their parts.
        The tensors of the copy belong to this object: the next call writes over them.
        """
        copied = self._copy(state, ())
        synchronize(device)
        return copied

    def _copy(self, value: object, path: tuple[object, ...]) -> object:
        if isinstance(value, Tensor):
            gathered = whole(value)
            return self._buffer(gathered, path).copy_(gathered, non_blocking=True)
        if isinstance(value, Mapping):
            return {key: self._copy(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._copy(item, (*path, i)) for i, item in enumerate(value))
        assert value is None or isinstance(value, bool | int | float | str), path
        return value

    def _buffer(self, tensor: Tensor, path: tuple[object, ...]) -> Tensor:
        buffer = self._buffers.get(path)
        if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
            pinned = tensor.device.type == "cuda"
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
            self._buffers[path] = buffer
        return buffer
