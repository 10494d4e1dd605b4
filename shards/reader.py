"""One sample from its shard straight into the rows of a batch: one scattered read, and nothing taken on trust."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import xxhash
from numpy.typing import NDArray

from shards.manifest import Manifest
from shards.storage import Store
from shards.tar import BLOCK, MAX_TEXT_BYTES, Field, explain, frame, parse_head, parse_text

T = TypeVar("T")

READ_THROUGH_BYTES = 1 << 16  # a field this small is cheaper read and thrown away than skipped by another request
INDEX_CACHE_BYTES = 64 << 20  # 2.8 million samples; beyond it a shard's index is fetched again when it is needed

_SCRATCH, _SKIP = -1, -2  # where bytes go that are no row of the batch
_DAMAGE = (ValueError, EOFError, FileNotFoundError)


class CorruptSampleError(ValueError):
    """A sample's bytes are missing or are not those that were written; the message names shard, row and remedy."""


def select(fields: Sequence[Field], names: Sequence[str] | None) -> tuple[Field, ...]:
    """The fields of these names, in the order of the names (None: all). Raises ValueError for one that is not there."""
    by_name = {field.name: field for field in fields}
    missing = [name for name in names or () if name not in by_name]
    if missing:
        raise ValueError(f"There is no field {missing[0]!r} in this data set, which has {', '.join(by_name)}.")
    return tuple(fields if names is None else (by_name[name] for name in names))


class SampleReader:
    """Reads the samples of one sealed data set by number. Safe to use from several threads at once."""

    def __init__(
        self, manifest: Manifest, store: Store, fields: Sequence[str] | None = None, checksums: bool = True
    ) -> None:
        """`fields`: names of those to read (None: all); large ones that are not among them are not read at all.

        `checksums`: compare every sample's xxh3-64 with its index. It covers whole samples, so where fields are skipped
        (`self.checksums` is False then) only the bytes around the tensors are compared."""
        self.manifest = manifest
        self.fields = select(manifest.fields, fields)
        self.store = store
        # A sample is a head (the JSON with the headers around it), then each tensor and what follows it. All but the
        # head have fixed sizes, so the sample's size in the index gives the place of every tensor.
        _, self._header_bytes, *after = (len(piece) for piece in frame("key", 0, manifest.fields))
        rows = {field.name: row for row, field in enumerate(self.fields)}
        targets = [rows.get(f.name, _SCRATCH if f.num_bytes <= READ_THROUGH_BYTES else _SKIP) for f in manifest.fields]
        self._parts: list[tuple[int, int]] = []  # behind the head: (row of the batch, _SCRATCH or _SKIP; bytes)
        self._pieces: list[
            tuple[int, int]
        ] = []  # (which piece of the frame, where it is in the scratch behind the head)
        self._around_bytes = 0
        for index, (field, target, following) in enumerate(zip(manifest.fields, targets, [*targets[1:], _SKIP])):
            around = _SKIP if target == following == _SKIP else _SCRATCH
            self._add_part(target, field.num_bytes)
            if around == _SCRATCH:
                self._pieces.append((index + 2, self._around_bytes))
            self._add_part(around, after[index])
        self._rest_bytes = sum(num_bytes for _, num_bytes in self._parts)
        self.checksums = checksums and all(kind != _SKIP for kind, _ in self._parts)
        self._indices: OrderedDict[int, NDArray[np.uint64]] = OrderedDict()
        self._lock = threading.Lock()

    def _add_part(self, kind: int, num_bytes: int) -> None:
        self._parts.append((kind, num_bytes))
        self._around_bytes += num_bytes * (kind == _SCRATCH)

    @property
    def scratch_bytes(self) -> int:
        """Memory that `read` needs for what surrounds the tensors."""
        return BLOCK + MAX_TEXT_BYTES + BLOCK + self._header_bytes + self._around_bytes

    def read(
        self, samples: Sequence[int], rows: Sequence[Sequence[memoryview]], scratches: Sequence[memoryview]
    ) -> list[tuple[str, dict[str, Any]] | CorruptSampleError]:
        """Fill the rows of some samples and return the key and text of each, or what is wrong with it.

        `rows`: for each sample the bytes of one row for each of `self.fields`. `scratches`: for each sample
        `scratch_bytes` of memory that nobody else uses meanwhile. Damage is read once more before it counts; the rows
        then hold anything. Other errors of the storage (OSError) are raised.

        All are fetched before the first is looked at: copying megabytes drives the interpreter out of the processor's
        caches, and coming back costs more than the checks themselves."""
        extents = [
            self._unless_damaged(self._fetch, sample, own, scratch)
            for sample, own, scratch in zip(samples, rows, scratches)
        ]
        found = [
            extent and self._unless_damaged(self._parse, extent, scratch) for extent, scratch in zip(extents, scratches)
        ]
        return [
            ok or self._read_again(sample, own, scratch)
            for ok, sample, own, scratch in zip(found, samples, rows, scratches)
        ]

    def _unless_damaged(self, step: Callable[..., T], *arguments: Any) -> T | None:
        try:
            return step(*arguments)
        except _DAMAGE:
            return None

    def place(self, sample: int) -> str:
        """Where a sample stands, for people."""
        shard, row = self.manifest.locate(sample)
        return f"sample {sample} (row {row} of {self.manifest.url}/{self.manifest.shard_name(shard)}.tar)"

    def _read_again(
        self, sample: int, rows: Sequence[memoryview], scratch: memoryview
    ) -> tuple[str, dict[str, Any]] | CorruptSampleError:
        self.store.forget(f"{self.manifest.shard_name(self.manifest.locate(sample)[0])}.tar")
        try:
            return self._parse(self._fetch(sample, rows, scratch), scratch)
        except _DAMAGE as error:
            return CorruptSampleError(
                f"{self.place(sample)}: {error}. Check the data set with `shards verify {self.manifest.url}` and make "
                "the shard again, or go on without such samples with on_corrupt: skip."
            )

    def _fetch(self, sample: int, rows: Sequence[memoryview], scratch: memoryview) -> tuple[str, int, int]:
        """Read a sample's bytes into rows and scratch; returns where they stand: name, offset and size."""
        shard, row = self.manifest.locate(sample)
        name = f"{self.manifest.shard_name(shard)}.tar"
        offset, size, checksum = self._index(shard)[row].tolist()
        head_bytes = size - self._rest_bytes
        if not BLOCK + self._header_bytes <= head_bytes <= len(scratch) - self._around_bytes:
            raise ValueError(f"its {size} bytes in the index do not fit its fields")
        runs = self._scatter(offset, head_bytes, rows, scratch)
        for start, buffers in runs:
            self.store.read_range(name, start, buffers)
        if self.checksums:
            state = xxhash.xxh3_64()
            for buffer in runs[0][1]:
                state.update(buffer)
            if state.intdigest() != checksum:
                raise ValueError(f"its bytes have the checksum {state.hexdigest()} and not {checksum:016x}")
        return name, offset, size

    def _parse(self, extent: tuple[str, int, int], scratch: memoryview) -> tuple[str, dict[str, Any]]:
        """Key and text of a sample from what surrounds its tensors, all of which is compared with the format."""
        key, text_size = parse_head(scratch)
        if not self._is_framed(key, text_size, extent[2] - self._rest_bytes, scratch):
            raise ValueError(self._explain(*extent))
        return key, parse_text(scratch[BLOCK : BLOCK + text_size])

    def _scatter(
        self, offset: int, head_bytes: int, rows: Sequence[memoryview], scratch: memoryview
    ) -> list[tuple[int, list[memoryview]]]:
        """What to read: byte offsets in the tar, and the buffers that the bytes from there on go to."""
        buffers = [scratch[:head_bytes]]
        runs = [(offset, buffers)]
        offset += head_bytes
        used = head_bytes
        skipping = False
        for kind, num_bytes in self._parts:
            if kind != _SKIP:
                if skipping:
                    buffers = []
                    runs.append((offset, buffers))
                if kind == _SCRATCH:
                    buffers.append(scratch[used : used + num_bytes])
                    used += num_bytes
                else:
                    buffers.append(rows[kind])
            skipping = kind == _SKIP
            offset += num_bytes
        return runs

    def _is_framed(self, key: str, text_size: int, head_bytes: int, scratch: memoryview) -> bool:
        """Whether every byte that was read and is neither JSON nor tensor is as the format has it."""
        pieces = frame(key, text_size, self.manifest.fields)
        places = [(0, 0), (1, BLOCK + text_size), *((piece, head_bytes + place) for piece, place in self._pieces)]
        return len(pieces[1]) == head_bytes - BLOCK - text_size and all(
            bytes(scratch[place : place + len(pieces[piece])]) == pieces[piece] for piece, place in places
        )

    def _explain(self, name: str, offset: int, size: int) -> str:
        """Why a sample is not what it should be, from all of its bytes."""
        data = bytearray(size)
        self.store.read_range(name, offset, [memoryview(data)])
        key, _ = parse_head(data)
        return explain(data, key, self.manifest.fields)

    def _index(self, shard: int) -> NDArray[np.uint64]:
        """Offset, size and checksum of each sample of a shard, uint64 [num_samples, 3]; the last used ones are kept."""
        with self._lock:
            if shard in self._indices:
                self._indices.move_to_end(shard)
                return self._indices[shard]
        index = self.manifest.read_index(self.store, shard)
        with self._lock:
            self._indices[shard] = index
            while len(self._indices) * index.nbytes > INDEX_CACHE_BYTES:
                self._indices.popitem(last=False)
        return index
