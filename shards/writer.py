"""One shard onto storage: `<shard>.tar`, then its index, then its record, which commits: without it there is no shard.

The index, `<shard>.idx.npy`, is uint64 [num_samples, 3]: byte offset, size and xxh3-64 of each sample's bytes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any

import numpy as np
import xxhash
from pydantic import ConfigDict, TypeAdapter, ValidationError

from shards.storage import Store
from shards.tar import END, Field, Sample, canonical_json, encode, npy_header

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Record:
    """What a complete shard says of itself, in `<shard>.json`. No times or hosts: every run writes the same bytes."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    format_version: int
    shard: str
    spec_digest: str
    num_samples: int
    num_bytes: int  # of the tar
    checksum: str  # xxh3-64 of the tar, 16 hex digits
    index_checksum: str  # the same of the index file
    key_digest: str  # of all keys in order
    first_key: str
    last_key: str
    fields: tuple[Field, ...]
    rejected: list[dict[str, Any]]  # each with a "reason": inputs that could not be used

    @property
    def index_bytes(self) -> int:
        return len(index_header(self.num_samples)) + self.num_samples * 24


_RECORD = TypeAdapter(Record)


def write_shard(
    store: Store,
    name: str,
    samples: Iterable[Sample],
    *,
    num_samples: int,
    spec_digest: str,
    rejected: Sequence[dict[str, Any]] = (),
    dtypes: Mapping[str, str] | None = None,
) -> Record:
    """Write `name`.tar, its index and, last, its record, and return the record.

    All of `num_samples` samples must come, with distinct keys and the first one's fields, or ValueError is raised;
    after any exception from here or from `samples` nothing is committed. `rejected` is read after the last sample, so
    its owner may fill it meanwhile. `dtypes` says what numpy cannot ({"condition": "bfloat16"})."""
    index = np.zeros((num_samples, 3), "<u8")
    whole, keys, fields, offset = xxhash.xxh3_64(), [], None, 0
    with store.writer(f"{name}.tar") as sink:
        for row, sample in enumerate(samples):
            found = fields_of(sample, dtypes or {})
            fields = fields or found
            if found != fields or row == num_samples:
                raise ValueError(_unfit(name, sample.key, row, num_samples, found, fields))
            buffers = encode(sample)
            own = xxhash.xxh3_64()
            for buffer in buffers:
                own.update(buffer)
                whole.update(buffer)
            sink.write(*buffers)
            size = sum(map(len, buffers))
            index[row] = offset, size, own.intdigest()
            keys.append(sample.key)
            offset += size
        if len(keys) != num_samples or len(set(keys)) != num_samples or not fields:
            twice = next((key for key in keys if keys.count(key) > 1), "none")
            raise ValueError(f"{name}: {len(keys)} of {num_samples} samples came, key that came twice: {twice}.")
        whole.update(END)
        sink.write(END)
    index_data = index_header(num_samples) + index.tobytes()
    record = Record(
        format_version=FORMAT_VERSION,
        shard=name,
        spec_digest=spec_digest,
        num_samples=num_samples,
        num_bytes=offset + len(END),
        checksum=whole.hexdigest(),
        index_checksum=xxhash.xxh3_64_hexdigest(index_data),
        key_digest=key_digest(keys),
        first_key=keys[0],
        last_key=keys[-1],
        fields=fields,
        rejected=list(rejected),
    )
    store.write(f"{name}.idx.npy", index_data)
    store.write(f"{name}.json", canonical_json(asdict(record)))
    return record


def fields_of(sample: Sample, dtypes: Mapping[str, str]) -> tuple[Field, ...]:
    return tuple(Field(name, dtypes.get(name, a.dtype.name), a.shape) for name, a in sample.arrays.items())


def _unfit(name: str, key: str, row: int, num_samples: int, found: Sequence[Field], fields: Sequence[Field]) -> str:
    if row == num_samples:
        return f"{name}: sample {key} is one more than the {num_samples} that this shard holds."
    return f"{name}: sample {key} has other fields than the first one: {found} and not {fields}."


def index_header(num_samples: int) -> bytes:
    return npy_header(np.dtype("<u8"), (num_samples, 3))


def key_digest(keys: Iterable[str]) -> str:
    """128 bits of SHA-256 over the keys, one a line."""
    return sha256("".join(f"{key}\n" for key in keys).encode()).hexdigest()[:32]


def read_record(store: Store, name: str) -> Record:
    """The record of a shard. Raises FileNotFoundError if there is none, ValueError if it is broken or another's."""
    data = store.read(f"{name}.json")
    try:
        record = _RECORD.validate_json(data)
    except ValidationError as error:
        raise ValueError(f"{store.url}/{name}.json is no shard record: {error.errors()[0]['msg']}") from None
    if record.shard != name or record.format_version != FORMAT_VERSION:
        raise ValueError(
            f"{store.url}/{name}.json is the record of {record.shard} in format {record.format_version} and not of "
            f"{name} in format {FORMAT_VERSION}."
        )
    return record


def is_complete(store: Store, name: str, spec_digest: str) -> bool:
    """Whether the shard's record is there and its tar and index have the sizes that it says.

    A record that cannot be read counts as none: the shard is made again. Raises ValueError if it was made to another
    spec, because shards of two specs must not be mixed."""
    try:
        record = read_record(store, name)
    except (FileNotFoundError, ValueError):
        return False
    if record.spec_digest != spec_digest:
        raise ValueError(
            f"{store.url}/{name} was made to spec {record.spec_digest} and not {spec_digest}. Use another folder, or "
            "delete the shards that are there."
        )
    return store.size(f"{name}.tar") == record.num_bytes and store.size(f"{name}.idx.npy") == record.index_bytes


def discard(store: Store, name: str) -> None:
    """Delete a shard, its record first, so that no moment leaves a record without its shard."""
    for suffix in (".json", ".idx.npy", ".tar"):
        store.delete(f"{name}{suffix}")
