"""The ranks of a run: processes started by torchrun that share each step, and their collectives.

Each rank takes its share of a step's micro-batches and holds the whole model, whose gradients DistributedDataParallel
averages, or its shard (fsdp.py). Only rank 0 writes and prints. A process that torchrun did not start is the only rank;
its collectives do nothing.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from nanogauge.errors import BadInput, RunFailed

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

TIMEOUT = timedelta(minutes=30)
"""Time that a rank waits in a collective before it fails; others may still compile or evaluate."""
LOST = "another process of this run has ended or no longer answers"
_T = TypeVar("_T")


class Ranks:
    """Rank, world size and collectives of a run with a single rank; a context manager."""

    rank = 0
    world = 1
    local_world = 1
    """Number of ranks on this machine."""

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes and prints."""
        return self.rank == 0

    def wrap(self, module: nn.Module, warm_up: Callable[[nn.Module], None]) -> nn.Module:
        """Return the module, wrapped in DDP if there are several ranks.

        Args:
            module: module with equal weights on all ranks.
            warm_up: runs a module forward and backward once and removes the gradients.
        """
        return module

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """Return a context for a micro-batch; the `last` one of a step all-reduces gradients."""
        return contextlib.nullcontext()

    def turns(self, count: int, together: bool) -> range:
        """Return the indices below `count` that this rank processes, assigned round-robin.

        together: give all ranks equally many indices, for collectives; the last may be >= count.
        """
        whole_rounds = -(-count // self.world) * self.world
        return range(self.rank, whole_rounds if together else count, self.world)

    def sum(self, figures: Tensor) -> Tensor:
        """Return the sum of a tensor over the ranks, with the same bits on all of them."""
        return figures

    def mean(self, figures: Tensor) -> Tensor:
        """Return the mean over the ranks, with the same bits on all of them."""
        return self.sum(figures) / self.world

    def any(self, flag: bool) -> bool:
        """Return True if the flag is set on any rank."""
        return flag

    def gather(self, thing: _T) -> list[_T]:
        """Return a list with each rank's object: numbers, strings, tensors, lists or dicts.

        Other classes are refused, so that unpickling runs no code.
        """
        return [thing]

    def is_lost(self, error: BaseException) -> bool:
        """Return True if the error was raised because another rank has ended."""
        return False

    def close(self) -> None:
        """Leave the process group; other ranks may continue."""

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.close()


class _Joined(Ranks):
    """One of several ranks, connected by torch.distributed."""

    def __init__(self, cuda: bool) -> None:
        # Imported here, as a run on one rank does not need it.
        import torch.distributed as dist
        from torch.distributed.rendezvous import rendezvous

        self._dist = dist
        self.local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if cuda:
            _select_gpu(int(os.environ.get("LOCAL_RANK", "0")), self.local_world)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        self._store, self.rank, self.world = next(iter(rendezvous("env://", timeout=TIMEOUT)))
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("ranks", self._store),  # type: ignore[attr-defined]
            rank=self.rank,
            world_size=self.world,
            timeout=TIMEOUT,
        )
        self._synchronized: nn.parallel.DistributedDataParallel | None = None
        if not self.is_first:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  for as long as the process lives

    def wrap(self, module: nn.Module, warm_up: Callable[[nn.Module], None]) -> nn.Module:
        self._synchronized = nn.parallel.DistributedDataParallel(module)
        # DDP reorders its buckets after the first backward pass, which with three or more ranks changes the last bits
        # of a sum: a resumed run would differ from an uninterrupted one.
        # So this pass comes before the first step of both.
        warm_up(self._synchronized)
        return self._synchronized

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        if last or self._synchronized is None:
            return contextlib.nullcontext()
        return self._synchronized.no_sync()

    def sum(self, figures: Tensor) -> Tensor:
        total = figures.clone()
        self._dist.all_reduce(total)
        return total

    def any(self, flag: bool) -> bool:
        return bool(self.sum(torch.tensor(int(flag))))

    def gather(self, thing: _T) -> list[_T]:
        buffer = io.BytesIO()
        torch.save(thing, buffer)
        mine = torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)
        sizes = torch.zeros(self.world, dtype=torch.int64)
        sizes[self.rank] = len(mine)
        sizes = self.sum(sizes)
        padded = torch.zeros(int(sizes.max()), dtype=torch.uint8)
        padded[: len(mine)] = mine
        parts = [torch.empty_like(padded) for _ in range(self.world)]
        self._dist.all_gather(parts, padded)
        return [_read(part[:size]) for part, size in zip(parts, sizes.tolist(), strict=True)]

    def is_lost(self, error: BaseException) -> bool:
        """Return True for a DistError, and for Gloo's plain RuntimeError on a lost connection."""
        if isinstance(error, self._dist.DistError):
            return True
        return isinstance(error, RuntimeError) and "gloo" in str(error).lower()

    def close(self) -> None:
        self._dist.destroy_process_group()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Leave the process group; only the first rank that fails reports its error.

        The failures of other ranks are its consequence: they exit without a message.
        """
        # torch deadlocks if a process group is freed while its thread waits for the GIL to free a tensor: keep it.
        _LEFT.append(self)
        if error is None:
            self.close()
        lost = error is not None and self.is_lost(error)
        if lost or isinstance(error, (BadInput, RunFailed)):
            if not _reports_first(self._store):
                raise SystemExit(2 if isinstance(error, BadInput) else 1)
            if lost:
                raise RunFailed(f"{LOST}; --resume auto continues from the newest checkpoint.")


_LEFT: list[Ranks] = []


def open_ranks(device: str) -> Ranks:
    """Join the process group of torchrun's ranks, or return a single rank.

    Ranks other than 0 print nothing on standard output from here on.

    Args:
        device: run.device of the configuration; a rank on cuda uses the GPU of its LOCAL_RANK.

    Raises:
        BadInput: if this machine has no GPU for the rank, or the device cannot be shared.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks()
    if device == "mps" or (device == "auto" and torch.backends.mps.is_available()):
        raise BadInput("several processes share CUDA GPUs or the processor; set --run.device cpu.")
    return _Joined(cuda=device != "cpu" and torch.cuda.is_available())


def is_reported_by_rank_0() -> bool:
    """Return True on ranks other than 0, which leave the message of an input error to rank 0."""
    return os.environ.get("RANK", "0") != "0"


def rank_share(grad_accum: int, world: int) -> int:
    """Return the number of micro-batches per step that each rank processes.

    Raises:
        BadInput: if the world size does not divide it, with the nearest values that it divides.
    """
    if grad_accum % world == 0:
        return grad_accum // world
    above = grad_accum // world + 1
    nearest = " or ".join(str(n * world) for n in (above - 1, above) if n > 0)
    raise BadInput(
        f"{world} processes cannot share the {grad_accum} micro-batches of a step equally; "
        f"set --train.grad-accum to {nearest}."
    )


def _select_gpu(local_rank: int, local_world: int) -> None:
    cards = torch.cuda.device_count()
    if local_world > cards:
        raise BadInput(
            f"there are more processes on this machine than its {cards} GPUs; "
            f"start torchrun with --nproc-per-node {cards}."
        )
    torch.cuda.set_device(local_rank)


def _read(data: Tensor) -> Any:
    return torch.load(io.BytesIO(data.numpy().tobytes()), weights_only=True)


def _reports_first(store: Store) -> bool:
    """Return True on the first rank that calls it, whose error caused the others' failures."""
    try:
        return int(store.add("sentences", 1)) == 1
    except RuntimeError:  # rank 0, which held the store, is gone
        return True
