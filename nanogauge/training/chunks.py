"""How many tokens the vocabulary head takes at a time; prediction counts with it, without torch."""

CHUNK_BYTES = {"cpu": 28 * 2**20, "cuda": 512 * 2**20}
"""Logits of a chunk at most, counted as fp32 on a CPU and as 16-bit values elsewhere. Fewer, and to
read and write the weight's whole gradient for each chunk takes longer than the products; more, and
glibc hands the memory back each time: it keeps blocks of up to 32 MiB."""


def chunk_tokens(vocabulary: int, device_type: str) -> int:
    """Tokens of a chunk: a multiple of 64, as matrix products like it."""
    on_cpu = device_type == "cpu"
    tokens = CHUNK_BYTES["cpu" if on_cpu else "cuda"] // ((4 if on_cpu else 2) * vocabulary)
    return max(64, tokens // 64 * 64)
