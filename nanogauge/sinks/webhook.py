"""Webhook: alarms and the end of a run as a few words to a phone or a chat."""

import json
import os
import sys
import textwrap
import time
from argparse import Namespace
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from nanogauge.errors import BadInput, RunFailed
from nanogauge.files import ALERTS_VARIABLE
from nanogauge.runspec import RunSpec
from nanogauge.schema import Prediction
from nanogauge.sinks.sink import TITLES, Outcome, Severity, Sink

_TIMEOUT_SECONDS, _RETRY_SECONDS = 10.0, 2.0
_MOST_CHARACTERS = 1000
_FIELDS = {"hooks.slack.com": "text", "discord.com": "content", "api.telegram.org": "text"}
"""Host that takes JSON -> field of the message; any other, such as ntfy.sh, takes plain text."""


def request_of(url: str, words: str) -> Request:
    """Return the POST of a message in the format of its host."""
    kind, body = "text/plain; charset=utf-8", textwrap.shorten(words, _MOST_CHARACTERS)
    if field := _FIELDS.get(urlsplit(url).hostname or ""):
        kind, body = "application/json", json.dumps({field: body})
    # Discord refuses urllib's own User-Agent.
    return Request(url, body.encode(), {"Content-Type": kind, "User-Agent": "nanogauge"})


class Webhook(Sink):
    """Posts to the address in NANOGAUGE_ALERTS_URL; has no place for rows."""

    def __init__(self, options: Namespace) -> None:
        self._url = os.environ.get(ALERTS_VARIABLE, "")
        if not self._url.startswith(("http://", "https://")):
            raise BadInput(f"set {ALERTS_VARIABLE} to the address of a webhook, which begins with http:// or https://.")
        self._reason = ""
        self._problem: str | None = None

    def begin(self, folder: Path, spec: RunSpec, prediction: Prediction) -> None:
        self._name = spec.name or folder.name

    def summary(self, values: Mapping[str, Any]) -> None:
        self._reason = values.get("run/reason", self._reason)

    def alert(self, level: Severity, title: str, text: str) -> None:
        if level == "alarm":
            self._post(text)

    def end(self, status: Outcome | None, report: Mapping[str, Any] | None) -> str:
        outcome = status or "its process died; --resume auto continues from the newest checkpoint"
        reason = f": {self._reason.rstrip('.')}" if status is not None and self._reason else ""
        headline = report["run"]["headline"] if report is not None else ""
        self._post(f"{outcome}{reason}. {headline}".rstrip())
        if self._problem is not None:
            raise RunFailed(f"The webhook did not take all messages: {self._problem}.")
        return TITLES["webhook"]

    def _post(self, words: str) -> None:
        try:
            request = request_of(self._url, f"{self._name}: {words}")
            try:
                urlopen(request, timeout=_TIMEOUT_SECONDS).close()
            except (OSError, HTTPException):
                time.sleep(_RETRY_SECONDS)
                urlopen(request, timeout=_TIMEOUT_SECONDS).close()
        except (OSError, HTTPException, ValueError) as error:  # of the last two, the text may quote the address
            self._problem = str(error) if isinstance(error, OSError) else type(error).__name__
            print(f"Not taken: {words} ({self._problem})", file=sys.stderr)
