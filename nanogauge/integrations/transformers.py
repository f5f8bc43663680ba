"""Measure a transformers.Trainer: Trainer(..., callbacks=[NanogaugeCallback("mine")])."""

from contextlib import ExitStack
from typing import Any

from transformers import TrainerCallback

from nanogauge.instrument import Phase, Run, run
from nanogauge.runspec import RunSpec


class NanogaugeCallback(TrainerCallback):
    """Predicts the run when training begins, measures it and writes its report at the end.

    A step is an optimizer step with all of its micro-batches; evaluations and checkpoints are timed apart from it. Its
    loss is the mean that the Trainer logs, in the step that ends a logging interval.

    Args:
        name: name of the run.
        spec: what the run is; None to read it from the model's configuration and the TrainingArguments.
        context: tokens of a sequence; None for the length of the training set's first example.
        settings: plan, folder and claims of nanogauge.run.
    """

    def __init__(self, name: str, spec: RunSpec | None = None, context: int | None = None, **settings: Any) -> None:
        self._name, self._spec, self._context, self._settings = name, spec, context, settings
        self._run: Run | None = None
        self._open = ExitStack()
        """The step or phase under way."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if (spec := self._spec) is None:
            context = self._context or len(more["train_dataloader"].dataset[0]["input_ids"])
            spec = RunSpec.from_transformers(more["model"].config, args, context, state.max_steps)
        self._run = run(self._name, spec, **self._settings)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        assert self._run is not None
        self._open.close()
        self._open.enter_context(self._run.step())

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._open.close()
        if control.should_evaluate:
            self._begin("evaluation")
        elif control.should_save:
            self._begin("checkpoint")

    def on_log(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        logs = more["logs"]
        values = {name: float(logs[name]) for name in ("loss", "learning_rate", "grad_norm") if name in logs}
        if values and self._run is not None:
            self._run.log(**values)

    def on_evaluate(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if self._run is None or state.global_step == 0:
            return
        if "eval_loss" in more["metrics"]:
            self._run.log(val_loss=more["metrics"]["eval_loss"])
        self._open.close()
        if control.should_save:
            self._begin("checkpoint")

    def on_save(self, *_: Any, **__: Any) -> None:
        self._open.close()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._open.close()
        if self._run is not None:
            self._run.finish()
            self._run = None

    def _begin(self, phase: Phase) -> None:
        assert self._run is not None
        self._open.enter_context(self._run.phase(phase))
