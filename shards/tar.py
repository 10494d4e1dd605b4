"""One sample as tar members, byte for byte, and back: the on-disk format (docs/format.md) is this file.

A sample is `<key>.json` followed by one `<key>.<field>.npy` for each tensor. Given key, length of the JSON and fields,
every byte that is not JSON or tensor is known in advance: `frame` says which. The writer puts the frame around the
payload, and whoever reads a sample compares it, which is faster and stricter than any parser. `members` and `parse_npy`
parse what others wrote, and say what is wrong with a frame that differs."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray
from pydantic_core import from_json

from shards.store import as_bytes

Bytes = bytes | bytearray | memoryview
DTYPES = (
    *("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"),
    *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
)

BLOCK = 512
END = bytes(2 * BLOCK)  # what closes a tar
MAX_TEXT_BYTES = 1 << 20  # of a sample's JSON, and of a foreign tar's pax header: bounds memory on hostile input
MAX_NPY_HEADER_BYTES = 4096

_KEY = re.compile(r"[A-Za-z0-9_-]{1,48}")
_FIELD = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_HEAD = re.compile(rb"(?=.{124}([0-7]{11}))([A-Za-z0-9_-]{1,48})\.json\0", re.DOTALL)
_NPY_HEADER = re.compile(
    r"\{\s*'descr':\s*'([^']*)',\s*'fortran_order':\s*(True|False),\s*'shape':\s*\(([\d, ]*)\),?\s*\}\s*"
)


@dataclass(frozen=True)
class Field:
    """Name, type and shape of one tensor of every sample. bfloat16 is stored as its bit patterns in uint16."""

    name: str
    dtype: str  # one of DTYPES
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if not _FIELD.fullmatch(self.name) or len(self.name) > 44:
            raise ValueError(f"Field name {self.name!r}: use letters, digits, _ and -, dots between; at most 44.")
        if self.dtype not in DTYPES:
            raise ValueError(f"Field {self.name} has dtype {self.dtype}; shards hold {', '.join(DTYPES)}.")
        if any(size < 0 for size in self.shape):
            raise ValueError(f"Field {self.name} has shape {self.shape}.")

    @classmethod
    def of(cls, name: str, array: NDArray[Any], dtype: str | None = None) -> "Field":
        """The field that this array is one of; `dtype` where numpy has no name for it: bfloat16.

        Raises ValueError for an array that shards don't hold, big-endian ones among them."""
        field = cls(name, dtype or array.dtype.name, array.shape)
        if field.stored != array.dtype:
            raise ValueError(f"Field {name} as {field.dtype} is stored as {field.stored.str}, not {array.dtype.str}.")
        return field

    @property
    def stored(self) -> np.dtype[Any]:
        return np.dtype("uint16" if self.dtype == "bfloat16" else self.dtype).newbyteorder("<")

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.stored.itemsize


@dataclass(frozen=True)
class Sample:
    """`key` names the sample (no dots), `text` becomes its JSON, `arrays` its tensors in the order of their members."""

    key: str
    text: Mapping[str, Any]
    arrays: Mapping[str, NDArray[Any]]


def encode(sample: Sample) -> list[Bytes]:
    """The sample's bytes as buffers to write one after another: `frame`'s pieces with the JSON and the tensors between
    them. C-contiguous tensors are not copied."""
    text = canonical_json(sample.text)
    fields = [Field.of(name, array) for name, array in sample.arrays.items()]
    payload: list[Bytes] = [text, *(as_bytes(np.ascontiguousarray(array)) for array in sample.arrays.values())]
    around = frame(sample.key, len(text), fields)
    return [*(buffer for pair in zip(around, payload) for buffer in pair), around[-1]]


def canonical_json(value: Any) -> bytes:
    """The one way in which we write a value as JSON: sorted keys, no spaces, UTF-8, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def frame(key: str, text_size: int, fields: Sequence[Field]) -> list[bytes]:
    """What stands before the JSON, before each field's tensor, and after the last one: len(fields) + 2 pieces.

    Tar headers, npy headers and padding, for a JSON of `text_size` bytes. Raises ValueError for a key that is not one.
    """
    return framer(tuple(fields))(key, text_size)


@lru_cache(maxsize=16)
def framer(fields: tuple[Field, ...]) -> Callable[[str, int], list[bytes]]:
    """`frame` for the samples of one data set."""
    headers = [npy_header(field.stored, field.shape) for field in fields]
    members = [(f".{field.name}.npy", len(npy) + field.num_bytes, npy) for field, npy in zip(fields, headers)]

    @lru_cache(maxsize=4096)
    def templates(key_bytes: int, text_size: int) -> tuple[list[tuple[bytes, int]], bytes]:
        """Each member's piece with its key and checksum left open, what the checksum is without the key; the rest."""
        found, padding = [], b""
        for suffix, size, npy in [(".json", text_size, b""), *members]:
            before, after, checksum = _tar_header(key_bytes, suffix, size)
            parts = [part.replace(b"%", b"%%") for part in (padding, before, after + npy)]
            found.append((b"%b%%b%b%%06o\0 %b" % tuple(parts), checksum))
            padding = bytes(-size % BLOCK)
        return found, padding

    def pieces(key: str, text_size: int) -> list[bytes]:
        if not _KEY.fullmatch(key):
            raise ValueError(f"Key {key!r}: use letters, digits, _ and -, without dots, at most 48.")
        if text_size > MAX_TEXT_BYTES:
            raise ValueError(f"The JSON of sample {key} has {text_size} bytes; at most {MAX_TEXT_BYTES} are allowed.")
        name = key.encode()
        key_sum = sum(name)
        open_pieces, padding = templates(len(name), text_size)
        return [*[piece % (name, key_sum + checksum) for piece, checksum in open_pieces], padding]

    return pieces


def _tar_header(key_bytes: int, suffix: str, size: int) -> tuple[bytes, bytes, int]:
    """What stands in a plain ustar header (POSIX.1-1988; mode 0644, owner 0, time 0) between the key and the checksum,
    what after it, and what both add to the checksum, which counts its own field as spaces."""
    if size >= 8**11:
        raise ValueError(f"*{suffix} has {size} bytes; a tar member holds less than 8 GiB.")
    name = suffix.encode().ljust(100 - key_bytes, b"\0")
    before = b"%b0000644\0%b%011o\0%011o\0" % (name, b"0000000\0" * 2, size, 0)
    after = b"0".ljust(101, b"\0") + b"ustar\x0000".ljust(72, b"\0") + b"0000000\0" * 2 + bytes(167)
    return before, after, sum(before) + sum(after) + 8 * ord(" ")


def npy_header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """The header of a version 1.0 .npy file in C order, padded so that the data begins at a multiple of 64."""
    text = f"{{'descr': {dtype.str!r}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    length = 10 + len(text) + 1
    length += -length % 64
    return b"\x93NUMPY\x01\x00" + (length - 10).to_bytes(2, "little") + text.ljust(length - 11) + b"\n"


def decode(
    data: Bytes, fields: Sequence[Field], checksums: Sequence[int] = ()
) -> tuple[str, dict[str, Any], list[memoryview]]:
    """Key, text and the raw bytes of each tensor (views) of one sample's byte range.

    `checksums`: of the head and of each tensor, to `compare`. Raises ValueError, which says what is wrong, if one is
    another, and unless every byte outside JSON and tensors is as `frame` has it."""
    view = memoryview(data)
    key, text_size = parse_head(view)
    pieces = frame(key, text_size, fields)
    sizes = [text_size, *(field.num_bytes for field in fields), 0]
    parts, offset = [], 0
    for piece, size in zip(pieces, sizes):
        if view[offset : offset + len(piece)] != piece:
            raise ValueError(explain(view, key, fields))
        parts.append(view[offset + len(piece) : offset + len(piece) + size])
        offset += len(piece) + size
    if offset != len(view):
        raise ValueError(f"sample {key} has {len(view)} bytes where its fields take {offset}")
    text, *tensors = parts[:-1]
    head = view[: BLOCK + text_size + len(pieces[1])]
    compare([head, *tensors], checksums)
    return key, parse_text(text), tensors


def compare(parts: Iterable[Bytes], checksums: Iterable[int]) -> None:
    """Raise ValueError for the first of a sample's parts that has not its xxh3-64."""
    for part, checksum in zip(parts, checksums):
        found = xxhash.xxh3_64_intdigest(part)
        if found != checksum:
            raise ValueError(f"its bytes have the checksum {found:016x} and not {checksum:016x}")


def parse_head(data: Bytes) -> tuple[str, int]:
    """Key and JSON length from a sample's first 512 bytes. Raises ValueError if no sample of ours begins there."""
    found = _HEAD.match(data)
    if len(data) < BLOCK or not found:
        raise ValueError(f"a sample begins with the tar header of KEY.json, not with {bytes(data[:24])!r}")
    return found[2].decode(), int(found[1], 8)


def parse_text(data: Bytes) -> dict[str, Any]:
    """A sample's JSON as a dict; anything else is a ValueError."""
    try:
        text = from_json(bytes(data))  # a third of the json module's time
    except ValueError as error:
        raise ValueError(f"the JSON is broken: {error}") from None
    if not isinstance(text, dict):
        raise ValueError(f"the JSON is a {type(text).__name__} and not an object")
    return text


def explain(data: Bytes, key: str, fields: Sequence[Field]) -> str:
    """Why one sample's bytes are not what `frame` says, found by parsing them: a reason for people."""
    view = memoryview(data)
    names = [f"{key}.json", *(f"{key}.{field.name}.npy" for field in fields)]
    try:
        found = list(members(view, fragment=True))
        if [member.name for member in found] != names:
            return f"sample {key} has the members {[member.name for member in found]} and not {names}"
        for member, field in zip(found[1:], fields):
            dtype, shape, start = parse_npy(view[member.offset : member.offset + member.size])
            if (dtype, shape) != (field.stored, field.shape):
                return f"{member.name} holds {dtype}{list(shape)} and not {field.stored}{list(field.shape)}"
            if member.size != start + field.num_bytes:
                return f"{member.name} has {member.size} bytes and not {start + field.num_bytes}"
    except ValueError as error:
        return f"sample {key}: {error}"
    return f"sample {key} has tar headers, npy headers or padding that differ from the format"


class Member(NamedTuple):
    name: str
    offset: int  # of its data, from the beginning of the tar
    size: int


def members(source: Bytes | BinaryIO, fragment: bool = False) -> Iterator[Member]:
    """The regular files in a tar (a buffer or a seekable file), in order; directories are passed over.

    Reads ustar, and honours the pax (x, g) and GNU (L) headers that other writers put before a member. Links, devices,
    sparse files, absolute names and "..", sizes beyond the end, bad header checksums and a tar that ends before its
    closing zero block raise ValueError with offset and reason. `fragment`: a piece of a tar, without that block."""
    read, num_bytes = _reader(source)
    offset = 0
    shared: dict[str, str] = {}  # from pax g headers: for all members that follow
    extra: dict[str, str] = {}  # from pax x and GNU L headers: for the next member
    while offset < num_bytes or not fragment:
        header = read(offset, BLOCK)
        if len(header) < BLOCK:
            raise ValueError(f"the tar is cut off at byte {offset + len(header)}: no closing zero blocks")
        if not fragment and not extra and header == bytes(BLOCK):
            return
        try:
            name, size, kind = _parse_tar_header(header)
            extended = {**shared, **extra}
            if kind not in b"xgL":
                name, size = extended.get("path", name), _pax_size(extended.get("size"), size)
            if size > num_bytes - offset - BLOCK:
                raise ValueError(f"it has {size} bytes, which is beyond the end at {num_bytes}")
            if kind in b"xgL":
                if size > MAX_TEXT_BYTES:
                    raise ValueError(f"an extended header of {size} bytes")
                values = _parse_extended(read(offset + BLOCK, size), kind)
                (shared if kind == b"g" else extra).update(values)
            else:
                extra = {}
                if kind in (b"0", b"\0", b"7"):
                    yield Member(_safe_name(name), offset + BLOCK, size)
                elif kind != b"5":
                    raise ValueError(f"type {kind!r} (a link, device or sparse file); only plain files are read")
        except ValueError as error:
            raise ValueError(f"tar member at byte {offset}: {error}") from None
        offset += BLOCK + size + -size % BLOCK
    if extra or offset != num_bytes:
        raise ValueError(f"the tar is cut off at byte {num_bytes} inside a member")


def _reader(source: Bytes | BinaryIO) -> tuple[Callable[[int, int], bytes], int]:
    if isinstance(source, bytes | bytearray | memoryview):
        view = memoryview(source)
        return lambda offset, size: bytes(view[offset : offset + size]), len(view)

    def read(offset: int, size: int) -> bytes:
        source.seek(offset)
        return source.read(size)

    return read, source.seek(0, 2)


def _parse_tar_header(header: bytes) -> tuple[str, int, bytes]:
    """Name, size and type flag. Sizes are octal, or binary with the top bit set (GNU, for 8 GiB and more)."""
    expected = sum(header[:148]) + sum(header[156:]) + 8 * ord(" ")
    if _octal(header[148:156]) != expected:
        raise ValueError(f"header checksum {header[148:156]!r} is wrong (should be {expected:o})")
    size = int.from_bytes(header[125:136], "big") if header[124] == 0x80 else _octal(header[124:136])
    name = header[:100].split(b"\0")[0].decode()
    prefix = header[345:500].split(b"\0")[0].decode() if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name, size, header[156:157]


def _octal(digits: bytes) -> int:
    stripped = digits.strip(b" \0")
    if not re.fullmatch(rb"[0-7]*", stripped):
        raise ValueError(f"{digits!r} is no octal number")
    return int(stripped or b"0", 8)


def _pax_size(value: str | None, size: int) -> int:
    if value is None:
        return size
    if not re.fullmatch(r"[0-9]{1,19}", value):
        raise ValueError(f"pax size {value!r}")
    return int(value)


def _parse_extended(data: bytes, kind: bytes) -> dict[str, str]:
    """path= and size= of a pax header, whose records are "LENGTH KEY=VALUE\\n"; or the long name of a GNU one."""
    if kind == b"L":
        return {"path": data.rstrip(b"\0").decode()}
    values = {}
    while data:
        digits = data[: data.find(b" ") + 1]
        length = int(digits) if re.fullmatch(rb"[0-9]{1,7} ", digits) else 0
        key, equals, value = data[len(digits) : length - 1].partition(b"=")
        if not equals or length > len(data) or data[length - 1 : length] != b"\n":
            raise ValueError(f"a broken pax record {data[:40]!r}")
        values[key.decode()] = value.decode()
        data = data[length:]
    if any(key.startswith("GNU.sparse") for key in values):
        raise ValueError("a sparse file; only plain files are read")
    return {key: value for key, value in values.items() if key in ("path", "size")}


def _safe_name(name: str) -> str:
    if not name or name.startswith("/") or ".." in name.split("/") or "\0" in name:
        raise ValueError(f"name {name!r} is empty or leads out of the tar's folder")
    return name


def parse_npy(data: Bytes) -> tuple[np.dtype[Any], tuple[int, ...], int]:
    """Type, shape and offset of the data of a .npy file from its first bytes; never unpickles.

    Raises ValueError for all but little-endian numbers in C order under a header of at most 4 KiB."""
    head = bytes(data[:12])
    if head[:6] != b"\x93NUMPY" or head[6:8] not in (b"\x01\0", b"\x02\0"):
        raise ValueError(f"no .npy file of version 1 or 2 begins with {head[:8]!r}")
    start = 10 if head[6] == 1 else 12
    length = int.from_bytes(head[8:start], "little")
    if length > MAX_NPY_HEADER_BYTES or start + length > len(data):
        raise ValueError(f"a .npy header of {length} bytes (at most {MAX_NPY_HEADER_BYTES}, {len(data)} are there)")
    text = bytes(data[start : start + length]).decode("latin-1")
    found = _NPY_HEADER.fullmatch(text)
    if not found:
        raise ValueError(f"the .npy header {text.strip()!r} is not one of numbers")
    descr, fortran, sizes = found.groups()
    if not re.fullmatch(r"[<|][biufc]\d{1,2}", descr):
        raise ValueError(f"the .npy type {descr!r} is not a little-endian number (objects would need pickle)")
    if fortran == "True":
        raise ValueError("the .npy file is in fortran order; only C order is read")
    try:
        return np.dtype(descr), tuple(int(size) for size in sizes.split(",") if size.strip()), start + length
    except (TypeError, ValueError) as error:
        raise ValueError(f"the .npy header {text.strip()!r}: {error}") from None
