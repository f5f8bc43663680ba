"""How long the data takes to prepare, once and before the run, by prepare_fineweb.py."""

from __future__ import annotations

from nanogauge.quantities import Interval

# Tokens a second that are read, tokenised and written. Measured by bench/prepare.py: 33 to 37 MB of
# text a second with two workers, from start to end; web text has about 4.5 bytes a token. Low is a
# quarter of that, on a machine that is busy otherwise; high the four workers of the default memory.
TOKENS_PER_SECOND = Interval(2.0e6, 8.0e6, 16.0e6)
# Parquet bytes per GPT-2 token: the card of FineWeb gives its sample-10BT as 27.6 GB.
SOURCE_BYTES_PER_TOKEN = 2.76
LINE_BYTES_PER_SECOND = Interval(50e6 / 8, 100e6 / 8, 1e9 / 8)
"""home connections of 50, 100 and 1,000 Mbit/s"""


def preparation_seconds(tokens: int) -> Interval:
    """Return the time of the slower of download and tokenization, which overlap."""
    working = tokens / TOKENS_PER_SECOND
    download = tokens * SOURCE_BYTES_PER_TOKEN / LINE_BYTES_PER_SECOND
    return Interval(
        max(working.low, download.low),
        max(working.expected, download.expected),
        max(working.high, download.high),
    )
