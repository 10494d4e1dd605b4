import tarfile

import numpy as np
import pytest

from shards.manifest import bind, load_manifest, seal
from shards.record import read_record
from shards.storage import open_store
from shards.tar import Sample
from shards.writer import is_complete, write_shard


def make_samples(indices, frames=7):
    rng = np.random.default_rng(0)
    for index in indices:
        tensor = rng.standard_normal((1, frames, 5)).astype(np.float16)
        yield Sample(
            f"{index:09d}", {"text": f"sound {index}"}, {"stft_mixture.2048": tensor, "condition": tensor[0, 0]}
        )


def write_all(store, num_samples=10, samples_per_shard=4):
    plan = bind(store, {"seed": 0}, num_samples, samples_per_shard)
    for index in range(plan.num_shards):
        samples = plan.samples(index)
        write_shard(
            store, plan.shard_name(index), make_samples(samples), num_samples=len(samples), spec_digest=plan.spec_digest
        )
    return plan


def test_written_shards_seal_and_open_with_tarfile(tmp_path):
    store = open_store(tmp_path)
    plan = write_all(store)
    assert is_complete(store, "shard-000002", plan.spec_digest)
    sealed = seal(store)
    loaded = load_manifest(tmp_path)
    assert (loaded.digest, loaded.num_samples, loaded.num_shards) == (sealed.digest, 10, 3)
    assert loaded.checksum(1) == read_record(store, "shard-000001").checksum
    with tarfile.open(tmp_path / "shard-000002.tar") as tar:
        assert [m.name for m in tar][:3] == [
            "000000008.json",
            "000000008.stft_mixture.2048.npy",
            "000000008.condition.npy",
        ]


def test_a_second_spec_is_refused_and_named(tmp_path):
    store = open_store(tmp_path)
    write_all(store)
    with pytest.raises(ValueError, match=r"spec\.seed was 0 and is now 1"):
        bind(store, {"seed": 1}, 10, 4)
