"""Turn FineWeb-Edu, or other texts, into token shards as llm.c writes them.

    python prepare_fineweb.py --tokens 3.68e9 --out data/fineweb_edu
    python prepare_fineweb.py --dataset my_texts/ --tokens 1e8 --out data/mine
    python prepare_fineweb.py --pretokenized OWNER/SHARDS --tokens 1e9 --out data/ready
    python prepare_fineweb.py --verify data/fineweb_edu
    python prepare_fineweb.py --stats data/fineweb_edu

Interrupted, the same command goes on where it was; with more --tokens it goes on from its end.
HF_ENDPOINT (a mirror of the hub), HF_TOKEN, HF_HUB_OFFLINE and proxies are honoured.
docs/preparing.md says more.
"""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

from nanogauge.cli import Parser, run_command


def main(arguments: Sequence[str]) -> int:
    given = parser().parse(arguments)
    if given.verify is not None or given.stats is not None:
        from trainer.data.verify import show_stats, verify

        return verify(given.verify) if given.verify is not None else show_stats(given.stats)
    if given.repair is not None:
        from trainer.data.verify import repair

        return repair(given.repair, given.workers)
    from trainer.data.command import prepare_command

    return prepare_command(given)


def parser() -> Parser:
    parser = Parser(__doc__ or "")
    add = parser.add_argument
    source = parser.add_argument_group("source").add_argument
    source(
        "--dataset",
        default="HuggingFaceFW/fineweb-edu",
        help="dataset on the hub, or a local file or folder of .parquet, .jsonl or .txt "
        "(HuggingFaceFW/fineweb-edu)",
    )
    source("--name", help="configuration of the dataset (FineWeb's sample-10BT, else its default)")
    source("--revision", help="commit of the dataset (its newest)")
    source("--text-column", default="text", help="column, or key, that holds the texts (text)")
    source(
        "--whole-files",
        action="store_true",
        help="fetch whole files into the hub client's cache, checked by their sha256",
    )
    source("--pretokenized", metavar="REPO", help="fetch ready shards from this dataset instead")
    add("--tokens", type=count, default=3_680_000_000, help="training tokens (3.68e9)")
    add("--out", type=Path, default=Path("data/fineweb_edu"), help="folder (data/fineweb_edu)")
    add("--val-tokens", type=count, help="validation tokens (1e7)")
    add("--val-share", type=share, help="validation tokens as a share of the training tokens")
    add("--shard-tokens", type=count, default=100_000_000, help="tokens of one shard (1e8)")
    add(
        "--tokenizer",
        default="gpt2",
        help="an encoding of tiktoken, a .tiktoken file, or hf: and a tokenizer.json (gpt2)",
    )
    add("--pattern", default="gpt2", help="how a .tiktoken file splits words (gpt2)")
    add(
        "--workers",
        type=count,
        default=os.cpu_count() or 1,
        help="processes that tokenise (one for each core)",
    )
    add("--memory", type=size, default=size("2GiB"), help="of all processes together (2GiB)")
    look = parser.add_argument_group("looking at what is there").add_argument
    look("--verify", type=Path, metavar="DIR", help="check headers, counts, hashes and tokens")
    look("--repair", type=Path, metavar="DIR", help="make damaged shards again, and only those")
    look("--stats", type=Path, metavar="DIR", help="lengths, compression and a few documents")
    return parser


def count(text: str) -> int:
    """A whole number above zero, as people write it: 3680000000, 3_680_000_000 or 3.68e9."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (value > 0 and value.is_integer()):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0, such as 3.68e9")
    return int(value)


def share(text: str) -> float:
    """A number between 0 and 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share between 0 and 1, such as 0.003")
    return value


def size(text: str) -> float:
    """Bytes, as people write them: 2GiB, 2.5GB or 2e9."""
    match = re.fullmatch(r"([\d.]+(?:e\d+)?)(GiB|GB|MiB|MB|)", text)
    units = {"GiB": 2.0**30, "GB": 1e9, "MiB": 2.0**20, "MB": 1e6, "": 1.0}
    try:
        value = float(match[1]) * units[match[2]] if match is not None else math.nan
    except ValueError:
        value = math.nan
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size, such as 2GiB")
    return value


if __name__ == "__main__":
    run_command(main)
