"""The doctor's checks and the facts they judge."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from nanogauge.doctor.checks import (
    DiskUse,
    Finding,
    TorchBuild,
    check_compiler,
    check_data,
    check_disk,
    check_gpu,
    check_memory,
    check_power,
    check_wandb,
    remedies,
    warn_of_wsl,
)
from nanogauge.doctor.machine import command_output, is_wsl, wandb_key_from
from nanogauge.doctor.sleep import check_sleep
from nanogauge.measure.sensors import DriverInfo
from nanogauge.quantities import Interval

GIB = 2**30
CARD = DriverInfo("NVIDIA GeForce RTX 4070", "580.65.06", (13, 0))
NO_CARD = DriverInfo(absent={"name": "no NVIDIA driver"})
ADA = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_120", "compute_120")
TORCH = TorchBuild("2.13.0", "cuda", "13.0", CARD.name, (8, 9), ADA)
BLIND = TorchBuild("2.13.0", "cpu", "13.0")
CPU_BUILD = TorchBuild("2.13.0+cpu", "cpu")
MISSING = TorchBuild("2.13.0", None, "13.0")


def gpu(wanted: str, torch: TorchBuild, driver: DriverInfo, visible: str | None = None) -> Finding:
    return check_gpu(wanted, torch, driver, visible)


def memory(need: Interval, fit: Any) -> Finding:
    return check_memory("here", 5 * GIB, 6 * GIB, None, need, fit, None)


def disk(free: int) -> Finding:
    return check_disk(Path("x"), None, free, DiskUse(491 * 10**6, 3, 0, 10**7))


def data(available: int, planned: int) -> Finding:
    return check_data(20_000, 10**10, available, planned, "data", False)


def compiler(language: str, name: str | None, headers: Path | None) -> Finding:
    return check_compiler(language, ("gcc", "clang"), name, headers, "install one")


def sleep(*logind: str, root: Path = Path("/nowhere"), **environment: str) -> Finding:
    """Check a machine whose logind has these properties, as busctl prints them."""
    system = environment.pop("SYSTEM", "Linux")

    def asked(command: Sequence[str]) -> str | None:
        gnome = {"sleep-inactive-ac-type": "'suspend'", "sleep-inactive-ac-timeout": "uint32 1200"}
        return gnome.get(command[-1], "\n".join(logind))

    return check_sleep(root, environment, asked, system)


OLD_DRIVER = DriverInfo(CARD.name, "550.54.14", (12, 4))
OLD_TORCH = TorchBuild("2.4.0", "cuda", "12.4", "RTX 5090", (12, 0), ("sm_80", "sm_90", "sm_90a"))
FAILING = [
    (gpu("auto", CPU_BUILD, CARD), "no-go", "2.13.0+cpu is a CPU build"),
    (gpu("cuda", MISSING, OLD_DRIVER), "no-go", "driver 550.54.14 knows CUDA up to"),
    (gpu("cuda", MISSING, NO_CARD), "no-go", "no CUDA GPU is visible to torch (no NV"),
    (gpu("cuda", MISSING, CARD, "3"), "no-go", "CUDA_VISIBLE_DEVICES=3 hides NVIDIA"),
    (gpu("auto", BLIND, CARD, ""), "warn", "CUDA_VISIBLE_DEVICES= hides NVIDIA"),
    (gpu("auto", BLIND, CARD), "no-go", "and torch cannot use it"),
    (gpu("cuda", OLD_TORCH, CARD), "no-go", "no code for RTX 5090, compute capability"),
    (gpu("cuda", TORCH, NO_CARD), "warn", "its sensors are absent: no NVIDIA"),
    (gpu("mps", MISSING, NO_CARD), "no-go", "no mps device"),
    (compiler("C++", None, Path("/")), "warn", "no C++ compiler (gcc or clang): training runs"),
    (compiler("C", "gcc", None), "warn", "no Python.h"),
    (memory(Interval(4.0, 5.0, 7.0), "doubtful"), "warn", "doubtful: the run peaks"),
    (memory(Interval(7.0, 8.0, 9.0), "does not fit"), "no-go", "does not fit: the run peaks"),
    (check_disk(Path("x"), "it is not", 1, None), "no-go", "cannot make the folder"),
    (disk(10**9), "no-go", "1.0 GB free, the run needs up to 1.5 GB: 3 checkpoints of 491 MB, log"),
    (disk(2 * 10**9), "warn", "2.0 GB free, the run needs up to 1.5 GB"),
    (
        data(2 * 10**9, 4 * 10**9),
        "warn",
        "2 billion training tokens in data: 5 passes, not the 2.5 over the 4 billion of",
    ),
    (data(2 * 10**9, 2 * 10**9), "warn", "5 passes; beyond 4, repeated tokens teach less"),
    (sleep('s ""', 's ""', 's ""', "b false"), "warn", "runs on its battery"),
    (sleep('s "suspend"'), "warn", "logind does suspend"),
    (sleep(XDG_CURRENT_DESKTOP="ubuntu:GNOME"), "warn", "GNOME does suspend after 20 min without"),
    (sleep(XDG_CURRENT_DESKTOP="KDE"), "warn", "not known: when KDE suspends"),
    (sleep(SYSTEM="Darwin"), "warn", "macOS decides"),
    (warn_of_wsl(), "warn", "WSL's driver may move"),
    (check_power(150, 200), "warn", "limited to 150 W where 200 W is this card's"),
    (check_wandb("auto", False, None), "warn", "wandb is not installed"),
    (check_wandb("online", True, None), "warn", "there is no key"),
]


@pytest.mark.parametrize(("finding", "verdict", "words"), FAILING)
def test_each_failing_check_gives_its_reason_and_a_remedy(finding: Finding, verdict: str, words: str) -> None:
    assert finding.verdict == verdict
    assert words in finding.text
    assert finding.remedy
    assert "\n" not in finding.text + finding.remedy


@pytest.mark.parametrize(
    ("finding", "words"),
    [
        (gpu("cuda", TORCH, CARD), "RTX 4070, driver 580.65.06, torch 2.13.0 (CUDA 13.0)"),
        (gpu("cpu", CPU_BUILD, CARD), "RTX 4070 stays unused"),
        (compiler("C", "clang", Path("/")), "clang, and Python.h"),
        (check_memory("here", None, None, None, None, None, None), "not known"),
        (check_disk(Path("x"), None, 10**12, DiskUse(10**9, 3, 0, 0)), "3 checkpoints of 1.0 GB"),
        (data(4 * 10**9, 4 * 10**9), "2.5 passes"),
        (check_disk(Path("x"), None, 10**9, DiskUse(100, 3, 300, 7)), "needs up to 0 MB"),
        (check_data(20_000, 10**10, 10**6, None, "the demo", True), "in the demo"),
        (sleep(), "no setting suspends"),
        (sleep('s "suspend"', container="podman"), "its host decides"),
        (sleep(*['s ""'] * 3, "b true", 's "sleep"', XDG_CURRENT_DESKTOP="KDE"), "is blocked"),
        (check_power(200, 200), "200 W, the default"),
        (check_power(None, 200), "not known"),
        (check_wandb("auto", True, None), "wandb login makes it online"),
        (check_wandb("online", True, "WANDB_API_KEY"), "with the key from WANDB_API_KEY"),
    ],
)
def test_a_check_without_a_problem_is_go(finding: Finding, words: str) -> None:
    assert finding.verdict == "go"
    assert words in finding.text
    assert finding.remedy is None


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((8, 9), ("sm_86",), True),  # machine code runs on later minor versions
        ((8, 0), ("sm_86",), False),  # but not on earlier ones
        ((9, 0), ("sm_80", "sm_86"), False),  # nor on another major version
        ((12, 0), ("sm_80", "compute_90"), True),  # where only PTX does
        ((9, 0), ("sm_90a",), True),
        ((10, 3), ("sm_100a",), False),  # architecture-specific code is for that one alone
    ],
)
def test_code_runs_where_nvidia_says_it_does(
    capability: tuple[int, int], architectures: tuple[str, ...], runs: bool
) -> None:
    """Source: CUDA C++ programming guide, binary and PTX compatibility."""
    torch = TorchBuild("2.13.0", "cuda", "13.0", "a card", capability, architectures)
    assert (check_gpu("cuda", torch, CARD, None).verdict == "go") == runs


def test_a_driver_of_the_same_major_version_is_new_enough() -> None:
    """CUDA's minor version compatibility: a driver of 12.2 runs code built for 12.8."""
    unseen = TorchBuild("2.9.0", None, "12.8")
    same = gpu("cuda", unseen, DriverInfo("a card", "535.1", (12, 2)))
    assert "torch cannot use it" in same.text, "the driver is not the reason"
    older = gpu("cuda", unseen, DriverInfo("a card", "470.1", (11, 4)))
    assert older.remedy is not None
    assert "driver 525 or newer" in older.remedy


@pytest.mark.parametrize(
    ("capability", "remedy"),
    [
        ((6, 1), "torch==2.13.0 --index-url https://download.pytorch.org/whl/cu126; train with"),
        ((7, 0), "torch==2.13.0 --index-url https://download.pytorch.org/whl/cu126; or train on"),
        ((5, 2), "/whl/cu126; train with --run.compile false"),
        ((12, 0), "torch==2.13.0 --index-url https://download.pytorch.org/whl/cu130; or train on"),
        ((3, 7), "no current build of torch has code for it, so the card cannot train"),
    ],
)
def test_the_build_that_has_code_for_a_card_is_named(capability: tuple[int, int], remedy: str) -> None:
    """Source: PyTorch's support matrix of CUDA builds."""
    torch = TorchBuild("2.13.0+cu128", "cuda", "12.8", "a card", capability, ("sm_80",))
    found = check_gpu("cuda", torch, CARD, None)
    assert found.verdict == "no-go" and remedy in (found.remedy or "")


@pytest.mark.parametrize(
    ("system", "remedy"),
    [
        ("Linux", "-m pip install --force-reinstall torch==2.13.0; or train on the processor"),
        ("Windows", "torch==2.13.0 --index-url https://download.pytorch.org/whl/cu130"),
        ("Darwin", "macOS has no CUDA; choose --run.device mps or cpu"),
    ],
)
def test_a_remedy_is_that_of_the_system(system: str, remedy: str) -> None:
    assert remedy in (check_gpu("cuda", CPU_BUILD, CARD, None, system).remedy or "")
    names = remedies()["installers"][system]
    assert set(names) <= remedies()["compilers"].keys()


def test_programs_that_use_the_memory_are_named_largest_first() -> None:
    others = {"Xorg": GIB // 2, "firefox": 2 * GIB, "code": GIB // 4, "a": 1, "b": 2}
    flags = "--train.micro-batch 8 --train.grad-accum 64"
    need = Interval(7.0 * GIB, 8.0 * GIB, 10.0 * GIB)
    finding = check_memory("on the card", 9 * GIB, 12 * GIB, others, need, "doubtful", flags)
    assert "the run peaks at 8.0 GiB (7.0 to 10.0), 9.0 of 12.0 GiB on the card" in finding.text
    assert "(firefox 2.0, Xorg 0.5, code 0.2, b 0.0 GiB)" in finding.text
    assert finding.remedy == f"close firefox or {flags}"


def write(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


def test_the_lid_the_login_screen_and_masks_are_files_of_the_system(tmp_path: Path) -> None:
    lid = "closing the lid does"
    assert lid not in sleep('s ""', 's "suspend"', root=tmp_path).text
    (tmp_path / "proc/acpi/button/lid/LID0").mkdir(parents=True)
    assert f"{lid} suspend" in sleep(root=tmp_path).text, "logind's default"
    assert f"{lid} hibernate" in sleep('s ""', 's "hibernate"', 's ""', root=tmp_path).text
    assert lid not in sleep('s ""', 's "suspend"', 's "ignore"', root=tmp_path).text
    inhibited = ('s ""', 's "suspend"', 's ""', "b true", 's "handle-lid-switch"')
    assert lid not in sleep(*inhibited, root=tmp_path).text
    units = tmp_path / "etc/systemd/system"
    units.mkdir(parents=True)
    (units / "display-manager.service").symlink_to("/lib/systemd/system/gdm3.service")
    assert "when gdm3 suspends" in sleep(root=tmp_path).text
    (units / "suspend.target").symlink_to("/dev/null")
    assert sleep(root=tmp_path).text == "sleep is switched off (masked in systemd)"


def test_wsl_and_containers_are_recognized(tmp_path: Path) -> None:
    write(tmp_path, ".dockerenv", "")
    assert "this is a container" in sleep(root=tmp_path).text
    assert not is_wsl(tmp_path)
    write(tmp_path, "proc/version", "Linux version 5.15.153.1-microsoft-standard-WSL2\n")
    assert is_wsl(tmp_path)
    assert "Windows' power plan decides" in sleep(root=tmp_path).text


def test_a_command_that_hangs_or_fails_returns_none() -> None:
    assert command_output(["echo", "yes"]) == "yes"
    assert command_output(["sleep", "60"]) is None
    assert command_output(["false"]) is None
    assert command_output(["no-such-program"]) is None


def test_the_wandb_key_is_found_and_never_shown(tmp_path: Path) -> None:
    key = "0123456789abcdef"
    assert wandb_key_from({}, tmp_path) is None
    assert wandb_key_from({"WANDB_API_KEY": key}, tmp_path) == "WANDB_API_KEY"
    (tmp_path / ".netrc").write_text(f"machine other.example login me password {key}\n")
    assert wandb_key_from({}, tmp_path) is None
    (tmp_path / "mine").write_text(f"machine api.wandb.ai login user password {key}\n")
    environment = {"NETRC": str(tmp_path / "mine")}
    found = wandb_key_from(environment, tmp_path)
    assert found == "mine"
    own_server = {**environment, "WANDB_BASE_URL": "https://wandb.example"}
    assert wandb_key_from(own_server, tmp_path) is None
    (tmp_path / "mine").write_text("machine\n")
    assert wandb_key_from(environment, tmp_path) is None, "a damaged file is no key"
    assert key not in json.dumps(vars(check_wandb("online", True, found)))
