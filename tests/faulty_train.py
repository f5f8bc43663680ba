"""train.py with a model that fails: python faulty_train.py FAULT ARGUMENTS...

nan:A-B makes the loss of the A-th to the B-th training pass of the process no number, not_before:S
that of every pass from step S on, room:N has no memory for more than N sequences in one pass, and
evaluation_room:N none in an evaluation.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import train  # noqa: E402
from model import GPT  # noqa: E402
from nanogauge.cli import run_command  # noqa: E402

fault, _, value = sys.argv.pop(1).partition(":")
sys.argv[0] = "train.py"
sound = GPT.forward
passes = 0


def forward(self: GPT, tokens: Tensor, targets: Tensor) -> Tensor:
    global passes  # noqa: PLW0603
    passes += self.training
    crowded = "room" in fault and len(tokens) > int(value)
    if crowded and (fault == "room" or not self.training):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    loss = sound(self, tokens, targets)
    if fault == "nan" and self.training:
        first, last = map(int, value.split("-"))
        loss = loss * (float("nan") if first <= passes <= last else 1.0)
    return loss


GPT.forward = forward  # type: ignore[method-assign]
run_command(train.main)
