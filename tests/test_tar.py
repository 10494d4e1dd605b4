"""Samples in tars: what `encode` writes, every other reader of tars and npy files reads the same."""

import contextlib
import io
import struct
import subprocess
import tarfile

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_data import make_samples

from shards.tar import END, MAX_TEXT_BYTES, Field, Sample, canonical_json, decode, encode, members, parse_npy

dtypes = st.sampled_from(["bool", "int8", "uint16", "int64", "float16", "float32", "complex64"])
shapes = st.lists(st.integers(0, 9), max_size=4).map(tuple)
names = st.from_regex(r"[A-Za-z0-9_-]{1,20}(\.[A-Za-z0-9_-]{1,9}){0,2}", fullmatch=True)
values = st.text() | st.integers() | st.lists(st.floats(allow_nan=False, allow_infinity=False))
texts = st.dictionaries(st.text(max_size=9), values)


@st.composite
def samples(draw):
    arrays = {}
    for name in draw(st.lists(names, max_size=4, unique=True)):
        shape = draw(shapes)
        raw = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 100, shape)
        arrays[name] = np.asarray(raw, draw(dtypes))
    return Sample(draw(st.from_regex(r"[A-Za-z0-9_-]{1,48}", fullmatch=True)), draw(texts), arrays)


@given(samples())
@settings(deadline=None)
def test_decode_inverts_encode_and_tarfile_agrees(sample):
    data = b"".join(encode(sample))
    fields = [Field.of(name, array) for name, array in sample.arrays.items()]
    key, text, tensors = decode(data, fields)
    assert (key, text) == (sample.key, sample.text)
    for tensor, array in zip(tensors, sample.arrays.values(), strict=True):
        assert tensor == array.tobytes()
    with tarfile.open(fileobj=io.BytesIO(data + END)) as tar:
        theirs = [(member.name, member.offset_data, member.size) for member in tar]
        loaded = [np.load(io.BytesIO(tar.extractfile(member).read())) for member in tar.getmembers()[1:]]
    assert [tuple(member) for member in members(data, fragment=True)] == theirs
    assert [tuple(member) for member in members(io.BytesIO(data + END))] == theirs
    for array, other in zip(sample.arrays.values(), loaded, strict=True):
        assert array.dtype == other.dtype
        np.testing.assert_array_equal(array, other)


def test_encoding_depends_on_the_values_only_and_copies_no_tensor():
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    one = encode(Sample("a", {"x": 1, "y": 2}, {"t": array}))
    assert any(np.shares_memory(np.frombuffer(buffer, np.uint8), array) for buffer in one)
    other = encode(Sample("a", {"y": 2, "x": 1}, {"t": np.asfortranarray(array)}))
    assert b"".join(one) == b"".join(other)
    with tarfile.open(fileobj=io.BytesIO(b"".join([*one, END]))) as tar:
        member = tar.getmembers()[1]
        assert (member.mtime, member.uid, member.gid, member.mode, member.uname) == (0, 0, 0, 0o644, "")
    assert one[2][-128:].startswith(b"\x93NUMPY\x01\x00")  # behind the JSON's padding and a tar header
    assert len(b"".join(one)) % 512 == 0


def test_gnu_tar_and_webdataset_read_equal_tensors(tmp_path):
    written = list(make_samples(range(3)))
    path = tmp_path / "shard-000000.tar"
    path.write_bytes(b"".join(buffer for sample in written for buffer in [*encode(sample)]) + END)
    listing = subprocess.run(["tar", "tvf", path], capture_output=True, text=True, check=True)
    assert (listing.stderr, listing.stdout.count("\n")) == ("", 12)
    subprocess.run(["tar", "xf", path, "-C", tmp_path], check=True)
    read = list(webdataset.WebDataset(str(path), shardshuffle=False).decode())
    assert [sample["__key__"] for sample in read] == [sample.key for sample in written]
    for sample, theirs in zip(written, read, strict=True):
        assert theirs["json"] == sample.text
        for name, array in sample.arrays.items():
            np.testing.assert_array_equal(theirs[f"{name}.npy"], array)
            np.testing.assert_array_equal(np.load(tmp_path / f"{sample.key}.{name}.npy"), array)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (Sample("a.b", {}, {"t": np.zeros(1)}), "without dots"),
        (Sample("../a", {}, {"t": np.zeros(1)}), "letters"),
        (Sample("a", {"x": float("nan")}, {"t": np.zeros(1)}), "JSON"),
        (Sample("a", {"x": "y" * MAX_TEXT_BYTES}, {"t": np.zeros(1)}), "at most"),
        (Sample("a", {}, {"t": np.array([None])}), "dtype object"),
        (Sample("a", {}, {"t": np.zeros(1, ">f4")}), ">f4"),
        (Sample("a", {}, {"t/..": np.zeros(1)}), "Field name"),
    ],
)
def test_what_the_format_does_not_hold_is_refused(sample, message):
    with pytest.raises(ValueError, match=message):
        encode(sample)


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
@given(dtype=dtypes, shape=shapes)
def test_parse_npy_agrees_with_numpy(version, dtype, shape):
    file = io.BytesIO()
    np.lib.format.write_array(file, np.zeros(shape, dtype), version)
    found, sizes, offset = parse_npy(file.getvalue())
    assert (found, sizes) == (np.dtype(dtype), shape)
    assert len(file.getvalue()) == offset + np.zeros(shape, dtype).nbytes


def npy(array):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (npy(np.array([{"a": 1}, None])), "pickle"),
        (npy(np.zeros((3, 2), order="F")), "fortran"),
        (npy(np.zeros(2, ">f8")), "little-endian"),
        (npy(np.zeros(2, [("a", "f4")])), "not one of numbers"),
        (b"\x93NUMPY\x01\x00\xff\xff" + b" " * 70000, "65535 bytes"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + b" " * 99, "4294967295 bytes"),
        (b"\x93NUMPY\x01\x00\x76\x00" + b"(" * 118, "not one of numbers"),
        (b"\x93NUMPY\x03\x00", "version"),
        (b"", "version"),
        (npy(np.zeros(2))[:60], "118 bytes"),
    ],
)
def test_parse_npy_refuses(data, message):
    with pytest.raises(ValueError, match=message):
        parse_npy(data)


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_members_of_tars_that_others_wrote(kind):
    file = io.BytesIO()
    long = "" if kind == tarfile.USTAR_FORMAT else "ü" * 200
    with tarfile.open(fileobj=file, mode="w", format=kind, pax_headers={"comment": "global"}) as tar:
        for name, content in {"a/b.txt": b"x", f"./a/{'n' * 90}{long}.wav": b"y" * 1000, "c": b""}.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            info.mtime = 0.5 if kind == tarfile.PAX_FORMAT else 0  # needs an extended header
            tar.addfile(info, io.BytesIO(content))
        folder = tarfile.TarInfo("d/")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    with tarfile.open(fileobj=io.BytesIO(file.getvalue())) as tar:
        theirs = [(member.name, member.offset_data, member.size) for member in tar if member.isfile()]
    assert [tuple(member) for member in members(file.getvalue())] == theirs


def make_tar(name="a.json", size=b"%011o\0" % 4, kind=b"0", data=b"data"):
    header = bytearray(tarfile.TarInfo("a").tobuf(tarfile.USTAR_FORMAT))
    header[:100] = name.encode().ljust(100, b"\0")
    header[124:136], header[156:157] = size, kind
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data.ljust(512, b"\0") + END


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (make_tar("../a.json"), "leads out"),
        (make_tar("/etc/passwd"), "leads out"),
        (make_tar("x/../../a"), "leads out"),
        (make_tar(""), "leads out"),
        (make_tar(kind=b"1"), "link"),
        (make_tar(kind=b"2"), "link"),
        (make_tar(kind=b"3"), "device"),
        (make_tar(kind=b"S"), "sparse"),
        (make_tar(size=b"7" * 11 + b"\0"), "beyond the end"),
        (make_tar(size=b"\x80" + struct.pack(">3xQ", 2**63)), "beyond the end"),
        (make_tar(size=b"\xff" * 12), "no octal number"),
        (make_tar(kind=b"x", data=b"4 a\n"), "broken pax record"),
        (make_tar(kind=b"x", size=b"%011o\0" % 14, data=b"14 size=99999\n"), "no octal|checksum"),
        (make_tar(kind=b"x", size=b"%011o\0" % 11, data=b"11 size=-1\n")[:1024] + make_tar(), "pax size"),
        (make_tar(kind=b"x", size=b"%011o\0" % 16, data=b"16 path=../../a\n")[:1024] + make_tar(), "leads out"),
        (make_tar()[:512] + bytes(512), "cut off"),
        (make_tar()[:-1024], "no closing zero blocks"),
        (make_tar()[:700], "cut off|beyond the end"),
        (b"\0" * 511, "cut off"),
        (b"", "cut off"),
        (b"x" * 2048, "no octal number"),
    ],
)
def test_members_refuses(data, message):
    with pytest.raises(ValueError, match=message):
        list(members(data))


@given(st.binary(max_size=3000), st.integers(0, 4095), st.booleans())
def test_garbage_is_a_value_error_or_nothing(garbage, place, fragment):
    data = b"".join([*encode(next(make_samples([0]))), END])
    data = data[:place] + garbage + data[place + len(garbage) :]
    with contextlib.suppress(ValueError):
        assert all(0 <= member.offset <= len(data) - member.size for member in members(data, fragment))


def test_decode_says_what_is_wrong():
    sample = next(make_samples([7]))
    fields = [Field.of(name, array) for name, array in sample.arrays.items()]

    def broken(**arrays):
        changed = {name.replace("__", "."): array for name, array in arrays.items()}
        return b"".join(encode(Sample(sample.key, sample.text, {**sample.arrays, **changed})))

    for data, message in (
        (broken(condition=np.zeros(3, np.float32)), r"condition.npy holds float32\[3\] and not float16\[3\]"),
        (broken(condition=np.zeros(5, np.float16)), r"float16\[5\] and not float16\[3\]"),
        (broken(extra=np.zeros(5)), "takes|take"),
        (b"".join(encode(sample)).replace(b"2048.npy", b"1024.npy"), "checksum"),
        (b"".join(encode(sample)).replace(b"False", b"True "), "fortran"),
        (b"".join(encode(Sample("7", {}, {}))), "has the members"),
        (b"".join(encode(sample))[:-512], "has .* bytes|cut off|differ"),
        (canonical_json({}), "a sample begins"),
    ):
        with pytest.raises(ValueError, match=message):
            decode(data, fields)
