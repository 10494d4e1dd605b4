"""A root is bound to one spec, sealed only when whole, and found again by sample number."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from shard_data import tree, write_one, write_set

from shards.manifest import (
    IncompleteError,
    Manifest,
    Plan,
    bind,
    format_ranges,
    load_manifest,
    parse_manifest,
    parse_ranges,
    read_plan,
    seal,
    shard_name,
    survey,
    unrecorded,
)
from shards.record import FORMAT_VERSION, OtherSpecError
from shards.storage import open_store
from shards.tar import canonical_json


def test_a_root_is_bound_to_one_spec(tmp_path):
    store = open_store(tmp_path)
    plan = bind(store, {"seed": 0, "stft": {"hop_length": 320}}, 10, 4)
    assert bind(store, {"stft": {"hop_length": 320}, "seed": 0}, 10, 4) == plan == read_plan(store)
    for spec, num_samples, change in (
        ({"seed": 0, "stft": {"hop_length": 160}}, 10, r"spec\.stft\.hop_length was 320 and is now 160"),
        ({"seed": 0}, 10, r"spec\.stft was .* and is now 'absent'"),
        ({"seed": 0, "stft": {"hop_length": 320}}, 11, "num_samples was 10 and is now 11"),
    ):
        with pytest.raises(ValueError, match=change):
            bind(store, spec, num_samples, 4)
    with pytest.raises(ValueError, match="both must be positive"):
        bind(store, {}, 0, 4)
    with pytest.raises(ValueError, match="no data set was begun"):
        read_plan(open_store(tmp_path / "elsewhere"))
    store.write("spec.json", b"{")
    with pytest.raises(ValueError, match="is broken"):
        read_plan(store)


@pytest.mark.parametrize("num_shards", [1, 250, 10_101])
def test_shards_without_a_record_are_found_by_their_names(tmp_path, num_shards):
    store, plan = open_store(tmp_path), Plan(1, {}, num_shards, 1)
    there = {*np.random.default_rng(0).integers(0, num_shards, 20).tolist()}
    for index in there:
        store.write(f"{plan.shard_name(index)}.json", b"{}")
        store.write(f"{plan.shard_name((index + 1) % num_shards)}.tar", b"not yet recorded")
    assert list(unrecorded(store, plan)) == [index for index in range(num_shards) if index not in there]


def test_a_sealed_root_is_the_sum_of_its_shards(tmp_path):
    store = open_store(tmp_path)
    plan = write_set(store, num_samples=10, samples_per_shard=4)
    manifest = seal(store)
    records = list(survey(store, plan))
    assert [record.num_samples for record in records] == [4, 4, 2]
    assert [manifest.num_bytes(i) for i in range(3)] == [
        (tmp_path / f"shard-00000{i}.tar").stat().st_size for i in (0, 1, 2)
    ]
    assert [manifest.checksum(i) for i in range(3)] == [record.checksum for record in records]
    assert [manifest.index_checksum(i) for i in range(3)] == [record.index_checksum for record in records]
    assert manifest.fields == records[0].fields
    assert [manifest.locate(sample) for sample in (0, 3, 4, 9)] == [(0, 0), (0, 3), (1, 0), (2, 1)]
    before = tree(tmp_path)
    for place in (tmp_path, str(tmp_path), tmp_path / "manifest.json", store):
        assert load_manifest(place).digest == manifest.digest
    assert seal(store).digest == manifest.digest
    assert tree(tmp_path) == before


def test_more_shards_than_there_are_names_for_bind_no_root(tmp_path):
    with pytest.raises(ValueError, match=r"would be 100000000001 shards; 10000000 are possible"):
        bind(open_store(tmp_path), {}, num_samples=10**12 + 1, samples_per_shard=10)
    assert tree(tmp_path) == {}


def test_sealing_names_what_is_missing(tmp_path):
    store = open_store(tmp_path)
    plan = write_set(store, num_samples=40, samples_per_shard=4)
    (tmp_path / "shard-000001.json").unlink()
    (tmp_path / "shard-000003.tar").write_bytes(b"")
    (tmp_path / "shard-000004.idx.npy").unlink()
    (tmp_path / "shard-000005.json").write_bytes(b"{}")
    (tmp_path / "shard-000008.json").write_bytes((tmp_path / "shard-000007.json").read_bytes())
    with pytest.raises(IncompleteError, match=r"5 of 10 shards.*shard-000001: not there.*--shards 1,3-5,8") as error:
        seal(store)
    assert error.value.shards == [1, 3, 4, 5, 8]
    assert not (tmp_path / "manifest.json").exists()
    with pytest.raises(FileNotFoundError, match="seal it first"):
        load_manifest(tmp_path)
    for index in error.value.shards:
        write_one(store, plan, index)
    seal(store)


def test_a_shard_under_two_names_is_found(tmp_path):
    store = open_store(tmp_path)
    write_set(store, num_samples=12, samples_per_shard=4)
    for suffix in (".tar", ".idx.npy"):
        (tmp_path / f"shard-000002{suffix}").write_bytes((tmp_path / f"shard-000000{suffix}").read_bytes())
    record = json.loads((tmp_path / "shard-000000.json").read_bytes())
    store.write("shard-000002.json", canonical_json(record | {"shard": "shard-000002"}))
    with pytest.raises(IncompleteError, match="shard-000002: it holds the keys of shard-000000"):
        seal(store)


def test_shards_of_another_spec_are_not_mixed_in(tmp_path):
    store = open_store(tmp_path)
    write_set(store)
    (tmp_path / "spec.json").unlink()
    bind(store, {"seed": 1}, 10, 4)
    with pytest.raises(OtherSpecError, match="was made to spec"):
        seal(store)


@pytest.mark.parametrize(
    "change",
    [
        {"num_shards": 4},
        {"spec_digest": "0" * 32},
        {"fields": [{"name": "a", "dtype": "object", "shape": [1]}]},
        {"fields": [{"name": "../a", "dtype": "uint8", "shape": [1]}]},
        {"unknown": 1},
        {"shards": {"num_bytes": [1, 2], "checksums": "", "index_checksums": ""}},
        {"shards": {"num_bytes": [1, 2, 2**70], "checksums": "0" * 48, "index_checksums": "0" * 48}},
        {"shards": {"num_bytes": [1, 2, 3], "checksums": "0" * 47, "index_checksums": "0" * 48}},
    ],
)
def test_a_broken_manifest_is_refused(tmp_path, change):
    store = open_store(tmp_path)
    write_set(store)
    seal(store)
    document = json.loads(store.read("manifest.json"))
    with pytest.raises(ValueError, match=r"manifest\.json is broken"):
        parse_manifest(canonical_json(document | change), store.url)


def test_shards_of_large_sets_are_spread_over_folders(tmp_path):
    assert shard_name(7, 10_000) == "shard-000007"
    assert shard_name(12_345, 10_001) == "0012/shard-0012345"
    names = [shard_name(index, 1_000_000) for index in range(1_000_000)]
    assert len(set(names)) == len(names)
    assert names == sorted(names)
    store = open_store(tmp_path)
    plan = bind(store, {}, 10_001, 1)
    for index in (0, 1_000, 10_000):
        write_one(store, plan, index)
    found = {index for index, record in enumerate(survey(store, plan)) if not isinstance(record, str)}
    assert found == {0, 1_000, 10_000}


def test_ranges_are_printed_and_parsed():
    assert format_ranges([52, 3, 17, 40, 41, 42]) == "3,17,40-42,52"
    rng = np.random.default_rng(0)
    for _ in range(100):
        indices = np.unique(rng.integers(0, 60, 30)).tolist()
        assert parse_ranges(format_ranges(indices)) == indices
    for text in ("", "3-", "5-3", "a", "-1", "1,,2"):
        with pytest.raises(ValueError, match="no shard number or range"):
            parse_ranges(text)


def synthetic_manifest(num_shards: int) -> bytes:
    plan = Plan(FORMAT_VERSION, {"seed": 0}, num_shards * 256, 256)
    digits = np.random.default_rng(0).bytes(8 * num_shards).hex()
    columns = {"num_bytes": [525_336_576] * num_shards, "checksums": digits, "index_checksums": digits}
    totals = {"num_shards": num_shards, "num_bytes": 525_336_576 * num_shards, "num_rejected": 0, "rejected": {}}
    fields = [{"name": "stft_mixture.2048", "dtype": "float16", "shape": [1, 501, 1025]}]
    document = {"plan": asdict(plan), "spec_digest": plan.spec_digest, "fields": fields, **totals, "shards": columns}
    return canonical_json(document)


def test_a_manifest_of_a_million_shards_is_small_and_quick():
    data = synthetic_manifest(1_000_000)
    assert len(data) < 50e6
    manifest = parse_manifest(data, "memory")
    held = sum(column.nbytes for column in (manifest.tar_bytes, manifest.checksums, manifest.index_checksums))
    assert held < 25e6
    assert isinstance(manifest, Manifest)
    assert manifest.locate(255_999_999) == (999_999, 255)
