"""A headless Chromium, driven by chromedriver over plain HTTP: the W3C WebDriver protocol."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
AXE = ("axe-core", "node_modules", "axe-core", "axe.min.js")
SECONDS = 60


def axe_source() -> str:
    """The accessibility checker, from the cache that .ci/run fills; without it the test skips."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    path = Path(cache, "nanogauge", *AXE)
    if not path.exists():
        pytest.skip(f"no axe-core: .ci/run fetches it with npm into {path.parents[2]}")
    return path.read_text(encoding="utf-8")


class Browser:
    """One session of the browser."""

    def __init__(self, port: int, binary: str) -> None:
        self._address = f"http://127.0.0.1:{port}/session"
        options = {"args": FLAGS, "binary": binary}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        made = self._post("", {"capabilities": {"alwaysMatch": wanted}})
        self._address += "/" + made["sessionId"]
        self._post("/timeouts", {"script": 1000 * SECONDS})

    def _post(self, command: str, values: dict[str, Any], method: str = "POST") -> Any:
        request = urllib.request.Request(
            self._address + command,
            data=json.dumps(values).encode() if method == "POST" else None,
            headers={"Content-Type": "application/json"},
            method=method,
        )
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            return json.load(answer)["value"]

    def _devtools(self, command: str, **values: Any) -> None:
        self._post("/goog/cdp/execute", {"cmd": command, "params": values})

    def show(self, page: Path, width: int, height: int, scheme: str) -> None:
        """Open a page in a window of this size, with the light or the dark colours."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._devtools("Emulation.setDeviceMetricsOverride", **size)
        preferred = [{"name": "prefers-color-scheme", "value": scheme}]
        self._devtools("Emulation.setEmulatedMedia", media="", features=preferred)
        self._post("/url", {"url": page.resolve().as_uri()})

    def print_colours(self) -> None:
        """From now on show pages as paper does, until one is shown anew."""
        self._devtools("Emulation.setEmulatedMedia", media="print")

    def run(self, script: str, *arguments: Any) -> Any:
        """What a function body in JavaScript returns."""
        return self._post("/execute/sync", {"script": script, "args": list(arguments)})

    def run_async(self, script: str, *arguments: Any) -> Any:
        """What a function body in JavaScript gives to its last argument, a callback."""
        return self._post("/execute/async", {"script": script, "args": list(arguments)})

    def console(self) -> list[str]:
        """What the page wrote to its console since it was last asked."""
        return [entry["message"] for entry in self._post("/se/log", {"type": "browser"})]

    def picture(self) -> bytes:
        """What the window shows, as PNG."""
        return base64.b64decode(self._post("/screenshot", {}, method="GET"))

    def close(self) -> None:
        self._post("", {}, method="DELETE")


@contextmanager
def open_browser() -> Iterator[Browser]:
    """A browser for as long as it is used; without one the test skips."""
    driver = shutil.which("chromedriver")
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    if driver is None or binary is None:
        pytest.skip("no browser: the tests of the pages need chromium and chromedriver")
    command = [driver, "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            ports = (re.search(r"started successfully on port (\d+)", s) for s in process.stdout)
            browser = Browser(int(next(found for found in ports if found)[1]), binary)
            try:
                yield browser
            finally:
                browser.close()
        finally:
            process.terminate()
