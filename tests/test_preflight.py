"""The doctor on this machine, on a scripted driver, and on data and disks in several states."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import DEMO, ROOT, build_fake_driver, run, run_here
from examples import CPU, DOCUMENTED, documented_config, write_document
from test_shards import ORIGIN

from model import GPT
from nanogauge.config import Config, load_config
from nanogauge.doctor import preflight
from nanogauge.doctor.checks import Finding, TorchBuild
from nanogauge.doctor.preflight import LOG_BYTES_PER_SECOND, LOG_BYTES_PER_STEP, Device, consult, disk_use_of
from nanogauge.errors import BadInput
from nanogauge.hardware import lookup
from nanogauge.runspec import RunSpec
from trainer.checkpoints.checkpoint import random_state
from trainer.checkpoints.checkpoint_writer import CheckpointWriter, Written
from trainer.data.dataset import count_tokens
from trainer.data.shards import ShardWriter
from trainer.step.optimizer import make_optimizer

KEY = "0123456789abcdef0123456789abcdef01234567"


def doctor(*arguments: object, status: int = 0, **environment: str) -> dict[str, dict[str, Any]]:
    """Return the findings of plan.py --doctor --json by the name of the check."""
    done = run("plan.py", "--doctor", "--json", *arguments, **environment)
    assert done.returncode == status, done.stderr + done.stdout
    assert done.stderr == ""
    found = json.loads(done.stdout)
    assert found["schema"] == 1
    verdicts = [finding["verdict"] for finding in found["doctor"]]
    assert found["verdict"] == max(verdicts, key=["go", "warn", "no-go"].index)
    return {finding["check"]: finding for finding in found["doctor"]}


@pytest.mark.parametrize(
    ("given", "check", "words"),
    [
        ("--model.vocab-size=128", "data", "has 257 tokens but model.vocab_size is 128"),
        ("--model.block-size=99999", "data", "no shard of more than 99999 tokens"),
        ("--run.dtype=float16", "dtype", "float16 training needs a CUDA GPU, not cpu"),
        ("--run.out=/proc/no", "disk", "cannot make the folder /proc/no/demo"),
        ("--train.micro-batch=4000000", "memory", "does not fit: the run peaks at"),
    ],
)
def test_the_doctor_refuses_what_training_would(tmp_path: Path, given: str, check: str, words: str) -> None:
    """With the sentence of train.py, which consults it."""
    flags = [f"--run.out={tmp_path}", given]
    found = doctor(DEMO, *flags, status=1)[check]
    assert found["verdict"] == "no-go"
    assert words in found["text"]
    done = run("train.py", DEMO, *flags)
    assert done.returncode == 2
    free = re.compile(r"[\d.]+ of [\d.]+ GiB of memory free")  # it is read twice
    assert free.sub("", f"{found['text']}  → {found['remedy']}") in free.sub("", done.stdout)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder of a driver with one RTX 4070 that supports CUDA up to 12.4."""
    return str(build_fake_driver(tmp_path_factory.mktemp("driver")))


def shards(folder: Path, train_tokens: int) -> Path:
    folder.mkdir()
    with ShardWriter(folder, ORIGIN, shard_tokens=10**6) as writer:
        write_document(writer, "val", np.zeros(2000, dtype=np.uint16))
        write_document(writer, "train", np.zeros(train_tokens, dtype=np.uint16))
    return folder


def test_the_demo_can_start_here_and_each_check_is_one_line() -> None:
    """On any machine that runs the tests there is a warning at most."""
    done = run("plan.py", "--doctor", DEMO)
    assert done.returncode == 0, done.stdout
    assert done.stderr == ""
    lines = [line.split() for line in done.stdout.splitlines()]
    checks = "gpu compiler memory disk data sleep wandb"
    assert " ".join(words[1] for words in lines) == checks
    assert {words[0] for words in lines} <= {"go", "warn"}


def test_without_a_configuration_only_the_machine_is_examined(tmp_path: Path) -> None:
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {KEY}\n")
    environment = {"CUDA_VISIBLE_DEVICES": "", "WANDB_API_KEY": "", "WANDB_BASE_URL": ""}
    environment |= {"NETRC": str(tmp_path / "netrc"), "WANDB_IDENTITY_TOKEN_FILE": ""}
    done = run("plan.py", "--doctor", "--json", **environment)
    found = {f["check"]: f for f in json.loads(done.stdout)["doctor"]}
    assert "data" not in found
    assert found["memory"]["verdict"] == found["disk"]["verdict"] == "go"
    assert found["wandb"]["text"] == "online, with the key from netrc"
    assert KEY not in done.stdout + done.stderr


@pytest.mark.skipif(torch.version.cuda is not None, reason="needs a build of torch without CUDA")
def test_a_cpu_build_of_torch_beside_a_gpu_is_no_go(driver: str) -> None:
    library = {"LD_LIBRARY_PATH": driver, "CUDA_VISIBLE_DEVICES": ""}
    found = doctor(status=1, **library)["gpu"]
    assert found["verdict"] == "no-go"
    assert f"torch {torch.__version__} is a CPU build but there is an NVIDIA GPU" in found["text"]
    assert doctor(DEMO, **library)["gpu"]["verdict"] == "go", "the demo asks for the processor"


EXAMINE = """
import json, sys
from dataclasses import asdict
from pathlib import Path
from nanogauge.config import load_config
from nanogauge.doctor import preflight
from nanogauge.doctor.checks import TorchBuild
from nanogauge.hardware import lookup
from nanogauge.measure.sensors import driver_info
from trainer.data.dataset import count_tokens
uuid = "12345678-1234-1234-1234-123456789abc"
build = TorchBuild("2.13.0", "cuda", "13.0", "NVIDIA GeForce RTX 4070", (8, 9), ("sm_86",))
device = preflight.Device(build, "bfloat16", lookup("RTX 4070", "bfloat16"), uuid)
config = load_config(Path(sys.argv[1]))
found = {f.check: asdict(f) for f in preflight.examine(config, device, count_tokens)}
print(json.dumps([found, asdict(driver_info(uuid))]))
"""


def test_driver_memory_and_power_are_those_of_nvml(driver: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", EXAMINE, str(DOCUMENTED)],
        env={**os.environ, "LD_LIBRARY_PATH": driver},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    found, board = json.loads(done.stdout)
    assert board["cuda_version"] == [12, 4]
    assert board["power_limit_default_watts"] == 215.0
    assert found["gpu"]["verdict"] == "go", "torch has the card, whatever the driver's number says"
    assert "RTX 4070, driver 550.54.14, torch 2.13.0" in found["gpu"]["text"]
    assert "limited to 200 W where 215 W is this card's default" in found["power"]["text"]
    assert "10.0 of 12.0 GiB on the card free" in found["memory"]["text"]


def with_data(config: Config, path: Path, tokens: int | None) -> Config:
    data = config.data.model_copy(update={"path": str(path), "tokens": tokens})
    return config.model_copy(update={"data": data})


def test_missing_shards_are_no_go_with_the_command_that_makes_them(tmp_path: Path) -> None:
    flags = [f"--data.path={tmp_path}", f"--run.out={tmp_path}", "--run.device=cpu"]
    data = doctor(DOCUMENTED, *flags, status=1)["data"]
    assert data["verdict"] == "no-go"
    assert "holds no token shards" in data["text"]
    assert f"prepare_fineweb.py --out {tmp_path} --tokens 3680000000" in data["remedy"]


def test_few_validation_tokens_are_a_warning_with_the_error_they_give() -> None:
    """As few as the documented run's val.bin held."""
    for validation, verdict in ((5_700, "warn"), (10_000_000, "go")):
        counted = (3_680_000_000, validation)
        found = preflight._check_data(documented_config(), lambda _, counted=counted: counted)
        assert found.verdict == verdict
        assert ("5,700 validation tokens, which gives the loss" in found.text) == (verdict == "warn")


def test_shards_are_counted_and_damaged_ones_are_no_go(tmp_path: Path) -> None:
    """A step of 524,288 tokens passes 2.85 times over these data."""
    train = documented_config().train.model_copy(update={"max_steps": 1})
    config = documented_config().model_copy(update={"train": train})
    tokens = int(524_288 / 2.85)
    enough = shards(tmp_path / "enough", tokens)
    found = preflight._check_data(with_data(config, enough, tokens), count_tokens)
    assert (found.verdict, found.remedy) == ("go", None)
    assert "2.85 passes" in found.text
    less = shards(tmp_path / "less", tokens // 10)
    found = preflight._check_data(with_data(config, less, tokens), count_tokens)
    assert found.verdict == "warn"
    assert "28.5 passes, not the 2.85" in found.text
    found = preflight._check_data(with_data(config, less, None), count_tokens)
    assert found.verdict == "warn"
    assert "beyond 4" in found.text
    next(enough.glob("*_train_*.bin")).unlink()
    found = preflight._check_data(with_data(config, enough, tokens), count_tokens)
    assert found.verdict == "no-go"
    assert "is missing" in found.text
    assert found.remedy is not None and "prepare_fineweb.py" in found.remedy


def test_a_checkpoint_has_the_bytes_that_the_disk_check_counts(tmp_path: Path) -> None:
    """12 a parameter: weights and two moments in fp32; the rest of the files is under 1 %."""
    config = load_config(DEMO)
    model = GPT(config.model)
    optimizer = make_optimizer(model, config.optimizer)
    tokens = torch.zeros(1, 8, dtype=torch.long)
    model(tokens, tokens).backward()
    optimizer.step()
    checkpoints = CheckpointWriter(tmp_path, keep=1)
    checkpoints.begin(
        1,
        model,
        optimizer,
        torch.amp.GradScaler("cpu"),
        [random_state(torch.device("cpu"))],
        position={},
        run={},
        val_loss=None,
    )
    checkpoints.wait()
    (written,) = checkpoints.done()
    assert isinstance(written, Written)
    size = written.bytes
    counted = disk_use_of(config, RunSpec.from_config(config), None).checkpoint
    assert counted <= size < 1.01 * counted


def test_disk_use_includes_sensor_readings_on_a_gpu() -> None:
    config, steps = documented_config(), documented_config().train.max_steps
    writes = disk_use_of(config, RunSpec.from_config(config), lookup("RTX 4070", "bfloat16"))
    assert writes.copies == 4
    assert writes.checkpoint == 12 * 40_953_216
    assert writes.log > LOG_BYTES_PER_STEP * steps + LOG_BYTES_PER_SECOND * 70_000
    assert disk_use_of(config, RunSpec.from_config(config, "float32"), CPU).log == LOG_BYTES_PER_STEP * steps


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--doctor", "--gpu", "RTX 4070"], "--gpu belongs to a plan"),
        (["--doctor", DEMO, "--by", "08:00"], "--by belongs to a plan"),
        (["--doctor", "--run.device=cpu"], "--run.device changes a configuration"),
        (["--gpu", "RTX 4070"], "give the configuration of a run"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(arguments: list[object], words: str) -> None:
    done = run_here("plan.py", *arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


GO = Finding("gpu", "go", "a card")
WARNING = Finding("sleep", "warn", "it sleeps", "wake it")
NO_GO = Finding("disk", "no-go", "it is full", "free some")


def test_before_training_only_findings_that_are_not_go_are_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def consulted(*findings: Finding, force: bool = False) -> str:
        monkeypatch.setattr(preflight, "examine", lambda *_: list(findings))
        device = Device(TorchBuild("2.13.0", "cpu", None))
        consult(documented_config(), device, count_tokens, force)
        return capsys.readouterr().out

    assert consulted(GO, GO) == "doctor: 2 checks, all go\n"
    assert consulted(GO, WARNING) == "warn   sleep     it sleeps  → wake it\n"
    with pytest.raises(BadInput, match="^it is full; free some, or start anyway with --force.$"):
        consulted(WARNING, NO_GO)
    assert consulted(WARNING, NO_GO, force=True).splitlines()[-1].startswith("no-go  disk")
