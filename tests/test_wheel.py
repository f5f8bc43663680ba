"""The wheel holds all that the commands need, and they work from any folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from commands import ROOT

COMMANDS = ["evaluate", "export", "plan", "prepare", "report", "sample", "train"]
DATA = ("configs", "examples", "predictions")
QUIET = ["--quiet", "--disable-pip-version-check"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built without a network, of a copy: the build leaves traces beside the sources."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("nanogauge", "trainer", *DATA):
        shutil.copytree(ROOT / name, source / name)
    for path in [*ROOT.glob("*.py"), ROOT / "pyproject.toml", ROOT / "README.md", ROOT / "LICENSE"]:
        shutil.copy(path, source)
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", out]
    pip(*build, source)
    (made,) = out.glob("*.whl")
    return made


def pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", *map(str, arguments), *QUIET]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*"))


def test_every_file_of_the_project_is_in_the_wheel(wheel: Path) -> None:
    """Each module and each file that a module reads: a package that is not listed is left out."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    written = {
        str(path.relative_to(ROOT))
        for path in [
            *ROOT.glob("*.py"),
            *(ROOT / "nanogauge").rglob("*"),
            *(ROOT / "trainer").rglob("*"),
        ]
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert not written - names
    (data,) = {name.partition("/")[0] for name in names if ".data/" in name}
    for path in [path for name in DATA for path in (ROOT / name).iterdir()]:
        assert f"{data}/data/share/nanogauge/{path.relative_to(ROOT)}" in names
    assert not [name for name in names if name.startswith(("tests", "bench"))]


def test_every_module_and_package_is_listed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert sorted(listed["py-modules"]) == sorted(path.stem for path in ROOT.glob("*.py"))
    packages = {
        path.parent for path in [*files("nanogauge"), *files("trainer")] if path.suffix == ".py"
    }
    assert sorted(listed["packages"]) == sorted(
        ".".join(path.relative_to(ROOT).parts) for path in packages
    )


def test_installed_commands_work_from_any_folder(wheel: Path, tmp_path: Path) -> None:
    """In an environment of their own, which has but the wheel and what it depends on.

    Configurations, claims and logs that came with it are found by the names that they have here.
    """
    place = tmp_path / "environment"
    venv.create(place, with_pip=False, symlinks=True)
    scripts = place / ("Scripts" if os.name == "nt" else "bin")
    site = sysconfig.get_path("purelib", vars={"base": str(place)})
    dependencies = f"{sysconfig.get_path('purelib')}\n"
    (Path(site) / "dependencies.pth").write_text(dependencies)
    python = scripts / ("python.exe" if os.name == "nt" else "python")
    pip("--python", python, "install", "--no-deps", "--no-index", wheel)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    def call(name: str, *arguments: str) -> str:
        done = subprocess.run(
            [str(scripts / f"nanogauge-{name}"), *arguments],
            cwd=elsewhere,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    for name in COMMANDS:
        assert f"usage: nanogauge-{name}" in call(name, "--help")
    claims = "--claims=predictions/seed_zh.toml"
    planned = call("plan", "configs/rtx4070_fineweb.toml", "--gpu=RTX 4070", claims)
    assert "RTX 4070" in planned
    assert not list(elsewhere.iterdir())
    log = "--nanogpt-log=examples/nanogpt_cpu.log"
    call("report", log, "--config=examples/nanogpt_cpu.toml", "--out=imported")
    assert (elsewhere / "imported" / "report.html").exists()


def test_the_image_is_given_all_that_the_wheel_is_made_of() -> None:
    """What .dockerignore holds back cannot be copied, and what is not copied is not installed."""
    copied: set[str] = set()
    for line in (ROOT / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY"):
            copied |= {name.removeprefix("./") for name in line.split()[1:-1]}
    let_through = re.findall("^!(.*)$", (ROOT / ".dockerignore").read_text(), re.M)
    assert copied == set(let_through)
    needed = ["*.py", "LICENSE", "README.md", "constraints.txt", "nanogauge", "pyproject.toml"]
    assert sorted(copied) == sorted([*needed, *DATA])
