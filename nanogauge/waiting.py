"""Say on stderr what a command waits for, once it has been silent for a few seconds."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SILENT_SECONDS = 3.0


@contextmanager
def announced(what: str, limit_seconds: float) -> Iterator[Callable[[str], None]]:
    """Say what is waited for, and until when, if the block takes more than SILENT_SECONDS.

    Yields a function that adds the reason of the wait, which is said with it, or after it.
    """
    until = time.strftime("%H:%M:%S", time.localtime(time.time() + limit_seconds))
    reasons: list[str] = []
    said: list[str] = []

    def say() -> None:
        reason = reasons[-1] if reasons else ""
        said.append(reason)
        text = f"waiting for {what}{reason and f' ({reason})'}, until about {until}"
        print(f"\r\x1b[K{text}" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)

    def add(reason: str) -> None:
        reasons.append(reason)
        if said == [""]:
            say()

    timer = threading.Timer(SILENT_SECONDS, say)
    timer.daemon = True
    timer.start()
    try:
        yield add
    finally:
        timer.cancel()
        timer.join()
