"""A run has the same bits each time, also when it was killed and resumed."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from commands import DEMO, TINY, log_lines, run, steps_of, succeed

from trainer.step.device import choose_algorithms, seed_rank, set_cublas_workspace

SMALL = [
    *(*TINY, "--model.n-embd=64", "--model.block-size=64", "--train.micro-batch=8"),
    *("--train.eval-every=6", "--run.compile=true"),
]


def test_a_killed_and_resumed_compiled_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    """Compiled code added up the embedding's gradient with several threads, in any order."""
    whole, killed, eager = (tmp_path / name / "demo" for name in ("whole", "killed", "eager"))

    def train(folder: Path, *more: str, fault: tuple[str, ...] = ()) -> int:
        script = "tests/faulty_train.py" if fault else "train.py"
        flags = (*fault, DEMO, f"--run.out={folder.parent}", *SMALL, *more)
        return run(script, *flags, OMP_NUM_THREADS="2").returncode

    assert train(whole) == 0
    assert train(killed, fault=("kill:21",)) == -signal.SIGKILL
    assert train(killed, "--resume=auto") == 0
    starts = [line["first_step"] for line in log_lines(killed) if line["kind"] == "start"]
    assert starts[0] == 0 and starts[1] >= 4
    before, after = steps_of(whole), {line["step"]: line for line in steps_of(killed)}
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in before] == [after[step][key] for step in range(12)]
    file = "checkpoints/step_00000012/model.safetensors"
    assert (whole / file).read_bytes() == (killed / file).read_bytes()

    (compilation,) = [line for line in log_lines(whole) if line["kind"] == "compile"]
    assert compilation["mode"] == "compiled"
    assert compilation["seconds"] > 0.1
    succeed(run("train.py", DEMO, f"--run.out={eager.parent}", *SMALL, "--run.compile=false", "--rehearse=1"))
    # Dropout draws other numbers in compiled code, so the first loss is near, not equal.
    assert before[0]["loss"] == pytest.approx(steps_of(eager)[0]["loss"], abs=0.05)


@pytest.fixture
def _torch_as_it_was() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic
    state = torch.get_rng_state()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.backends.cudnn.deterministic = before[1]
    torch.set_rng_state(state)


@pytest.mark.usefixtures("_torch_as_it_was")
def test_deterministic_algorithms_are_used_on_the_cpu_and_on_request_on_a_gpu() -> None:
    for device, requested, exact in (
        ("cpu", False, True),
        ("cpu", True, True),
        ("cuda", False, False),
        ("cuda", True, True),
    ):
        choose_algorithms(torch.device(device), requested)
        assert torch.are_deterministic_algorithms_enabled() is exact, (device, requested)
        assert torch.backends.cudnn.deterministic is exact, (device, requested)


def test_cublas_gets_a_deterministic_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the two sizes that NVIDIA documents as deterministic; torch requires one."""
    one, other = ":4096:8", ":16:8"
    for before, after in (("", one), (":4096:2:16:8", one), (other, other), (one, one)):
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", before)
        set_cublas_workspace()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == after


@pytest.mark.usefixtures("_torch_as_it_was")
def test_every_rank_and_every_start_draws_other_random_numbers() -> None:
    """Ranks with the same numbers would all drop the same units."""
    drawn = set()
    for seed, rank, step in ((1, 0, 0), (1, 1, 0), (1, 0, 10), (11, 0, 0)):
        for _ in range(2):
            seed_rank(seed, rank, step)
            drawn.add(torch.rand(()).item())
    assert len(drawn) == 4
