"""A damaged log is imported or refused with one sentence; nothing else happens."""

import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from examples import DOCUMENTED
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import LOG
from test_nanogpt_variants import DUMP
from test_other_logs import STEPS, build_nanogpt_file, build_nanogpt_output, nanochat_log
from test_wandb_history import as_csv, nanochat_rows, nanogpt_rows, our_rows, torchtitan_rows

from nanogauge.analysis.report_model import build_report
from nanogauge.errors import BadInput
from nanogauge.importers.described import Given
from nanogauge.importers.formats import TEXT_FORMATS
from nanogauge.importers.import_run import import_log
from nanogauge.importers.reader import LogParser, parse_log
from nanogauge.importers.text import TextLines
from nanogauge.report.html import write_report

Mutation = Callable[[random.Random, bytes], bytes]


def lines(chance: random.Random, data: bytes) -> bytes:
    """Delete, repeat and reorder lines, and add others."""
    junk = [b"<script>", b"\x1b[2J=1+1\x00", chance.randbytes(40), b"\r" * 9]
    rows = [row for row in data.split(b"\n") if chance.random() > 0.1]
    for _ in range(chance.randint(1, 5)):
        place = chance.randint(0, len(rows))
        rows.insert(place, chance.choice([*rows[place : place + 6], *junk]))
    return b"\n".join(rows)


def flip(chance: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.randint(1, 5)):
        changed[chance.randrange(len(changed))] = chance.randrange(256)
    return bytes(changed)


def digits(chance: random.Random, data: bytes) -> bytes:
    """Change figures: too large, too small, out of order."""
    changed = bytearray(data)
    places = [i for i, byte in enumerate(changed) if 48 <= byte < 58]
    for place in chance.sample(places, min(len(places), 3)):
        changed[place : place + 1] = chance.choice([b"0", b"9", b"99999999", b""])
    return bytes(changed)


def cut(chance: random.Random, data: bytes) -> bytes:
    begin, end = sorted(chance.sample(range(len(data) + 1), 2))
    return data[begin:end]


MUTATIONS: list[Mutation] = [lines, flip, digits, cut]


LOGS: dict[str, tuple[bytes, int]] = {
    "nanoGPT": ((DUMP + LOG).encode(), 1000),
    "nanochat": (nanochat_log().encode(), STEPS),
    "build-nanogpt": (build_nanogpt_output().encode(), STEPS),
    "log.txt": (build_nanogpt_file().encode(), STEPS),
    "our history": (as_csv(our_rows()), 1000),
    "nanochat's history": (as_csv(nanochat_rows()), 1000),
    "nanoGPT's history": (as_csv(nanogpt_rows()), 1000),
    "torchtitan's history": (as_csv(torchtitan_rows()), 1000),
}


@pytest.mark.parametrize(("data", "max_steps"), LOGS.values(), ids=LOGS)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), kinds=st.lists(st.sampled_from(MUTATIONS), max_size=3))
def test_a_mutated_log_is_a_run_or_bad_input(data: bytes, max_steps: int, seed: int, kinds: list[Mutation]) -> None:
    chance = random.Random(seed)
    for mutate in kinds:
        data = mutate(chance, data) if data else data
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "log.txt", Path(folder) / "run"
        path.write_bytes(data)
        message = None
        # Without a configuration it is that of the log.
        config = DOCUMENTED if seed % 2 else None
        given = Given(config, {"train": {"max_steps": max_steps}}, "RTX 4070")
        try:
            import_log(path, given, None, out)
        except BadInput as refused:
            message = str(refused)
        assert out.exists() == (message is None)
        if message is not None:
            assert message.isprintable()
            assert kinds, message
            return
        report, run, recorded = build_report(out, None)
        if seed % 5 == 0:  # the pages are slow
            write_report(report, run, recorded)


@pytest.mark.parametrize("format", TEXT_FORMATS)
def test_very_long_lines_are_read_in_linear_time(tmp_path: Path, format: str) -> None:
    path = tmp_path / "log.txt"
    pieces = ("[a]", "- ", "\x1b[1", "9", "iter 0: ", "step 00000/", "step 1 | ", " ", "|")
    starts = ("", "iter 5: loss ", "step 00005/00010 (1", "step 5 | loss: ")
    before = time.process_time()
    for piece in pieces:
        repeated = (piece * 2**18)[: 2**18]
        path.write_text("\n".join(start + repeated for start in starts), encoding="utf-8")
        parser = LogParser(TEXT_FORMATS[format])
        for number, line in TextLines(path, ""):
            parser.read(number, line)
    assert time.process_time() - before < 10


def test_a_table_of_very_many_columns_is_refused_quickly(tmp_path: Path) -> None:
    path = tmp_path / "history.csv"
    path.write_text(",".join(f"c{i}" for i in range(130_000)) + "\n1,2\n", encoding="utf-8")
    before = time.process_time()
    with pytest.raises(BadInput, match="has not the columns"):
        parse_log(path)
    assert time.process_time() - before < 10
