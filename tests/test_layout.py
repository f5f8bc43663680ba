"""The shape of the project: what imports what, how long files are, what starts without torch."""

import ast
import graphlib
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "nanogauge"
TRAINER = ROOT / "trainer"
FOUNDATION = {
    *["errors", "files", "quantities", "runspec", "spec_parts", "programs", "schema"],
    *["schedule", "config", "names", "shell", "transformers_spec"],
}
ROOMS = ("prediction", "measure", "runlog", "analysis", "report", "importers", "sinks", "doctor")
MEETING_PLACES = (
    "trainer.run.session",
    "trainer.run.recovery",
    "trainer.run.startup",
    "trainer.run.step_records",
    "train",
)


def imports(path: Path) -> set[str]:
    """Return the modules that a file imports anywhere, and a.b.name for each name taken."""
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


def room(module: str) -> str:
    """Return the folder of nanogauge/ or trainer/ that a module is in, or the module itself."""
    return ".".join(module.split(".")[:2])


def modules() -> dict[str, Path]:
    paths = [*PACKAGE.rglob("*.py"), *TRAINER.rglob("*.py"), *ROOT.glob("*.py")]
    return {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in paths}


def test_the_foundation_stands_on_the_standard_library_and_pydantic() -> None:
    """Everything imports it, so it may import nothing slow or circular."""
    allowed = {*sys.stdlib_module_names, "pydantic"}
    ours = tuple(f"nanogauge.{leaf}" for leaf in (*FOUNDATION, "traced_module"))  # which imports torch when called
    for leaf in FOUNDATION:
        for name in imports(PACKAGE / f"{leaf}.py"):
            assert name.split(".")[0] in allowed or name.startswith(ours), (leaf, name)


def test_prediction_knows_no_measurement_and_no_log() -> None:
    """A prediction that could see measurements would not be one."""
    others = ("measure", "runlog", "analysis", "report", "importers", "sinks", "doctor")
    for path in files("prediction"):
        assert not uses(path, *(f"nanogauge.{other}" for other in others), "torch"), path


def test_measurement_knows_no_configuration_and_no_prediction() -> None:
    """An instrument that knew the expected value could be read too kindly."""
    others = ("config", "runspec", "prediction", "runlog", "analysis", "report")
    for path in files("measure"):
        assert not uses(path, *(f"nanogauge.{other}" for other in others)), path


def test_the_model_and_the_step_import_no_prediction_measurement_or_report() -> None:
    others = ("prediction", "measure", "runlog", "analysis", "report")
    parts = ("step", "checkpoints", "data")
    trained = [path for part in parts for path in (TRAINER / part).rglob("*.py")]
    for path in [ROOT / "model.py", *trained]:
        assert not uses(path, *(f"nanogauge.{other}" for other in others)), path


def test_no_module_and_no_room_imports_in_a_circle() -> None:
    every = modules()
    for level in (str, room):
        graph: dict[str, set[str]] = {}
        for name, path in every.items():
            used = {level(i) for i in imports(path) if i in every} - {level(name)}
            graph.setdefault(level(name), set()).update(used)
        try:
            tuple(graphlib.TopologicalSorter(graph).static_order())
        except graphlib.CycleError as error:
            pytest.fail(f"import circle: {error.args[1]}")


def test_the_instrument_imports_no_trainer() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert not uses(path, "trainer", "model", "train"), path


def test_the_trainer_uses_public_names_of_nanogauge() -> None:
    for path in [*TRAINER.rglob("*.py"), *ROOT.glob("*.py")]:
        for name in uses(path, "nanogauge"):
            assert not any(part.startswith("_") for part in name.split(".")), (path, name)


def test_only_the_loop_imports_the_session() -> None:
    loop = ("train.py", "session.py", "step_records.py", "recovery.py", "startup.py")
    for path in [*PACKAGE.rglob("*.py"), *TRAINER.rglob("*.py"), *ROOT.glob("*.py")]:
        if path.name not in loop:
            assert not uses(path, *MEETING_PLACES), path


def test_only_the_run_log_touches_log_jsonl() -> None:
    for path in [*PACKAGE.rglob("*.py"), *TRAINER.rglob("*.py"), *ROOT.glob("*.py")]:
        strings = {
            node.value
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        assert path == PACKAGE / "runlog" / "reader.py" or "log.jsonl" not in strings, path


@pytest.mark.parametrize("module", ["plan", "report", "nanogauge.analysis.claims", "nanogauge.sinks.mirror"])
def test_planning_and_reporting_start_without_torch(module: str) -> None:
    """torch takes seconds to import: a plan is there in one, without it."""
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'wandb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_training_loop_is_inline_and_at_most_80_lines() -> None:
    """The loop is what a reader comes for: it reads top to bottom in one place."""
    tree = ast.parse((ROOT / "train.py").read_text())
    (train,) = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "train"]
    (loop,) = [n for n in train.body if isinstance(n, ast.While)]
    assert train.end_lineno is not None
    assert train.end_lineno - train.lineno < 80
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
        for name in public_names(path):
            where.setdefault(name, []).append(str(path.relative_to(ROOT)))
    assert {name: paths for name, paths in where.items() if len(paths) > 1} == {}


def test_windows_and_an_old_driver_are_refused_before_anything_is_downloaded(tmp_path: Path) -> None:
    read = {"capture_output": True, "text": True}
    code = "import sys; sys.platform = 'win32'; import nanogauge"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, **read)
    assert done.returncode == 2 and "inside WSL2" in done.stderr
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 550.54.14\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    found = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    make = ["make", "setup", f"PYTHON={sys.executable}"]
    done = subprocess.run(make, cwd=tmp_path, env=found, check=False, **read)
    assert done.returncode == 2 and "580 or newer, here is 550.54.14" in done.stderr
    assert not (tmp_path / ".venv").exists()
