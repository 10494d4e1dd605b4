"""Epochs over a network that breaks: exact, or ended by an error that says so; never silently short, never hanging."""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from lossy_proxy import LossyProxy
from shard_data import make_data_set, make_sample

from shards.batches import Batch
from shards.copy import copy
from shards.loader import ShardLoader
from shards.reader import CorruptSampleError
from shards.storage import open_store
from shards.store import TransferError

NUM_FAULTS = 1000  # for each kind of server
NUM_SAMPLES = 320
SHAPES = {"stft_mixture.2048": (1, 60, 50), "stft_segment.2048": (1, 60, 50), "condition": (30,)}
STATED = (TransferError, CorruptSampleError, PermissionError, FileNotFoundError)
HASTY = {"stall_seconds": 0.25, "backoff_seconds": 0.001, "retry_seconds": 20.0, "concurrency": 24}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("faults") / "set"
    make_data_set(root, NUM_SAMPLES, samples_per_shard=20, shapes=SHAPES)
    return root


def check(batch: Batch) -> None:
    """Every value of a batch against what was written."""
    for row, key in enumerate(batch.keys):
        sample = make_sample(int(key), SHAPES)
        assert batch.text[row] == sample.text
        for name, array in sample.arrays.items():
            np.testing.assert_array_equal(batch.arrays[name][row], array)


@pytest.mark.timeout(200)
@pytest.mark.parametrize("kind", ["http", "s3"])
def test_random_faults_of_every_kind(root: Path, request: pytest.FixtureRequest, kind: str, longer: int) -> None:
    """Each epoch is taken up again after every error, from the loader's state, until it is whole."""
    server = request.getfixturevalue(f"{kind}_server")
    copy(open_store(root), server.target("faults"))
    ends: Counter[str] = Counter()
    with LossyProxy(server.port, seed=11) as proxy:
        source = server.source("faults", proxy.url, **HASTY)
        loader = ShardLoader(source.url, storage=source.options, block_samples=5)  # some alone, some with neighbours
        proxy.rate = 0.3
        while proxy.counts.total() < NUM_FAULTS * longer:
            epoch, seen = loader.epoch, list[int]()
            while loader.epoch == epoch:
                state = loader.state_dict()
                try:
                    for batch in loader:
                        check(batch)
                        seen += map(int, batch.keys)
                        state = loader.state_dict()
                    ends["whole"] += 1
                except STATED as error:
                    ends[re.findall("gave up at byte|shards verify|$", str(error))[0]] += 1
                    loader.load_state_dict(state)
            assert ends[""] == 0  # every error said so
            assert sorted(seen) == list(range(NUM_SAMPLES))
        print(f"{kind}: {dict(proxy.counts)} in {loader.epoch} epochs, which ended {dict(ends)}")
