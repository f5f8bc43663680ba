"""What holds for every test."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import succeed, train_tiny
from gpt2_vocabulary import gpt2_vocabulary  # noqa: F401  (a fixture of every test)
from hypothesis import settings

os.environ.pop("NANOGAUGE_ALERTS_URL", None)  # no run of a test calls its user
if "PYTEST_XDIST_WORKER" in os.environ:  # the runs of two tests share the cores
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# The same examples every time, so that what passed for one passes for all. For other examples:
# pytest --hypothesis-profile=search
settings.register_profile("repeatable", derandomize=True)
settings.register_profile("search", derandomize=False)
settings.load_profile("repeatable")


@pytest.fixture(scope="session", autouse=True)
def _calibrations_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test reads or writes what was measured, or compiled, for whose machine this is."""
    os.environ["XDG_DATA_HOME"] = str(tmp_path_factory.mktemp("data"))
    compiled = Path(tempfile.gettempdir()) / "nanogauge-compiled-by-tests"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compiled))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Models this small lose more to waiting for a second thread than it does for them."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def gpt2_tokenizer(gpt2_vocabulary: Path) -> Iterator[None]:  # noqa: F811
    """Let tiktoken find GPT-2's vocabulary."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(gpt2_vocabulary))
        yield


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny model's run, twelve steps long; not to be written to."""
    out = tmp_path_factory.mktemp("tiny")
    succeed(train_tiny(out))
    return out / "demo"
