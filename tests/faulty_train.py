"""train.py with a model that fails; train_server.py runs it with FAULT ARGUMENTS...

Training passes of the process are counted from 1. The faults:

    kill:N             the process kills itself in pass N
    bug:N              pass N raises an error that nothing expects
    late_scan:S        the look for tokens beyond the vocabulary ends S seconds after its start
    no_scan:           it finds none
    nan:A-B            the loss of passes A to B is NaN
    room:N             more than N sequences in a pass run out of memory
    late_room:N        the same, from pass 8 on
    evaluation_room:N  the same, in evaluations alone

Changes that are no faults:

    rewrite:S          the report is rewritten every S seconds
    read_late:         the times of a step are read one step later, as on a GPU
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import train  # noqa: E402
from nanogauge.cli import run_command  # noqa: E402
from nanogauge.measure.clock import HostTimeline  # noqa: E402
from trainer.data import loader  # noqa: E402
from trainer.run import startup  # noqa: E402
from trainer.step.loss import TrainingLoss  # noqa: E402

fault, _, value = sys.argv.pop(1).partition(":")
sys.argv[0] = "train.py"
sound = TrainingLoss.__call__
passes = 0


def faulty(self: TrainingLoss, tokens: Tensor, targets: Tensor) -> Tensor:
    global passes  # noqa: PLW0603
    training = torch.is_grad_enabled()
    passes += training
    if fault == "kill" and training and passes == int(value):
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "bug" and training and passes == int(value):
        raise KeyError("forgotten")
    crowded = "room" in fault and len(tokens) > int(value)
    meant = {"room": True, "late_room": passes >= 8, "evaluation_room": not training}
    if crowded and meant[fault]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    loss = sound(self, tokens, targets)
    if fault == "nan" and training:
        first, last = map(int, value.split("-"))
        loss = loss + (float("nan") if first <= passes <= last else 0.0)
    return loss


def late_scan(*given: Any) -> str | None:
    time.sleep(float(value or 0))
    return found(*given) if fault == "late_scan" else None


found, startup.SCAN_SECONDS = loader.find_beyond, 0.1
if "scan" in fault:
    loader.find_beyond = late_scan
if fault == "rewrite":
    train.CPU_SECONDS = float(value)
HostTimeline.lag = int(fault == "read_late")
TrainingLoss.__call__ = faulty  # type: ignore[method-assign]
run_command(train.main)
