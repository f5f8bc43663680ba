"""Download from the Hugging Face hub; interrupted requests are retried with exponential backoff.

The hub's own client makes every connection, so HF_ENDPOINT (a mirror), HF_TOKEN, HF_HOME, HF_HUB_OFFLINE,
HF_HUB_DOWNLOAD_TIMEOUT and the usual proxy variables apply.
"""

import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from nanogauge.errors import BadInput, RunFailed
from nanogauge.files import make_folder, sha256_file, stays_below
from nanogauge.waiting import announced

TRIES = 10
"""Attempts per request; the waits between them take at least four minutes."""
RETRY_LIMIT_SECONDS = 300.0
"""Time after whose end no attempt begins."""
_LONGEST_WAIT_SECONDS = 60.0
_RETRY_STATUSES = frozenset((408, 425, 429, 500, 502, 503, 504))

_Value = TypeVar("_Value")


class Interrupted(Exception):
    """Raised for a failed request that may succeed on a retry."""

    def __init__(self, reason: str, wait_seconds: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_seconds = wait_seconds


def with_retries(name: str, request: Callable[[], _Value]) -> _Value:
    """Call `request` and return its value; while it raises Interrupted, retry with backoff.

    Raises:
        RunFailed: if the last attempt is interrupted too.
    """
    ends = time.monotonic() + RETRY_LIMIT_SECONDS
    with announced(name, RETRY_LIMIT_SECONDS) as because:
        for attempt in range(TRIES):
            try:
                return request()
            except Interrupted as error:
                reason = str(error)
                because(reason)
                wait = max(min(2.0**attempt, _LONGEST_WAIT_SECONDS), error.wait_seconds)
            if attempt == TRIES - 1 or time.monotonic() + wait > ends:
                break
            time.sleep(wait)
    raise RunFailed(f"the download of {name} broke off ({reason})")


def silence_client() -> None:
    """Disable the messages, progress bars and telemetry of the hub's client; before its import."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")
    from huggingface_hub.utils.logging import set_verbosity
    from huggingface_hub.utils.tqdm import disable_progress_bars

    set_verbosity(logging.ERROR)
    disable_progress_bars()


def client_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions that the hub's client raises if the network or the hub fails."""
    # The client re-exports its HTTP library, whose name changes with the client's version.
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    return OSError, httpx.HTTPError


def refuse_unwritable_cache(folder: str, variable: str) -> None:
    """Raise BadInput if a cache folder, which an environment variable names, cannot be written."""
    try:
        make_folder(Path(folder))
    except BadInput as error:
        why = str(error).partition(";")[0]
        raise BadInput(f"downloads cannot be kept in {folder} ({why}); set {variable} to a folder of yours.") from None


def as_interrupted(error: Exception) -> Interrupted | None:
    """Convert an error of the hub's client to Interrupted; return None if a retry cannot help."""
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    response = getattr(error, "response", None)
    if response is not None and response.status_code not in _RETRY_STATUSES:
        return None
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return None
    wait = _retry_after(response.headers) if response is not None else 0.0
    return Interrupted(first_line(error), wait)


def fetch_range(url: str, name: str, begin: int, end: int, size: int) -> bytes:
    """Return bytes [begin, end) of a file on the hub; `size` is the file size the hub lists.

    Raises:
        BadInput: if the hub refuses it.
        RunFailed: if it cannot be fetched.
    """
    return with_retries(name, lambda: _fetch_range(url, name, begin, end, size))


def _fetch_range(url: str, name: str, begin: int, end: int, size: int) -> bytes:
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils._headers import build_hf_headers

    headers = build_hf_headers() | {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
    parts: list[bytes] = []
    received = 0
    try:
        with get_session().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
            if response.status_code in _RETRY_STATUSES:
                raise Interrupted(f"the server answered {response.status_code}", _retry_after(response.headers))
            if 400 <= response.status_code < 500:
                raise BadInput(_refusal(response.status_code, name))
            sent = response.headers.get("Content-Range", "")
            if response.status_code != 206 or sent != f"bytes {begin}-{end - 1}/{size}":
                raise Interrupted("the server did not send the requested bytes")
            for part in response.iter_raw():
                parts.append(part)
                received += len(part)
                if received > end - begin:
                    raise Interrupted("the server sent more bytes than requested")
    except client_errors() as error:
        raise Interrupted(first_line(error)) from None
    if received < end - begin:
        raise Interrupted(f"the connection was cut after {received:,} of {end - begin:,} bytes")
    return b"".join(parts)


def _refusal(status: int, name: str) -> str:
    if status in (401, 403):
        return f"the hub refuses {name} ({status}); accept the dataset's conditions there, and set HF_TOKEN."
    return f"the hub has no {name} ({status}); give --dataset and --name as it lists them."


def _retry_after(headers: Any) -> float:
    with suppress(ValueError):
        return min(float(headers.get("Retry-After", 0)), _LONGEST_WAIT_SECONDS)
    return 0.0


def fetch_file(repository: str, name: str, revision: str, sha256: str | None) -> Path:
    """Return a whole file of a dataset, downloaded to the client's cache.

    Raises:
        BadInput: if the hub refuses it.
        RunFailed: if it cannot be fetched, or is damaged in every attempt.
    """
    from huggingface_hub import hf_hub_download

    if not stays_below(name):
        raise BadInput(f"{repository} lists {name!r}, which leads out of it; give another dataset.")

    def request() -> Path:
        try:
            path = Path(hf_hub_download(repository, name, repo_type="dataset", revision=revision))
        except client_errors() as error:
            message = f"the hub has no {name} ({first_line(error)})."
            raise as_interrupted(error) or BadInput(message) from None
        if sha256 is not None and sha256_file(path) != sha256:
            path.resolve().unlink()  # the cached copy, which a retry would return
            path.unlink(missing_ok=True)
            raise Interrupted(f"it does not have the sha256 that the hub lists, {sha256[:12]}...")
        return path

    return with_retries(name, request)


def file_info(repository: str, name: str, revision: str) -> Any:
    """Return the hub's entry (path, size, lfs) for a file of a dataset; None if there is no file.

    Raises:
        BadInput: if the hub refuses it.
        RunFailed: if the hub cannot be reached.
    """
    from huggingface_hub import HfApi

    def request() -> list[Any]:
        try:
            return HfApi().get_paths_info(repository, [name], revision=revision, repo_type="dataset")
        except client_errors() as error:
            message = f"the hub refuses {repository} ({first_line(error)})."
            raise as_interrupted(error) or BadInput(message) from None

    return next(iter(with_retries(repository, request)), None)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
