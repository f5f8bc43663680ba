"""Set the environment of torch's CPU threads, oneDNN and glibc's allocator. Import before torch.

By default a waiting OpenMP thread of GNU's library spins for long, and may occupy the core that another thread needs. A
step of a small model on two cores with a spin count of 3,000, 10,000 and 300,000 (the default) takes 36, 32 and 32 ms
on an idle machine, and 84, 112 and 570-760 ms beside one other busy program. The library reads its settings once, when
it is loaded.

oneDNN caches up to 1,024 compiled matrix products, one per shape. Training uses a few dozen shapes; generation meets a
new length with each token and took 330 MB for a model of 18 MB. A cache of 64 adds nothing to the memory.
"""

import os
import sys

os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")

ALLOCATOR = "GLIBC_TUNABLES"


def keep_pages() -> None:
    """Re-exec the process with glibc malloc settings, which are read only at start-up.

    Memory freed by a step then stays in the process for the next step, and large weights use
    2 MiB pages. Call it before anything else. GLIBC_TUNABLES set by the user is kept; other C libraries are left alone.
    """
    if sys.platform != "linux" or ALLOCATOR in os.environ or not sys.executable:
        return
    if not (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc"):
        return
    from nanogauge.config import MMAP_THRESHOLD_BYTES

    settings = {
        "glibc.malloc.hugetlb": 1,  # ask the kernel for 2 MiB pages where they are allowed
        "glibc.malloc.mmap_threshold": MMAP_THRESHOLD_BYTES,
        "glibc.malloc.trim_threshold": 2**40,  # never
    }
    os.environ[ALLOCATOR] = ":".join(f"{name}={value}" for name, value in settings.items())
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
