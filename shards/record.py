"""What a complete shard says of itself: the record, `<shard>.json`, and the index, `<shard>.idx.npy`."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Annotated, Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from pydantic import ConfigDict, StringConstraints, TypeAdapter, ValidationError

from shards.store import Store
from shards.tar import END, MAX_TEXT_BYTES, Field, frame, npy_header

FORMAT_VERSION = 2
SUFFIXES = (".tar", ".idx.npy", ".json")  # of a shard's files, in the order in which they are written
Checksum = Annotated[str, StringConstraints(pattern="^[0-9a-f]{16}$")]  # xxh3-64


@dataclass(frozen=True)
class Record:
    """No times or hosts are among these, so that every run writes the same bytes."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    format_version: int
    shard: str
    spec_digest: str
    num_samples: int
    num_bytes: int  # of the tar
    checksum: Checksum  # of the tar
    index_checksum: Checksum  # of the index file
    key_digest: str  # of all keys in order
    first_key: str
    last_key: str
    fields: tuple[Field, ...]
    rejected: list[dict[str, Any]]  # inputs that could not be used, each with a "reason"

    @property
    def index_bytes(self) -> int:
        return _index_layout(self.num_samples, self.fields)[1]

    def read_index(self, store: Store) -> NDArray[np.uint64]:
        """The shard's index, if it is the one that this record speaks of; see `read_index`."""
        return read_index(
            store,
            self.shard,
            num_samples=self.num_samples,
            num_bytes=self.num_bytes,
            checksum=self.index_checksum,
            fields=self.fields,
        )


_RECORD = TypeAdapter(Record)


def key_digest(keys: Iterable[str]) -> str:
    """128 bits of SHA-256 over the keys, one a line."""
    return sha256("".join(f"{key}\n" for key in keys).encode()).hexdigest()[:32]


def read_record(store: Store, name: str) -> Record:
    """The record of shard `name`. Raises FileNotFoundError if there is none, ValueError if it is broken."""
    data = store.read(f"{name}.json")
    try:
        record = _RECORD.validate_json(data)
    except ValidationError as error:
        raise ValueError(f"{store.url}/{name}.json is no shard record: {explain_invalid(error)}.") from None
    if record.shard != name or record.format_version != FORMAT_VERSION:
        raise ValueError(
            f"{store.url}/{name}.json is the record of {record.shard} in format {record.format_version} and not of "
            f"{name} in format {FORMAT_VERSION}, which this version reads."
        )
    return record


class OtherSpecError(ValueError):
    """A shard was made to another spec than the one its root is bound to."""


def complete_record(store: Store, name: str, spec_digest: str, size: Callable[[str], int | None]) -> Record:
    """The record of a complete shard; `size` tells the bytes of a name in the store.

    Raises OtherSpecError, and FileNotFoundError or ValueError that say what is not complete."""
    record = read_record(store, name)
    if record.spec_digest != spec_digest:
        raise OtherSpecError(
            f"{store.url}/{name} was made to spec {record.spec_digest}, but the root is bound to {spec_digest}. "
            "Delete the shards of the other spec, or use another root."
        )
    for file, expected in ((f"{name}.tar", record.num_bytes), (f"{name}.idx.npy", record.index_bytes)):
        if size(file) != expected:
            raise ValueError(f"{file} has {size(file) or 'no'} bytes and its record says {expected}")
    return record


def examine(store: Store, name: str, spec_digest: str, size: Callable[[str], int | None]) -> Record | str:
    """The record of a shard if it is complete, otherwise what is wrong; `size` tells the bytes of a name in the store.

    Raises OtherSpecError, because shards of two specs must not be mixed."""
    try:
        return complete_record(store, name, spec_digest, size)
    except OtherSpecError:
        raise
    except (FileNotFoundError, ValueError) as error:
        return str(error)


def explain_invalid(error: ValidationError) -> str:
    """The first problem in a JSON file, in one line."""
    first = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")


def encode_index(index: NDArray[np.uint64]) -> bytes:
    """The index file of [num_samples, 3 + num_fields]: for each sample its byte offset and size in the tar, the xxh3-64
    of its head (all that stands before the first tensor), and that of each tensor. The rest is known from the format.
    """
    return npy_header(np.dtype("<u8"), index.shape) + index.astype("<u8").tobytes()


def _index_layout(num_samples: int, fields: Sequence[Field]) -> tuple[bytes, int]:
    """What an index file begins with, and its size."""
    columns = 3 + len(fields)
    header = npy_header(np.dtype("<u8"), (num_samples, columns))
    return header, len(header) + num_samples * columns * 8


def read_index(
    store: Store, name: str, *, num_samples: int, num_bytes: int, checksum: str, fields: Sequence[Field]
) -> NDArray[np.uint64]:
    """The index of shard `name`, uint64 [num_samples, 3 + num_fields]; see `encode_index`. What it must fit is what the
    record or manifest says of the shard: samples and bytes of the tar, xxh3-64 of the index file, and fields.

    Raises FileNotFoundError if it is not there, ValueError if it is not that one or its samples, each of a possible
    size, do not follow one another from the tar's first byte to its end."""
    data = store.read(f"{name}.idx.npy")
    found = xxhash.xxh3_64_hexdigest(data)
    header, num_index_bytes = _index_layout(num_samples, fields)
    if found != checksum or data[: len(header)] != header or len(data) != num_index_bytes:
        raise ValueError(
            f"{store.url}/{name}.idx.npy has checksum {found} and {len(data)} bytes; expected checksum {checksum} and "
            f"{num_index_bytes} bytes, the index of {num_samples} samples"
        )
    entries = np.frombuffer(data, "<u8", offset=len(header)).reshape(num_samples, -1)
    least = sum(map(len, frame("key", 0, fields))) + sum(field.num_bytes for field in fields)
    sizes, ends = entries[:, 1], np.cumsum(entries[:, 1])
    if not (
        least <= int(sizes.min()) <= int(sizes.max()) <= least + MAX_TEXT_BYTES
        and entries[:, 0].tolist() == [0, *ends[:-1].tolist()]
        and int(ends[-1]) + len(END) == num_bytes
    ):
        raise ValueError(f"{store.url}/{name}.idx.npy does not divide the tar into {num_samples} samples of its fields")
    return entries
