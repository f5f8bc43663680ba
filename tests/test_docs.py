"""The commands, options and links of the documentation exist, and the commands run."""

import functools
import glob
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import ROOT, run_here, train_tiny
from runs import documented_log

from nanogauge.config import Config
from nanogauge.quantities import QUANTITIES, UNITS

DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS, ROOT / "examples" / "README.md"]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
SCRIPT = re.compile(r"(?<![\w/.-])((?:bench/|tests/)?[a-z_]+\.py)(?![\w.])")
FLAG = re.compile(r"(?<![\w-])--([a-z][\w-]*(?:\.[\w-]+)?)")
FILE = re.compile(r"(?<![\w/.~-])(?:configs|predictions|examples|docs|bench|tests)/[\w./-]*\w(?![\w*])")
COMMANDS = [path.name for path in ROOT.glob("*.py") if path.name != "model.py"]
FOREIGN = re.compile(r"(docker|pip|\.venv/bin/hf|xcode-select|python llama\.cpp|--standalone)\b")
PLACEHOLDER = re.compile(r"[A-Z]{3,}|/X\b|\.\.\.")
LINK = re.compile(r"\]\(([^)\s]+)\)")
TYPED = re.compile(r"(?:\.venv/bin/)?python ((?:bench/)?[a-z_]+\.py)\b(.*)")
NOT_RUN = {
    "prepare_fineweb.py": "downloads from a hub; tests/test_prepare.py has a local one",
    "train.py": "needs the documented GPU for a day; tests/test_train.py does not",
    "evaluate.py": "downloads GPT-2; tests/test_evaluate.py makes one",
    "bench/": "takes minutes, or needs other programs",
    "--doctor": "this machine need not be ready",
    "--calibrate": "the documented GPU is not here",
    "--wandb": "W&B's own process; tests/test_wandb_mirror.py",
    "runs/own_text": "the run of a text; tests/test_own_text.py trains and samples it",
}
"""Part of a command that keeps it from being run here -> why."""


def commands_of(page: Path) -> Iterator[str]:
    """Yield the code of a page, inline or indented, with continued lines joined."""
    text = page.read_text().replace("\\\n", " ")
    for line in text.splitlines():
        if line.startswith("    "):
            yield re.sub(r"^ *docker run .* nanogauge ", "", line.split("   #")[0])
        else:
            yield from re.findall(r"`([^`]+)`", line)


@functools.cache
def flags_of(script: str) -> set[str]:
    """Return the flags of a command's help, or of a benchmark's source."""
    if "/" in script:
        sources = ((ROOT / path).read_text() for path in (script, "bench/results.py"))
        return {flag for text in sources for flag in re.findall(r'"--([a-z][\w-]*)"', text)}
    done = run_here(script, "--help")
    assert done.returncode == 0, done.stderr
    return set(FLAG.findall(done.stdout)) | {"help"}


def is_key(flag: str) -> bool:
    section, _, key = flag.partition(".")
    known = Config.model_fields.get(section)
    fields = getattr(known.annotation, "model_fields", {}) if known is not None else {}
    return key.replace("-", "_") in fields


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_each_option_in_a_command_exists(page: Path) -> None:
    wrong = []
    for command in commands_of(page):
        scripts = [s for s in SCRIPT.findall(command) if "/" in s or s in COMMANDS]
        named = set(FLAG.findall(command))
        if not scripts and FOREIGN.match(command.strip()):
            continue
        known = {flag for script in scripts or COMMANDS for flag in flags_of(script)}
        wrong += [f"{command}: --{flag}" for flag in named - known if not is_key(flag)]
        wrong += [
            f"{command}: there is no {name}"
            for name in FILE.findall(command)
            if not (ROOT / name).exists() and not PLACEHOLDER.search(name)
        ]
    assert wrong == []


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_each_link_has_a_target(page: Path) -> None:
    wanted = [link for link in LINK.findall(page.read_text()) if "://" not in link]
    dead = [link for link in wanted if not (page.parent / link.partition("#")[0]).exists()]
    assert dead == []


def test_the_index_has_every_page() -> None:
    linked = set(LINK.findall((ROOT / "docs" / "README.md").read_text()))
    missing = {page.name for page in DOCS} - linked - {"README.md"}
    assert missing == set()


def test_the_rows_and_units_of_claims_are_documented() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", (ROOT / "docs/claims.md").read_text(), re.M)
    documented = {row: units.strip().split(", ") for row, units in rows if row in QUANTITIES}
    assert documented == {row: list(UNITS[q.unit]) for row, q in QUANTITIES.items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained")
    done = train_tiny(out, "--data.tokens=1e6")
    assert done.returncode == 0, done.stderr
    return out / "demo"


@pytest.fixture
def desk(trained: Path, tmp_path: Path) -> Path:
    """Return a folder like a checkout, with a run under each name that a page uses."""
    for name in ("configs", "predictions", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("demo", "NAME", "ONE", "OTHER", "rtx4070_fineweb"):
        shutil.copytree(trained, tmp_path / "runs" / name)
    (tmp_path / "CONFIG").symlink_to(ROOT / "configs" / "rtx4070_fineweb.toml")
    (tmp_path / "FILE").write_text("The import statement \n")
    (tmp_path / "train.log").write_text(documented_log())
    return tmp_path


def test_every_exception_is_used() -> None:
    lines = [line for page in PAGES for line in typed(page)]
    assert [mark for mark in NOT_RUN if not any(mark in line for line in lines)] == []


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_each_short_command_succeeds(page: Path, desk: Path) -> None:
    failed = []
    for line in typed(page):
        if any(mark in line for mark in NOT_RUN):
            continue
        script, *given = shlex.split(line)
        found = [glob.glob(word, root_dir=desk) if "*" in word else [word] for word in given]
        done = run_here(script, *(word for words in found for word in words), folder=desk)
        if done.returncode:
            failed.append(f"{line}: {done.stderr}")
    assert failed == []


def typed(page: Path) -> Iterator[str]:
    """Yield the commands that name the interpreter, without its name."""
    text = re.sub(r"\\\n +", "", page.read_text())
    for line in re.findall(r"^    (\S.*)$", text, re.M) + re.findall(r"`(python [^`]+)`", text):
        if match := TYPED.match(line):
            arguments = re.sub(r"\[.*?\]|\.\.\.|  .*", "", match[2])
            yield match[1] + arguments.rstrip()
