"""The tables of docs/scaling.md are those of the prediction."""

import re
from dataclasses import replace

from commands import ROOT, run
from examples import documented_spec

from nanogauge.hardware import lookup
from nanogauge.prediction.constants import FITTED
from nanogauge.prediction.prediction import predict

PAGE = ROOT / "docs" / "scaling.md"


def test_the_tables_of_the_page_are_those_of_the_prediction() -> None:
    """bench/scaling.py --write updates them."""
    done = run("bench/scaling.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout in PAGE.read_text(encoding="utf-8")
    assert "outside" not in done.stdout, "a published run outside of its interval"
    published = re.findall(r"\| ([+-]\d+) % \|", done.stdout)
    assert len(published) == 6
    assert all(abs(int(off)) <= 15 for off in published)


def test_a_compiled_step_hides_no_gradient_synchronisation() -> None:

    def exchange(compile_it: bool) -> float:
        spec = replace(documented_spec(), compile=compile_it, world_size=2)
        parts = predict(spec, lookup("RTX 4070", "bfloat16")).step_parts
        return sum(part.value for part in parts if part.name == "gradient synchronisation")

    gradients = 4 * 40_953_216
    assert exchange(True) == 2 * gradients * (1 / 2) / (FITTED.pcie_share * 32e9)
    assert exchange(False) < exchange(True) / 4
