"""The report of a run that goes on, made anew when its log has grown, and kept until it has."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import re
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from nanogauge.errors import BadInput
from nanogauge.files import without_secrets
from nanogauge.report.build import CLAIMS_NAME, build_report, claims_of
from nanogauge.report.page import templates
from nanogauge.report.render import render_report
from nanogauge.report.unfinished import process_is_there
from nanogauge.runlog import FILE_NAME, LogReader

REBUILD_SECONDS = 2.0
"""a report is not made more often than this, however often one asks; live.js asks as often"""
AGE_SECONDS = 60.0
"""a report of a run without an end says how long it has been silent; so old it is told again"""
PATIENCE_SECONDS = 1.0
"""how long a request waits for the report that is being made, before it gets the one before"""
REFRESH_SECONDS = 5
"""how often a browser without scripts loads the page again"""

_STYLE = Path(__file__).with_name("live.css").read_text(encoding="utf-8")
_SCRIPT = Path(__file__).with_name("live.js").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Page:
    """What there is to show: the report, or a sentence that says why there is none."""

    html: bytes
    json: bytes
    etag: str
    policy: str
    """its Content-Security-Policy: it loads nothing, and runs what is its own alone"""
    is_report: bool
    ages: bool
    """it says how long ago something was"""


class LiveReport:
    """The newest report of a run folder, whatever becomes of the folder; never raises.

    It is made in a thread of its own, from what was appended to the log since the last time, and
    nothing is written into the run folder.
    """

    def __init__(self, folder: Path, claims: Path | None) -> None:
        self._folder = folder
        self._claims = claims
        self._reader = LogReader(folder)
        self._page = waiting_page(folder, "Reading the log ...")
        self._made_of: list[tuple[int, int, int] | bool | None] = []
        self._made_at = -float("inf")
        self._making: asyncio.Future[None] | None = None

    async def page(self) -> Page:
        """The newest page that can be had in a moment."""
        if self._making is None and self._is_due():
            loop = asyncio.get_running_loop()
            self._making = loop.create_future()
            # A daemon: a long log that is being read must not hold up the end of the server.
            threading.Thread(target=self._make, args=[loop], daemon=True).start()
        if self._making is not None:
            await asyncio.wait([self._making], timeout=PATIENCE_SECONDS)
        return self._page

    def _is_due(self) -> bool:
        age = time.monotonic() - self._made_at
        if age < REBUILD_SECONDS:
            return False
        return self._state_of_files() != self._made_of or (self._page.ages and age > AGE_SECONDS)

    def _state_of_files(self) -> list[tuple[int, int, int] | bool | None]:
        names = ("config.toml", "machine.json", "prediction.json", CLAIMS_NAME, FILE_NAME)
        paths = [self._folder / name for name in names]
        found: list[tuple[int, int, int] | bool | None] = [process_is_there(self._folder)]
        for path in [*paths, self._claims] if self._claims is not None else paths:
            try:
                stat = path.stat()
            except OSError:
                found.append(None)
            else:
                found.append((stat.st_ino, stat.st_size, stat.st_mtime_ns))
        return found

    def _make(self, loop: asyncio.AbstractEventLoop) -> None:
        made_of = self._state_of_files()
        try:
            claims = claims_of(self._folder, self._claims)
            report, run, recorded = build_report(self._folder, claims, self._reader)
            texts = render_report(report, run, recorded)
            ages = report.run.last_line_age_s is not None
            page = _live_page(texts["report.html"], texts["report.json"], True, ages)
        except BadInput as error:
            page = waiting_page(self._folder, str(error))
        except Exception as error:  # a run being copied or deleted fails in many ways, the next not
            traceback.print_exc(file=sys.stderr)
            page = waiting_page(
                self._folder, f"The report could not be made: {type(error).__name__}: {error}."
            )

        def publish() -> None:
            self._page, self._made_of, self._made_at = page, made_of, time.monotonic()
            if self._making is not None:
                self._making.set_result(None)
                self._making = None

        with contextlib.suppress(RuntimeError):  # the server has ended meanwhile
            loop.call_soon_threadsafe(publish)


def waiting_page(folder: Path, text: str) -> Page:
    """A page in place of the report, which goes on asking for it."""
    template = templates().get_template("waiting.html.j2")
    text = without_secrets(text)
    told = json.dumps({"error": text}, ensure_ascii=False)
    return _live_page(template.render(name=folder.name, text=text), told, False, False)


def _live_page(report: str, told: str, is_report: bool, ages: bool) -> Page:
    """The page of the report, with what keeps it up to date."""
    version = hashlib.sha256(report.encode()).hexdigest()[:32]
    sheets = [_STYLE, *re.findall(r"<style>(.*?)</style>", report, re.DOTALL)]
    styles = " ".join(sorted({_hash(sheet) for sheet in sheets}))
    refresh = f'<meta http-equiv="refresh" content="{REFRESH_SECONDS}">'
    head = f"<noscript>{refresh}</noscript>\n<style>{_STYLE}</style>\n</head>"
    foot = (
        f'<p id="live" data-version="{version}" data-styles="{styles}"></p>\n'
        f'<script id="live-script">{_SCRIPT}</script>\n</body>'
    )
    text = report.replace("</head>", head, 1)
    text = foot.join(text.rsplit("</body>", 1))
    # The values of style attributes follow the data, and the policy is that of the first page into
    # which all later ones are put; without a source to load from they can do nothing but lay out.
    policy = (
        f"default-src 'none'; script-src {_hash(_SCRIPT)}; style-src {styles}; "
        "style-src-attr 'unsafe-inline'; img-src data:; connect-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    )
    return Page(text.encode(), told.encode(), f'"{version}"', policy, is_report, ages)


def _hash(content: str) -> str:
    digest = hashlib.sha256(content.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
