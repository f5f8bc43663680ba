"""Shard a model that is too large for one GPU over the ranks, with FSDP2.

With torch.distributed.fsdp.fully_shard each rank holds some rows of every parameter, its gradient and its moments. A
block is gathered for its forward pass and again for its backward pass, and freed after each; parameters outside of the
blocks are gathered once for both.
Sources: Rajbhandari et al. 2020, ZeRO (its third stage), https://arxiv.org/abs/1910.02054; Zhao et al. 2023, PyTorch
FSDP, https://arxiv.org/abs/2304.11277.

Forward passes, backward passes and gathers are collectives: all ranks must call them.
"""

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
from nanogauge.shell import tool_command
from trainer.step.device import DTYPES, choose_device
from trainer.step.loss import LossModule, TrainingLoss


def refuse_unshardable(config: Config, world: int) -> None:
    """Check that train.sharding can be used.

    Raises:
        BadInput: with one rank, or in 16 bits on a CPU, whose norms do not support 16-bit weights.
    """
    if config.train.sharding == "none":
        return
    if world == 1:
        raise BadInput(
            "train.sharding = full divides the model among several processes, and this is the only "
            f"one; start it with {tool_command('torchrun', '--nproc-per-node', 'N')}, or set "
            "--train.sharding none."
        )
    if config.run.dtype == "bfloat16" and choose_device(config.run.device).type == "cpu":
        raise BadInput(
            "train.sharding = full works in 16 bits on GPUs alone; set --run.dtype float32 or --train.sharding none."
        )


class ShardedLoss(TrainingLoss):
    """Training loss that shards its model over the ranks when it is created.

    Create it before the optimizer, as it replaces the model's parameters.

    Gradients are reduce-scattered after each micro-batch. Reducing only after a step's last one would save traffic, but
    each rank would hold all gradients in fp32 meanwhile: the memory that sharding is to save.

    With a 16-bit dtype the blocks are gathered in 16 bits: their matrix products have the same inputs as under
    autocast, and the weights of their norms are rounded as well. Embeddings, head, last norm, residual stream and the
    reduction of gradients stay in fp32.
    """

    def __init__(
        self, model: GPT, head: Literal["chunked", "plain"], grad_accum: int, device: torch.device, dtype: str
    ) -> None:
        """model: model in host memory, whose blocks are moved to the device one by one."""
        from torch.distributed import get_world_size
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        super().__init__(model, head, grad_accum, device, alone=False)
        shard = partial(fully_shard, mesh=init_device_mesh(device.type, (get_world_size(),)))
        policy = MixedPrecisionPolicy(param_dtype=DTYPES[dtype], reduce_dtype=torch.float32, cast_forward_inputs=False)
        self._blocks = list(model.blocks)
        for block in self._blocks:
            shard(block, mp_policy=policy)
        self._module = LossModule(model, super().__call__)
        self._root = shard(self._module)

    def compile(self) -> None:
        """Compile the forward pass of each block, without the gathering and freeing of its weights.

        Compilation happens in the next call; all layers share one compiled program.
        """
        for block in self._blocks:
            block.forward = torch.compile(block.forward)
        self.compile_head()

    def undo_compile(self) -> None:
        """Return to eager mode, also after a forward or backward pass that failed on all ranks."""
        self._root.reset_iter_state()
        for block in self._blocks:
            vars(block).pop("forward", None)
        super().undo_compile()

    def __call__(self, tokens: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = self._module(tokens, targets)
        if not torch.is_grad_enabled():
            self._root.reshard()  # no backward pass will do it
        return loss


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor of a DTensor (a collective), or a plain tensor unchanged."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor, or a plain tensor unchanged; no copy."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def is_sharded(tensor: Tensor) -> bool:
    """Return True for a DTensor, without importing its class."""
    return hasattr(tensor, "full_tensor")


def join_gather(state: object) -> None:
    """Take part in the collectives by which HostCopy.take on rank 0 gathers a nested state."""
    if isinstance(state, Tensor):
        full_tensor(state)
    elif isinstance(state, Mapping):
        for item in state.values():
            join_gather(item)
    elif isinstance(state, list | tuple):
        for item in state:
            join_gather(item)


def local_rows(sharded: Tensor) -> slice:
    """Return the slice of rows that this rank holds; FSDP splits rows as torch.chunk does."""
    mesh = sharded.device_mesh  # type: ignore[attr-defined]
    each = -(-len(sharded) // mesh.size())
    begin = min(mesh.get_local_rank() * each, len(sharded))
    return slice(begin, min(begin + each, len(sharded)))


@torch.no_grad()
def load_shards(file: Path, weights: Mapping[str, Tensor]) -> None:
    """Copy this rank's rows of a safetensors file into sharded weights, one tensor at a time."""
    with safetensors.safe_open(file, "pt") as stored:
        assert set(stored.keys()) == weights.keys()
        for name, sharded in weights.items():
            rows = local_rows(sharded)
            if rows.start < rows.stop:  # there may be fewer rows than ranks
                local_tensor(sharded).copy_(stored.get_slice(name)[rows])


def sharded_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Return an unsharded optimizer's state_dict with its moments cut to this rank's shards."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    moments = {}
    for number, parameter in zip(numbers, parameters, strict=True):
        if number in state["state"]:
            of_one = state["state"][number]
            moments[number] = {key: _sharded(value, parameter) for key, value in of_one.items()}
    return {**state, "state": moments}


def _sharded(value: Any, parameter: nn.Parameter) -> Any:
    """Return this rank's shard of a moment; clone other tensors, to release the mapped file."""
    if not isinstance(value, Tensor):
        return value
    if value.shape != parameter.shape:
        return value.clone()
    moment = torch.empty_like(parameter, requires_grad=False)
    local_tensor(moment).copy_(value[local_rows(parameter)])
    return moment
