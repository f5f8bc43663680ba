"""Fetching from the Hugging Face hub, with patience: what breaks off is tried again.

HF_ENDPOINT (a mirror), HF_TOKEN, HF_HOME, HF_HUB_OFFLINE, HF_HUB_DOWNLOAD_TIMEOUT and the usual
proxy variables are honoured by the hub's own client, which makes every connection here.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from nanogauge.errors import BadInput, RunFailed
from nanogauge.files import sha256_file, stays_below

TRIES = 10
"""of one request; with the waits between them they take at least four minutes"""
_LONGEST_WAIT_SECONDS = 60.0
_LATER = frozenset((408, 425, 429, 500, 502, 503, 504))
"""what a server says when the same request may work later"""

_Value = TypeVar("_Value")


class Interrupted(Exception):
    """A request that may work later; the message says what happened."""

    def __init__(self, why: str, wait_seconds: float = 0.0) -> None:
        super().__init__(why)
        self.wait_seconds = wait_seconds


def patiently(what: str, request: Callable[[], _Value]) -> _Value:
    """Make a request again, after longer and longer waits, while it is interrupted.

    Raises:
        RunFailed: if it was interrupted every time.
    """
    for tried in range(TRIES):
        try:
            return request()
        except Interrupted as error:
            why = str(error)
            wait = max(min(2.0**tried, _LONGEST_WAIT_SECONDS), error.wait_seconds)
        if tried < TRIES - 1:
            time.sleep(wait)
    raise RunFailed(f"the download of {what} broke off ({why})")


def quiet() -> None:
    """Let the hub's client say nothing by itself: what matters is told in one sentence."""
    from huggingface_hub.utils.logging import set_verbosity
    from huggingface_hub.utils.tqdm import disable_progress_bars

    set_verbosity(logging.ERROR)
    disable_progress_bars()


def client_errors() -> tuple[type[Exception], ...]:
    """What the hub's client raises for a network or a hub that fails."""
    # The HTTP library's name changes with the client's version; the client tells which it is.
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    return OSError, httpx.HTTPError


def interrupted(error: Exception) -> Interrupted | None:
    """An error of the hub's client as an interruption, unless trying again is of no use."""
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    response = getattr(error, "response", None)
    if response is not None and response.status_code not in _LATER:
        return None
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return None
    wait = _retry_after(response.headers) if response is not None else 0.0
    return Interrupted(short(error), wait)


def fetch_range(address: str, name: str, begin: int, end: int, size: int) -> bytes:
    """Bytes of a file on the hub, from begin to end, checked to be just those.

    Args:
        address: where the file is.
        name: what to call it.
        begin: first byte.
        end: behind the last byte.
        size: bytes of the whole file, as the hub listed it.

    Raises:
        BadInput: if the hub refuses it.
        RunFailed: if it cannot be had.
    """
    return patiently(name, lambda: _fetch_range(address, name, begin, end, size))


def _fetch_range(address: str, name: str, begin: int, end: int, size: int) -> bytes:
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils._headers import build_hf_headers

    headers = build_hf_headers() | {
        "Range": f"bytes={begin}-{end - 1}",
        "Accept-Encoding": "identity",
    }
    parts: list[bytes] = []
    held = 0
    try:
        with get_session().stream(
            "GET", address, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
        ) as response:
            if response.status_code in _LATER:
                raise Interrupted(
                    f"the server answered {response.status_code}", _retry_after(response.headers)
                )
            if 400 <= response.status_code < 500:
                raise BadInput(_refusal(response.status_code, name))
            told = response.headers.get("Content-Range", "")
            if response.status_code != 206 or told != f"bytes {begin}-{end - 1}/{size}":
                raise Interrupted("the server sent something else than was asked for")
            for part in response.iter_raw():
                parts.append(part)
                held += len(part)
                if held > end - begin:
                    raise Interrupted("the server sent more than was asked for")
    except client_errors() as error:
        raise Interrupted(short(error)) from None
    if held < end - begin:
        raise Interrupted(f"the connection was cut after {held:,} of {end - begin:,} bytes")
    return b"".join(parts)


def _refusal(status: int, name: str) -> str:
    if status in (401, 403):
        return (
            f"the hub refuses {name} ({status}); accept the dataset's conditions there, and set "
            "HF_TOKEN."
        )
    return f"the hub has no {name} ({status}); give --dataset and --name as it lists them."


def _retry_after(headers: Any) -> float:
    with suppress(ValueError):
        return min(float(headers.get("Retry-After", 0)), _LONGEST_WAIT_SECONDS)
    return 0.0


def fetch_file(
    repository: str, name: str, revision: str, sha256: str | None, folder: Path | None = None
) -> Path:
    """A whole file of a dataset on the hub, from the client's cache if it is there.

    Args:
        repository: of the dataset.
        name: path in it.
        revision: commit.
        sha256: what the file must have; None where the hub tells none.
        folder: where to put it in place of the cache.

    Raises:
        BadInput: if the hub refuses it.
        RunFailed: if it cannot be had, or comes damaged again and again.
    """
    return patiently(name, lambda: _fetch_file(repository, name, revision, sha256, folder))


def _fetch_file(
    repository: str, name: str, revision: str, sha256: str | None, folder: Path | None
) -> Path:
    from huggingface_hub import hf_hub_download

    if not stays_below(name):
        raise BadInput(f"{repository} lists {name!r}, which leads out of it; take another.")
    try:
        path = Path(
            hf_hub_download(
                repository, name, repo_type="dataset", revision=revision, local_dir=folder
            )
        )
    except client_errors() as error:
        if (again := interrupted(error)) is not None:
            raise again from None
        raise BadInput(f"the hub has no {name} ({short(error)}).") from None
    if sha256 is not None and sha256_file(path) != sha256:
        path.resolve().unlink()  # the cache's own copy, which it would give again
        path.unlink(missing_ok=True)
        raise Interrupted(f"what came has not the sha256 that the hub lists, {sha256[:12]}...")
    return path


def list_files(repository: str, names: list[str], revision: str) -> Iterator[Any]:
    """What the hub knows of files of a dataset: each with path, size and lfs.

    Raises:
        BadInput: if the hub refuses it.
        RunFailed: if it cannot be reached.
    """
    from huggingface_hub import HfApi

    def ask() -> list[Any]:
        try:
            return HfApi().get_paths_info(repository, names, revision=revision, repo_type="dataset")
        except client_errors() as error:
            if (again := interrupted(error)) is not None:
                raise again from None
            raise BadInput(f"the hub refuses {repository} ({short(error)}).") from None

    return iter(patiently(repository, ask))


def short(error: BaseException) -> str:
    """The first line of a message, or the kind of an error that has none."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
