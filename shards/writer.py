"""One shard onto storage: its tar, then its index, then its record, which commits: without it there is no shard."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from shards.record import FORMAT_VERSION, SUFFIXES, Record, encode_index, key_digest
from shards.store import Sink, Store
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
    with store.writer(f"{name}.tar") as sink:
        index, keys, fields, checksum = _write_tar(sink, name, samples, num_samples, dtypes or {})
        index_file = encode_index(index)
        record = Record(
            format_version=FORMAT_VERSION,
            shard=name,
            spec_digest=spec_digest,
            num_samples=num_samples,
            num_bytes=int(index[-1, 0] + index[-1, 1]) + len(END),
            checksum=checksum,
            index_checksum=xxhash.xxh3_64_hexdigest(index_file),
            key_digest=key_digest(keys),
            first_key=keys[0],
            last_key=keys[-1],
            fields=fields,
            rejected=list(rejected),
        )
        record_file = canonical_json(asdict(record))
        if store.size(f"{name}.json") is not None and store.read(f"{name}.json") != record_file:
            store.delete(f"{name}.json")  # the record of other bytes must not speak for those that now come
    store.write(f"{name}.idx.npy", index_file)
    store.write(f"{name}.json", record_file)
    return record


def _write_tar(
    sink: Sink, name: str, samples: Iterable[Sample], num_samples: int, dtypes: Mapping[str, str]
) -> tuple[NDArray[np.uint64], list[str], tuple[Field, ...], str]:
    """Write all samples, and return their index, keys and fields, and the xxh3-64 of the tar."""
    index = list[tuple[int, ...]]()
    whole, keys, fields, offset = xxhash.xxh3_64(), dict[str, None](), None, 0
    for sample in samples:
        found = tuple(Field.of(name, array, dtypes.get(name)) for name, array in sample.arrays.items())
        fields = fields or found
        if found != fields:
            raise ValueError(f"{name}: sample {sample.key} has the fields {found}, the first one has {fields}.")
        if sample.key in keys or len(keys) == num_samples:
            raise ValueError(f"{name}: sample {sample.key} came twice or after all {num_samples} samples.")
        buffers = encode(sample)
        for buffer in buffers:
            whole.update(buffer)
        sink.write(*buffers)
        size = sum(map(len, buffers))
        head, tensors = b"".join(buffers[:3]), buffers[3::2]
        index.append((offset, size, *map(xxhash.xxh3_64_intdigest, [head, *tensors])))
        keys[sample.key] = None
        offset += size
    if len(keys) < num_samples or not fields:
        raise ValueError(f"{name}: only {len(keys)} of {num_samples} samples came, with the fields {fields}.")
    whole.update(END)
    sink.write(END)
    return np.array(index, np.uint64), list(keys), fields, whole.hexdigest()


def discard(store: Store, name: str) -> None:
    """Delete a shard, its record first, so that no moment leaves a record without its shard."""
    for suffix in reversed(SUFFIXES):
        store.delete(f"{name}{suffix}")
