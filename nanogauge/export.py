"""A run's model as a Hugging Face folder: weights, configuration, tokenizer, model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch

from nanogauge.errors import BadInput, RunFailed
from nanogauge.files import make_folder, write_atomic
from nanogauge.report.build import Report, build_report, claims_of
from nanogauge.report.cells import Cells, in_order
from nanogauge.report.text import markdown
from nanogauge.tokenizer_files import tokenizer_files
from nanogauge.trained import Trained, encoding_of
from nanogauge.training.pretrained import CONFIG_NAME, WEIGHTS_NAME, to_hugging_face

FOLDER_NAME = "huggingface"


LACKS_TOKENIZER = (
    "no tokenizer files: {why}; the folder holds the model alone, and takes tokens as numbers."
)


def export_run(trained: Trained, out: Path, tokenizer: str | None) -> list[str]:
    """Write the folder; returns sentences on what it lacks.

    Rows of the embedding without a token, which pad it, are kept, so that the model stays the very
    same function; generation is told not to choose them.

    Args:
        trained: the model, on the CPU in fp32.
        out: a folder that is not there yet, or empty.
        tokenizer: a name that the user gives, where the run's data does not tell.

    Raises:
        BadInput: if the folder holds something, or cannot be written.
    """
    make_folder(out)
    if any(out.iterdir()):
        raise BadInput(f"{out} is not empty; remove it, or give another with --out.")
    config, tensors = to_hugging_face(trained.model)
    generation: dict[str, Any] = {"do_sample": True, "temperature": 0.8}
    lacks: list[str] = []
    files: dict[str, bytes] = {}
    try:
        encoding = encoding_of(trained.config.data, tokenizer)
    except (BadInput, RunFailed) as error:
        lacks.append(LACKS_TOKENIZER.format(why=str(error).rstrip(".")))
    else:
        ends = {"bos_token_id": encoding.eot_token, "eos_token_id": encoding.eot_token}
        config |= ends
        padding = list(range(encoding.n_vocab, trained.model.config.vocab_size))
        generation |= ends | ({"suppress_tokens": padding} if padding else {})
        made = tokenizer_files(encoding, trained.model.config.block_size)
        if made is None:
            why = f"GPT-2's form of them cannot hold the vocabulary {encoding.name}"
            lacks.append(LACKS_TOKENIZER.format(why=why))
        files |= made or {}
    report, _, _ = build_report(trained.folder.path, claims_of(trained.folder.path, None))
    files["generation_config.json"] = json.dumps(generation, indent=1).encode()
    files["README.md"] = model_card(trained, report).encode()
    files[CONFIG_NAME] = json.dumps(config, indent=1).encode()
    try:
        safetensors.torch.save_file(tensors, out / WEIGHTS_NAME, metadata={"format": "pt"})
        for name, data in files.items():
            write_atomic(out / name, data)
    except (OSError, safetensors.SafetensorError) as error:
        raise BadInput(f"cannot write to {out}: {error}; free space there.") from None
    return lacks


def model_card(trained: Trained, report: Report) -> str:
    """What the model is, and what its run measured: a row for each figure that there is."""
    config, run = trained.config, report.run
    losses = [e.val_loss for e in trained.recorded.evals if e.step == trained.step]
    loss = next((f"{value:.4f} nats per token" for value in losses if value is not None), None)
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [gpt2, nanogauge]",
        "---",
        f"# {run.name}",
        "",
        f"A GPT-2 of {config.model.n_layer} layers, {config.model.n_head} heads and width "
        f"{config.model.n_embd}, with a context of {config.model.block_size:,} tokens, trained by "
        f"nanogauge for {trained.step:,} of {config.train.max_steps:,} planned steps of "
        f"{config.tokens_per_step:,} tokens on {markdown(run.device)} ({run.dtype}).",
        "",
        f"Its validation loss at that step: {loss or 'not measured'}.",
        "",
        "What the run measured, beside what was claimed and predicted before its first step:",
        "",
        "| quantity | measured | claimed | predicted | verdict |",
        "|---|---|---|---|---|",
    ]
    for row in in_order(report.rows):
        cells = Cells(row)
        if cells.measured:
            shown = (row.quantity, cells.measured, cells.claimed, cells.predicted, cells.verdict)
            lines.append(f"| {' | '.join(map(markdown, shown))} |")
    absent = sorted({row.quantity for row in report.rows if row.measured is None})
    if absent:
        lines += ["", f"Not measured: {', '.join(absent)}."]
    return "\n".join([*lines, ""])
