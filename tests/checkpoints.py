"""A tiny model in training and its checkpoints."""

import copy
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from commands import ROOT

from model import GPT
from nanogauge.config import ModelSection, OptimizerSection
from trainer.checkpoints.checkpoint import RandomState, load_checkpoint, random_state
from trainer.checkpoints.checkpoint_writer import CheckpointWriter, NotWritten, Written
from trainer.step.optimizer import make_optimizer

CPU = torch.device("cpu")
TINY = ModelSection(n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=264)
WIDE = ModelSection(n_layer=2, n_head=4, n_embd=512, block_size=16, vocab_size=8192)


@dataclass
class Trained:
    """A model with its optimizer; each step() is an update with random tokens."""

    section: ModelSection = TINY
    model: GPT = field(init=False)
    optimizer: torch.optim.AdamW = field(init=False)
    scaler: torch.amp.GradScaler = field(init=False)

    def __post_init__(self) -> None:
        self.model = GPT(self.section)
        self.optimizer = make_optimizer(self.model, OptimizerSection())
        self.scaler = torch.amp.GradScaler("cpu", enabled=False)

    def step(self) -> None:
        tokens = torch.randint(0, 264, (2, 8))
        self.model(tokens, tokens).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def begin(
        self,
        checkpoints: CheckpointWriter,
        step: int,
        val_loss: float | None = None,
        random_states: list[RandomState] | None = None,
    ) -> None:
        checkpoints.begin(
            step,
            self.model,
            self.optimizer,
            self.scaler,
            random_states or [random_state(CPU)],
            position={"samples": 8 * step},
            run={"wandb_id": "é", "best": 3.25},
            val_loss=val_loss,
        )

    def save(self, checkpoints: CheckpointWriter, step: int, val_loss: float | None = None) -> Written | NotWritten:
        self.begin(checkpoints, step, val_loss)
        checkpoints.wait()
        (ended,) = checkpoints.done()
        return ended

    def load(self, path: Path, rank: int = 0, world: int = 1) -> bool:
        return load_checkpoint(path, self.model, self.optimizer, self.scaler, CPU, rank, world)

    def state(self) -> dict[str, torch.Tensor]:
        """Return copies of all tensors of model and optimizer."""
        found = copy.deepcopy(dict(self.model.state_dict()))
        for index, moments in self.optimizer.state_dict()["state"].items():
            found |= {f"{index} {name}": value.clone() for name, value in moments.items()}
        return found


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


BEGIN = """
import sys
from pathlib import Path
sys.path[:0] = ["tests", "."]
from checkpoints import WIDE, Trained, CheckpointWriter
trained, checkpoints = Trained(), CheckpointWriter(Path(sys.argv[1]), keep=2)
trained.step()
"""


def in_a_process(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BEGIN + code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def write_two(folder: Path) -> None:
    """Write intact checkpoints at steps 1 and 2."""
    trained, checkpoints = Trained(), CheckpointWriter(folder, keep=2)
    for step in (1, 2):
        trained.step()
        assert isinstance(trained.save(checkpoints, step), Written)
