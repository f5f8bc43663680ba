"""How torch's CPU threads wait, and what its products and its allocator keep; import before torch.

By default a thread of GNU's OpenMP that waits for its partner spins for long, and so may hold the
very core that the partner needs. A step of a small model on two cores, in turns of 3,000, 10,000
and (the default) 300,000: 36, 32 and 32 ms when the machine is idle; with one other busy program
84, 112 and 570-760 ms. The library reads its settings once, when it is loaded.

oneDNN, which multiplies the matrices, keeps up to 1,024 prepared products, one for each shape that
it met. Training meets a few dozen; text that runs its whole context for every token meets a new
length each time, and took 330 MB for a model of 18 MB. With 64 it takes none.
"""

import os
import sys

from nanogauge.training.chunks import HANDED_BACK_BYTES

os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")

ALLOCATOR = "GLIBC_TUNABLES"
_KEEPING = {
    "glibc.malloc.hugetlb": 1,  # asks the kernel for 2 MiB pages where it may have them
    "glibc.malloc.mmap_threshold": HANDED_BACK_BYTES,  # the most that glibc takes
    "glibc.malloc.trim_threshold": 2**40,  # never
}


def keep_pages() -> None:
    """Start this program anew as itself, with what GNU's allocator reads at that moment alone.

    Then memory that a step frees is not given back to be asked for again in the next, and a weight
    of 77 MB lies on 2 MiB pages, so that a product which goes through its columns finds them. To be
    called before anything was done; a user's own settings stand, and other libraries are let be.
    """
    if sys.platform != "linux" or ALLOCATOR in os.environ or not sys.executable:
        return
    if not (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc"):
        return
    os.environ[ALLOCATOR] = ":".join(f"{name}={value}" for name, value in _KEEPING.items())
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
