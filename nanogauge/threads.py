"""How torch's CPU threads wait for each other; it must be imported before torch.

By default a thread of GNU's OpenMP that waits for its partner spins, and so may hold the very core
that the partner needs. On two cores with other programs at work a step of the demo took 0.26-1.9 s
by default, and 0.08-0.14 s when a waiting thread soon goes to sleep. The library reads its settings
once, when it is loaded.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")
