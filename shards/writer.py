"""One shard onto storage: its tar, then its index, then its record, which commits: without it there is no shard."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import xxhash

from shards.record import FORMAT_VERSION, SUFFIXES, Record, encode_index, key_digest
from shards.storage import Store
from shards.tar import END, Field, Sample, canonical_json, encode


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
    """Write shard `name` and return its record.

    All of `num_samples` samples must come, with distinct keys and the first one's fields, or ValueError is raised;
    after any exception from here or from `samples` nothing is committed. `rejected` is read after the last sample, so
    its owner may fill it meanwhile. `dtypes` says what numpy cannot ({"condition": "bfloat16"})."""
    index = np.zeros((num_samples, 3), np.uint64)
    whole, keys, fields, offset = xxhash.xxh3_64(), dict[str, None](), None, 0
    with store.writer(f"{name}.tar") as sink:
        for row, sample in enumerate(samples):
            found = _fields_of(sample, dtypes or {})
            fields = fields or found
            if found != fields:
                raise ValueError(f"{name}: sample {sample.key} has the fields {found}, the first one has {fields}.")
            if sample.key in keys or row == num_samples:
                raise ValueError(f"{name}: sample {sample.key} came twice or after all {num_samples} samples.")
            buffers = encode(sample)
            own = xxhash.xxh3_64()
            for buffer in buffers:
                own.update(buffer)
                whole.update(buffer)
            sink.write(*buffers)
            size = sum(map(len, buffers))
            index[row] = offset, size, own.intdigest()
            keys[sample.key] = None
            offset += size
        if len(keys) < num_samples or not fields:
            raise ValueError(f"{name}: only {len(keys)} of {num_samples} samples came, with the fields {fields}.")
        whole.update(END)
        sink.write(END)
    index_file = encode_index(index)
    record = Record(
        format_version=FORMAT_VERSION,
        shard=name,
        spec_digest=spec_digest,
        num_samples=num_samples,
        num_bytes=offset + len(END),
        checksum=whole.hexdigest(),
        index_checksum=xxhash.xxh3_64_hexdigest(index_file),
        key_digest=key_digest(keys),
        first_key=next(iter(keys)),
        last_key=next(reversed(keys)),
        fields=fields,
        rejected=list(rejected),
    )
    store.write(f"{name}.idx.npy", index_file)
    store.write(f"{name}.json", canonical_json(asdict(record)))
    return record


def _fields_of(sample: Sample, dtypes: Mapping[str, str]) -> tuple[Field, ...]:
    return tuple(Field.of(name, array, dtypes.get(name)) for name, array in sample.arrays.items())


def discard(store: Store, name: str) -> None:
    """Delete a shard, its record first, so that no moment leaves a record without its shard."""
    for suffix in reversed(SUFFIXES):
        store.delete(f"{name}{suffix}")
