"""Every byte of a data set against what spec, records, indices and manifest say of it."""

import errno
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import xxhash

from shards.manifest import MANIFEST, Manifest, Plan, load_manifest, read_plan
from shards.progress import progress
from shards.record import SUFFIXES, Record, complete_record, key_digest
from shards.store import Store
from shards.tar import END, Sample, decode

READ_BYTES = 8 << 20  # samples are read so many bytes at a time, or one by one where they are larger


@dataclass(frozen=True)
class Report:
    num_shards: int
    num_bytes: int  # read and checked
    seconds: float
    bad: dict[int, str]  # what is wrong with each bad shard, by its index

    def __str__(self) -> str:
        rate = self.num_bytes / self.seconds / 1e6
        counts = f"{self.num_shards - len(self.bad)} of {self.num_shards} shards are good"
        summary = f"{counts}; {self.num_bytes / 1e9:.3f} GB in {self.seconds:.1f} s, {rate:.0f} MB/s"
        return "\n".join([*(f"BAD {reason}" for reason in self.bad.values()), summary])


def verify(store: Store, shards: Sequence[int] | None = None, num_threads: int | None = None) -> Report:
    """Read the shards (default: all) of a root, sealed or not, and report those that are not as they should be.

    Checks records against spec and manifest, sizes, index, checksums, each sample's hash, headers, padding and JSON,
    and that keys are distinct. Memory is `num_threads` times the larger of READ_BYTES and the largest sample."""
    plan = read_plan(store)
    manifest = load_manifest(store) if store.size(MANIFEST) is not None else None
    sealed, bound = manifest.plan.spec_digest if manifest else None, plan.spec_digest
    if manifest and sealed != bound:
        raise ValueError(f"{store.url}: the manifest seals spec {sealed}, but the root is bound to {bound}.")
    indices = range(plan.num_shards) if shards is None else shards
    if beyond := [index for index in indices if index >= plan.num_shards]:
        raise ValueError(f"{store.url} has shards 0 to {plan.num_shards - 1}, not {beyond}.")
    start, bad, owners, num_bytes = time.perf_counter(), {}, dict[str, int](), 0
    total = int(manifest.tar_bytes[list(indices)].sum()) if manifest else None
    buffers = threading.local()  # one for each thread, reused
    pool = ThreadPoolExecutor(num_threads or max(os.cpu_count() or 1, store.concurrency))
    with progress(total=total, desc="verify", unit="B", unit_scale=True) as bar:
        try:
            for index, found in zip(indices, pool.map(lambda i: _checked(store, plan, manifest, i, buffers), indices)):
                if isinstance(found, str):
                    bad[index] = found
                    continue
                twin = owners.setdefault(found.key_digest, index)
                if twin != index:
                    bad[index] = f"{plan.shard_name(index)}: it holds the keys of {plan.shard_name(twin)}"
                num_bytes += found.num_bytes
                bar.update(found.num_bytes)
        finally:  # at Ctrl-C, say, shards that were not begun are left, and those on a slow link not waited for
            pool.shutdown(wait=False, cancel_futures=True)
    return Report(len(indices), num_bytes, time.perf_counter() - start, bad)


def _checked(store: Store, plan: Plan, manifest: Manifest | None, index: int, buffers: threading.local) -> Record | str:
    """The record of a good shard, or what is wrong with it, twice: a bit that flips on the way is no damage."""
    for _ in range(2):
        try:
            return check_shard(store, plan, manifest, index, buffers)
        except (ValueError, EOFError, FileNotFoundError) as error:
            wrong = str(error)
        except OSError as error:
            if error.errno != errno.EIO:  # a disk that lost the bytes; anything else is not the shard's fault
                raise
            wrong = str(error)
        for suffix in SUFFIXES:
            store.forget(plan.shard_name(index) + suffix)
    return f"{plan.shard_name(index)}: {wrong}"


def check_shard(store: Store, plan: Plan, manifest: Manifest | None, index: int, buffers: threading.local) -> Record:
    """The record of a shard in which everything is right. Raises ValueError, EOFError or FileNotFoundError otherwise.

    `buffers` is the caller's thread-local storage; its attribute `data` is reused from call to call."""
    name = plan.shard_name(index)
    record = complete_record(store, name, plan.spec_digest, store.size)
    _expect("number of samples", record.num_samples, len(plan.samples(index)))
    if manifest:
        _expect("fields, by the manifest,", record.fields, manifest.fields)
        _expect("checksum, by the manifest,", record.checksum, manifest.checksum(index))
        _expect("index checksum, by the manifest,", record.index_checksum, manifest.index_checksum(index))
    entries = record.read_index(store).tolist()
    whole, keys = xxhash.xxh3_64(), []
    for rows, data in _runs(store, name, entries, buffers):
        whole.update(data)
        for row in rows:
            offset, size, *checksums = entries[row]
            place = offset - entries[rows[0]][0]
            sample = data[place : place + size]
            try:
                keys.append(decode(sample, record.fields, checksums)[0])
            except ValueError as error:
                raise ValueError(f"sample {row}, at byte {offset}: {error}") from None
    end = bytearray(len(END))
    store.read_range(f"{name}.tar", record.num_bytes - len(END), [memoryview(end)])
    whole.update(end)
    _expect("end of the tar", bytes(end), END)
    _expect("checksum of the tar", whole.hexdigest(), record.checksum)
    _expect("digest of the keys", key_digest(keys), record.key_digest)
    _expect("first and last key", (keys[0], keys[-1]), (record.first_key, record.last_key))
    _expect("number of distinct keys", len(set(keys)), record.num_samples)
    return record


def _expect(what: str, found: object, expected: object) -> None:
    if found != expected:
        raise ValueError(f"the {what} is {found} and should be {expected}")


def _runs(
    store: Store, name: str, entries: list[list[int]], buffers: threading.local
) -> Iterator[tuple[range, memoryview]]:
    """The tar's samples in runs of neighbours: their rows and their bytes, valid until the next run."""
    first = 0
    while first < len(entries):
        start, num_bytes, end = entries[first][0], entries[first][1], first + 1
        while end < len(entries) and num_bytes + entries[end][1] <= READ_BYTES:
            num_bytes += entries[end][1]
            end += 1
        if len(getattr(buffers, "data", b"")) < num_bytes:
            buffers.data = bytearray(max(num_bytes, READ_BYTES))
        data = memoryview(buffers.data)[:num_bytes]
        store.read_range(f"{name}.tar", start, [data])
        yield range(first, end), data
        first = end


def read_sample(store: Store, manifest: Manifest, index: int) -> Sample:
    """Sample `index` of a sealed data set, checked like in `verify`; bfloat16 tensors as their bits in uint16.

    For looking at single samples; `ShardLoader` is for many. Raises ValueError, EOFError or FileNotFoundError."""
    shard, row = manifest.locate(index)
    name = manifest.shard_name(shard)
    entries = manifest.read_index(store, shard)
    offset, size, *checksums = entries[row].tolist()
    data = memoryview(bytearray(size))
    store.read_range(f"{name}.tar", offset, [data])
    try:
        key, text, tensors = decode(data, manifest.fields, checksums)
    except ValueError as error:
        raise ValueError(f"sample {index}, row {row} of {store.url}/{name}.tar: {error}.") from None
    arrays = {
        field.name: np.frombuffer(tensor, field.stored).reshape(field.shape)
        for field, tensor in zip(manifest.fields, tensors)
    }
    return Sample(key, text, arrays)
