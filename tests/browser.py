"""A headless Chromium, driven by chromedriver over the W3C WebDriver protocol."""

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
    """Return axe-core's script from the cache that .ci/run fills; skip the test without it."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    path = Path(cache, "nanogauge", *AXE)
    if not path.exists():
        pytest.skip(f"no axe-core: .ci/run fetches it with npm into {path.parents[2]}")
    return path.read_text(encoding="utf-8")


class Browser:
    def __init__(self, port: int, binary: str) -> None:
        self._address = f"http://127.0.0.1:{port}/session"
        options = {"args": FLAGS, "binary": binary}
        required = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        session = self._post("", {"capabilities": {"alwaysMatch": required}})
        self._address += "/" + session["sessionId"]
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
        """Open a page in a window of this size, with light or dark colours."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._devtools("Emulation.setDeviceMetricsOverride", **size)
        preferred = [{"name": "prefers-color-scheme", "value": scheme}]
        self._devtools("Emulation.setEmulatedMedia", media="", features=preferred)
        self._post("/url", {"url": page.resolve().as_uri()})

    def emulate_print(self) -> None:
        self._devtools("Emulation.setEmulatedMedia", media="print")

    def run(self, script: str, *arguments: Any) -> Any:
        """Run a JavaScript function body and return its result."""
        return self._post("/execute/sync", {"script": script, "args": list(arguments)})

    def run_async(self, script: str, *arguments: Any) -> Any:
        """Run a JavaScript function body; return what it passes to the callback, given last."""
        return self._post("/execute/async", {"script": script, "args": list(arguments)})

    def console(self) -> list[str]:
        """Return the console messages since the last call."""
        return [entry["message"] for entry in self._post("/se/log", {"type": "browser"})]

    def close(self) -> None:
        self._post("", {}, method="DELETE")


@contextmanager
def open_browser() -> Iterator[Browser]:
    """Start a browser and stop it at the end; skip the test without one."""
    driver = shutil.which("chromedriver")
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    if driver is None or binary is None:
        pytest.skip("no browser: the tests of the pages need chromium and chromedriver")
    with subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, text=True) as process:
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
