"""Before the first step: the model is compiled, and joined to the other ranks.

Here, as in train.py, everything meets: nothing but train.py imports it.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch

from nanogauge.calibrations import load_calibration
from nanogauge.measure.alarms import Alarm
from nanogauge.predict.eager import eager_sentence, eager_total
from nanogauge.present import calibrated_threads
from nanogauge.recording import raise_alarm
from nanogauge.records import Compile
from nanogauge.session import Session
from nanogauge.training.compiling import (
    compile_loss,
    compiles_at_all,
    keep_compiled,
    run_once,
)
from nanogauge.training.device import autocast
from nanogauge.training.loss import AsModule

COMPILING_SECONDS = 1800.0
"""what compiling may take: minutes for large models on slow processors"""


def compile_session(s: Session) -> None:
    """Compile, in a window of its own; where that fails the model stays as it is, loudly."""
    keep_compiled()
    s.screen.say("compiling ...")
    s.compile_watch.listen()
    s.watchdog.beat(COMPILING_SECONDS)
    with s.clock.window() as compiling:
        tokens, targets = s.batches.batch("train", 0, 0)
        context = partial(autocast, s.device, s.dtype)
        failure = None
        if s.config.train.sharding == "full":
            failure = _of_any(s, compiles_at_all(s.device))
        if failure is None:
            compiled = compile_loss(s.model, s.loss_of, tokens, targets, context)
            if (failure := _of_any(s, compiled)) is not None:
                s.loss_of.stay_eager()
    mode: Literal["compiled", "eager"] = "compiled" if failure is None else "eager"
    s.compiled, s.eager = failure is None, failure is not None
    s.log.write(Compile(seconds=compiling.seconds + compiling.compile_seconds, mode=mode))
    if failure is not None:
        text = f"torch.compile failed, training goes on without it: {failure}"
        hardware = s.folder.prediction.hardware
        calibration, _ = load_calibration(
            hardware.name, torch.__version__, calibrated_threads(s.device)
        )
        eager = eager_total(s.folder.spec, hardware, calibration)
        if eager is not None:
            predicted = s.folder.prediction.best("total_seconds")
            text = f"{text.rstrip('.')}. {eager_sentence(eager, predicted)}"
        raise_alarm(s, Alarm("compile_failed", text, level="warning"), None)


def _of_any(s: Session, failure: str | None) -> str | None:
    """The failure of the first rank that had one, which all must heed."""
    return next((told for told in s.ranks.gather(failure) if told is not None), None)


def average_gradients(s: Session) -> None:
    """From here on the gradients of averaged_loss_of are the mean over all ranks."""
    if s.ranks.world == 1 or s.config.train.sharding == "full":
        return  # there is nothing to average, or the sharded loss does it
    tokens, targets = s.batches.batch("train", 0, 0)
    context, accumulation = partial(autocast, s.device, s.dtype), s.batches.grad_accum
    with s.clock.window():
        s.averaged_loss_of = s.ranks.wrap(
            AsModule(s.model, s.loss_of),
            lambda loss: run_once(s.model, loss, accumulation, tokens, targets, context),
        )
