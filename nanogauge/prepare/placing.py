"""Which part of the source this process takes, and where it puts it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nanogauge.errors import BadInput

_RANKS = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))
"""what torchrun and srun tell a process"""


def rank_and_world(
    rank: int | None, world: int | None, environment: Mapping[str, str]
) -> tuple[int, int]:
    """Which part of how many: as given, else as torchrun or SLURM tells it, else all of it.

    Raises:
        BadInput: if only one of both is given, or there is no such rank.
    """
    if (rank is None) != (world is None):
        raise BadInput("give --rank and --world together.")
    if rank is None or world is None:
        rank, world = _told(environment)
    if not 0 <= rank < world:
        raise BadInput(f"there is no rank {rank} of {world}: the first is 0, the last {world - 1}.")
    return rank, world


def _told(environment: Mapping[str, str]) -> tuple[int, int]:
    try:
        for rank, world in _RANKS:
            if rank in environment and int(environment.get(world, 1)) > 1:
                return int(environment[rank]), int(environment[world])
        if int(environment.get("SLURM_ARRAY_TASK_COUNT", 1)) > 1:
            first = int(environment.get("SLURM_ARRAY_TASK_MIN", 0))
            step = int(environment.get("SLURM_ARRAY_TASK_STEP", 1))
            number = (int(environment["SLURM_ARRAY_TASK_ID"]) - first) // step
            return number, int(environment["SLURM_ARRAY_TASK_COUNT"])
    except (KeyError, ValueError):
        raise BadInput(
            "RANK and WORLD_SIZE, or SLURM's variables, are set and are no numbers; "
            "give --rank and --world."
        ) from None
    return 0, 1


def rank_folder(out: Path, rank: int, world: int) -> Path:
    """Where one rank of several writes."""
    return out / f"rank_{rank:05d}_of_{world:05d}"
