"""A small Hugging Face hub on the loopback interface.

It serves one repository, of a dataset or a model, from memory: its revision, its file tree and its files, whole or in
ranges. Other requests are answered 404, as by the hub. Each of a
list of faults damages one response with a file's bytes.
"""

import hashlib
import json
import random
import threading
import time
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Literal, Self
from urllib.parse import parse_qs, unquote, urlsplit

REVISION = "0123456789abcdef0123456789abcdef01234567"
_DATE = "2026-01-01T00:00:00.000Z"


class Hub:
    """A context manager: the server runs between enter and exit, at `endpoint`.

    `gated`: the files need a token of an account that accepted the conditions. `former` is a name that the repository
    had before: the hub redirects.

    `dies_at`: from the first request for the first row group of this file on, the server closes every connection
    without an answer.

    `faults` damages the next responses with a file's bytes, one each: "cut" (half), "stall" (half of them, then
    silence), "garbage" (as many random bytes), "page" (a web page with status 200), or a status such as "429".
    """

    def __init__(
        self,
        repository: str,
        files: Mapping[str, bytes],
        dies_at: str | None = None,
        faults: Sequence[str] = (),
        kind: Literal["datasets", "models"] = "datasets",
        gated: bool = False,
        former: str = "",
    ) -> None:
        self.gated, self.former = gated, former
        self.repository, self.kind = repository, kind
        self.files = dict(files)
        self.dies_at = dies_at
        self.faults = list(faults)
        self.served_bytes = 0
        self.dead = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def tree(self, folder: str) -> list[dict[str, Any]]:
        """Return the entries below a folder, as the hub's tree lists them."""
        inside = f"{folder}/" if folder else ""
        names = [name for name in self.files if name.startswith(inside)]
        folders = {name[: name.index("/", len(inside))] for name in names if "/" in name[len(inside) :]}
        return [self.entry(name) for name in names] + [
            {"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in sorted(folders)
        ]

    def entry(self, name: str) -> dict[str, Any]:
        data = self.files[name]
        lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        entry = {"type": "file", "path": name, "size": len(data), "oid": etag(data)}
        return entry if name.endswith(".md") else entry | {"lfs": lfs}


def etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    api = f"/api/{hub.kind}/{hub.repository}"
    files = f"/{'datasets/' if hub.kind == 'datasets' else ''}{hub.repository}/resolve/"

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = unquote(urlsplit(self.path).path)
            asked = self.headers.get("Range") or ""
            if hub.dies_at and path.endswith(hub.dies_at) and asked.startswith("bytes=4-"):
                hub.dead.set()
            if hub.dead.is_set():
                self.close_connection = True
            elif hub.former and hub.former in path:
                location = self.path.replace(hub.former, hub.repository)
                self.send(307, b"", {"Location": location})
            elif hub.gated and ("/resolve/" in path or "/tree/" in path):
                self.send(401, b"", {"X-Error-Code": "GatedRepo"})
            elif path in (api, f"{api}/revision/main", f"{api}/revision/{REVISION}"):
                siblings = [{"rfilename": name} for name in hub.files]
                self.json({"id": hub.repository, "sha": REVISION, "siblings": siblings})
            elif path.startswith(f"{api}/tree/"):
                folder = path.removeprefix(f"{api}/tree/").partition("/")[2]
                self.json(hub.tree(folder))
            elif path == f"{api}/paths-info/{REVISION}":
                form = "form" in self.headers.get("Content-Type", "")
                wanted = (parse_qs(body.decode()) if form else json.loads(body))["paths"]
                self.json([hub.entry(name) for name in wanted if name in hub.files])
            elif path.startswith(files):
                self.file(path.removeprefix(files).partition("/")[2])
            else:
                self.send(404, b"", {"X-Error-Code": "RepoNotFound"})

        do_GET = do_HEAD = do_POST = answer

        def file(self, name: str) -> None:
            if name not in hub.files:
                self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
                return
            data = hub.files[name]
            headers = {"ETag": f'"{etag(data)}"', "X-Repo-Commit": REVISION, "Accept-Ranges": "bytes"}
            asked = self.headers.get("Range")
            begin, end, status = 0, len(data) - 1, 200
            if asked is not None:
                first, _, last = asked.removeprefix("bytes=").partition("-")
                begin, end = int(first), min(int(last or len(data)), len(data) - 1)
                headers["Content-Range"] = f"bytes {begin}-{end}/{len(data)}"
                status = 206
            sent = data[begin : end + 1]
            hub.served_bytes += len(sent) if self.command == "GET" else 0
            counts = self.command == "GET" and not name.endswith(".md")
            if counts and hub.faults:
                self.fault(hub.faults.pop(0), status, sent, headers)
            else:
                self.send(status, sent, headers)

        def fault(self, fault: str, status: int, data: bytes, headers: Mapping[str, str]) -> None:
            if fault == "garbage":
                self.send(status, random.Random(1).randbytes(len(data)), headers)
            elif fault == "page":
                self.send(200, b"<html>Please log in to this hotel's network</html>", {})
            elif fault in ("cut", "stall"):
                self.close_connection = True
                self.send_response(status)
                for key, value in headers.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: len(data) // 2])
                self.wfile.flush()
                if fault == "stall":
                    time.sleep(3)
            else:
                self.send(int(fault), b"", {"Retry-After": "1"})

        def json(self, value: object) -> None:
            self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def send(self, status: int, data: bytes, headers: Mapping[str, str]) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            """Print nothing."""

    return Handler
