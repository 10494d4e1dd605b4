"""What the reader hands out is what was written, or an error with shard and row; skipped bytes are not read."""

import itertools
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_data import SHAPES, make_data_set, make_sample

from shards import tar
from shards.local_store import LocalStore
from shards.manifest import load_manifest
from shards.reader import CorruptSampleError, SampleReader
from shards.storage import open_store
from shards.store import StorageConfig

LARGE = {"a": (1, 200, 200), "b": (2, 200, 200), "small": (5,), "c": (300, 200), "d": (90000,)}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "train"
    make_data_set(folder, 30)
    return folder


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large") / "train"
    make_data_set(folder, 4, samples_per_shard=2, shapes=LARGE)
    return folder


def read(reader: SampleReader, samples: list[int]):
    """Key, text and arrays of each sample, or the error."""
    memory = [[bytearray(b"\xff" * field.num_bytes) for field in reader.fields] for _ in samples]
    rows = [[memoryview(data) for data in own] for own in memory]
    margins = [reader.margins() for _ in samples]
    for result, own in zip(reader.read(samples, rows, margins), memory):
        arrays = {f.name: np.frombuffer(data, f.stored).reshape(f.shape) for f, data in zip(reader.fields, own)}
        yield result if isinstance(result, CorruptSampleError) else (*result, arrays)


def check(reader: SampleReader, samples: list[int]) -> None:
    """All that is read of some samples against what was written."""
    for sample, (key, text, arrays) in zip(samples, read(reader, samples)):
        written = make_sample(sample)
        assert (key, text) == (written.key, written.text)
        for name, array in written.arrays.items():
            np.testing.assert_array_equal(arrays[name], array)


@pytest.mark.parametrize("checksums", [True, False])
def test_reads_any_samples_in_any_order(root, checksums):
    reader = SampleReader(load_manifest(root), open_store(root), checksums=checksums)
    samples = random.Random(0).sample(range(30), 30)
    check(reader, samples)


@given(st.permutations(list(LARGE)), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_any_choice_of_fields_reads_what_it_needs_and_nothing_large_besides(large, names, count):
    """Bytes read: the chosen tensors, and what surrounds them; a skipped tensor of over 64 KiB is passed over."""
    chosen = names[:count]
    store = open_store(large)
    reader = SampleReader(load_manifest(large), store, chosen)
    spans: list[tuple[int, int]] = []
    read_range = store.read_range
    store.read_range = lambda name, offset, buffers: (
        spans.append((offset, sum(len(buffer) for buffer in buffers))),
        read_range(name, offset, buffers),
    )
    for sample, (key, _, arrays) in zip([3, 0], read(reader, [3, 0])):
        assert key == f"{sample:09d}"
        assert list(arrays) == list(chosen)
        for name in chosen:
            np.testing.assert_array_equal(arrays[name], make_sample(sample, LARGE).arrays[name])
    needed = sum(2 * int(np.prod(LARGE[name])) for name in chosen)
    assert sum(size for _, size in spans) <= 2 * (needed + 2 * 5 + (len(LARGE) + 2) * 1700)


class Remote(LocalStore):
    """A folder read like a distant place, where neighbours are best read at once; notes the bytes of each read."""

    def __init__(self, folder: Path, request_bytes: int) -> None:
        super().__init__(str(folder), StorageConfig())
        self.request_bytes = request_bytes
        self.reads: list[int] = []

    def read_range(self, name: str, offset: int, buffers: Sequence[memoryview | np.ndarray]) -> None:
        if name.endswith(".tar"):
            self.reads.append(sum(buffer.nbytes for buffer in buffers))
        super().read_range(name, offset, buffers)


@given(st.lists(st.integers(0, 29), min_size=1, max_size=40), st.sampled_from([0, 6000, 9000, 1 << 20]))
@settings(max_examples=100, deadline=None)
def test_neighbours_are_one_read_up_to_a_size_and_the_same_as_by_themselves(root, samples, request_bytes):
    store = Remote(root, request_bytes)
    reader = SampleReader(load_manifest(root), store)
    check(reader, samples)
    joints = sum(after == before + 1 and after % 10 > 0 for before, after in itertools.pairwise(samples))
    assert len(store.reads) >= len(samples) - joints
    if request_bytes == 1 << 20:
        assert len(store.reads) == len(samples) - joints
    assert max(store.reads) <= max(request_bytes, max(reader._index(shard)[1][:, 1].max() for shard in range(3)))


def test_a_damaged_neighbour_spoils_no_other(tmp_path):
    manifest = make_data_set(tmp_path, 10, first=650)  # with long texts
    offset, size, *_ = SampleReader(manifest, open_store(tmp_path))._index(0)[1][4].tolist()
    path = tmp_path / "shard-000000.tar"
    data = bytearray(path.read_bytes())
    data[offset + size - 600] ^= 1
    path.write_bytes(data)
    found = list(read(SampleReader(manifest, Remote(tmp_path, 1 << 20)), list(range(10))))
    assert [isinstance(each, CorruptSampleError) for each in found] == [row == 4 for row in range(10)]
    for row, (key, text, arrays) in enumerate(each for each in found if not isinstance(each, CorruptSampleError)):
        sample = make_sample(650 + row + (row >= 4))
        assert (key, text) == (sample.key, sample.text)
        np.testing.assert_array_equal(arrays["condition"], sample.arrays["condition"])


def test_a_field_that_is_not_there_is_named(root):
    with pytest.raises(ValueError, match=r"no field 'stft_mixture' .* stft_mixture.2048, stft_segment.2048, condition"):
        SampleReader(load_manifest(root), open_store(root), ["stft_mixture"])


@pytest.mark.parametrize("checksums", [True, False])
def test_every_flipped_byte_is_found(tmp_path, checksums):
    """With checksums: any byte of the sample. Without: any byte that is not JSON or tensor."""
    manifest = make_data_set(tmp_path, 3, samples_per_shard=3)
    reader = SampleReader(manifest, open_store(tmp_path), checksums=checksums)
    offset, size, *_ = reader._index(0)[1][1].tolist()
    path = tmp_path / "shard-000000.tar"
    whole = path.read_bytes()
    payload = {
        place
        for member in tar.members(whole)
        for place in range(member.offset + (128 if member.name.endswith("npy") else 0), member.offset + member.size)
    }
    draw = random.Random(0)
    places = set(draw.sample(range(offset, offset + size), 300))
    for place in places if checksums else places - payload:
        data = bytearray(whole)
        data[place] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        good, bad, also_good = read(reader, [0, 1, 2])
        assert good[0] == "000000000"
        assert also_good[0] == "000000002"
        assert isinstance(bad, CorruptSampleError)
        assert f"sample 1 (row 1 of {tmp_path}/shard-000000.tar)" in str(bad)
        assert "shards verify" in str(bad)


@pytest.mark.parametrize("fields", [("small", "a"), ("d",), ("c", "b"), ()])
def test_every_flipped_byte_of_the_chosen_fields_is_found(tmp_path, fields):
    manifest = make_data_set(tmp_path, 1, shapes=LARGE)
    reader = SampleReader(manifest, open_store(tmp_path), fields)
    path = tmp_path / "shard-000000.tar"
    whole = path.read_bytes()
    written, draw = make_sample(0, LARGE), random.Random(0)
    for _ in range(20):
        for member in tar.members(whole):
            place = member.offset + draw.randrange(-512, member.size)
            data = bytearray(whole)
            data[place] ^= 1 << draw.randrange(8)
            path.write_bytes(data)
            [found] = read(reader, [0])
            if member.name.split(".")[1] in ("json", *fields):
                assert isinstance(found, CorruptSampleError), place
            elif not isinstance(found, CorruptSampleError):  # the byte may have been read, and then is found, too
                assert found[:2] == (written.key, written.text)
                for field in fields:
                    np.testing.assert_array_equal(found[2][field], written.arrays[field])


def test_samples_that_changed_places_are_found_by_their_checksums(tmp_path):
    manifest = make_data_set(tmp_path, 3, samples_per_shard=3)
    reader = SampleReader(manifest, open_store(tmp_path))
    path = tmp_path / "shard-000000.tar"
    whole = bytearray(path.read_bytes())
    first, second = (slice(offset, offset + size) for offset, size, *_ in reader._index(0)[1][:2].tolist())
    whole[first], whole[second] = whole[second], whole[first]
    path.write_bytes(whole)
    *swapped, untouched = read(reader, [0, 1, 2])
    assert all(isinstance(result, CorruptSampleError) for result in swapped)
    assert untouched[0] == "000000002"


@pytest.mark.parametrize("checksums", [True, False])
@pytest.mark.parametrize("damage", ["truncated", "deleted", "foreign", "zeroed", "no index", "foreign index"])
def test_whole_shards_that_are_damaged_are_errors(tmp_path, damage, checksums):
    make_data_set(tmp_path / "other", 30, first=500)
    manifest = make_data_set(tmp_path / "own", 30)
    tar_file, index_file = (tmp_path / "own" / f"shard-000001.{suffix}" for suffix in ("tar", "idx.npy"))
    match damage:
        case "truncated":
            tar_file.write_bytes(tar_file.read_bytes()[:9000])
        case "deleted":
            tar_file.unlink()
        case "foreign":
            tar_file.write_bytes((tmp_path / "other" / "shard-000000.tar").read_bytes())
        case "zeroed":
            tar_file.write_bytes(bytes(tar_file.stat().st_size))
        case "no index":
            index_file.unlink()
        case "foreign index":
            index_file.write_bytes((tmp_path / "own" / "shard-000002.idx.npy").read_bytes())
    reader = SampleReader(manifest, open_store(tmp_path / "own"), checksums=checksums)
    first, second = read(reader, [0, 19])
    assert first[0] == "000000000"
    assert isinstance(second, CorruptSampleError)
    assert "sample 19 (row 9 of" in str(second)


def test_a_fault_of_the_moment_is_read_over(root, monkeypatch):
    store = open_store(root)
    reader = SampleReader(load_manifest(root), store)
    read_range, calls = store.read_range, []

    def flaky(name, offset, buffers):
        read_range(name, offset, buffers)
        calls.append(name)
        if len(calls) == 1:
            buffers[1][7] ^= 1

    monkeypatch.setattr(store, "read_range", flaky)
    [(key, _, arrays)] = read(reader, [4])
    assert key == "000000004"
    np.testing.assert_array_equal(arrays["stft_mixture.2048"], make_sample(4).arrays["stft_mixture.2048"])
    assert len(calls) == 2
    assert set(SHAPES) == set(arrays)
