"""The loader serves every sample exactly once, to any number of ranks and threads, over any stops and changes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_data import make_data_set, make_sample

from shards.loader import ShardLoader

NUM_SAMPLES = 61


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "train"
    make_data_set(folder, num_samples=NUM_SAMPLES, samples_per_shard=10)
    return folder


def keys_of(batches) -> list[str]:
    return [key for batch in batches for key, valid in zip(batch.keys, batch.valid.tolist()) if valid]


def test_batches_hold_the_samples_that_were_written(root):
    for batch in ShardLoader(root, batch_size=8):
        for row, (key, text) in enumerate(zip(batch.keys, batch.text)):
            sample = make_sample(int(key))
            assert text == sample.text
            for name, array in sample.arrays.items():
                assert batch.arrays[name].dtype == torch.float16
                np.testing.assert_array_equal(batch.arrays[name][row], array)


setups = st.fixed_dictionaries(
    {
        "world_size": st.integers(1, 5),
        "batch_size": st.integers(1, 7),
        "num_threads": st.integers(1, 4),
        "prefetch_bytes": st.sampled_from([1, 2000, 1 << 20]),
        "block_samples": st.integers(1, 12),
    }
)


@given(st.lists(st.tuples(setups, st.integers(1, 6)), max_size=4), setups, st.booleans(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_every_sample_comes_once_over_stops_and_changes(root, stops, last, drop_last, shuffle):
    """Whatever changes at a stop, the multiset over the epoch is exact, and all ranks agree on state and steps."""
    served: list[str] = []
    state = {"epoch": 3}
    for setup, num_steps in [*stops, (last, 1000)]:
        reached = []
        for rank in range(setup["world_size"]):
            loader = ShardLoader(root, rank=rank, drop_last=drop_last, shuffle=shuffle, **setup)
            if len(state) > 1:
                loader.load_state_dict(state)
            loader.set_epoch(3)
            batches = iter(loader)
            taken = [batch for _, batch in zip(range(num_steps), batches)]
            batches.close()
            served += keys_of(taken)
            reached.append((len(taken), loader.state_dict()))
        assert all(other == reached[0] for other in reached)
        state = reached[0][1]
        if state["epoch"] == 4:
            break
    assert state["epoch"] == 4
    assert state["samples"] == 0
    assert len(set(served)) == len(served)
    num_missing = NUM_SAMPLES - len(served)
    assert num_missing < setup["world_size"] * setup["batch_size"] if drop_last else num_missing == 0
