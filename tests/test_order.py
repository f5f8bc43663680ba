"""The order of windows: each once in an epoch, cut elsewhere in the next, the same in every version."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.loader import Grid, window_order

SEEDS = st.integers(0, 10**15)


def test_the_order_never_changes_with_a_version() -> None:
    assert window_order(10, 1337, 0).tolist() == [3, 5, 2, 9, 6, 1, 0, 4, 7, 8]
    assert window_order(3_593_748, 1337, 2)[:4].tolist() == [2339548, 2921847, 1888048, 2656197]
    assert Grid([1000, 2000], 64, 1337).begins(3).tolist() == [20, 37]


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    block = draw(st.integers(1, 9))
    lengths = draw(st.lists(st.integers(block + 1, 60), min_size=1, max_size=6))
    return Grid(lengths, block, draw(SEEDS))


@settings(max_examples=100, deadline=None)
@given(grids(), st.integers(0, 50))
def test_an_epoch_predicts_each_token_at_most_once_and_counts_the_others(grid: Grid, epoch: int) -> None:
    samples = np.arange(epoch * grid.windows, (epoch + 1) * grid.windows)
    shards, begins = grid.locate(samples)
    predicted = set()
    for shard, begin in zip(shards.tolist(), begins.tolist(), strict=True):
        assert begin >= 0 and begin + grid.block_size + 1 <= grid.lengths[shard]
        predicted |= {(shard, begin + 1 + i) for i in range(grid.block_size)}
    assert len(predicted) == grid.windows * grid.block_size
    assert sum(grid.lengths) - len(predicted) == grid.unseen_tokens
    assert grid.unseen_tokens <= 2 * grid.block_size * len(grid.lengths)


def test_windows_are_cut_elsewhere_in_each_epoch() -> None:
    grid = Grid([10_000], 16, 1)
    assert {int(grid.begins(epoch)[0]) for epoch in range(400)} == set(range(16))
    seen = set()
    for epoch in range(40):
        _, first = grid.locate(np.arange(epoch * grid.windows, (epoch + 1) * grid.windows))
        seen |= {int(b) + 1 + i for b in first for i in range(16)}
    assert seen == set(range(1, 10_000))  # no token precedes the first


@settings(max_examples=50, deadline=None)
@given(grids(), st.integers(1, 40))
def test_the_windows_of_an_evaluation_are_spread_evenly(grid: Grid, of: int) -> None:
    shards, begins = grid.spread(np.arange(of), of)
    ends = np.cumsum([(length // grid.block_size - 1) or 1 for length in grid.lengths])
    starts = np.concatenate(([0], ends[:-1]))
    numbers = starts[shards] + begins // grid.block_size
    gaps = np.diff(numbers)
    assert numbers[0] >= 0 and numbers[-1] < grid.windows
    assert of == 1 or gaps.max() - gaps.min() <= 1
    assert abs((numbers[0] + numbers[-1]) - (grid.windows - 1)) <= 1
