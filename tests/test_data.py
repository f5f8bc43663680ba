"""Batches depend on the seed and the number of a sample, and on nothing else."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogauge.errors import BadInput
from trainer.data.loader import Batches, Prefetch, SampleOrder
from trainer.data.shards import Shards
from trainer.run.resources import describe_order
from trainer.run.resume import data_differences, refuse_differences

CPU = torch.device("cpu")
ORDERS = st.sampled_from(["permutation", "random"])


def numbered(*lengths: int) -> list[np.ndarray]:
    """Return shards in which every token is its position, up to 65,535."""
    ends = np.cumsum(lengths)
    return [np.arange(e - n, e, dtype=np.uint16) for n, e in zip(lengths, ends, strict=True)]


def batches(
    train: Shards,
    micro_batch: int = 4,
    block_size: int = 8,
    order: SampleOrder = "permutation",
    **more: int | str | None,
) -> Batches:
    splits = {"train": train, "val": train}
    return Batches(splits, micro_batch, block_size, 2**16, 7, CPU, order=order, **more)  # type: ignore[arg-type]


def rows(data: Batches, step: int, micro: int) -> list[list[int]]:
    inputs, targets = data.batch("train", step, micro)
    assert inputs.shape == targets.shape == (data.micro_batch, data.block_size)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    return torch.cat([inputs, targets[:, -1:]], dim=1).tolist()


def step_of(ranks: list[Batches], step: int) -> list[list[int]]:
    micros = range(ranks[0].grad_accum)
    return [row for micro in micros for rank in ranks for row in rows(rank, step, micro)]


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 3, 4, 6, 12]),
    st.lists(st.integers(9, 300), min_size=1, max_size=4),
    st.integers(0, 50),
)
def test_ranks_and_micro_batches_share_a_step_without_changing_it(
    world: int, micro_batch: int, lengths: list[int], step: int
) -> None:
    shards = numbered(*lengths)
    alone = step_of([batches(shards, 48)], step)
    share = {"grad_accum": 48 // world // micro_batch, "world": world}
    ranks = [batches(shards, micro_batch, rank=rank, **share) for rank in range(world)]
    assert step_of(ranks, step) == alone


@settings(max_examples=30, deadline=None)
@given(
    ORDERS,
    st.integers(1, 5),
    st.lists(st.integers(9, 300), min_size=1, max_size=4),
    st.integers(0, 400),
    st.integers(0, 2),
)
def test_a_resumption_anywhere_sees_what_the_run_would_have_seen(
    order: SampleOrder, grad_accum: int, lengths: list[int], step: int, ahead: int
) -> None:
    shards = numbered(*lengths)
    begun = batches(shards, 3, order=order, grad_accum=grad_accum, ahead=0)
    stream = [rows(begun, s, m) for s in range(step, step + 3) for m in range(grad_accum)]
    resumed = batches(shards, 3, order=order, grad_accum=grad_accum, ahead=ahead)
    resumed.batch("train", 0, 0)  # as compiling does, before the first step
    again = [rows(resumed, s, m) for s in range(step, step + 3) for m in range(grad_accum)]
    resumed.close()
    assert again == stream


def test_the_random_order_is_what_it_was() -> None:
    data = batches(numbered(1000, 4, 333, 2000), 6, order="random", grad_accum=3)
    assert [row[0] for row in rows(data, 51, 2)] == [2092, 3315, 2293, 2190, 308, 361]


@pytest.mark.parametrize("order", ["permutation", "random"])
def test_an_evaluation_reads_the_same_windows_spread_over_all_of_the_split(order: SampleOrder) -> None:
    shards = numbered(4000, 5000, 3000)
    data = batches(shards, 4, order=order, eval_batches=25, ahead=1)

    def evaluation() -> list[list[int]]:
        return [r for i in range(25) for r in data.evaluation_batch("val", i)[0].tolist()]

    first = evaluation()
    trained = rows(data, 3, 0)
    assert evaluation() == first
    assert rows(data, 4, 0) == rows(batches(shards, 4, order=order), 4, 0)
    assert rows(data, 3, 0) == trained
    begins = [row[0] for row in first]
    assert begins == sorted(set(begins))
    assert max(np.diff(begins)) <= 12_000 / 100 + 4 * 8
    other_cut = batches(shards, 10, eval_batches=10)
    again = [r for i in range(10) for r in other_cut.evaluation_batch("val", i)[0].tolist()]
    assert again == first
    data.close()


@pytest.mark.parametrize("ahead", [0, 2])
def test_a_token_beyond_the_vocabulary_is_refused_with_the_batch_that_holds_it(ahead: int) -> None:
    tokens = np.zeros(4000, dtype=np.uint16)
    tokens[2000] = 300
    data = Batches({"train": [tokens]}, 4, 8, 300, 7, CPU, ahead=ahead)
    clean = batches([tokens], 4)
    for step in range(200):
        if any(300 in row for row in rows(clean, step, 0)):
            assert step > 0
            with pytest.raises(BadInput, match="the train data holds the token 300 but"):
                data.batch("train", step, 0)
            break
        data.batch("train", step, 0)
    else:
        raise AssertionError("no batch holds the token")
    data.close()


def test_tokens_of_mapped_files_are_those_in_memory(tmp_path: Path) -> None:
    for offset, dtype in ((0, np.uint16), (1024, np.uint32), (2**16 + 16, np.uint16)):
        tokens = np.arange(60_000).astype(dtype)
        (tmp_path / "file").write_bytes(bytes(offset) + tokens.tobytes())
        mapped = np.memmap(tmp_path / "file", dtype=dtype, mode="r", offset=offset)
        data, plain = (batches([t], 16, 64, eval_batches=3) for t in (mapped, tokens))
        for step in (0, 10, 70):
            assert rows(data, step, 0) == rows(plain, step, 0)
        evaluated = [each.evaluation_batch("val", 2)[0] for each in (data, plain)]
        assert torch.equal(*evaluated)


def test_prefetching_makes_each_thing_once_and_in_order() -> None:
    made = []

    def make(number: int) -> int:
        made.append(number)
        if number == 5:
            raise BadInput("five")
        return 10 * number

    prefetch = Prefetch(make, 2)
    assert [prefetch.get(n) for n in range(4)] == [0, 10, 20, 30]
    assert prefetch.get(4) == 40
    with pytest.raises(BadInput, match="five"):
        prefetch.get(5)
    assert prefetch.get(100) == 1000
    assert prefetch.get(101) == 1010
    prefetch.close()
    assert made[:6] == [0, 1, 2, 3, 4, 5]
    assert len(made) == len(set(made)) <= 6 + 2 + 4
    assert not [t for t in threading.enumerate() if t.name.startswith("prefetch")]


def test_the_position_counts_samples_whatever_the_ranks() -> None:
    shards = numbered(1000, 500)
    one = batches(shards, 4, grad_accum=4, fingerprint="f").position(30)
    four = batches(shards, 2, grad_accum=2, world=4, rank=3, fingerprint="f").position(30)
    assert one == four
    windows = batches(shards).grids["train"].windows
    assert one["samples"] == 480
    assert (one["epoch"], one["window_of_epoch"]) == divmod(480, windows)
    assert data_differences(one, four) == []


def test_a_resumption_on_other_data_is_refused_with_both_side_by_side() -> None:
    old = batches(numbered(1000), fingerprint="a" * 64).position(8)
    new = batches(numbered(1001), fingerprint="b" * 64).position(8)
    with pytest.raises(BadInput) as refused:
        refuse_differences(data_differences(old, new))
    sentence = str(refused.value)
    assert "1,000 training" in sentence and "1,001 training" in sentence
    assert "a" * 12 in sentence and "b" * 12 in sentence and "\n" not in sentence
    with pytest.raises(BadInput, match="does not describe"):
        refuse_differences(data_differences({}, new))


def test_the_tokens_that_an_epoch_leaves_out_are_counted() -> None:
    text = describe_order(batches(numbered(100, 5)))
    assert "8 tokens of 11 windows" in text
    assert "12 of the 100 training tokens (12.00%)" in text
    assert "5 more tokens are in shards too short" in text
    assert "replacement" in describe_order(batches(numbered(100), order="random"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_gets_the_same_batches_from_pinned_memory() -> None:
    shards = numbered(30_000, 20_000)
    cuda = Batches({"train": shards}, 16, 1024, 2**16, 7, torch.device("cuda"), grad_accum=4)
    plain = batches(shards, 16, 1024, grad_accum=4)
    got = [cuda.batch("train", step, micro) for step in range(50) for micro in range(4)]
    for number, (inputs, targets) in enumerate(got):
        expected = plain.batch("train", *divmod(number, 4))
        assert torch.equal(inputs.cpu(), expected[0])
        assert torch.equal(targets.cpu(), expected[1])
    cuda.close()
