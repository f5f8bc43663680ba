"""How long the data takes to prepare, once and before the run, by prepare_fineweb.py."""

from __future__ import annotations

# Tokens a second that are read, tokenised and written. Measured: 2.8 M a second and thread by
# tiktoken alone, 1.2 M a core by the whole command, on a two-core machine that was busy otherwise
# 0.4 M in all; low, expected and high are for a desktop of 4 to 16 cores.
TOKENS_PER_SECOND = (0.5e6, 2.0e6, 5.0e6)
# Parquet bytes per GPT-2 token: the card of FineWeb gives its sample-10BT as 27.6 GB.
SOURCE_BYTES_PER_TOKEN = 2.76
LINE_BYTES_PER_SECOND = (50e6 / 8, 100e6 / 8, 1e9 / 8)
"""home connections of 50, 100 and 1,000 Mbit/s"""


def preparation_seconds(tokens: int) -> tuple[float, float, float]:
    """Low, expected and high; download and tokenising overlap, the slower counts."""
    low, expected, high = (
        max(tokens / rate, tokens * SOURCE_BYTES_PER_TOKEN / line)
        for rate, line in zip(
            reversed(TOKENS_PER_SECOND), reversed(LINE_BYTES_PER_SECOND), strict=True
        )
    )
    return low, expected, high
