"""Several processes that share each step: what torchrun starts, and what they tell each other.

Each rank, one process, takes its share of a step's micro-batches and holds the whole model, where
DistributedDataParallel averages the gradients, or its part of it (sharding.py). Rank 0 alone writes
and prints. A process that torchrun has not started is the only rank, for which all of this does
nothing.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from nanogauge.errors import BadInput, RunFailed

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

TIMEOUT = timedelta(minutes=30)
"""that a rank waits for the others, which may compile, write or evaluate, before it fails"""
LOST = "another process of this run has ended or no longer answers"
_T = TypeVar("_T")


class Ranks:
    """The processes of a run, as one of them sees them; here the only one. A context manager."""

    rank = 0
    world = 1
    local_world = 1
    """of these in this machine"""

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes and prints."""
        return self.rank == 0

    def wrap(self, module: nn.Module, warm_up: Callable[[nn.Module], None]) -> nn.Module:
        """A module whose gradients are the mean over the ranks, each on its own batch.

        Args:
            module: has the same weights on all ranks.
            warm_up: runs it forward and backward once, and leaves no gradients.
        """
        return module

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """Round a forward and backward pass: wrapped, only a step's last one averages gradients."""
        return contextlib.nullcontext()

    def turns(self, count: int, together: bool) -> range:
        """Which of so many things are this rank's.

        together: as many as any other rank has, so that the last may be `count` or above, where
        there is nothing: for what all ranks must do at once.
        """
        whole_rounds = -(-count // self.world) * self.world
        return range(self.rank, whole_rounds if together else count, self.world)

    def sum(self, figures: Tensor) -> Tensor:
        """The sum over the ranks of a tensor that each has, the same bits on all of them."""
        return figures

    def mean(self, figures: Tensor) -> Tensor:
        """The mean over the ranks, the same bits on all of them."""
        return self.sum(figures) / self.world

    def any(self, flag: bool) -> bool:
        """Whether any rank says so: what ends a step early must be agreed on by all of them."""
        return flag

    def gather(self, thing: _T) -> list[_T]:
        """What each rank has, in their order: numbers, texts, tensors, and lists and dicts of them.

        It travels without objects of any other class, so that nothing is run by reading it.
        """
        return [thing]

    def is_lost(self, error: BaseException) -> bool:
        """Whether an error says that another rank is no longer there."""
        return False

    def close(self) -> None:
        """Leave the others, who may have to go on."""

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _Joined(Ranks):
    """One of several ranks, joined through torch.distributed."""

    def __init__(self, cuda: bool) -> None:
        # Loaded here, as nothing else of a run needs it.
        import torch.distributed as dist
        from torch.distributed.rendezvous import rendezvous

        self._dist = dist
        self.local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if cuda:
            _take_card(int(os.environ.get("LOCAL_RANK", "0")), self.local_world)
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
        # It puts its buckets in another order after the first backward pass, and with three ranks
        # or more that changes the last bits of a sum: a resumed run would begin in another order
        # than the one that was not disturbed. So that pass comes before the first step of each.
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
        """Gloo tells a lost connection as a plain RuntimeError that names it."""
        if isinstance(error, self._dist.DistError):
            return True
        return isinstance(error, RuntimeError) and "gloo" in str(error).lower()

    def close(self) -> None:
        self._dist.destroy_process_group()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave; of all sentences with which the ranks fail, the first that comes is told.

        The others fail as its consequence, and leave with their status alone.
        """
        if error is None:
            self.close()
        lost = error is not None and self.is_lost(error)
        if lost or isinstance(error, (BadInput, RunFailed)):
            if not _is_first_to_speak(self._store):
                raise SystemExit(2 if isinstance(error, BadInput) else 1)
            if lost:
                raise RunFailed(f"{LOST}; --resume auto goes on from the newest checkpoint.")


def open_ranks(device: str) -> Ranks:
    """The rank that torchrun has made of this process, else the only one.

    From here on a rank other than 0 prints nothing on standard output.

    Args:
        device: run.device of the configuration; a rank on cuda takes the card of its LOCAL_RANK.

    Raises:
        BadInput: if this machine has no card for it, or the device cannot be shared.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks()
    if device == "mps" or (device == "auto" and torch.backends.mps.is_available()):
        raise BadInput("several processes share CUDA GPUs or the processor; set --run.device cpu.")
    return _Joined(cuda=device != "cpu" and torch.cuda.is_available())


def is_told_elsewhere() -> bool:
    """Whether rank 0 says what is wrong with a command line or file that all ranks read alike."""
    return os.environ.get("RANK", "0") != "0"


def share_of(grad_accum: int, world: int) -> int:
    """Micro-batches of a step that each rank takes.

    Raises:
        BadInput: if they cannot take the same number, with the nearest that they could share.
    """
    if grad_accum % world == 0:
        return grad_accum // world
    above = grad_accum // world + 1
    nearest = " or ".join(str(n * world) for n in (above - 1, above) if n > 0)
    raise BadInput(
        f"{world} processes cannot share the {grad_accum} micro-batches of a step equally; "
        f"set --train.grad-accum to {nearest}."
    )


def _take_card(local_rank: int, local_world: int) -> None:
    cards = torch.cuda.device_count()
    if local_world > cards:
        raise BadInput(
            f"there are more processes on this machine than its {cards} GPUs; "
            f"start torchrun with --nproc-per-node {cards}."
        )
    torch.cuda.set_device(local_rank)


def _read(data: Tensor) -> Any:
    return torch.load(io.BytesIO(data.numpy().tobytes()), weights_only=True)


def _is_first_to_speak(store: Store) -> bool:
    """Whether no rank has come here before: a cause comes before its consequences."""
    try:
        return int(store.add("sentences", 1)) == 1
    except RuntimeError:  # rank 0 kept the store, and is gone
        return True
