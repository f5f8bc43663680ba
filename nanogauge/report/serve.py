"""The live page of a run: a server that knows three addresses, reads one folder, writes nothing.

No path of a request is ever opened: an address is one of those below, letter by letter, or it is
not found. One thread talks to all clients and another makes the report, so that neither a slow
client nor many of them can hold up the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import re
import signal
import socket
from dataclasses import dataclass, field
from email.utils import formatdate
from http import HTTPStatus
from pathlib import Path

from nanogauge.errors import BadInput
from nanogauge.report.live import PATIENCE_SECONDS, LiveReport

PAGES = ("/", "/report.html")
JSON = "/report.json"
LONGEST_HEAD = 2**14
"""bytes of a request up to its empty line"""
HEAD_SECONDS = 5.0
"""in which a request has to be there whole"""
SEND_SECONDS = 30.0
"""in which an answer has to be taken"""
LINGER_SECONDS = 1.0
MOST_CONNECTIONS = 500

_REQUEST_LINE = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+) (\S+) HTTP/(\d)\.\d")
_HEADER = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*(.*?)[ \t]*")
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s:@/\[\]]+)(?::\d{1,5})?")


class Refused(Exception):
    """A request that gets no page, and the status that says why."""

    def __init__(self, status: HTTPStatus, **headers: str) -> None:
        super().__init__(status)
        self.status = status
        self.headers = headers


@dataclass
class Answer:
    status: HTTPStatus
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    method: str
    target: str
    headers: dict[str, str]


def serve(folder: Path, claims: Path | None, host: str, port: int) -> int:
    """Show the live page of a run folder until Ctrl-C or SIGTERM; returns the exit status.

    Raises:
        BadInput: if the address is not this machine's, or its port is taken.
    """
    listening = _listen(host, port)
    return asyncio.run(_Server(folder, claims, host, listening).run())


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65535:
        raise BadInput(f"--port takes a number from 0 to 65535, not {port}.")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        raise BadInput(
            f"--host {host!r} is no address; leave it out for this machine alone."
        ) from None
    family, kind, protocol, _, address = found[0]
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(MOST_CONNECTIONS)
    except OSError as error:
        listening.close()
        raise BadInput(
            f"cannot listen at {host} port {port}: {(error.strerror or str(error)).lower()}; "
            "choose another --port, or 0 for any that is free."
        ) from None
    return listening


class _Server:
    def __init__(
        self, folder: Path, claims: Path | None, host: str, listening: socket.socket
    ) -> None:
        self._folder = folder
        self._report = LiveReport(folder, claims)
        self._listening = listening
        self._address, self._port = listening.getsockname()[:2]
        self._names = {_as_host(host), "localhost", "127.0.0.1", "[::1]"}
        if ipaddress.ip_address(self._address).is_unspecified:
            self._names.add(socket.gethostname().lower())
        self._connections: dict[asyncio.WriteTransport, asyncio.Task[None] | None] = {}
        self._unheard: dict[asyncio.WriteTransport, None] = {}
        """connections whose request is not there yet, the oldest first"""

    async def run(self) -> int:
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(NotImplementedError):  # where there are no such signals
                loop.add_signal_handler(number, ended.set)
        server = await asyncio.start_server(
            self._connected, sock=self._listening, limit=LONGEST_HEAD, backlog=MOST_CONNECTIONS
        )
        where = f"http://{_as_host(self._address)}:{self._port}/"
        print(f"{self._folder}: live at {where} (Ctrl-C ends it)", flush=True)
        if not ipaddress.ip_address(self._address).is_loopback:
            print("! Whoever reaches this address over the network can read it.", flush=True)
        await ended.wait()
        server.close()
        talking = [task for task in self._connections.values() if task is not None]
        for transport in list(self._connections):
            transport.abort()
        if talking:
            await asyncio.wait(talking, timeout=2 * PATIENCE_SECONDS)
        return 0

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, one request; whoever is slow with it makes room for those who are not."""
        transport = writer.transport
        if len(self._connections) >= MOST_CONNECTIONS:
            crowded_out = next(iter(self._unheard), transport)
            crowded_out.abort()
            self._unheard.pop(crowded_out, None)
            if crowded_out is transport:
                return
        self._connections[transport] = asyncio.current_task()
        self._unheard[transport] = None
        transport.set_write_buffer_limits(0)
        try:
            await self._talk(reader, writer)
        except (TimeoutError, OSError):
            transport.abort()  # it takes no answer: there is nobody to tell
        finally:
            del self._connections[transport]
            self._unheard.pop(transport, None)
            writer.close()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = None
        try:
            request = await self._request(reader)
            self._unheard.pop(writer.transport, None)
            answer = await self._answer(request, writer.get_extra_info("sockname")[0])
        except asyncio.IncompleteReadError:
            return  # the client went away
        except Refused as refused:
            body = f"{refused.status.value} {refused.status.phrase}\n".encode()
            headers = {"Content-Type": "text/plain; charset=utf-8", **refused.headers}
            answer = Answer(refused.status, body, headers)
        head = [f"HTTP/1.1 {answer.status.value} {answer.status.phrase}"]
        headers = {
            "Date": formatdate(usegmt=True),
            "Content-Length": str(len(answer.body)),
            "Cache-Control": "no-store",
            "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Connection": "close",
        }
        if answer.status is HTTPStatus.NOT_MODIFIED:
            del headers["Content-Length"]
        head += [f"{name}: {value}" for name, value in (headers | answer.headers).items()]
        writer.write("\r\n".join([*head, "", ""]).encode("latin-1"))
        if request is None or request.method != "HEAD":
            writer.write(answer.body)
        async with asyncio.timeout(SEND_SECONDS):
            await writer.drain()
        await _let_go(reader, writer)

    async def _request(self, reader: asyncio.StreamReader) -> Request:
        try:
            async with asyncio.timeout(HEAD_SECONDS):
                data = await reader.readuntil(b"\r\n\r\n")
        except TimeoutError:
            raise Refused(HTTPStatus.REQUEST_TIMEOUT) from None
        except asyncio.LimitOverrunError:
            raise Refused(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE) from None
        first, *lines = data.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
        asked = _REQUEST_LINE.fullmatch(first)
        if asked is None:
            raise Refused(HTTPStatus.BAD_REQUEST)
        if asked[3] != "1":
            raise Refused(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED)
        headers: dict[str, str] = {}
        for line in lines:
            match = _HEADER.fullmatch(line)
            if match is None or (match[1].lower() == "host" and "host" in headers):
                raise Refused(HTTPStatus.BAD_REQUEST)
            headers[match[1].lower()] = match[2]
        return Request(asked[1], asked[2], headers)

    async def _answer(self, request: Request, reached_at: str) -> Answer:
        """The page, or Refused.

        A name that is not one of ours in Host is another's site, whose script reads the answer as
        its own: the address it stands for was changed to this one after the page was loaded.
        """
        host = _HOST.fullmatch(request.headers.get("host", ""))
        if host is None:
            raise Refused(HTTPStatus.BAD_REQUEST)
        if host[1].lower() not in self._names | {_as_host(reached_at)}:
            raise Refused(HTTPStatus.MISDIRECTED_REQUEST)
        if request.method not in ("GET", "HEAD"):
            raise Refused(HTTPStatus.METHOD_NOT_ALLOWED, Allow="GET, HEAD")
        path = request.target.partition("?")[0]
        if path not in (*PAGES, JSON):
            raise Refused(HTTPStatus.NOT_FOUND)
        page = await self._report.page()
        status = HTTPStatus.OK if page.is_report else HTTPStatus.SERVICE_UNAVAILABLE
        again = {} if page.is_report else {"Retry-After": "2"}
        if path == JSON:
            kind = {"Content-Type": "application/json; charset=utf-8"}
            return Answer(status, page.json, kind | again)
        headers = {
            "Content-Type": "text/html; charset=utf-8",
            "Content-Security-Policy": page.policy,
            "ETag": page.etag,
            **again,
        }
        if page.etag in request.headers.get("if-none-match", ""):
            return Answer(HTTPStatus.NOT_MODIFIED, b"", headers)
        return Answer(status, page.html, headers)


async def _let_go(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Close our side, and take what the client may still send, so that it gets to read the answer.

    Closing on unread bytes resets the connection, and the answer is lost with it.
    """
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_SECONDS):
            writer.write_eof()
            while await reader.read(LONGEST_HEAD):
                pass


def _as_host(address: str) -> str:
    """An address as it stands in Host: one of IPv6 in brackets, without its zone.

    One of IPv4 that came over a socket for both is itself again.
    """
    address = address.partition("%")[0].lower().removeprefix("::ffff:")
    return f"[{address}]" if ":" in address else address
