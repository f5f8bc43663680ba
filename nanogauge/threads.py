"""How torch's CPU threads wait, and what its products keep; it must be imported before torch.

By default a thread of GNU's OpenMP that waits for its partner spins for long, and so may hold the
very core that the partner needs. A step of the demo on two cores: 0.064 s by default and 0.067 s
with this setting when the machine is idle; with one other busy program 0.3-1.9 s and 0.17 s. The
library reads its settings once, when it is loaded.

oneDNN, which multiplies the matrices, keeps up to 1,024 prepared products, one for each shape that
it met. Training meets a few dozen; text that runs its whole context for every token meets a new
length each time, and took 330 MB for a model of 18 MB. With 64 it takes none.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "3000")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
