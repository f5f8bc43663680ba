"""Runs that other people published, as a CSV: each row as a workload, a card and what was measured.

Such tables are made by hand, so a row says part of itself in words. What the columns leave out is read from the notes
(`source_detail`, `quote`); what is nowhere is assumed, and named as assumed. A row that cannot be predicted is skipped
with its reason.
"""

import csv
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from nanogauge.commands.share import COLUMNS
from nanogauge.errors import BadInput
from nanogauge.hardware import find_gpu, from_row
from nanogauge.prediction.flops import count_parameters, flops_per_token_palm
from nanogauge.prediction.memory import predict_memory
from nanogauge.prediction.workload import Dtype, Workload, workload_of
from nanogauge.programs import TRAINING_PROGRAMS
from nanogauge.runspec import RunSpec
from nanogauge.schema import Hardware
from nanogauge.spec_parts import PLAIN, Program, Shape


@dataclass(frozen=True)
class PublishedRun:
    id: str
    source: str
    confidence: str
    work: Workload
    hardware: Hardware
    assumed: tuple[str, ...]
    """what the row does not say and was taken for granted"""
    step_seconds: float | None
    peak_allocated_bytes: float | None
    peak_reserved_bytes: float | None
    peak_process_bytes: float | None

    @property
    def complete(self) -> bool:
        return not self.assumed

    @property
    def owner(self) -> str:
        """Person or group behind the source; for an issue, its reporter."""
        return self.source if re.search(r"[#(]", self.source) else re.split(r"[/.]", self.source)[0]


@dataclass(frozen=True)
class Skipped:
    id: str
    reason: str


@dataclass(frozen=True)
class PowerReading:
    """Mean power of one board while it trains, whatever it trains."""

    id: str
    hardware: Hardware
    watts: float
    limit_watts: float

    @property
    def share(self) -> float:
        """Of the limit."""
        return self.watts / self.limit_watts


_Row = dict[str, str]
_DECIMAL = r"\d+(?:\.\d+)?"


def read_runs(path: Path) -> tuple[list[PublishedRun], list[PowerReading], list[Skipped]]:
    """Every row of the table, as a run or as skipped with a reason; and all readings of power.

    A row whose model is not described is skipped as a run and may still have a reading of power.

    Raises:
        BadInput: if the file cannot be read or lacks a column.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            missing = [c for c in COLUMNS.split() if c not in (reader.fieldnames or [])]
            rows = [{k: (v or "").strip() for k, v in row.items() if k} for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a table of UTF-8 text"
        raise BadInput(f"{path}: {reason}; give a CSV file of runs.") from None
    if missing:
        raise BadInput(f"{path}: no column {', '.join(missing)}; give a CSV file of runs.")
    runs: list[PublishedRun] = []
    readings = [r for number, row in enumerate(rows, start=2) if (r := _power(row, number))]
    skipped: list[Skipped] = []
    described: dict[str, str] = {}
    for number, row in enumerate(rows, start=2):
        if "same model" not in row["source_detail"]:
            described[row["source"]] = row["source_detail"]
        name = row["id"] or f"line {number}"
        try:
            runs.append(_run(name, row, described.get(row["source"], "")))
        except _CannotPredict as reason:
            skipped.append(Skipped(name, str(reason)))
    return runs, readings, skipped


def _power(row: _Row, number: int) -> PowerReading | None:
    """The reading of a row with a number of watts on one known card with tensor cores."""
    watts = _number(row["power_w"]) if re.fullmatch(_DECIMAL, row["power_w"]) else None
    gpu = find_gpu(_card(row["gpu"]))
    if watts is None or gpu is None or gpu.peak_flops("float16") is None:
        return None
    hardware = _hardware(row, "bfloat16" if gpu.peak_flops("bfloat16") else "float16")
    if hardware.power_limit_watts is None:
        return None
    return PowerReading(row["id"] or f"line {number}", hardware, watts, hardware.power_limit_watts)


class _CannotPredict(Exception):
    """Why a row is skipped."""


def _run(name: str, row: _Row, described: str) -> PublishedRun:
    """A row as a run; described is what its source said last of a model, for "the same model"."""
    notes = " ".join(row[c] for c in ("source", "source_detail", "gpu", "optimizer", "quote"))
    assumed: list[str] = []
    dtype, master = _arithmetic(row, assumed)
    hardware = _hardware(row, dtype)
    if row.get("spec"):  # of `nanogauge share`
        work = _shared(row, assumed)
    else:
        same = described if "same model" in row["source_detail"] else ""
        shape = _shape(row, f"{notes} {same}", assumed)
        work = _workload(row, notes, shape, dtype, master, assumed)
    step = _step_seconds(row, work)
    memory = _number(row["peak_vram_mib"])
    peak = memory * 2**20 if memory else None
    if "compile (yes)" in assumed and peak is not None:
        work = _compiled_by_memory(work, hardware, peak)
    of_process = bool(re.search(r"nvidia-smi: python process|process accounting", notes))
    of_allocator = "torchtitan" in notes  # its memory is torch.cuda's max_reserved
    if step is None and peak is None:
        raise _CannotPredict("neither a time nor a peak of memory is given")
    return PublishedRun(
        id=name,
        source=row["source"],
        confidence=row["confidence"],
        work=work,
        hardware=hardware,
        assumed=tuple(assumed),
        step_seconds=step,
        peak_allocated_bytes=None if of_process or of_allocator else peak,
        peak_reserved_bytes=peak if of_allocator else None,
        peak_process_bytes=peak if of_process else None,
    )


def _shared(row: _Row, assumed: list[str]) -> Workload:
    try:
        spec = RunSpec.from_json(row["spec"].encode())
        work = workload_of(spec, on_gpu=True)
    except (ValueError, BadInput) as error:
        raise _CannotPredict(f"its spec: {error}") from None
    if spec.compile is None:
        assumed.append("compile (yes)")
    return replace(work, compiled=spec.compile is not False)


def _compiled_by_memory(work: Workload, hardware: Hardware, peak: float) -> Workload:
    """Return the workload; eager, if its predicted peak is then at least twice as close to the peak."""

    def distance(candidate: Workload) -> float:
        return abs(math.log(predict_memory(candidate, hardware).allocated.expected / peak))

    eager = replace(work, compiled=False)
    return eager if distance(eager) < distance(work) / 2 else work


def _number(text: str) -> float | None:
    """The number a cell begins with; of a range like 40.2-40.3 the first."""
    found = re.match(rf"{_DECIMAL}(e\d+)?", text.replace(",", ""))
    return float(found[0]) if found and float(found[0]) > 0 else None


def _whole(row: _Row, column: str) -> int:
    value = _number(row[column])
    if value is None:
        raise _CannotPredict(f"{column} is not given")
    return int(value)


def _found(pattern: str, text: str) -> int | None:
    match = re.search(pattern, text, re.IGNORECASE)
    return int(next(g for g in match.groups() if g)) if match else None


def _arithmetic(row: _Row, assumed: list[str]) -> tuple[Dtype, bool]:
    precision = row["precision"].lower()
    if "fp4" in precision or "int8" in precision:
        raise _CannotPredict(f"its arithmetic, {row['precision']}, is not predicted")
    master = not re.search(r"(bf16|fp16) params", precision)
    for word, dtype in (("bf16", "bfloat16"), ("bfloat16", "bfloat16"), ("fp16", "float16")):
        if word in precision:
            return dtype, master  # type: ignore[return-value]
    if "fp32" in precision or "float32" in precision:
        return ("float32" if re.search(r"tf32 off|no tf32", precision) else "tf32"), True
    if "tf32" in precision:
        return "tf32", True
    gpu = find_gpu(_card(row["gpu"]))
    if gpu is None or gpu.peak_flops("bfloat16") is None or gpu.architecture == "apple":
        assumed.append("precision (fp32)")
        return "float32", True
    assumed.append("precision (bf16 autocast)")
    return "bfloat16", True


def _card(text: str) -> str:
    """The card without what is said of it in parentheses; an A100 of unknown memory has 40 GB."""
    name = re.sub(r"\(.*?\)|^\d+ ?x ", "", text).strip()
    return "A100 40GB" if name == "A100" else name


def _hardware(row: _Row, dtype: Dtype) -> Hardware:
    gpu = find_gpu(_card(row["gpu"]))
    if gpu is None:
        raise _CannotPredict(f"no card {row['gpu']!r} in hardware.toml")
    limit = _found(r"\((\d+) ?W limit\)", row["gpu"])
    name = "float32" if dtype == "tf32" else dtype
    try:
        return from_row(gpu, name, limit)
    except BadInput as error:
        raise _CannotPredict(str(error)) from None


def _shape(row: _Row, notes: str, assumed: list[str]) -> Shape:
    layers, heads, width = (_whole(row, c) for c in ("n_layer", "n_head", "n_embd"))
    context = _whole(row, "block_size")
    if not row["vocab_size"] and "nanoGPT" in row["source"]:
        assumed.append("vocabulary (GPT-2's)")
        vocabulary = 50257
    else:
        vocabulary = _whole(row, "vocab_size")
    if "Megatron" in notes:  # its default make-vocab-size-divisible-by
        vocabulary = math.ceil(vocabulary / 128) * 128
    if width % heads and not re.search(r"hd ?\d+|head_dim", notes):
        raise _CannotPredict(f"n_embd {width} is not a multiple of n_head {heads}")
    if re.search(r"\bbert\b|encoder fine-tune", notes, re.IGNORECASE):
        raise _CannotPredict("an encoder, not a GPT")
    if re.search(r"\bmoe\b|experts", notes, re.IGNORECASE):
        raise _CannotPredict("a mixture of experts")
    head_size = _found(r"\bhd ?(\d+)|head_dim (\d+)", notes) or width // heads
    llama = re.search(r"llama|qwen|swiglu|mistral", notes, re.IGNORECASE)
    nanochat = re.search(r"nanochat|value emb|autoresearch|train_gpt_simple", notes)
    rotary = llama or nanochat or re.search(r"rotary|rope", notes, re.IGNORECASE)
    shape = Shape(
        n_layer=layers,
        n_embd=width,
        n_head=heads,
        context=context,
        vocabulary=vocabulary,
        n_kv_head=_key_value_heads(notes) or heads,
        head_size=head_size,
        mlp_width=_found(r"\b(?:d_ff|ff) ?(\d+)", notes) or (_found(r"MLP (\d)x", notes) or 4) * width,
        mlp_matrices=3 if llama else 2,
        tied_head=not (re.search(r"untied", notes) or nanochat or (llama and " tied" not in notes)),
        position_table=not rotary,
        norm_weights=not re.search(r"nanochat|autoresearch", notes),  # F.rms_norm, nanochat/gpt.py
        attended=_attended(notes),
    )
    return _filled_up(shape, _number(row["params_m"]), bool(llama), bool(nanochat), notes)


def _key_value_heads(notes: str) -> int | None:
    """As the notes say; Llama 3 8B has 8 (Grattafiori et al. 2024, table 3), Llama 2 7B and 13B as many as heads."""
    return _found(r"(\d+) ?kv", notes) or (8 if re.search(r"llama 3(\.\d)? 8b", notes, re.I) else None)


def _attended(notes: str) -> float:
    """Mean share of the context under a pattern of windows: S is half of it, L the whole."""
    pattern = re.search(r"window pattern ([SL]{2,})", notes)
    if pattern is None:
        return 1.0
    shares = [0.5 if letter == "S" else 1.0 for letter in pattern[1]]
    return sum(shares) / len(shares)


def _filled_up(shape: Shape, millions: float | None, gated: bool, nanochat: bool, notes: str) -> Shape:
    """The width of a gated MLP, or the size of tables, from a published parameter count."""
    if millions is None:
        return shape
    if gated and not re.search(r"\b(?:d_ff|ff) ?\d+", notes):
        without = count_parameters(replace(shape, mlp_width=0)).total
        width = (1e6 * millions - without) / (shape.n_layer * 3 * shape.n_embd)
        return replace(shape, mlp_width=max(64, round(width / 64) * 64))
    missing = 1e6 * millions - count_parameters(shape).total
    return replace(shape, table_parameters=max(0, int(missing))) if nanochat else shape


_OPTIMIZERS: tuple[tuple[str, Literal["adamw", "adamw_foreach", "muon"] | None], ...] = (
    (r"soap|shampoo|sophia", None),
    (r"muon", "muon"),
    (r"adam.*fused|fused adam", "adamw"),
    (r"adam", "adamw_foreach"),
)


def _workload(row: _Row, notes: str, shape: Shape, dtype: Dtype, master: bool, assumed: list[str]) -> Workload:
    gpus = int(_number(row["world"]) or _number(row["n_gpus"]) or 1)
    if re.search(r"(?<![a-z])[tp]p[-_ =]?[2-9]", row["source_detail"]):
        raise _CannotPredict("tensor or pipeline parallelism")
    compiled = _compiled(row["compile"].lower(), assumed)
    attention = _attention(row["flash_attn"].lower(), assumed)
    named = row["optimizer"].lower()
    optimizer: Literal["adamw", "adamw_foreach", "muon"] = "adamw"
    for pattern, kind in _OPTIMIZERS:
        if re.search(pattern, named):
            if kind is None:
                raise _CannotPredict(f"its optimizer, {row['optimizer']}, is not predicted")
            optimizer = kind
            break
    else:
        assumed.append("optimizer (fused AdamW)")
    if "CUDA C" in row["compile"]:
        optimizer = "adamw"
    checkpointing, precision = (_checkpointing(row["activation_ckpt"].lower()), row["precision"].lower())
    return Workload(
        shape=shape,
        micro_batch=_whole(row, "micro_batch"),
        grad_accum=int(_number(row["grad_accum"]) or 1),
        dtype=dtype,
        compiled=compiled,
        attention=attention,
        dropout=float(m[1]) if (m := re.search(r"dropout (0\.\d+)", notes)) else 0.0,
        checkpointing=checkpointing,
        optimizer=optimizer,
        clipped="clip" in named or not re.search(r"modded-nanogpt|nanochat|muon", notes.lower()),
        gpus=gpus,
        sharding=_sharding(notes, named),
        # nanochat's optimizers exchange gradients in their own step.
        overlapped=not re.search(r"not overlapped|nanochat", notes),
        program=replace(
            published_program(notes),
            fp32_exchange=False,
            master_weights=master,
            wide_residual=master and bool(re.search(r"autocast|mixed|amp", precision)),
            newton_schulz_steps=_found(r"(\d+) NS iter", notes) or 5,
            muon_batched=not re.search(rf"{_ALONE}|per param", notes),
            fp8_products="fp8" in precision,
            sync_every_micro_step="no no_sync" in notes,
        ),
    )


# The first Muon: every rank worked on every matrix, one after the other.
_ALONE = r"not sharded|replicated on every rank"


def _sharding(notes: str, optimizer: str) -> Literal["replicated", "optimizer", "full", "hybrid"]:
    if re.search(r"\bHSDP \|", notes) or re.search(r"\bhsdp\.?$", notes, re.IGNORECASE):
        return "hybrid"
    if re.search(r"\bfsdp", notes, re.IGNORECASE):
        return "full"
    if re.search(r"sharded", optimizer):
        return "optimizer"
    alone = re.search(_ALONE, notes)
    return "optimizer" if "muon" in optimizer and not alone else "replicated"


def _compiled(text: str, assumed: list[str]) -> bool:
    if not text:
        assumed.append("compile (yes)")
    return not text.startswith("no")


def _attention(text: str, assumed: list[str]) -> Literal["flash", "flash3", "plain"]:
    if not text:
        assumed.append("attention kernel (flash)")
    if text.startswith(("no", "math", "naive", "eager")):
        return "plain"
    return "flash3" if re.search(r"fa3|cudnn|te fused", text) else "flash"


def _checkpointing(text: str) -> Literal["none", "selective", "full"]:
    if not text or text.startswith("no"):
        return "none"
    return "selective" if text.startswith("selective") else "full"


def _step_seconds(row: _Row, work: Workload) -> float | None:
    """Seconds of an optimizer step: printed, or from tokens per second, MFU or a total."""
    if milliseconds := _number(row["iter_ms"]):
        return milliseconds / 1e3
    if rate := _number(row["tokens_per_sec"]):
        return work.tokens_per_step / rate
    notes = f"{row['source_detail']} {row['quote']}"
    if found := re.search(rf"total_training_time ({_DECIMAL}) ?s? ?/ ?(\d+) steps", notes):
        return float(found[1]) / int(found[2])
    if found := re.search(rf"(\d+) steps in ({_DECIMAL}) ?s\b", notes):
        return float(found[2]) / int(found[1])
    if found := re.search(rf"({_DECIMAL})(?:-{_DECIMAL})? ms\b", row["quote"]):
        return float(found[1]) / 1e3
    share, peak = _number(row["mfu_logged"]), _number(row["mfu_peak_used_tflops"])
    if share and peak:
        flops = flops_per_token_palm(work.shape) * work.tokens_per_step
        return flops / (share / 100 * peak * 1e12)
    return None


_PROGRAMS = (
    (r"nanochat|autoresearch", "nanochat"),
    (r"parameter-golf", "parameter-golf"),
    (r"torchtitan", "torchtitan"),
    (r"ai-field-notes", "ai-field-notes"),
    (r"build-nanogpt", "build-nanogpt"),
    (r"modded-nanogpt|nanogpt-speedrun", "modded-nanogpt"),
    (r"llm\.c", "llm.c"),
    (r"nanogpt|jekyll-ai-blog", "nanogpt"),
)


def published_program(notes: str) -> Program:
    """The program that a run's notes name; one with defaults where none is known."""
    named = (name for pattern, name in _PROGRAMS if re.search(pattern, notes, re.IGNORECASE))
    program = TRAINING_PROGRAMS.get(next(named, ""), PLAIN)
    # torch 2.5 has no donated buffers.
    return replace(program, donated_buffers=not re.search(r"torch 2\.[0-5]\b", notes))
