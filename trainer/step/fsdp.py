"""Sharded training: a model that no card can hold, divided among the ranks.

FSDP2, torch.distributed.fsdp.fully_shard: each rank holds a share of the rows of every parameter,
of its gradient and of its moments. A block is gathered whole for its forward and again for its
backward pass, and let go after each; what is outside of the blocks is gathered once for both.
Sources: Rajbhandari et al. 2020, ZeRO (its third stage), https://arxiv.org/abs/1910.02054; Zhao et
al. 2023, PyTorch FSDP, https://arxiv.org/abs/2304.11277.

A forward pass, a backward pass and a gathering are done by all ranks at once, or wait for ever.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import safetensors
import torch
from torch import Tensor, nn

from model import GPT
from nanogauge.config import Config
from nanogauge.errors import BadInput
from trainer.step.device import DTYPES, choose_device
from trainer.step.loss import AsModule, TrainingLoss


def refuse_unshardable(config: Config, world: int) -> None:
    """See that a model which is to be sharded can be.

    Raises:
        BadInput: if this process is the only one, or computes in 16 bits on a processor, whose
            norms do not take weights in 16 bits.
    """
    if config.train.sharding == "none":
        return
    if world == 1:
        raise BadInput(
            "train.sharding = full divides the model among several processes, and this is the only "
            "one; start it with torchrun --nproc-per-node N, or set --train.sharding none."
        )
    if config.run.dtype == "bfloat16" and choose_device(config.run.device).type == "cpu":
        raise BadInput(
            "train.sharding = full works in 16 bits on GPUs alone; set --run.dtype float32 or "
            "--train.sharding none."
        )


class ShardedLoss(TrainingLoss):
    """The loss of a model that is divided among the ranks from here on; to be made before its
    optimizer, as its parameters become others.

    Gradients are averaged over the ranks after each micro-batch. Waiting for the last one of a step
    would spare traffic, but every rank would hold all gradients whole meanwhile, in fp32, which is
    as much as the weights: the memory that is to be saved.

    In 16 bits the blocks travel and are gathered in 16 bits: their products see the same numbers as
    with autocast alone, their norms' weights are rounded as well. All else (embeddings, head, last
    norm, the residual stream, and gradients on their way) stays in fp32.
    """

    def __init__(
        self,
        model: GPT,
        head: Literal["chunked", "plain"],
        grad_accum: int,
        device: torch.device,
        dtype: str,
    ) -> None:
        """model: in the host's memory, from where it goes to the device block by block."""
        from torch.distributed import get_world_size
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        super().__init__(model, head, grad_accum, device, alone=False)
        shard = partial(fully_shard, mesh=init_device_mesh(device.type, (get_world_size(),)))
        policy = MixedPrecisionPolicy(
            param_dtype=DTYPES[dtype], reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        self._blocks = list(model.blocks)
        for block in self._blocks:
            shard(block, mp_policy=policy)
        self._module = AsModule(model, super().__call__)
        self._root = shard(self._module)

    def compile(self) -> None:
        """Compile from the next call on: a block, between its gathering and its letting go.

        It is the same program in all layers and is so compiled once.
        """
        for block in self._blocks:
            block.forward = torch.compile(block.forward)
        self.compile_head()

    def stay_eager(self) -> None:
        """Undo compile(), also where it failed in the midst of a pass on all ranks."""
        self._root.reset_iter_state()
        for block in self._blocks:
            vars(block).pop("forward", None)
        super().stay_eager()

    def __call__(self, tokens: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = self._module(tokens, targets)
        if not torch.is_grad_enabled():
            self._root.reshard()  # there is no backward pass that would
        return loss


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that is sharded, which all ranks must ask for; any other as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def local_part(tensor: Tensor) -> Tensor:
    """What this rank has of a tensor, in the memory where it lies."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, whose class a process without sharding need not load."""
    return hasattr(tensor, "full_tensor")


def give_parts(state: object) -> None:
    """Take part in the gathering of a nested state, tensor by tensor, that rank 0 copies."""
    if isinstance(state, Tensor):
        whole(state)
    elif isinstance(state, Mapping):
        for item in state.values():
            give_parts(item)
    elif isinstance(state, list | tuple):
        for item in state:
            give_parts(item)


def own_rows(sharded: Tensor) -> slice:
    """Of a tensor that FSDP has sharded, this rank's rows: as torch.chunk shares them out."""
    mesh = sharded.device_mesh  # type: ignore[attr-defined]
    each = -(-len(sharded) // mesh.size())
    begin = min(mesh.get_local_rank() * each, len(sharded))
    return slice(begin, min(begin + each, len(sharded)))


@torch.no_grad()
def load_parts(file: Path, weights: Mapping[str, Tensor]) -> None:
    """Read this rank's rows of the weights from a checkpoint's whole ones, a tensor at a time."""
    with safetensors.safe_open(file, "pt") as stored:
        assert set(stored.keys()) == weights.keys()
        for name, sharded in weights.items():
            rows = own_rows(sharded)
            if rows.start < rows.stop:  # there may be more ranks than rows
                local_part(sharded).copy_(stored.get_slice(name)[rows])


def sharded_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A whole optimizer's state_dict with this rank's rows of its moments, for an optimizer of
    sharded parameters.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    moments = {}
    for number, parameter in zip(numbers, parameters, strict=True):
        if number in state["state"]:
            of_one = state["state"][number]
            moments[number] = {key: _sharded(value, parameter) for key, value in of_one.items()}
    return {**state, "state": moments}


def _sharded(value: Any, parameter: nn.Parameter) -> Any:
    """The rows of a moment as of its parameter; a count of updates as it is, off the file."""
    if not isinstance(value, Tensor):
        return value
    if value.shape != parameter.shape:
        return value.clone()
    moment = torch.empty_like(parameter, requires_grad=False)
    local_part(moment).copy_(value[own_rows(parameter)])
    return moment
