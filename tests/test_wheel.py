"""Wheel and sdist: the package nanogauge alone, whose commands need neither torch nor a checkout."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from commands import ROOT

SOURCES = ("pyproject.toml", "README.md", "LICENSE")
BUILD = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
HIDE = """
import sys
class Visible:
    finders = list(sys.meta_path)
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] in {names}:
            return None
        return next(filter(None, (f.find_spec(name, path, target) for f in cls.finders)), None)
sys.meta_path[:] = [Visible]
"""


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since a build writes beside the sources; with a test, which does not belong in it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT / "nanogauge", source / "nanogauge", ignore=shutil.ignore_patterns("__pycache__"))
    (source / "tests").mkdir()
    for name in (*SOURCES, "MANIFEST.in", "tests/test_wheel.py"):
        shutil.copy(ROOT / name, source / name)
    subprocess.run([sys.executable, "-c", BUILD, str(out)], cwd=source, capture_output=True, check=True)
    (path,) = out.glob("*.tar.gz")
    return path


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, as pip does where there is no wheel."""
    out = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", out, sdist)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed wheel, and a start-up file that hides all undeclared packages."""
    folder = tmp_path_factory.mktemp("installed")
    pip("install", "--no-deps", "--no-index", "--no-compile", "--target", folder, wheel)
    (distribution,) = metadata.distributions(path=[str(folder)])
    allowed = required(distribution.requires or [])
    owners = metadata.packages_distributions()
    names = {top for top, dists in owners.items() if not {plain(d) for d in dists} & allowed}
    names |= {path.stem for path in ROOT.glob("*.py")} | {"trainer"}
    assert {"torch", "tiktoken", "wandb", "pyarrow", "model"} <= names
    names -= {"nanogauge"}
    (folder / "sitecustomize.py").write_text(HIDE.format(names=names))
    return folder


def pip(*arguments: object) -> None:
    quiet = ["--quiet", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", *map(str, arguments), *quiet]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def required(requirements: list[str]) -> set[str]:
    """Return the distributions that are required, directly or not, without extras."""
    names: set[str] = set()
    for requirement in requirements:
        name = plain(re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0])
        if "extra ==" in requirement or name in names:
            continue
        try:
            names |= {name} | required(metadata.requires(name) or [])
        except metadata.PackageNotFoundError:
            continue  # of another platform
    return names


def test_wheel_and_sdist_hold_every_file_of_the_package_and_nothing_else(sdist: Path, wheel: Path) -> None:
    package = {p for p in (ROOT / "nanogauge").rglob("*") if "__pycache__" not in p.parts}
    files = {str(path.relative_to(ROOT)) for path in package if path.is_file()}
    with zipfile.ZipFile(wheel) as archive:
        assert files == {name for name in archive.namelist() if ".dist-info/" not in name}
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    made = {"PKG-INFO", "setup.cfg"} | {name for name in names if name.startswith("nanogauge.egg-info/")}
    assert names - made == files | {*SOURCES, "MANIFEST.in"}


def test_the_commands_work_without_torch_from_any_folder(installed: Path, tmp_path: Path) -> None:
    def call(*arguments: object, status: int = 0) -> str:
        done = subprocess.run(
            [str(installed / "bin" / "nanogauge"), *map(str, arguments)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(installed)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == status, done.stderr
        return done.stderr if status else done.stdout

    config = ROOT / "configs" / "rtx4070_fineweb.toml"
    claims = f"--claims={ROOT / 'predictions' / 'seed_zh.toml'}"
    assert "RTX 4070" in call("plan", config, "--gpu=RTX 4070", claims)
    assert "needs a checkout" in call("plan", config, "--calibrate", status=2)
    checks = json.loads(call("doctor", "--json"))["doctor"]
    assert {"gpu", "memory", "disk"} <= {finding["check"] for finding in checks}
    log = ROOT / "examples" / "nanogpt_cpu.log"
    call("import", log, f"--config={log.with_suffix('.toml')}", "--out=imported")
    written = (tmp_path / "imported" / "report.html").read_bytes()
    call("report", "imported")
    assert (tmp_path / "imported" / "report.html").read_bytes() == written


def test_the_image_copies_what_its_environment_is_installed_from() -> None:
    """Docker copies only what .dockerignore admits, and installs only what was copied."""
    copied: set[str] = set()
    for line in (ROOT / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY"):
            copied |= {name.removeprefix("./") for name in line.split()[1:-1]}
    admitted = re.findall("^!(.*)$", (ROOT / ".dockerignore").read_text(), re.M)
    assert copied == set(admitted) == {*SOURCES, "constraints.txt", "nanogauge"}
