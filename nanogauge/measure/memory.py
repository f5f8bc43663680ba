"""Memory of this process, as the operating system and torch's allocator count it."""

from __future__ import annotations

import resource
import sys
from pathlib import Path


def process_bytes() -> int | None:
    """Resident memory now; None where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    return pages * resource.getpagesize()


def peak_process_bytes() -> int:
    """Resident memory at its highest so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
