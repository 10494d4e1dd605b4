import tarfile

import pytest

from shards.manifest import bind, load_manifest, seal
from shards.record import read_record
from shards.storage import open_store
from shards.writer import is_complete
from tests.shard_sets import write_set


def test_written_shards_seal_and_open_with_tarfile(tmp_path):
    store = open_store(tmp_path)
    plan = write_set(store)
    assert is_complete(store, "shard-000002", plan.spec_digest)
    sealed = seal(store)
    loaded = load_manifest(tmp_path)
    assert (loaded.digest, loaded.num_samples, loaded.num_shards) == (sealed.digest, 10, 3)
    assert loaded.checksum(1) == read_record(store, "shard-000001").checksum
    with tarfile.open(tmp_path / "shard-000002.tar") as tar:
        assert [m.name for m in tar][:3] == [
            "000000008.json",
            "000000008.stft_mixture.2048.npy",
            "000000008.stft_segment.2048.npy",
        ]


def test_a_second_spec_is_refused_and_named(tmp_path):
    store = open_store(tmp_path)
    write_set(store)
    with pytest.raises(ValueError, match=r"spec\.seed was 0 and is now 1"):
        bind(store, {"seed": 1}, 10, 4)
