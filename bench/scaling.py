"""Predict runs on one to 1,024 GPUs: the tables of docs/scaling.md.

python bench/scaling.py            # print them
python bench/scaling.py --write    # put them into docs/scaling.md

It measures nothing and needs no GPU. Published steps are compared with the same predictions.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from results import result

from nanogauge.cli import Parser, run_command
from nanogauge.hardware import lookup
from nanogauge.prediction.memory import predict_memory
from nanogauge.prediction.prediction import predict
from nanogauge.prediction.search import fit_verdict
from nanogauge.prediction.step_time import predict_step_time
from nanogauge.prediction.workload import Workload, workload_of
from nanogauge.quantities import Interval, format_range, format_seconds
from nanogauge.runspec import RunSpec
from nanogauge.schema import Estimate, Hardware
from nanogauge.spec_parts import Program, Shape, Sharding

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
BEGIN, END = "<!-- tables: bench/scaling.py --write -->\n", "<!-- end of the tables -->\n"
GIB = 2**30
DTYPE = "bfloat16"


@dataclass(frozen=True)
class Case:
    gpu: str
    gpus: int
    micro_batch: int
    each: int
    """Micro-batches per step on each GPU."""


SMALL = {"n_layer": 12, "n_head": 12, "n_embd": 768}
LARGE = {"n_layer": 48, "n_head": 25, "n_embd": 1600}
SMALL_TOKENS, LARGE_TOKENS = 10e9, 30e9
STRONG = (
    *(Case("RTX 4070", 1, 8, 64), Case("RTX 4070", 2, 8, 32)),
    *(Case("RTX 4090", 1, 16, 32), Case("RTX 4090", 2, 16, 16), Case("RTX 4090", 8, 16, 4)),
    *(Case("A100 80GB", 1, 64, 8), Case("A100 80GB", 8, 64, 1)),
    *(Case("H100 SXM", 1, 64, 8), Case("H100 SXM", 8, 64, 1), Case("H100 SXM", 64, 8, 1)),
)
"""GPT-2 124M, strong scaling: 524,288 tokens per step"""
WEAK = tuple(Case("H100 SXM", gpus, 4, 4) for gpus in (1, 8, 64, 256, 1024))
"""GPT-2 1.5B, weak scaling"""
HUGE = {"n_layer": 32, "n_head": 32, "n_embd": 4096}
TOO_LARGE = (
    *(("GPT-2 1.5B", LARGE, Case("RTX 4090", n, 1, each)) for n, each in ((2, 32), (8, 8))),
    *(("GPT of 6.7 B", HUGE, Case("H100 SXM", n, 4, 4)) for n in (8, 64)),
)
"""models larger than one GPU's memory, weak scaling"""


@dataclass(frozen=True)
class Published:
    """A published step time on several GPUs, and its workload."""

    what: str
    gpu: str
    seconds: float
    source: str
    work: Workload


_GPT2 = Shape(12, 768, 12, 1024, 50_304, 12, 64, 3072)
_llama = partial(Shape, mlp_matrices=3, tied_head=False, position_table=False)
_LLAMA3_8B = _llama(32, 4096, 32, 8192, 128_256, 8, 128, 14_336)
_LLAMA2_7B = _llama(32, 4096, 32, 4096, 32_000, 32, 128, 11_008)
_LLAMA2_13B = _llama(40, 5120, 40, 4096, 32_000, 40, 128, 13_824)
_FOREACH = Workload(_GPT2, 32, 4, optimizer="adamw_foreach")
_FSDP = replace(
    _FOREACH, micro_batch=2, grad_accum=1, sharding="full", program=Program(fp32_exchange=False, wide_residual=False)
)
PUBLISHED = (
    Published(
        "GPT-2 124M, DDP over PCIe, gradients averaged in each of 4 micro-steps",
        "RTX 4090",
        1.19134,
        "tyler-romero/nanogpt-speedrun, logs/4c627c0d",
        replace(_FOREACH, gpus=2, program=Program(sync_every_micro_step=True)),
    ),
    Published(
        "GPT-2 124M, DDP",
        "A100 40GB",
        0.56315,
        "karpathy/nanoGPT, issue 110",
        replace(
            _FOREACH, shape=replace(_GPT2, vocabulary=50_257), micro_batch=12, grad_accum=5, attention="plain", gpus=8
        ),
    ),
    Published(
        "GPT of 124M, DDP",
        "H100 SXM",
        0.13861,
        "KellerJordan/modded-nanogpt, 2024-10-29_Optimizers",
        Workload(Shape(12, 768, 6, 1024, 50_304, 6, 128, 3072, position_table=False), 64, 1, clipped=False, gpus=8),
    ),
    Published(
        "Llama 3 8B, FSDP, selective checkpointing",
        "A100 80GB",
        64 * 8192 / 185_856,
        "pytorch/torchtitan, docs/performance.md",
        replace(_FSDP, shape=_LLAMA3_8B, micro_batch=1, checkpointing="selective", gpus=64),
    ),
    Published(
        "Llama 2 13B, FSDP, selective checkpointing",
        "H100 SXM",
        1.68907,
        "foundation-model-stack/fms-fsdp",
        replace(_FSDP, shape=_LLAMA2_13B, checkpointing="selective", gpus=96),
    ),
    Published(
        "Llama 2 7B, HSDP",
        "A100 80GB",
        1.8004,
        "foundation-model-stack/fms-fsdp",
        replace(_FSDP, shape=_LLAMA2_7B, sharding="hybrid", gpus=128),
    ),
)


def spec_of(case: Case, model: dict[str, int], tokens: float, sharding: Sharding = "replicated") -> RunSpec:
    """Return the run of a case over this number of tokens."""
    sequences = case.micro_batch * case.each * case.gpus
    return RunSpec.gpt(
        **model,
        name="scaling",
        dtype=DTYPE,
        context=1024,
        vocabulary=50_304,
        micro_batch=case.micro_batch,
        grad_accum=case.each * case.gpus,
        steps=max(1, round(tokens / (sequences * 1024))),
        world_size=case.gpus,
        sharding=sharding,
        head="chunked",
        eval_every=500,
        eval_batches=50,
        checkpoint_every=500,
        unique_tokens=round(tokens),
    )


def case_rows(cases: Sequence[Case], model: dict[str, int], tokens: float) -> Iterator[list[str]]:
    for case in cases:
        spec, hardware = spec_of(case, model, tokens), lookup(case.gpu, DTYPE)
        quantities = predict(spec, hardware).quantities
        step, total, energy = (quantities[n] for n in ("step_seconds", "total_seconds", "energy_kwh"))
        work = workload_of(spec, on_gpu=True)
        alone = predict_step_time(replace(work, gpus=1), hardware)
        assert alone is not None
        yield [
            f"{case.gpus:,} x {case.gpu}",
            f"{spec.tokens_per_step / 1e6:.3g} M",
            _seconds(step),
            f"{spec.tokens_per_step / step.expected:,.0f}",
            f"{100 * alone.seconds / step.expected:.0f} %",
            _span("total_seconds", total),
            _span("energy_kwh", energy),
            _peak(work, hardware),
        ]


def sharding_rows() -> Iterator[list[str]]:
    for name, model, case in TOO_LARGE:
        hardware = lookup(case.gpu, DTYPE)
        for sharding in ("replicated", "full"):
            spec = spec_of(case, model, LARGE_TOKENS, sharding)
            step = predict(spec, hardware).quantities["step_seconds"]
            yield [
                name,
                f"{case.gpus} x {case.gpu}",
                "full" if sharding == "full" else "none",
                _seconds(step),
                _peak(workload_of(spec, on_gpu=True), hardware),
            ]


def _peak(work: Workload, hardware: Hardware) -> str:
    """Format the peak memory of a process and whether the GPU holds it."""
    peak = predict_memory(work, hardware).process
    assert hardware.memory_bytes is not None
    desktop = GIB if hardware.kind == "geforce" else 0
    verdict = fit_verdict(peak, hardware.memory_bytes - desktop)
    return f"{peak.expected / GIB:.1f} GiB, {verdict}"


def published_steps() -> Iterator[tuple[Published, Interval]]:
    """Yield each published run with its predicted step time in seconds."""
    for run in PUBLISHED:
        step = predict_step_time(run.work, lookup(run.gpu, DTYPE))
        assert step is not None
        yield run, step.interval


def published_rows() -> Iterator[list[str]]:
    for run, step in published_steps():
        off = 100 * (step.expected / run.seconds - 1)
        yield [
            f"{run.work.gpus} x {run.gpu}",
            run.what,
            f"{run.seconds:.3f} s",
            f"{step.expected:.3f} s ({step.low:.3f}–{step.high:.3f})",
            f"{off:+.0f} %" + ("" if step.contains(run.seconds) else ", outside"),
            run.source,
        ]


def links(gpus: Sequence[str]) -> Iterator[list[str]]:
    for name in gpus:
        hardware = lookup(name, DTYPE)
        assert hardware.interconnect_bytes_per_second is not None
        rate = f"{hardware.interconnect_bytes_per_second / 1e9:.0f} GB/s"
        yield [name, str(hardware.interconnect), rate]


def _seconds(estimate: Estimate) -> str:
    interval = format_range("step_seconds", estimate.low, estimate.high)
    return f"{format_seconds(estimate.expected)} ({interval})"


def _span(row_id: str, estimate: Estimate) -> str:
    return format_range(row_id, estimate.low, estimate.high)


def table(header: Sequence[str], rows: Iterator[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


CASE_COLUMNS = (
    *("GPUs", "tokens per step", "step", "tokens/s", "of one GPU's speed", "whole run"),
    *("energy of the boards", "peak per GPU"),
)


def tables() -> str:
    """Return all tables as Markdown."""
    parts = [
        "**GPT-2 124M, 10 B tokens, 524,288 tokens per step, shared by the GPUs (DDP):**\n",
        table(CASE_COLUMNS, case_rows(STRONG, SMALL, SMALL_TOKENS)),
        "**GPT-2 1.5B, 30 B tokens, the same work on each GPU (DDP):**\n",
        table(CASE_COLUMNS, case_rows(WEAK, LARGE, LARGE_TOKENS)),
        "**Models larger than one GPU, with `train.sharding` none (DDP) and full (FSDP):**\n",
        table(("model", "GPUs", "sharding", "step", "peak per GPU"), sharding_rows()),
        "**Published step times on several GPUs, and our predictions:**\n",
        table(("GPUs", "what", "published", "predicted", "error", "source"), published_rows()),
        "**The interconnect of one GPU, in one direction:**\n",
        table(
            ("GPU", "link within a machine", "datasheet bandwidth"),
            links(("RTX 4070", "RTX 4090", "A100 80GB", "H100 SXM")),
        ),
    ]
    return "\n".join(parts)


def main(arguments: Sequence[str]) -> int:
    parser = Parser(__doc__ or "")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/scaling.md")
    parser.add_argument("--json", action="store_true", help="print the published steps as JSON")
    args = parser.parse(arguments)
    if args.json:
        results = []
        for run, step in published_steps():
            peer = f"{run.seconds} s, {run.source}"
            interval = [step.low, step.high]
            results.append(result("step_seconds", run.what, interval, peer, step.expected))
        print(json.dumps({"bench": "scaling", "results": results}))
    elif args.write:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        _, _, after = rest.partition(END)
        PAGE.write_text(before + BEGIN + "\n" + tables() + "\n" + END + after, encoding="utf-8")
    else:
        sys.stdout.write(tables())
    return 0


if __name__ == "__main__":
    run_command(main)
