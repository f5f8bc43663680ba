"""Download from the Hugging Face hub; interrupted requests are retried with exponential backoff.

The hub's own client makes every connection, so HF_ENDPOINT (a mirror), HF_TOKEN, HF_HOME, HF_HUB_OFFLINE,
HF_HUB_DOWNLOAD_TIMEOUT and the usual proxy variables apply.
"""

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from nanogauge.errors import BadInput, RunFailed
from nanogauge.files import make_folder, sha256_file, stays_below
from nanogauge.waiting import announced

TRIES = 10
"""Attempts per request; the waits between them take at least four minutes."""
RETRY_LIMIT_SECONDS = 300.0
"""Time after whose end no attempt begins."""
_LONGEST_WAIT_SECONDS = 60.0
_RETRY_STATUSES = frozenset((408, 425, 429, 500, 502, 503, 504))

HUB = "hf://"
"""Prefix of the URLs of files on the hub."""

_Value = TypeVar("_Value")


class Damaged(BadInput):
    """Raised for a damaged file; a remote file may be intact when downloaded again."""


def with_retries(name: str, request: Callable[[], _Value], refusal: str) -> _Value:
    """Call `request` and return its value; retry with backoff while the hub or network fails, or the data is damaged.

    Raises:
        BadInput: `refusal` and the hub's reason, if no retry can help.
        RunFailed: if the last attempt fails too.
    """
    failures: tuple[type[Exception], ...] = (Damaged, *client_errors())
    ends = time.monotonic() + RETRY_LIMIT_SECONDS
    with announced(name, RETRY_LIMIT_SECONDS) as because:
        for attempt in range(TRIES):
            try:
                return request()
            except failures as error:
                if _is_final(error.__cause__ or error):
                    raise BadInput(f"{refusal} ({first_line(error)}).") from None
                reason = first_line(error)
                because(reason)
            wait = min(2.0**attempt, _LONGEST_WAIT_SECONDS)
            if attempt == TRIES - 1 or time.monotonic() + wait > ends:
                break
            time.sleep(wait)
    raise RunFailed(f"the download of {name} broke off ({reason})")


def _is_final(error: BaseException) -> bool:
    """Return True for an error of the hub's client that a retry cannot change."""
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    response = getattr(error, "response", None)
    if response is not None and response.status_code not in _RETRY_STATUSES:
        return True
    return isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)


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
        path = Path(hf_hub_download(repository, name, repo_type="dataset", revision=revision))
        if sha256 is not None and sha256_file(path) != sha256:
            path.resolve().unlink()  # the cached copy, which a retry would return
            path.unlink(missing_ok=True)
            raise Damaged(f"it does not have the sha256 that the hub lists, {sha256[:12]}...")
        return path

    return with_retries(name, request, f"the hub has no {name}")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
