"""The order is a bijection, random enough to shuffle by, and costs the same at any size."""

import tracemalloc
from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.order import EpochOrder, Permutation


def chi_square_excess(counts: np.ndarray) -> float:
    """How many standard deviations the chi-square statistic of uniform `counts` lies above its mean."""
    expected = counts.sum() / counts.size
    degrees = counts.size - 1
    return float(((counts - expected) ** 2 / expected).sum() - degrees) / (2 * degrees) ** 0.5


@given(size=st.integers(1, 3000), key=st.tuples(st.integers(0, 2**40), st.integers(0, 9)))
def test_permutation_is_a_bijection_with_its_inverse(size, key):
    permutation = Permutation(size, key)
    images = permutation(np.arange(size))
    assert sorted(images) == list(range(size))
    assert (permutation.inverse(images) == np.arange(size)).all()


@given(size=st.integers(1, 2**62 - 1), data=st.data())
@settings(max_examples=50)
def test_permutation_inverts_at_any_size(size, data):
    elements = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20))
    permutation = Permutation(size, b"key")
    images = permutation(elements)
    assert ((images >= 0) & (images < size)).all()
    assert permutation.inverse(images).tolist() == elements


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_every_permutation_of_few_elements_is_equally_likely(size):
    counts = Counter(tuple(Permutation(size, (7, key))(np.arange(size)).tolist()) for key in range(4000))
    every = np.array([counts[order] for order in permutations(range(size))])
    assert every.sum() == 4000
    assert chi_square_excess(every) < 4


@pytest.mark.parametrize("size", [97, 1000])
def test_pairs_of_neighbours_land_uniformly(size):
    """Where two neighbours go, jointly, on a grid of 8 x 8 regions: first order and correlation in one."""
    grid = np.zeros((8, 8))
    for key in range(200):
        images = Permutation(size, (key,))(np.arange(size))
        np.add.at(grid, (images[:-1] * 8 // size, images[1:] * 8 // size), 1)
    widths = np.bincount(np.arange(size) * 8 // size)
    assert chi_square_excess(grid / np.outer(widths, widths) * widths.mean() ** 2) < 4


@given(st.integers(1, 400), st.integers(1, 50), st.integers(0, 5), st.integers(0, 5))
def test_epoch_visits_every_sample_once_in_whole_blocks(num_samples, block_samples, seed, epoch):
    order = EpochOrder(num_samples, block_samples, "digest", seed, epoch)
    visited = order[np.arange(num_samples)]
    assert sorted(visited) == list(range(num_samples))
    starts = np.flatnonzero(visited % block_samples == 0)
    for start, stop in zip(starts, [*starts[1:], num_samples]):
        first = visited[start]
        assert visited[start:stop].tolist() == list(range(first, min(first + block_samples, num_samples)))


def test_orders_of_two_epochs_seeds_or_data_sets_are_unrelated():
    orders = [
        EpochOrder(10_000, 1, *key)[np.arange(10_000)] for key in [("a", 0, 0), ("a", 0, 1), ("a", 1, 0), ("b", 0, 0)]
    ]
    for i, first in enumerate(orders):
        for second in orders[:i]:
            assert abs(np.corrcoef(first, second)[0, 1]) < 0.05
            assert (first == second).sum() < 10


def test_a_billion_samples_cost_no_memory():
    tracemalloc.start()
    order = EpochOrder(10**9, 16, "digest", 0, 0)
    samples = order[np.arange(500_000_000, 500_000_256)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(set(samples.tolist())) == 256
    assert peak < 100_000


def test_positions_outside_are_refused():
    with pytest.raises(IndexError, match=r"10\.\.10 .* range\(10\)"):
        EpochOrder(10, 3, "digest", 0, 0)[10]
    with pytest.raises(IndexError, match="-1"):
        Permutation(10, b"")([-1])
    with pytest.raises(ValueError, match="permutation of 0"):
        Permutation(0, b"")
