"""A damaged log is imported or refused with one sentence; nothing else happens."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from examples import documented_prediction
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import LOG, spec_of
from test_nanogpt_variants import DUMP
from test_other_logs import STEPS, build_nanogpt_file, build_nanogpt_output, nanochat_log
from test_wandb_history import as_csv, nanochat_rows, nanogpt_rows, our_rows, torchtitan_rows

from nanogauge.analysis.report_model import build_report
from nanogauge.errors import BadInput
from nanogauge.importers.formats import BUILD_NANOGPT, NANOCHAT, NANOGPT
from nanogauge.importers.import_run import import_log
from nanogauge.importers.parsed import ParsedLog
from nanogauge.importers.wandb_history import read_wandb_history
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


LOGS: dict[str, tuple[Callable[[Path], ParsedLog], bytes, int]] = {
    "nanoGPT": (NANOGPT.read, (DUMP + LOG).encode(), 1000),
    "nanochat": (NANOCHAT.read, nanochat_log().encode(), STEPS),
    "build-nanogpt": (BUILD_NANOGPT.read, build_nanogpt_output().encode(), STEPS),
    "log.txt": (BUILD_NANOGPT.read, build_nanogpt_file().encode(), STEPS),
    "our history": (read_wandb_history, as_csv(our_rows()), 1000),
    "nanochat's history": (read_wandb_history, as_csv(nanochat_rows()), 1000),
    "nanoGPT's history": (read_wandb_history, as_csv(nanogpt_rows()), 1000),
    "torchtitan's history": (read_wandb_history, as_csv(torchtitan_rows()), 1000),
}


@pytest.mark.parametrize(("read", "data", "max_steps"), LOGS.values(), ids=LOGS)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), kinds=st.lists(st.sampled_from(MUTATIONS), max_size=3))
def test_a_mutated_log_is_a_run_or_bad_input(
    read: Callable[[Path], ParsedLog], data: bytes, max_steps: int, seed: int, kinds: list[Mutation]
) -> None:
    chance = random.Random(seed)
    for mutate in kinds:
        data = mutate(chance, data) if data else data
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "log.txt", Path(folder) / "run"
        path.write_bytes(data)
        prediction, message = documented_prediction(), None
        try:
            import_log(read, path, spec_of(max_steps), prediction, None, None, out)
        except BadInput as refused:
            message = str(refused)
        assert out.exists() == (message is None)
        if message is not None:
            assert message.isprintable()
            assert kinds
            return
        report, run, recorded = build_report(out, None)
        if seed % 5 == 0:  # the pages are slow
            write_report(report, run, recorded)


@pytest.mark.parametrize("read", [NANOGPT.read, NANOCHAT.read, BUILD_NANOGPT.read])
def test_very_long_lines_are_read_in_linear_time(
    tmp_path: Path, read: Callable[[Path], ParsedLog]
) -> None:
    path = tmp_path / "log.txt"
    pieces = ("[a]", "- ", "\x1b[1", "9", "iter 0: ", "step 00000/", "step 1 | ", " ", "|")
    starts = ("", "iter 5: loss ", "step 00005/00010 (1", "step 5 | loss: ")
    before = time.process_time()
    for piece in pieces:
        repeated = (piece * 2**18)[: 2**18]
        path.write_text("\n".join(start + repeated for start in starts), encoding="utf-8")
        with pytest.raises(BadInput):
            read(path)
    assert time.process_time() - before < 10


def test_a_table_of_very_many_columns_is_refused_quickly(tmp_path: Path) -> None:
    path = tmp_path / "history.csv"
    path.write_text(",".join(f"c{i}" for i in range(130_000)) + "\n1,2\n", encoding="utf-8")
    before = time.process_time()
    with pytest.raises(BadInput, match="has not the columns"):
        read_wandb_history(path)
    assert time.process_time() - before < 10
