"""How many tokens the vocabulary head takes at a time; prediction counts with it, without torch."""

import math

CHUNK_BYTES = {"cpu": 36 * 2**20, "cuda": 512 * 2**20}
"""Logits of a chunk at most, counted as fp32 on a CPU and as 16-bit values elsewhere. Fewer, and to
read and write the weight's whole gradient for each chunk takes longer than the products; more, and
the softmax leaves the processor's caches, and the peak of the process grows."""


HANDED_BACK_BYTES = 32 * 2**20
"""Blocks of more than that glibc returns to the kernel, which clears them before they come again:
so large logits of a chunk stay between losses on a CPU."""


def chunk_tokens(tokens: int, vocabulary: int, device_type: str) -> int:
    """Tokens of a chunk, of so many that a loss has: a multiple of 16 or 64, as products like it.

    On a CPU the chunks of a loss are equally large, as nearly as that allows.
    """
    if device_type != "cpu":
        return max(64, CHUNK_BYTES["cuda"] // (2 * vocabulary) // 64 * 64)
    most = max(16, CHUNK_BYTES["cpu"] // (4 * vocabulary) // 16 * 16)
    return math.ceil(tokens / math.ceil(tokens / most) / 16) * 16
