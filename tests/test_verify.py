"""Damage of every kind is found by `verify`, and never served by the reader as if it were the sample."""

import errno
import itertools
import json
import pickle
import random
import resource
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
import xxhash
from shard_data import write_one, write_set

from shards.manifest import bind, load_manifest, seal
from shards.reader import CorruptSampleError, SampleReader
from shards.record import key_digest
from shards.storage import open_store
from shards.tar import BLOCK, END, MAX_TEXT_BYTES, canonical_json, frame, members, npy_header
from shards.verify import read_sample, verify

NAME, OTHER = "shard-000001", "shard-000002"  # the shard that is damaged, and a foreign one
FILES = (f"{NAME}.tar", f"{NAME}.idx.npy", f"{NAME}.json")
ROWS = 3


def test_a_good_root_is_good_sealed_or_not(tmp_path):
    store = open_store(tmp_path)
    plan = write_set(store)
    for report in (verify(store), verify(store, num_threads=3), verify(store, [1])):
        assert not report.bad
        assert "shards are good" in str(report)
    seal(store)
    report = verify(store)
    assert (report.bad, report.num_shards) == ({}, 3)
    assert report.num_bytes == sum(path.stat().st_size for path in tmp_path.glob("*.tar"))
    for suffix in (".tar", ".idx.npy", ".json"):
        (tmp_path / f"{plan.shard_name(2)}{suffix}").unlink()
        report = verify(store)
        assert list(report.bad) == [2]
        assert report.bad[2].startswith("shard-000002: ")
        write_one(store, plan, 2)
    with pytest.raises(ValueError, match=r"shards 0 to 2, not \[3\]"):
        verify(store, [0, 3])


def test_large_shards_are_read_in_several_runs(tmp_path, monkeypatch):
    store = open_store(tmp_path)
    write_set(store, num_samples=20, samples_per_shard=10)
    for read_bytes in (1, 5_000, 7_000):
        monkeypatch.setattr("shards.verify.READ_BYTES", read_bytes)
        assert not verify(store).bad


def test_the_manifest_binds_its_shards(tmp_path):
    store = open_store(tmp_path)
    plan = write_set(store)
    manifest = seal(store)
    record = json.loads(store.read("shard-000000.json"))
    store.write("shard-000000.json", canonical_json(record | {"rejected": [{"reason": "other"}]}))
    assert not verify(store).bad
    store.write("shard-000000.json", canonical_json(record | {"checksum": "0" * 16}))
    assert "by the manifest" in verify(store).bad[0]
    with pytest.raises(ValueError, match="samples 0 to 9"):
        read_sample(store, manifest, 10)
    (tmp_path / "spec.json").unlink()
    bind(store, {"seed": 5}, plan.num_samples, plan.samples_per_shard)
    with pytest.raises(ValueError, match="the manifest seals spec"):
        verify(store)


def test_only_damage_that_stays_is_the_shards(tmp_path, monkeypatch):
    store = open_store(tmp_path)
    write_set(store)
    read_range, faults = store.read_range, iter([])

    def faulty(name, offset, buffers):
        read_range(name, offset, buffers)
        fault = next(faults, None)
        if isinstance(fault, Exception):
            raise fault
        if fault:
            buffers[0][700] ^= 1

    monkeypatch.setattr(store, "read_range", faulty)
    broken = OSError(errno.EIO, "Input/output error")
    faults = iter(["flip"])
    assert not verify(store, [0], num_threads=1).bad
    faults = iter([broken])
    assert not verify(store, [0], num_threads=1).bad
    faults = iter(["flip", "flip"])
    assert "sample 0, at byte 0: " in verify(store, [0], num_threads=1).bad[0]
    faults = iter([broken, broken])
    assert "Input/output error" in verify(store, [0], num_threads=1).bad[0]
    faults = iter([PermissionError(errno.EACCES, "expired")])
    with pytest.raises(PermissionError):
        verify(store, [0], num_threads=1)


@pytest.fixture(scope="module")
def damaged():
    """A sealed root of three shards in memory, one of which the tests damage."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        store = open_store(folder)
        write_set(store, num_samples=3 * ROWS, samples_per_shard=ROWS)
        seal(store)
        yield Damaged(Path(folder))


class Damaged:
    """The files of a sealed root: undamaged in memory, damaged on disk."""

    def __init__(self, root):
        self.root, self.store = root, open_store(root)
        self.manifest = load_manifest(self.store)
        self.files = {path.name: path.read_bytes() for path in root.iterdir()}
        tar, index = self.files[f"{NAME}.tar"], np.load(root / f"{NAME}.idx.npy")
        self.samples = [tar[offset : offset + size] for offset, size, *_ in index.tolist()]

    def put(self, files):
        for name, data in files.items():
            (self.root / name).write_bytes(data) if data is not None else (self.root / name).unlink(missing_ok=True)

    def republish(self, samples, index=None):
        """The shard's files and a manifest for other samples, with all sizes and checksums as if they were right."""
        tar = b"".join(samples) + END
        if index is None:
            sizes = list(map(len, samples))
            offsets = np.cumsum([0, *sizes[:-1]]).tolist()
            index = np.array([[*row] for row in zip(offsets, sizes, *zip(*map(self.checksums, samples)))], "<u8")
        index_file = npy_header(np.dtype("<u8"), index.shape) + index.astype("<u8").tobytes()
        checksum, index_checksum = xxhash.xxh3_64_hexdigest(tar), xxhash.xxh3_64_hexdigest(index_file)
        record = json.loads(self.files[f"{NAME}.json"])
        record |= {"num_bytes": len(tar), "checksum": checksum, "index_checksum": index_checksum}
        manifest = json.loads(self.files["manifest.json"])
        columns = manifest["shards"]
        columns["num_bytes"][1] = len(tar)
        columns["checksums"] = columns["checksums"][:16] + checksum + columns["checksums"][32:]
        columns["index_checksums"] = columns["index_checksums"][:16] + index_checksum + columns["index_checksums"][32:]
        files = dict(zip(FILES, (tar, index_file, canonical_json(record)), strict=True))
        return files | {"manifest.json": canonical_json(manifest)}

    def checksums(self, sample):
        """Of what stands before the first tensor, and of each tensor: their places are fixed from the sample's end."""
        found, end = [], len(sample)
        for field, piece in zip(self.manifest.fields[::-1], frame("key", 0, self.manifest.fields)[:1:-1]):
            start = end - len(piece) - field.num_bytes
            found.insert(0, xxhash.xxh3_64_intdigest(sample[max(start, 0) : start + field.num_bytes]))
            end = start
        return [xxhash.xxh3_64_intdigest(sample[: max(end, 0)]), *found]

    def refused_rows(self):
        """The rows of the damaged shard that the reader refuses; the others are the ones that were written."""
        reader = SampleReader(load_manifest(self.store), self.store)
        rows = [[memoryview(bytearray(field.num_bytes)) for field in reader.fields] for _ in range(ROWS)]
        margins = [reader.margins() for _ in range(ROWS)]
        refused = {}
        for row, found in enumerate(reader.read(range(ROWS, 2 * ROWS), rows, margins)):
            if isinstance(found, CorruptSampleError):
                refused[row] = str(found)
                continue
            key, text = found
            written = list(members(self.samples[row], fragment=True))
            assert written[0].name == f"{key}.json"
            assert canonical_json(text) == content(self.samples[row], written[0])
            for member, values in zip(written[1:], rows[row], strict=True):
                assert content(self.samples[row], member).endswith(values)
        assert all(f"row {row} of {self.root}/{NAME}.tar" in message for row, message in refused.items())
        return list(refused)


def content(sample, member):
    return sample[member.offset : member.offset + member.size]


# Damage to files, whose checksums then tell.


def flip(rng, damaged):
    name = rng.choice(FILES)
    data = bytearray(damaged.files[name])
    for _ in range(rng.choice([1, 1, 1, 2, 9])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return {name: bytes(data)}


def cut(rng, damaged):
    name = rng.choice(FILES)
    data = damaged.files[name]
    edges = [offset for member in members(damaged.files[FILES[0]]) for offset in (member.offset - BLOCK, member.offset)]
    return {name: data[: rng.choice([rng.randrange(len(data)), *(edge for edge in edges if edge < len(data)), 0])]}


def grow(rng, damaged):
    name = rng.choice(FILES)
    return {name: damaged.files[name] + rng.choice([bytes(1), bytes(10240), rng.randbytes(100), END])}


def lose_a_page(rng, damaged):
    data = bytearray(damaged.files[FILES[0]])
    start = rng.randrange(0, len(data) - 100, 512)
    data[start : start + 4096] = rng.choice([bytes, rng.randbytes])(len(data[start : start + 4096]))
    return {FILES[0]: bytes(data)}


def swap_samples(rng, damaged):
    samples = damaged.samples.copy()
    one, other = rng.sample(range(ROWS), 2)
    samples[one], samples[other] = samples[other], rng.choice(samples if rng.random() < 0.3 else [samples[one]])
    return {FILES[0]: b"".join(samples) + END}


def foreign(rng, damaged):
    suffixes = rng.choice([(".tar",), (".tar", ".idx.npy"), (".tar", ".idx.npy", ".json"), (".json",), (".idx.npy",)])
    files = {NAME + suffix: damaged.files[OTHER + suffix] for suffix in suffixes}
    if f"{NAME}.json" in files and rng.random() < 0.5:
        files[f"{NAME}.json"] = files[f"{NAME}.json"].replace(OTHER.encode(), NAME.encode())
    return files


def lose_a_file(rng, damaged):
    return {rng.choice(FILES): None}


# Damage inside one sample, after which every size and checksum is made right again.


def parts(sample):
    """[header, data] of each member of a sample."""
    return [
        [bytearray(sample[m.offset - BLOCK : m.offset]), content(sample, m)] for m in members(sample, fragment=True)
    ]


def joined(pieces, padding=b"\0"):
    return b"".join(bytes(header) + data + padding * (-len(data) % BLOCK) for header, data in pieces)


def set_size(part):
    part[0][124:136] = b"%011o\0" % len(part[1])


def set_checksum(header):
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)


def bad_header(rng, sample):
    pieces = parts(sample)
    number = rng.randrange(len(pieces))
    header = pieces[number][0]
    place, value = rng.choice(
        [
            *((slice(0, 100), name.ljust(100, b"\0")) for name in HOSTILE_NAMES),
            (slice(0, 100), bytes(pieces[number - 1][0][:100])),
            *((slice(124, 136), size) for size in HOSTILE_SIZES),
            (slice(124, 136), b"%011o\0" % (len(pieces[number][1]) + rng.choice([-1, 1, BLOCK]))),
            *(
                (slice(156, 157), kind)
                for kind in (b"\0", b"1", b"2", b"3", b"5", b"6", b"7", b"x", b"g", b"L", b"S", b"K")
            ),
            (slice(156, 176), b"2../../../etc/passwd"),
            (slice(345, 347), b".."),
            (slice(100, 107), b"0000777"),
            (slice(136, 147), b"%011o" % rng.randrange(8**11)),
            (slice(257, 265), b"ustar  \0"),
            (slice(265, 269), b"root"),
        ]
    )
    header[place] = value
    if rng.random() < 0.7:
        set_checksum(header)
    return joined(pieces)


HOSTILE_NAMES = (
    *(b"../../etc/passwd", b"/etc/passwd", b"a/../../b.json", b"", b"." * 100, b"x" * 100, b"\xff\xfe.json"),
    *(b"000000004.json", b"a.b.json", b"000000004.condition.npy", b"000000099.stft_mixture.2048.npy"),
)
HOSTILE_SIZES = (
    *(b"\x80" + struct.pack(">3xQ", size) for size in (2**63, 2**64 - 1, 10, 0)),
    *(b"7" * 11 + b"\0", b"7" * 12, b"\xff" * 12, b"0" * 12, b"-0000000001\0", b"abcdefghijk\0", bytes(12), b" " * 12),
)


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a pickle was loaded')",))


def bad_npy(rng, sample):
    pieces = parts(sample)
    part = rng.choice(pieces[1:])
    start = 10 + int.from_bytes(part[1][8:10], "little")
    text, values = part[1][10:start].decode(), part[1][start:]
    descr, shape = text.split("'")[3], text[text.index("(") : text.index(")") + 1]
    pickled = b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + text.replace(descr, "|O").ljust(118).encode()
    flat = len(values) // 2
    part[1] = rng.choice(
        [
            *(
                npy_text(text.replace(descr, other)) + values
                for other in (">f2", "|O", "<U2", "|V2", "<i2", "<f3", "[]")
            ),
            *(npy_text(text.replace(shape, other)) + values for other in SHAPES),
            npy_text(text.replace(shape, f"({flat},)")) + values + b"\0\0",
            npy_text(text.replace("False", "True")) + values,
            npy_text(text.replace("False", "None")) + values,
            npy_text(text.replace("'shape'", "'shape': (1,), 'shape'")) + values,
            npy_text("(" * 3000) + values,
            npy_text(text, b"\x02\x00") + values,
            npy_text(text, b"\x03\x00") + values,
            npy_text(text, b"\x09\x09") + values,
            b"\x93NUMPY\x01\x00\xff\xff" + part[1][10:],
            b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + part[1][12:],
            b"\x93NUMPZ" + part[1][6:],
            part[1][: rng.randrange(start)],
            part[1][:-1],
            part[1] + b"\0",
            values,
            b"",
            pickled + pickle.dumps([Bomb()]),
            pickle.dumps(Bomb()),
        ]
    )
    set_size(part)
    set_checksum(part[0])
    return joined(pieces)


TYPES = (">f2", "|O", "<U2", "|V2", "<i2", "<f3", "[]", "")
SHAPES = (
    *("(1, 5, 7)", "(35,)", "(1, 7, 5, 1)", "()", "(-1, 7, 5)", "(1, 7, 50)", "(1, 7,", "7", "(1.0, 7, 5)", "(a,)"),
    *(f"({2**63}, 2)", f"({2**64},)", "(" + "9" * 50 + ",)", "(" + "1, " * 70 + ")", "(0, 7, 5)", "(1, 7, 4)"),
)


def npy_text(text, version=b"\x01\x00"):
    length = struct.pack("<H" if version == b"\x01\x00" else "<I", len(text))
    return b"\x93NUMPY" + version + length + text.encode()


def bad_json(rng, sample):
    pieces = parts(sample)
    text = pieces[0][1]
    pieces[0][1] = rng.choice(
        [
            *(b"", b"[1]", b"null", b"not json", b"\xff\xfe", b"[" * 50_000, b'{"a":' * 50_000, text[:-1], text + b"}"),
            *(b'{"x":"' + bytes([byte]) + b'"}' for byte in (0, 10, 128, 255)),
            text + bytes(1),
            b'{"x":"' + b"y" * MAX_TEXT_BYTES + b'"}' if rng.random() < 0.1 else text[1:],
        ]
    )
    set_size(pieces[0])
    set_checksum(pieces[0][0])
    return joined(pieces)


def bad_members(rng, sample):
    pieces = parts(sample)
    one, other = rng.sample(range(len(pieces)), 2)
    pax = [bytearray(pieces[0][0]), b"20 path=../../escape"]
    pax[0][156:157] = b"x"
    set_size(pax)
    set_checksum(pax[0])
    swapped = pieces.copy()
    swapped[one], swapped[other] = pieces[other], pieces[one]
    return rng.choice(
        [
            joined(swapped),
            joined(pieces[:one] + pieces[one + 1 :]),
            joined([*pieces[:one], pieces[one], *pieces[one:]]),
            joined([pax, *pieces]),
            joined(pieces) + joined(pieces),
            joined(pieces[:1]),
            joined(pieces, padding=b"x"),
            joined(pieces) + bytes(BLOCK),
            bytes(BLOCK) + joined(pieces),
            joined(pieces)[:-BLOCK],
            bytes(len(sample)),
            rng.randbytes(len(sample)),
        ]
    )


def flip_outside_payload(rng, sample):
    data = bytearray(sample)
    payload = set()
    for number, member in enumerate(members(sample, fragment=True)):
        start = member.offset + (128 if number else 0)  # our npy headers have 128 bytes here
        payload |= set(range(start, member.offset + member.size))
    places = [place for place in range(len(data)) if place not in payload]
    data[rng.choice(places)] ^= 1 << rng.randrange(8)
    return bytes(data)


FILE_DAMAGE = (flip, flip, flip, cut, cut, grow, lose_a_page, swap_samples, foreign, lose_a_file)
SAMPLE_DAMAGE = (bad_header, bad_npy, bad_json, bad_members, flip_outside_payload)


def test_damaged_files_are_found_and_never_served(damaged, longer):
    rng = random.Random(1)
    for _ in range(5_000 * longer):
        damage, files = rng.choice(FILE_DAMAGE), {}
        while files.items() <= damaged.files.items():  # nothing has changed
            files = damage(rng, damaged)
        damaged.put(files)
        try:
            bad = verify(damaged.store, [1], num_threads=1).bad
            assert bad, (damage, files)
            assert bad[1].startswith(f"{NAME}: ")
            changed = {name for name, data in files.items() if data != damaged.files[name]}
            refused = damaged.refused_rows()
            if f"{NAME}.idx.npy" in changed:
                assert refused == list(range(ROWS))
            elif changed == {f"{NAME}.tar"} and files[f"{NAME}.tar"] is not None:
                good = [sample in files[f"{NAME}.tar"] for sample in damaged.samples]
                assert refused or all(good)
        finally:
            damaged.put({name: damaged.files[name] for name in files})
    assert not verify(damaged.store).bad


def test_malformed_samples_are_found_and_never_served_although_all_checksums_are_right(damaged, longer):
    rng = random.Random(2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(5_000 * longer):
        damage, row = rng.choice(SAMPLE_DAMAGE), rng.randrange(ROWS)
        samples = damaged.samples.copy()
        while samples == damaged.samples:
            samples[row] = damage(rng, samples[row])
        files = damaged.republish(samples)
        damaged.put(files)
        try:
            bad = verify(damaged.store, [1], num_threads=1).bad
            assert bad, (damage, samples[row])
            assert f"sample {row}, at byte" in bad[1] or "does not divide the tar" in bad[1], bad
            assert row in damaged.refused_rows(), (damage, samples[row])
        finally:
            damaged.put({name: damaged.files[name] for name in files})
    grown_bytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown_bytes < 64e6
    assert not verify(damaged.store).bad


def test_hostile_indices_are_refused_although_their_own_checksum_is_right(damaged):
    rng = random.Random(3)
    right = np.load(damaged.root / f"{NAME}.idx.npy")
    for _ in range(300):
        index = right.copy()
        column = rng.randrange(2)
        hostile = (2**63, 2**64 - 1, 2**64 - int(index[0, 1]), 0, rng.randrange(2**64), int(index[2, column]) + 512)
        index[rng.randrange(ROWS), column] = rng.choice(hostile)
        if np.array_equal(index, right):
            continue
        files = damaged.republish(damaged.samples, index)
        damaged.put(files)
        try:
            assert "does not divide the tar" in verify(damaged.store, [1], num_threads=1).bad[1]
            assert damaged.refused_rows() == [0, 1, 2]
        finally:
            damaged.put({name: damaged.files[name] for name in files})
    for row, column in itertools.product(range(ROWS), range(2, right.shape[1])):
        index = right.copy()
        index[row, column] ^= np.uint64(1) << np.uint64(rng.randrange(64))
        files = damaged.republish(damaged.samples, index)
        damaged.put(files)
        try:
            assert f"sample {row}, at byte" in verify(damaged.store, [1], num_threads=1).bad[1]
            assert damaged.refused_rows() == [row]
        finally:
            damaged.put({name: damaged.files[name] for name in files})


def test_a_sample_that_stands_twice_is_found(damaged):
    samples = [damaged.samples[0], damaged.samples[1], damaged.samples[0]]
    files = damaged.republish(samples)
    record = json.loads(files[f"{NAME}.json"])
    damaged.put(files)
    try:
        assert "digest of the keys" in verify(damaged.store, [1]).bad[1]
        keys = ["000000003", "000000004", "000000003"]
        fixed = record | {"key_digest": key_digest(keys), "last_key": keys[-1]}
        damaged.put({f"{NAME}.json": canonical_json(fixed)})
        assert "number of distinct keys is 2" in verify(damaged.store, [1]).bad[1]
    finally:
        damaged.put({name: damaged.files[name] for name in files})
