"""Serve the report of one run folder at http://127.0.0.1: the page and its JSON, nothing else."""

from __future__ import annotations

import contextlib
import re
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from nanogauge.analysis.report_model import build_report, claims_of
from nanogauge.errors import BadInput
from nanogauge.report.html import render_report
from nanogauge.runlog.lock import is_locked
from nanogauge.runlog.reader import LogReader, last_written

_FILES = {"/": ("report.html", "text/html"), "/report.json": ("report.json", "application/json")}
_LOOPBACK = re.compile(r"(localhost|127\.0\.0\.1)(:\d+)?", re.IGNORECASE)
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'"


def serve(folder: Path, claims: Path | None, port: int) -> None:
    """Serve the report until Ctrl-C or SIGTERM.

    Raises:
        BadInput: if the port cannot be listened on.
    """
    try:
        server = _Server(("127.0.0.1", port), _Handler)
    except (OSError, OverflowError) as error:
        raise BadInput(f"cannot listen on port {port}: {error}; choose another --port.") from None
    server.folder, server.claims, server.reader = folder, claims, LogReader(folder)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    print(f"{folder}: http://127.0.0.1:{server.server_port}/ (Ctrl-C ends it)", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()


class _Server(ThreadingHTTPServer):
    folder: Path
    claims: Path | None
    reader: LogReader
    lock = threading.Lock()
    built: tuple[object, dict[str, str]] = (None, {})

    def contents(self) -> dict[str, str]:
        """Return the report's files by name; rebuild if the log grew or a minute has passed."""
        with self.lock:
            now = (last_written(self.folder), is_locked(self.folder), time.time() // 60)
            if now != self.built[0]:
                claims = claims_of(self.folder, self.claims)
                self.built = (now, render_report(*build_report(self.folder, claims, self.reader)))
            return self.built[1]


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = 10

    def do_GET(self) -> None:
        # A foreign web page whose host name was rebound to 127.0.0.1 must not read the answer.
        is_foreign = _LOOPBACK.fullmatch(",".join(self.headers.get_all("Host", []))) is None
        if is_foreign or self.path not in _FILES:
            return self.send_error(421 if is_foreign else 404)
        (name, kind), status = _FILES[self.path], 200
        try:
            text = self.server.contents()[name]
        except (BadInput, OSError) as error:
            text, kind, status = f"{error}\n", "text/plain", 503
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Security-Policy", _POLICY)
        with contextlib.suppress(ConnectionError):  # the browser has closed the page
            self.end_headers()
            self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        """Print no line for each request."""
