"""Run tasks of lm-evaluation-harness on models in Hugging Face's layout."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nanogauge.errors import BadInput
from nanogauge.shell import pip_install
from trainer.evaluation.benchmarks import Items

_FIRST = ("acc_norm", "acc", "exact_match")


def harness_items(
    folders: Sequence[Path], task: str, task_folder: Path | None, device: str, dtype: str, limit: int | None
) -> tuple[str, bool, Items]:
    """Run a task; return the name of its main metric, whether higher is better, and its items.

    The main metric is the first of acc_norm, acc and exact_match that the task has, else its first.

    Args:
        folders: folder of a model, optionally followed by that of a model to compare it with. task: name of the task.
        task_folder: folder with the user's own task files; None for the harness's tasks only. device: device to run on.
        dtype: dtype of the weights.
        limit: number of documents; None for all.

    Raises:
        BadInput: if the harness is not installed, or there is no such task.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise BadInput(
            f"the task {task} needs lm-evaluation-harness, which is not installed: {pip_install('nanogauge[eval]')}."
        ) from None
    include = str(task_folder) if task_folder is not None else None
    manager = TaskManager(include_path=include)
    if task not in manager.all_tasks:
        raise BadInput(f"lm-evaluation-harness has no task {task}; --task-folder adds those of a folder.")
    counted: list[tuple[str, bool, dict[Any, float]]] = []
    for folder in folders:
        done = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": str(folder), "dtype": dtype},
            tasks=[task],
            task_manager=manager,
            device=device,
            batch_size=8,
            limit=limit,
            log_samples=True,
            bootstrap_iters=0,
        )
        counted.append(_of_task(done, task))
    metric, higher, own = counted[0]
    documents = sorted(own)
    values = [np.array([results[d] for d in documents], np.float64) for _, _, results in counted]
    other = values[1] if len(values) > 1 else None
    return metric, higher, Items(values[0], other, np.ones(len(documents)))


def _of_task(done: dict[str, Any], task: str) -> tuple[str, bool, dict[Any, float]]:
    samples = done["samples"].get(task)
    if not samples:
        raise BadInput(f"{task} is a group of tasks; name its tasks one by one.")
    metrics = [name for name in samples[0]["metrics"] if isinstance(samples[0][name], float | int)]
    if not metrics:
        raise BadInput(f"the task {task} has no metric that is a number for each document.")
    metric = next((name for name in _FIRST if name in metrics), metrics[0])
    higher = bool(done["higher_is_better"][task].get(metric, True))
    return metric, higher, {sample["doc_id"]: float(sample[metric]) for sample in samples}
