"""Export a run's model as a Hugging Face folder: weights, configuration, tokenizer, model card.

The tokenizer files are Hugging Face's own, a table of characters, or GPT-2's: a byte-level vocabulary and its merges.
tiktoken stores no merges, but they follow from its ranks: a token's two parts are the result of merging its bytes in
order of rank up to just below the token's own rank. Source: tiktoken, tiktoken/_educational.py (bpe_encode).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
from tiktoken_ext.openai_public import r50k_pat_str

from nanogauge.analysis.report_model import Report, build_report, claims_of
from nanogauge.errors import BadInput, RunFailed
from nanogauge.files import make_folder, write_atomic
from nanogauge.report.cells import Cells, sort_rows
from nanogauge.report.escape import markdown
from trainer.checkpoints.pretrained import CONFIG_NAME, WEIGHTS_NAME, to_hugging_face
from trainer.data.tokenizer import CHARACTERS, END_OF_TEXT, HUGGING_FACE, NANOGPT_CHARACTERS, Tokenizer
from trainer.evaluation.load import Trained, tokenizer_of

if TYPE_CHECKING:
    import tiktoken

FOLDER_NAME = "huggingface"


LACKS_TOKENIZER = "no tokenizer files: {why}; the folder holds the model alone, and takes tokens as numbers."


def export_run(trained: Trained, out: Path, tokenizer: str | None) -> list[str]:
    """Write the Hugging Face folder; return a sentence on each file or feature it lacks.

    Embedding rows beyond the tokenizer's vocabulary are kept, so that logits do not change. The generation settings
    exclude these tokens.

    Args:
        trained: the model, on the CPU in fp32.
        out: a new or empty folder.
        tokenizer: name of the tokenizer to export; None for the one of the run's data.

    Raises:
        BadInput: if the folder is not empty, or cannot be written.
    """
    make_folder(out)
    if any(out.iterdir()):
        raise BadInput(f"{out} is not empty; remove it, or give another with --out.")
    config, tensors = to_hugging_face(trained.model)
    generation: dict[str, Any] = {"do_sample": True, "temperature": 0.8}
    lacks: list[str] = []
    files: dict[str, bytes] = {}
    try:
        used = tokenizer_of(trained.config.data, tokenizer)
    except (BadInput, RunFailed) as error:
        lacks.append(LACKS_TOKENIZER.format(why=str(error).rstrip(".")))
    else:
        end = used.end_of_text
        ends = {} if end is None else {"bos_token_id": end, "eos_token_id": end}
        config |= ends
        padding = list(range(used.vocab_size, trained.model.config.vocab_size))
        generation |= ends | ({"suppress_tokens": padding} if padding else {})
        made = files_of(used, trained.model.config.block_size)
        if made is None:
            why = f"GPT-2's form of them cannot hold the vocabulary {used.name}"
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
    """Return a model card with what the run measured."""
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
        "What the run measured, with what was claimed and predicted before its first step:",
        "",
        "| quantity | measured | claimed | predicted | verdict |",
        "|---|---|---|---|---|",
    ]
    for row in sort_rows(report.rows):
        cells = Cells(row)
        if cells.measured:
            shown = (row.quantity, cells.measured, cells.claimed, cells.predicted, cells.verdict)
            lines.append(f"| {' | '.join(map(markdown, shown))} |")
    absent = sorted({row.quantity for row in report.rows if row.measured is None})
    if absent:
        lines += ["", f"Not measured: {', '.join(absent)}."]
    return "\n".join([*lines, ""])


def files_of(tokenizer: Tokenizer, block_size: int) -> dict[str, bytes] | None:
    """Return names and contents of the tokenizer files; None if Hugging Face's cannot hold it."""
    library, end = tokenizer.library, tokenizer.end_of_text
    if tokenizer.name in (CHARACTERS, NANOGPT_CHARACTERS):
        name = None if end is None else END_OF_TEXT
        vocabulary = {token.decode(): rank for token, rank in library._mergeable_ranks.items()}
        split = {"pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
        described: str | bytes = _json(
            {
                "version": "1.0",
                "added_tokens": [] if end is None else [_special(end)],
                "pre_tokenizer": {"type": "Split", **split},
                "decoder": {"type": "Fuse"},
                "model": {
                    "type": "WordLevel",
                    "vocab": vocabulary | ({} if name is None else {name: end}),
                    "unk_token": name or next(iter(vocabulary)),
                },
            }
        )
    elif tokenizer.name.startswith(HUGGING_FACE):
        name, described = library.id_to_token(end), library.to_str(pretty=True)
    else:
        return tokenizer_files(library, block_size)
    names = {} if name is None else {"bos_token": name, "eos_token": name}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": block_size}
    return {
        "tokenizer.json": described.encode() if isinstance(described, str) else described,
        "tokenizer_config.json": _json(settings | {"clean_up_tokenization_spaces": False} | names),
    }


def _special(token: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token, "content": END_OF_TEXT, **flags, "special": True}


def tokenizer_files(encoding: tiktoken.Encoding, block_size: int) -> dict[str, bytes] | None:
    """Return names and contents of the tokenizer files; None if GPT-2's file format cannot hold it.

    That is the case if its pre-tokenization differs from GPT-2's (unless all tokens are single bytes), or if it has a
    token that no merge produces.
    """
    ranks = encoding._mergeable_ranks
    if encoding._pat_str != r50k_pat_str and len(ranks) > 256:
        return None
    letters = bytes_to_unicode()
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        if len(token) > 1:
            parts = parts_of(token, ranks)
            if parts is None:
                return None
            merges.append(" ".join("".join(letters[b] for b in part) for part in parts))
    vocabulary = _written(encoding)
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_special(encoding.eot_token)],
        "normalizer": None,
        "pre_tokenizer": {**level, "use_regex": True},
        "post_processor": {**level, "use_regex": True},
        "decoder": {**level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "vocab": vocabulary,
            "merges": merges,
        },
    }
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    tokenizer_config = {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": False,
        "model_max_length": block_size,
        **names,
    }
    return {
        "vocab.json": _json(vocabulary),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]).encode(),
        "tokenizer.json": _json(tokenizer),
        "tokenizer_config.json": _json(tokenizer_config),
        "special_tokens_map.json": _json(names),
    }


def vocabulary_of(tokenizer: Tokenizer) -> dict[str, int]:
    """Return the contents of vocab.json: ids by token, whose bytes are written as letters."""
    if tokenizer.name.startswith(HUGGING_FACE):
        vocabulary: dict[str, int] = tokenizer.library.get_vocab(with_added_tokens=True)
        return vocabulary
    return _written(tokenizer.library)


def _written(encoding: tiktoken.Encoding) -> dict[str, int]:
    letters = bytes_to_unicode()
    ranks = encoding._mergeable_ranks
    written = {"".join(letters[b] for b in token): rank for token, rank in ranks.items()}
    return written | encoding._special_tokens


def bytes_to_unicode() -> list[str]:
    """Return the letter that stands for each byte: itself if printable, else one from U+0100 on.

    Source: openai/gpt-2, src/encoder.py (bytes_to_unicode).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def parts_of(token: bytes, ranks: Mapping[bytes, int]) -> list[bytes] | None:
    """Return the two tokens whose merge gives a token, or None if no merge does."""
    parts = [bytes([byte]) for byte in token]
    own = ranks[token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, own) for a, b in pairwise(parts)]
        least = min(pairs)
        if least == own:
            return None
        at = pairs.index(least)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=1).encode()
