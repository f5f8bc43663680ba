"""What a run will need, whether it fits, and which claims about it cannot be true, before any run.

python plan.py configs/rtx4070_fineweb.toml --gpu "RTX 4070" --claims predictions/seed_zh.toml
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from nanogauge.claims import load_claims
from nanogauge.cli import Parser, run_command
from nanogauge.config import Config, add_config_flags, config_overrides, load_config
from nanogauge.errors import BadInput
from nanogauge.hardware import lookup
from nanogauge.predict.fit import largest_micro_batch
from nanogauge.predict.prediction import predict, resolve_dtype
from nanogauge.quantities import format_seconds
from nanogauge.records import SCHEMA, Prediction
from nanogauge.report.compare import build_rows
from nanogauge.report.render import in_order, print_findings, print_rows

DESKTOP_BYTES = 2**30  # what a desktop session holds of a card that also drives the screen


def main(arguments: Sequence[str]) -> int:
    assert __doc__ is not None
    parser = Parser(__doc__)
    parser.add_argument("config", type=Path, help="configuration of the run")
    parser.add_argument("--gpu", required=True, help='a row of nanogauge/hardware.toml: "RTX 4070"')
    parser.add_argument("--free-vram-gib", type=float, metavar="GIB", help="memory that is free")
    parser.add_argument("--claims", type=Path, help="claims to hold against the plan")
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else")
    add_config_flags(parser)
    given = parser.parse(arguments)
    config = load_config(given.config, config_overrides(given))
    claims = load_claims(given.claims) if given.claims is not None else None
    dtype = resolve_dtype(config, "gpu")
    prediction = predict(config, lookup(given.gpu, dtype), dtype)
    rows, findings = build_rows(claims, config, prediction, None)
    fit = fit_into(config, prediction, given.free_vram_gib)
    if given.json:
        plan = {
            "schema": SCHEMA,
            "rows": [row.model_dump(mode="json") for row in rows],
            "fit": fit,
            "inconsistencies": [finding.model_dump(mode="json") for finding in findings],
        }
        print(json.dumps(plan, indent=1, ensure_ascii=False))
        return 0
    console = Console()
    console.print(Text(f"{config.run.name} on {prediction.hardware.name}", style="bold"))
    console.print(Text(prediction.hardware.peak_name, style="dim"))
    console.print()
    shown = [row for row in in_order(rows) if row.claimed is not None or row.analytic is not None]
    print_rows(shown, ("predicted", "claimed"), console, planned=True)
    console.print()
    console.print(Text(_fit_sentence(config, fit)))
    if prediction.step_parts:
        parts = ", ".join(
            f"{p.name} {format_seconds(p.value)}" for p in prediction.step_parts if p.value
        )
        console.print(Text(f"One step: {parts}.", style="dim"))
    for note in prediction.notes:
        console.print(Text(f"! {note}", style="yellow"))
    print_findings(findings, console)
    return 0


def fit_into(
    config: Config, prediction: Prediction, free_vram_gib: float | None
) -> dict[str, object]:
    """Whether the expected peak of the process fits, by the free memory or the card less a desktop.

    Raises:
        BadInput: if free_vram_gib is not positive, or missing for a device whose memory varies.
    """
    if free_vram_gib is not None and not 0 < free_vram_gib < 1e6:
        raise BadInput("--free-vram-gib must be above 0, and a size that memory has.")
    total = prediction.hardware.memory_bytes
    if free_vram_gib is not None:
        free = int(free_vram_gib * 2**30)
    elif total is not None:
        free = total - DESKTOP_BYTES
    else:
        name = prediction.hardware.name
        raise BadInput(f"the memory of {name} varies; say what is free with --free-vram-gib.")
    peak = prediction.quantities["peak_process_bytes"]
    return {
        "fits": peak.expected <= free,
        "certain": peak.high <= free or peak.low > free,
        "peak_process_bytes": peak.expected,
        "free_bytes": free,
        "largest_micro_batch": largest_micro_batch(
            config, prediction.hardware, prediction.dtype, free
        ),
    }


def _fit_sentence(config: Config, fit: dict[str, object]) -> str:
    verdict = "fits" if fit["fits"] else "does not fit"
    if not fit["certain"]:
        verdict = "probably " + verdict
    peak, free = fit["peak_process_bytes"], fit["free_bytes"]
    assert isinstance(peak, float) and isinstance(free, int)
    largest = fit["largest_micro_batch"]
    advice = (
        f"the largest micro-batch that does is {largest}"
        if largest
        else "no micro-batch does: make the model smaller"
    )
    return (
        f"Memory: {verdict}: about {peak / 2**30:.1f} of {free / 2**30:.1f} GiB free, "
        f"at micro-batch {config.train.micro_batch}; {advice} (at the same tokens per step)."
    )


if __name__ == "__main__":
    run_command(main)
