"""Make the configurations of bench/presets.toml with the search of plan --best, and their table.

python bench/presets.py [--write]

--write replaces configs/NAME.toml and the table of docs/presets.md.
"""

import sys
import tomllib
from typing import Any

from results import ROOT

from nanogauge.config import load_config
from nanogauge.hardware import lookup, usually_free_bytes
from nanogauge.prediction.best_run import EVIDENCE_SHAPES
from nanogauge.prediction.plan import best_toml, plan_best
from nanogauge.prediction.prediction import predict
from nanogauge.runspec import RunSpec
from nanogauge.schema import FreeMemory, Hardware

TABLE = tomllib.loads((ROOT / "bench" / "presets.toml").read_text())
HEAD = """\
| configuration | hours | model | tokens | loss on FineWeb-Edu | memory |
|---|---|---|---|---|---|
"""


def make(preset: dict[str, Any]) -> tuple[str, str]:
    """Return the configuration of a preset as TOML, and its row of the table."""
    dtype = preset.get("dtype", "bfloat16")
    device = lookup(preset["gpu"], dtype) if "gpu" in preset else Hardware(**TABLE["laptop"])
    gib = preset.get("free_gib")
    free = usually_free_bytes(device) if gib is None else gib * 2**30
    assert free is not None
    run = {"dtype": dtype, "compile": preset.get("compile", True)}
    config = load_config(ROOT / "nanogauge" / "base.toml", {"run": run})
    plan, specs = plan_best(
        RunSpec.from_config(config, dtype),
        lambda spec: predict(spec, device),
        FreeMemory(bytes=int(free), source="presets.toml"),
        3600 * preset["hours"],
        sure="sure" in preset,
    )
    published = (
        name
        for name, run in plan.runs.items()
        if name.startswith("alternative") and (run.n_layer, run.n_embd) in EVIDENCE_SHAPES
    )
    name = next(published, "best")
    model, notes = plan.runs[name], predict(specs[name], device).notes
    plan = plan.model_copy(update={"runs": {"best": model}, "notes": notes})
    text = best_toml(config, specs[name], plan, device.name, f"configs/{preset['name']}.toml")
    total, loss = model.total_seconds, model.val_loss
    assert total is not None and loss is not None
    cells = (
        f"`{preset['name']}.toml`, {device.name}",
        f"{total.expected / 3600:.1f} ({total.low / 3600:.1f}-{total.high / 3600:.1f})",
        f"{model.n_layer} x {model.n_embd}, {model.parameters / 1e6:.0f} M",
        f"{model.tokens / 1e9:.2f} G",
        f"{loss.expected:.2f} ({loss.low:.2f}-{loss.high:.2f})",
        f"{model.peak_process_bytes.expected / 2**30:.1f} GiB",
    )
    return text, f"| {' | '.join(cells)} |\n"


def main() -> None:
    made = [(preset, *make(preset)) for preset in TABLE["preset"]]
    caveats = [f"* `{p['name']}.toml`: {p['caveat']}.\n" for p, _, _ in made if "caveat" in p]
    table = f"{HEAD}{''.join(row for _, _, row in made)}\n{''.join(caveats)}"
    print(table)
    if "--write" in sys.argv[1:]:
        for preset, text, _ in made:
            (ROOT / "configs" / f"{preset['name']}.toml").write_text(text)
        page = ROOT / "docs" / "presets.md"
        head, _, rest = page.read_text().partition("<!-- presets -->\n")
        tail = rest.partition("<!-- end -->")[2]
        page.write_text(f"{head}<!-- presets -->\n{table}<!-- end -->{tail}")


if __name__ == "__main__":
    main()
