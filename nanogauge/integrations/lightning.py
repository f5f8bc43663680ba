"""Measure a lightning.Trainer: Trainer(..., callbacks=[LightningCallback("mine", spec)])."""

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from nanogauge.instrument import Run, run
from nanogauge.runspec import RunSpec


class LightningCallback(Callback):
    """Predicts the run when fitting begins, measures it and writes its report at the end.

    A step is an optimizer step with all of its batches; validations are timed apart from it. The validation loss is the
    metric that the module logs as `val_loss`.

    Args:
        name: name of the run.
        spec: what the run is.
        settings: plan, folder and claims of nanogauge.run.
    """

    def __init__(self, name: str, spec: RunSpec, **settings: Any) -> None:
        self._open_run = partial(run, name, spec, **settings)
        self._run: Run | None = None
        self._open = ExitStack()
        """The step or validation under way."""
        self._in_step = False
        self._steps = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._run = self._open_run()

    def on_train_batch_start(self, *_: Any) -> None:
        assert self._run is not None
        if not self._in_step:
            self._open.enter_context(self._run.step())
            self._in_step = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        assert self._run is not None
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if trainer.global_step == self._steps:
            return  # gradient accumulation continues
        self._steps = trainer.global_step
        self._open.close()
        self._in_step = False
        if loss is not None:
            self._run.log(loss=loss)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._run is not None and not self._in_step:
            self._open.enter_context(self._run.phase("evaluation"))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._run is None or self._in_step:
            return
        if (loss := trainer.callback_metrics.get("val_loss")) is not None:
            self._run.log(val_loss=loss)
        self._open.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._run is not None:
            self._run.__exit__(type(exception), exception, None)
            self._run = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._open.close()
        if self._run is not None:
            self._run.finish()
            self._run = None
