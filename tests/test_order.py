"""The order of windows is a permutation of good quality for every size, seed and epoch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trainer.data.loader import Grid, permute

SEEDS = st.integers(0, 10**15)
EPOCHS = st.integers(0, 10**6)


def whole(n: int, seed: int, epoch: int) -> np.ndarray:
    return permute(n, seed, epoch, np.arange(n))


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 5000), SEEDS, EPOCHS)
@example(1, 0, 0)
@example(2, 0, 0)
@example(4096, 0, 0)
@example(4097, 0, 0)
def test_the_order_is_a_permutation_for_any_size(n: int, seed: int, epoch: int) -> None:
    assert np.array_equal(np.sort(whole(n, seed, epoch)), np.arange(n))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 10**15), SEEDS, EPOCHS, st.data())
def test_any_position_can_be_computed_alone(
    n: int, seed: int, epoch: int, data: st.DataObject
) -> None:
    """Without an array of n elements."""
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


@pytest.mark.parametrize("n", [97, 1000, 6543, 20_011])
def test_value_and_position_are_uncorrelated(n: int) -> None:
    """Within an epoch, from one position to the next, and between epochs.

    A correlation of a random permutation has standard deviation 1 / sqrt(n - 1); the mean square of
    200 must lie within five of its standard errors.
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


@pytest.mark.parametrize("n", [13, 64, 250, 6543])
def test_the_first_batch_is_drawn_evenly_over_the_windows(n: int) -> None:
    """Chi-square over seeds in 13 to 64 bins, within five standard deviations of its mean."""
    bins = min(n, 64)
    first = np.concatenate([permute(n, seed, 0, np.arange(min(8, n // 4))) for seed in range(4000)])
    observed = np.bincount(first * bins // n, minlength=bins)
    sizes = np.bincount(np.arange(n) * bins // n, minlength=bins)
    expected = first.size * sizes / n
    chi_square = float(((observed - expected) ** 2 / expected).sum())
    # Drawn without replacement, a batch spreads more evenly than independent draws would.
    mean = (bins - 1) * (n - min(8, n // 4)) / (n - 1)
    assert abs(chi_square - mean) < 5 * np.sqrt(2 * mean)


def test_adjacent_windows_share_a_batch_no_more_often_than_by_chance() -> None:
    n, batch = 4000, 20
    together = 0
    for seed in range(60):
        where = np.empty(n, dtype=int)
        where[whole(n, seed, 0)] = np.arange(n) // batch
        together += int((where[:-1] == where[1:]).sum())
    expected = 60 * (n - 1) * (batch - 1) / (n - 1)
    assert abs(together - expected) < 5 * np.sqrt(expected)


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    block = draw(st.integers(1, 9))
    lengths = draw(st.lists(st.integers(block + 1, 60), min_size=1, max_size=6))
    return Grid(lengths, block, draw(SEEDS))


@settings(max_examples=200, deadline=None)
@given(grids(), st.integers(0, 50))
def test_an_epoch_predicts_each_token_at_most_once_and_counts_those_it_does_not(
    grid: Grid, epoch: int
) -> None:
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
    """Otherwise the same token would have no context in all epochs."""
    grid = Grid([10_000], 16, 1)
    begins = [int(grid.begins(epoch)[0]) for epoch in range(400)]
    assert set(begins) == set(range(16))
    seen = set()
    for epoch in range(40):
        _, first = grid.locate(np.arange(epoch * grid.windows, (epoch + 1) * grid.windows))
        seen |= {int(b) + 1 + i for b in first for i in range(16)}
    assert seen == set(range(1, 10_000))  # all but the very first token, which nothing precedes


@settings(max_examples=100, deadline=None)
@given(grids(), st.integers(1, 40))
def test_evaluation_windows_are_spread_evenly(grid: Grid, of: int) -> None:
    shards, begins = grid.spread(np.arange(of), of)
    ends = np.cumsum([(length // grid.block_size - 1) or 1 for length in grid.lengths])
    starts = np.concatenate(([0], ends[:-1]))
    numbers = starts[shards] + begins // grid.block_size
    gaps = np.diff(numbers)
    assert numbers[0] >= 0 and numbers[-1] < grid.windows
    assert of == 1 or gaps.max() - gaps.min() <= 1
    assert abs((numbers[0] + numbers[-1]) - (grid.windows - 1)) <= 1
