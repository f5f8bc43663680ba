"""The order of windows: a permutation for any size, seed and epoch, without correlations."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trainer.data.loader import Grid, permute

SEEDS = st.integers(0, 10**15)
EPOCHS = st.integers(0, 10**6)


def whole(n: int, seed: int, epoch: int) -> np.ndarray:
    return permute(n, seed, epoch, np.arange(n))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 5000), SEEDS, EPOCHS)
@example(1, 0, 0)
@example(2, 0, 0)
@example(4096, 0, 0)
@example(4097, 0, 0)
def test_the_order_is_a_permutation_for_any_size(n: int, seed: int, epoch: int) -> None:
    assert np.array_equal(np.sort(whole(n, seed, epoch)), np.arange(n))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 10**15), SEEDS, EPOCHS, st.data())
def test_positions_of_an_order_of_any_size_are_computed_alone(
    n: int, seed: int, epoch: int, data: st.DataObject
) -> None:
    few = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20, unique=True))
    together = permute(n, seed, epoch, np.array(few))
    assert together.min() >= 0 and together.max() < n
    assert len(set(together.tolist())) == len(few)
    alone = [int(permute(n, seed, epoch, np.array([position]))[0]) for position in few]
    assert together.tolist() == alone


def test_the_order_never_changes_with_a_version() -> None:
    assert whole(10, 1337, 0).tolist() == [8, 7, 2, 1, 4, 3, 0, 6, 9, 5]
    assert permute(3_593_748, 1337, 2, np.arange(4)).tolist() == [348566, 1425071, 2790284, 2142153]
    assert Grid([1000, 2000], 64, 1337).begins(3).tolist() == [13, 37]


@pytest.mark.parametrize("n", [97, 6543])
def test_value_and_position_are_uncorrelated(n: int) -> None:
    """A correlation of a random permutation has standard deviation 1 / sqrt(n - 1).

    The mean square of 200 must be within five of its standard errors of that.
    """
    kinds: dict[str, list[float]] = {"position": [], "next": [], "epoch": [], "seed": []}
    for seed in range(200):
        order = whole(n, seed, 0)
        pairs = {
            "position": (np.arange(n), order),
            "next": (order[:-1], order[1:]),
            "epoch": (order, whole(n, seed, 1)),
            "seed": (order, whole(n, seed + 1, 0)),
        }
        for kind, (a, b) in pairs.items():
            kinds[kind].append(float(np.corrcoef(a, b)[0, 1]))
    for kind, correlations in kinds.items():
        mean_square = float(np.mean(np.square(correlations))) * (n - 1)
        assert abs(mean_square - 1) < 5 * np.sqrt(2 / 200), kind


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
