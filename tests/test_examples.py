"""The examples have the verdicts that their README lists."""

import json
import re
from pathlib import Path

from commands import ROOT, run, run_here
from examples import CPU

from nanogauge.analysis.claims import load_claims
from nanogauge.analysis.verdicts import build_rows
from nanogauge.config import load_config
from nanogauge.prediction.prediction import predict
from nanogauge.quantities import QUANTITIES
from nanogauge.runspec import RunSpec

README = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
DEMO_CLAIMS = ROOT / "examples" / "demo_claims.toml"
NANOGPT_CLAIMS = ROOT / "examples" / "nanogpt_cpu_claims.toml"


def test_arithmetic_refutes_the_claims_about_the_demo_that_the_readme_names() -> None:
    spec = RunSpec.from_config(load_config(ROOT / "configs" / "demo.toml"))
    rows, findings = build_rows(load_claims(DEMO_CLAIMS), spec, predict(spec, CPU), None)
    verdicts = {row.claim: row.verdict for row in rows if row.claim is not None}
    assert verdicts["flops_total_6n.scientific"] == "contradicted"
    exact = ("parameters", "tokens_per_step", "tokens_total", "flops_total_6n.detail")
    assert {verdicts[claim] for claim in exact} == {"held"}
    assert ["total_seconds.detail", "total_seconds.summary"] in [f.ids for f in findings]


def test_the_log_of_nanogpt_gives_the_verdicts_of_the_readme(tmp_path: Path) -> None:
    (command,) = re.findall(r"python (report\.py --nanogpt-log .*?)\n\n", README, re.S)
    words = command.replace("\\\n", " ").split()
    words[words.index("--out") + 1] = str(tmp_path / "out")
    done = run_here(*words)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    found = [(row["claim"], row["verdict"]) for row in report["rows"] if row["claim"] is not None]
    table = re.findall(r"^\| `(\S+)` \|.*\| ([a-z ]+) \|$", README, re.M)
    assert sorted(found) == sorted(table)
    measured = {row["id"] for row in report["rows"] if row["measured"] is not None}
    assert {"step_seconds", "first_step_seconds", "total_seconds", "val_loss"} <= measured


def test_names_of_quantities_stay_whole_on_a_terminal_of_80_columns() -> None:
    flags = ["--gpu=RTX 4070", f"--claims={NANOGPT_CLAIMS}"]
    done = run("plan.py", "configs/demo.toml", *flags, COLUMNS="80")
    assert done.returncode == 0, done.stderr
    table = re.split("\n[‼≉✕]", done.stdout.partition("quantity")[2])[0]
    firsts = {line.split("  ")[0] for line in table.splitlines()[1:]}
    words = {word for first in firsts for word in first.split()}
    assert words <= {word for q in QUANTITIES.values() for word in q.label.split()}
