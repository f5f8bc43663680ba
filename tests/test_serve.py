"""The live page, from outside: the real command on its own port, and what is sent to it."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import re
import shutil
import signal
import socket
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from commands import ROOT, command, run
from runs import make_finished, make_folder, steps, write

from nanogauge.report.live import REBUILD_SECONDS
from nanogauge.report.serve import HEAD_SECONDS, LONGEST_HEAD, MOST_CONNECTIONS

SECRET = "a secret that no request may bring out"


class Live:
    """A server that runs, and how to ask it."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process = process
        self.port = port

    def get(
        self, target: str = "/", method: str = "GET", **headers: str
    ) -> tuple[int, dict[str, str], str]:
        """Status, headers and body of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, target, headers=named)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read().decode()
        finally:
            connection.close()

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def send(self, data: bytes) -> bytes:
        """All that comes back for these bytes."""
        with self.connect() as client:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: client.recv(65536), b""))


@contextmanager
def live(folder: Path, *more: object) -> Iterator[Live]:
    """Serve a folder on a free port; nothing may be on stderr in the end."""
    process = subprocess.Popen(
        command("report.py", "--serve", folder, "--port", 0, *more),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"http://\S+:(\d+)/", line)
        assert found is not None, line or (process.stderr and process.stderr.read())
        yield Live(process, int(found[1]))
    finally:
        process.terminate()
        _, errors = process.communicate(timeout=10)
    assert (process.returncode, errors) == (0, "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its report, and secrets inside and beside its folder."""
    root = tmp_path_factory.mktemp("served")
    make_finished(root / "run")
    assert run("report.py", root / "run").returncode == 0
    for path in (root / "secret.txt", root / "run" / "secret.txt"):
        path.write_text(SECRET)
    return root / "run"


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Live]:
    with live(folder) as server:
        yield server


def until(what: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.1)


def hash_of(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def test_the_live_page_is_the_report(server: Live, folder: Path) -> None:
    """The same page as report.html, but for what keeps it fresh, with and without scripts."""
    report = (folder / "report.html").read_text(encoding="utf-8")
    for target in ("/", "/report.html", "/?whatever=1"):
        status, headers, page = server.get(target)
        assert status == 200
        head, body = report.split("</head>")
        assert page.startswith(head)
        assert body.split("</body>")[0] in page
    assert '<noscript><meta http-equiv="refresh"' in page
    status, headers, text = server.get("/report.json")
    assert status == 200
    assert headers["Content-Type"].startswith("application/json")
    assert json.loads(text) == json.loads((folder / "report.json").read_text(encoding="utf-8"))


def test_the_policy_lets_the_page_run_its_own_script_and_load_nothing(server: Live) -> None:
    """Markup that got into the page by whatever mistake could neither run nor call home."""
    _, headers, page = server.get()
    policy = dict(
        part.strip().split(" ", 1) for part in headers["Content-Security-Policy"].split(";")
    )
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", page, re.DOTALL)
    sheets = re.findall(r"<style[^>]*>(.*?)</style>", page, re.DOTALL)
    assert [policy["script-src"]] == [hash_of(script) for script in scripts]
    assert set(policy["style-src"].split()) == {hash_of(sheet) for sheet in sheets}
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cache-Control"] == "no-store"
    assert "Access-Control-Allow-Origin" not in headers


@pytest.mark.parametrize(
    "target",
    [
        "/secret.txt",
        "/../secret.txt",
        "/report.html/../secret.txt",
        "/..%2fsecret.txt",
        "/%2e%2e/secret.txt",
        "/%252e%252e/secret.txt",
        "/..%5csecret.txt",
        "/..\\secret.txt",
        "/%c0%ae%c0%ae/secret.txt",
        "/....//secret.txt",
        "//secret.txt",
        "/./secret.txt",
        "/secret.txt%00.html",
        "/;/../secret.txt",
        "/log.jsonl",
        "/report.html/",
        "/REPORT.HTML",
        "../secret.txt",
        "secret.txt",
        "file:///etc/passwd",
        "http://127.0.0.1/secret.txt",
        "*",
    ],
)
def test_no_address_reaches_a_file(server: Live, folder: Path, target: str) -> None:
    """In the run folder or outside of it, however it is written: no path is ever opened."""
    for address in (target, target.replace("secret.txt", f"{folder}/secret.txt")):
        answer = server.send(f"GET {address} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert answer.startswith(b"HTTP/1.1 404 ")
        assert SECRET.encode() not in answer


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "BREW"])
def test_the_server_is_read_only(server: Live, method: str) -> None:
    """And its refusal is heard, also by a client that sends a long body."""
    status, headers, _ = server.get(method=method)
    assert status == 405
    assert headers["Allow"] == "GET, HEAD"
    head = f"{method} / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 200000\r\n\r\n"
    assert server.send(head.encode() + b"x" * 200_000).startswith(b"HTTP/1.1 405 ")


def test_head_has_the_headers_of_get_and_no_body(server: Live) -> None:
    _, got, page = server.get()
    status, headers, body = server.get(method="HEAD")
    assert (status, body) == (200, "")
    assert int(headers["Content-Length"]) == len(page.encode())
    assert {**headers, "Date": ""} == {**got, "Date": ""}


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:1234", 200),
        ("127.0.0.1", 200),
        ("[::1]:80", 200),
        ("evil.example", 421),
        ("localhost.evil.example", 421),
        ("127.0.0.1.evil.example:80", 421),
        ("evil.example:localhost", 400),
        ("user@localhost", 400),
        ("192.168.0.7", 421),
        ("", 400),
        ("localhost evil.example", 400),
        ("localhost\r\nHost: evil.example", 400),
        (None, 400),
    ],
)
def test_a_page_of_another_site_cannot_read_the_report(
    server: Live, host: str | None, status: int
) -> None:
    """DNS rebinding: evil.example stands for 127.0.0.1 once its page is loaded, and stays Host."""
    line = "" if host is None else f"Host: {host}\r\n"
    answer = server.send(f"GET / HTTP/1.1\r\n{line}\r\n".encode())
    assert answer.startswith(f"HTTP/1.1 {status} ".encode())
    assert (b"made" in answer) == (status == 200)


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),  # TLS
        (b"\x00" * 100 + b"\r\n\r\n", 400),
        (b"\r\n\r\n", 400),
        (b"GET /\r\n\r\n", 400),
        (b"GET / HTTP/1.1 HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET  / HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET / HTTP/2.0\r\nHost: localhost\r\n\r\n", 505),
        (b"GET / HTTP/1.1\r\nHost : localhost\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n folded\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nA: " + b"a" * LONGEST_HEAD + b"\r\n\r\n", 431),
        (b"A" * 10 * LONGEST_HEAD, 431),
        (b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
    ],
)
def test_garbage_is_answered_with_its_status(server: Live, data: bytes, status: int) -> None:
    assert server.send(data).startswith(f"HTTP/1.1 {status} ".encode())


def test_an_unchanged_log_answers_from_memory(server: Live) -> None:
    """In milliseconds, and to those who have the page already without it."""
    _, headers, _ = server.get()
    seconds = []
    for _ in range(50):
        begin = time.perf_counter()
        status, _, body = server.get(If_None_Match=headers["ETag"])
        seconds.append(time.perf_counter() - begin)
        assert (status, body) == (304, "")
    assert statistics.median(seconds) < 0.05


def test_a_thousand_requests_leave_the_server_as_it_was(server: Live) -> None:
    """No thread, no file and no memory for each of them stays."""

    def held() -> tuple[int, int, int]:
        folder = Path(f"/proc/{server.process.pid}")
        status = dict(line.split(":\t", 1) for line in (folder / "status").open() if ":\t" in line)
        files = len(list((folder / "fd").iterdir()))
        return int(status["Threads"]), files, int(status["VmRSS"].split()[0])

    for _ in range(100):
        server.get()
    before = held()
    for _ in range(1000):
        assert server.get()[0] == 200
    time.sleep(0.2)
    after = held()
    assert after[0] == before[0]
    assert after[1] <= before[1] + 2
    assert after[2] < before[2] + 8000  # KiB
    with ThreadPoolExecutor(100) as many:
        assert {answer[0] for answer in many.map(lambda _: server.get(), range(400))} == {200}


def test_slow_clients_hold_up_nobody_and_are_let_go(server: Live) -> None:
    """More of them than there is room for, each with a byte now and then, for ever."""
    with ExitStack() as stack:
        slow = [stack.enter_context(server.connect()) for _ in range(MOST_CONNECTIONS + 20)]
        mute = stack.enter_context(server.connect())
        mute.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")  # and reads nothing
        newest = slow[-1]
        newest.settimeout(0.3)
        begin, heard = time.monotonic(), b""
        while not heard:
            for client in (slow[0], newest):
                with suppress(OSError):
                    client.sendall(b"G")
            asked = time.monotonic()
            assert server.get()[0] == 200
            assert time.monotonic() < asked + 2
            with suppress(TimeoutError):
                heard = newest.recv(100)
            assert time.monotonic() < begin + 2 * HEAD_SECONDS
        assert heard.startswith(b"HTTP/1.1 408 ")


def test_the_page_grows_with_the_log_and_the_folder_stays_as_it_is(tmp_path: Path) -> None:
    """Half a line at the end is not there yet; the server writes nothing."""
    make_folder(tmp_path)
    write(tmp_path, steps(0, 30))
    with live(tmp_path) as server:
        first = server.get()
        assert "step 30 of 1,000" in first[2]
        more = steps(30, 60)
        write(tmp_path, more[:-10])
        names = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        until(lambda: "step 59 of 1,000" in server.get()[2])
        page = server.get()[2]
        assert "is cut" not in page
        assert server.get()[1]["ETag"] != first[1]["ETag"]
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == names
        write(tmp_path, more[-10:])
        asked = time.monotonic()
        until(lambda: "step 60 of 1,000" in server.get()[2])
        assert time.monotonic() < asked + 3 * REBUILD_SECONDS


def test_a_run_that_comes_and_goes_is_shown_while_it_is_there(tmp_path: Path) -> None:
    """The page waits for a run that has not begun, and says what became of one that is gone."""
    folder = tmp_path / "run"
    with live(folder) as server:
        status, headers, page = server.get()
        assert status == 503
        assert headers["Retry-After"]
        assert "there is no run folder" in page
        assert "error" in json.loads(server.get("/report.json")[2])
        make_finished(folder)
        until(lambda: server.get()[0] == 200)
        shutil.rmtree(folder)
        until(lambda: server.get()[0] == 503)


def test_a_night_of_20_000_steps_is_there_at_once(tmp_path: Path) -> None:
    """Well under the five seconds that a shared processor is given here."""
    make_folder(tmp_path, max_steps=20_000)
    write(tmp_path, steps(0, 19_000))
    with live(tmp_path) as server:
        begin = time.monotonic()
        until(lambda: server.get()[0] == 200, 5.0)
        assert time.monotonic() < begin + 5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_server_ends_at_once_and_cleanly(folder: Path, number: signal.Signals) -> None:
    """Also with connections open; nothing is said on stderr."""
    with live(folder) as server, server.connect() as idle:
        idle.sendall(b"GET / HTTP/1.1\r\n")
        server.get()
        server.process.send_signal(number)
        assert server.process.wait(timeout=5) == 0


def test_a_port_that_is_taken_is_said_in_one_sentence(server: Live, folder: Path) -> None:
    for arguments, words in (
        (("--port", server.port), "address already in use"),
        (("--port", 70_000), "--port takes a number"),
        (("--host", "no.such.host.invalid"), "is no address"),
        (("--host", "192.0.2.1", "--port", 0), "cannot listen at 192.0.2.1"),
    ):
        done = run("report.py", "--serve", folder, *arguments, timeout=20)
        assert done.returncode == 2
        assert words in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_a_server_for_everybody_says_so_and_knows_itself_by_address(folder: Path) -> None:
    """Bound to every address, it still refuses a name that is not its own."""
    with live(folder, "--host", "0.0.0.0") as server:
        assert server.process.stdout is not None
        assert "over the network" in server.process.stdout.readline()
        assert server.get(Host="127.0.0.1")[0] == 200
        assert server.get(Host=socket.gethostname())[0] == 200
        assert server.get(Host="evil.example")[0] == 421
