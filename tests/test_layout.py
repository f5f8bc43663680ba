"""The shape of the project: what imports what, how long files are, what starts without torch."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "nanogauge"
LEAVES = ("runspec", "records", "quantities", "config", "explaining", "files")
MEETING_PLACES = (
    "nanogauge.session",
    "nanogauge.recording",
    "nanogauge.rescue",
    "nanogauge.starting",
    "train",
)


def imports(path: Path) -> set[str]:
    """Modules a file imports anywhere, with the names taken from them: a.b and a.b.name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def uses(path: Path, *modules: str) -> set[str]:
    return {i for i in imports(path) for m in modules if i == m or i.startswith(m + ".")}


def files(folder: str) -> list[Path]:
    return sorted((PACKAGE / folder).rglob("*.py"))


def test_records_quantities_and_config_stand_on_the_standard_library_and_pydantic() -> None:
    """They are imported by everything, so they may import nothing that is slow or circular."""
    allowed = {*sys.stdlib_module_names, "pydantic"}
    ours = {"nanogauge.errors", *(f"nanogauge.{leaf}" for leaf in LEAVES)}
    for leaf in LEAVES:
        for name in imports(PACKAGE / f"{leaf}.py"):
            top = name.split(".")[0]
            assert top in allowed or any(name.startswith(our) for our in ours), (leaf, name)


def test_prediction_knows_no_measurement_report_or_torch() -> None:
    """A prediction that could see measurements would not be one."""
    for path in files("predict"):
        assert not uses(path, "nanogauge.measure", "nanogauge.report", "nanogauge.runlog"), path
        if path.name != "calibrate.py":
            assert not uses(path, "torch"), path


def test_measurement_knows_no_configuration_and_no_prediction() -> None:
    """An instrument that knew what is expected could be read too kindly."""
    for path in files("measure"):
        assert not uses(path, "nanogauge.config", "nanogauge.predict", "nanogauge.report"), path


def test_model_and_training_know_nothing_of_prediction_measurement_and_report() -> None:
    others = ("nanogauge.predict", "nanogauge.measure", "nanogauge.report", "nanogauge.runlog")
    for path in [ROOT / "model.py", *files("training")]:
        assert not uses(path, *others), path


def test_nothing_imports_the_places_where_all_meet() -> None:
    for path in [*PACKAGE.rglob("*.py"), *ROOT.glob("*.py")]:
        if path.name not in ("train.py", "session.py", "recording.py", "rescue.py", "starting.py"):
            assert not uses(path, *MEETING_PLACES), path


def test_only_the_run_log_touches_log_jsonl() -> None:
    """One writer and one reader: the form of a line is known in a single file."""
    for path in [*PACKAGE.rglob("*.py"), *ROOT.glob("*.py")]:
        strings = {
            node.value
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        assert path.name == "runlog.py" or "log.jsonl" not in strings, path


@pytest.mark.parametrize("module", ["plan", "report", "nanogauge.claims", "nanogauge.tracking"])
def test_planning_and_reporting_start_without_torch(module: str) -> None:
    """torch takes seconds to import: a plan is there in one, without it."""
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'wandb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_training_loop_is_inline_and_at_most_80_lines() -> None:
    """The loop is what a reader comes for: it reads top to bottom in one place."""
    tree = ast.parse((ROOT / "train.py").read_text())
    (train,) = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "train"]
    (loop,) = [n for n in train.body if isinstance(n, ast.While)]
    assert loop.end_lineno is not None
    assert loop.end_lineno - loop.lineno < 80
    called = {n.attr for n in ast.walk(loop) if isinstance(n, ast.Attribute)}
    assert called >= {"begin_step", "batch", "backward", "zero_grad", "end_step", "accumulating"}
    named = {n.id for n in ast.walk(loop) if isinstance(n, ast.Name)}
    assert named >= {"evaluate", "save", "learning_rate", "update", "record_steps", "roll_back"}


def test_the_pinned_versions_are_the_installed_ones_and_name_no_address() -> None:
    """The same environment next year: every installed package is pinned, by name and version."""
    text = (ROOT / "constraints.txt").read_text()
    assert not re.search(r"https?:|file:|@", text)
    pins = dict(line.split("==") for line in text.splitlines() if not line.startswith("#"))
    plain = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins.items()}
    needed, seen = ["nanogauge"], set()
    while needed:
        name = re.sub(r"[-_.]+", "-", needed.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        try:
            installed = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # an extra, or a package of another platform
        if name != "nanogauge":
            assert installed.version.split("+")[0] == plain.get(name), name
        for requirement in installed.requires or []:
            evaluation = name == "nanogauge" and "eval" in requirement.partition(";")[2]
            if "extra ==" not in requirement or (name == "nanogauge" and not evaluation):
                needed.append(re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0])


LEAVING = ("power_curves.py", "power_limit.py")  # about to be deleted


def public_names(path: Path) -> set[str]:
    """Return the public functions, classes and constants that a module defines."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            targets = [n for target in node.targets for n in ast.walk(target)]
            found |= {n.id for n in targets if isinstance(n, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return {name for name in found if not name.startswith("_") and name != "main"}


def test_no_public_name_is_defined_in_two_modules() -> None:
    where: dict[str, list[str]] = {}
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "trainer").rglob("*.py")]:
        if path.name not in LEAVING:
            for name in public_names(path):
                where.setdefault(name, []).append(str(path.relative_to(ROOT)))
    assert {name: paths for name, paths in where.items() if len(paths) > 1} == {}
