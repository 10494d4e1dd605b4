"""One sample from its shard straight into the rows of a batch: one scattered read, and nothing taken on trust."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shards.manifest import Manifest
from shards.store import Store
from shards.tar import BLOCK, MAX_TEXT_BYTES, Field, compare, explain, framer, parse_head, parse_text

READ_THROUGH_BYTES = 1 << 16  # a field this small is cheaper read and thrown away than skipped by another request
INDEX_CACHE_BYTES = 64 << 20  # 1.7 million samples of two fields; beyond it a shard's index is fetched once more

_DAMAGE = (ValueError, EOFError, FileNotFoundError)


class CorruptSampleError(ValueError):
    """A sample's bytes are missing or are not those that were written; the message names shard, row and remedy."""


Found = tuple[str, dict[str, Any]] | CorruptSampleError  # a sample's key and text, or what is wrong with it


def select(fields: Sequence[Field], names: Sequence[str] | None) -> tuple[Field, ...]:
    """The fields of these names, in the order of the names (None: all). Raises ValueError for one that is not there."""
    by_name = {field.name: field for field in fields}
    if names and len({*names}) < len(names):
        raise ValueError(f"Of the fields {', '.join(names)} one is named twice.")
    missing = [name for name in names or () if name not in by_name]
    if missing:
        raise ValueError(f"There is no field {missing[0]!r} in this data set, which has {', '.join(by_name)}.")
    return tuple(fields if names is None else (by_name[name] for name in names))


@dataclass
class Margins:
    """Memory for what surrounds one sample's tensors."""

    head: memoryview  # the JSON and the headers around it; replaced by a larger one when that is needed
    after: list[memoryview]  # the other headers and padding, and small fields that nobody wants


class _Place(NamedTuple):
    """Where a sample's bytes are, and what they must be."""

    name: str
    offset: int
    size: int
    head_bytes: int
    checksums: list[int]  # of its head and of each field that is read


class _Run(NamedTuple):
    """Parts of a sample that are read without a gap; the first run has the sample's head before them."""

    start: int  # behind the head, bytes
    parts: list[tuple[bool, int]]  # (True, row) or (False, margin) that the bytes go to


class SampleReader:
    """Reads the samples of one sealed data set by number. Safe to use from several threads at once."""

    def __init__(
        self, manifest: Manifest, store: Store, fields: Sequence[str] | None = None, checksums: bool = True
    ) -> None:
        """`fields`: names of those to read (None: all); large ones that are not among them are not read at all.

        `checksums`: compare what is read with the index's xxh3-64 of it. The bytes around the tensors are compared with
        the format in any case."""
        self.manifest = manifest
        self.fields = select(manifest.fields, fields)
        self.store = store
        # A sample is a head (the JSON with the headers around it), then each tensor and what follows it. All but the
        # head have fixed sizes, so the sample's size in the index gives the place of every tensor.
        self._frame = framer(manifest.fields)
        _, self._header_bytes, *after = (len(piece) for piece in self._frame("key", 0))
        rows = {field.name: row for row, field in enumerate(self.fields)}
        wanted = [field.name in rows or field.num_bytes <= READ_THROUGH_BYTES for field in manifest.fields]
        self._runs = [_Run(0, [])]
        self._margins: list[tuple[int | None, int]] = []  # for `Margins.after`: piece of the frame (None: field), bytes
        self._rest_bytes = 0
        is_skipping = False
        for index, field in enumerate(manifest.fields):
            around = wanted[index] or any(wanted[index + 1 : index + 2])
            parts = [(wanted[index], None, field.num_bytes), (around, index + 2, after[index])]
            for is_read, piece, num_bytes in parts:
                if is_read and is_skipping:
                    self._runs.append(_Run(self._rest_bytes, []))
                if is_read and piece is None and field.name in rows:
                    self._runs[-1].parts.append((True, rows[field.name]))
                elif is_read:
                    self._runs[-1].parts.append((False, len(self._margins)))
                    self._margins.append((piece, num_bytes))
                is_skipping = not is_read
                self._rest_bytes += num_bytes
        self._framed = {margin: piece for margin, (piece, _) in enumerate(self._margins) if piece is not None}
        self.checksums = checksums
        self._columns = [0, 1, 2, *(3 + manifest.fields.index(field) for field in self.fields)]  # of the index
        self._shards: dict[int, tuple[str, NDArray[np.uint64]]] = {}
        self._lock = threading.Lock()

    @property
    def neighbours(self) -> int:
        """How many samples that stand side by side are best read at once from this place; at least 1."""
        return max(1, self.store.request_bytes // (BLOCK + self._header_bytes + self._rest_bytes))

    def margins(self) -> Margins:
        """What `read` needs beside the rows of one sample."""
        return Margins(
            memoryview(bytearray(2 * BLOCK + self._header_bytes)),
            [memoryview(bytearray(num_bytes)) for _, num_bytes in self._margins],
        )

    def read(
        self, samples: Sequence[int], rows: Sequence[Sequence[memoryview]], margins: Sequence[Margins]
    ) -> list[Found]:
        """Fill the rows of some samples and return the key and text of each, or what is wrong with it.

        `rows`: for each sample the bytes of one row for each of `self.fields`. `margins`: for each sample some that
        nobody else uses meanwhile. Samples that stand side by side in a shard are one request, where that pays. Damage
        is read once more before it counts; the rows then hold anything. Other errors of the storage (OSError) are
        raised.

        All are fetched before the first is looked at: copying megabytes drives the interpreter out of the processor's
        caches, and coming back costs more than the checks themselves."""
        try:
            return self._read_sound(samples, rows, margins)
        except _DAMAGE:
            if len(samples) > 1:  # which one it is shows when each is read by itself
                return [self.read([sample], [own], [margin])[0] for sample, own, margin in zip(samples, rows, margins)]
        [sample] = samples
        self.store.forget(f"{self.manifest.shard_name(self.manifest.locate(sample)[0])}.tar")
        try:
            return self._read_sound(samples, rows, margins)
        except _DAMAGE as error:
            return [
                CorruptSampleError(
                    f"{self.place(sample)}: {error}. Check the data set with `shards verify {self.manifest.url}` and "
                    "make the shard again, or go on without such samples with on_corrupt: skip."
                )
            ]

    def place(self, sample: int) -> str:
        """Where a sample stands, for people."""
        shard, row = self.manifest.locate(sample)
        name = f"sample {sample} (row {row} of {self.manifest.url}/{self.manifest.shard_name(shard)}.tar)"
        known = self._shards.get(shard)
        return f"{name} at byte {known[1][row, 0]}" if known else name

    def _read_sound(
        self, samples: Sequence[int], rows: Sequence[Sequence[memoryview]], margins: Sequence[Margins]
    ) -> list[Found]:
        """As `read`, but raises one of _DAMAGE unless all samples are sound."""
        places = [self._locate(sample) for sample in samples]
        most = self.neighbours
        together: list[tuple[_Place, Sequence[memoryview], Margins]] = []
        ranges: list[tuple[int, list[memoryview]]] = []
        for place, following, own, margin in zip(places, [*places[1:], None], rows, margins):
            together.append((place, own, margin))
            ranges += self._scatter(place, own, margin)
            if len(together) < most and following and following[:2] == (place.name, place.offset + place.size):
                continue
            self.store.read_ranges(place.name, ranges)
            if self.checksums:
                for read, tensors, around in together:
                    compare([around.head[: read.head_bytes], *tensors], read.checksums)
            together, ranges = [], []
        return [self._parse(place, margin) for place, margin in zip(places, margins)]

    def _locate(self, sample: int) -> _Place:
        shard, row = self.manifest.locate(sample)
        name, index = self._index(shard)
        offset, size, *checksums = index[row].tolist()
        head_bytes = size - self._rest_bytes
        text_bytes = head_bytes - self._header_bytes - BLOCK  # with its padding
        if not 0 <= text_bytes <= MAX_TEXT_BYTES + BLOCK:
            raise ValueError(f"its {size} bytes in the index do not fit its fields")
        return _Place(name, offset, size, head_bytes, checksums)

    def _scatter(
        self, place: _Place, rows: Sequence[memoryview], margins: Margins
    ) -> Iterator[tuple[int, list[memoryview]]]:
        """What to read: byte offsets in the tar, and the buffers that the bytes from there on go to."""
        if place.head_bytes > len(margins.head):
            margins.head = memoryview(bytearray(2 * place.head_bytes))
        for start, parts in self._runs:
            buffers = [rows[index] if is_row else margins.after[index] for is_row, index in parts]
            if start == 0:
                yield place.offset, [margins.head[: place.head_bytes], *buffers]
            else:
                yield place.offset + place.head_bytes + start, buffers

    def _parse(self, place: _Place, margins: Margins) -> tuple[str, dict[str, Any]]:
        """Key and text of a sample from what surrounds its tensors, all of which is compared with the format."""
        key, text_size = parse_head(margins.head)
        if not self._is_framed(key, text_size, place.head_bytes, margins):
            raise ValueError(self._explain(place))
        return key, parse_text(margins.head[BLOCK : BLOCK + text_size])

    def _is_framed(self, key: str, text_size: int, head_bytes: int, margins: Margins) -> bool:
        """Whether every byte that was read and is neither JSON nor tensor is as the format has it."""
        pieces = self._frame(key, text_size)
        found = [margins.head[:BLOCK], margins.head[BLOCK + text_size : head_bytes]]
        found += [margins.after[margin] for margin in self._framed]
        return [bytes(each) for each in found] == [pieces[piece] for piece in (0, 1, *self._framed.values())]

    def _explain(self, place: _Place) -> str:
        """Why a sample is not what it should be, from all of its bytes."""
        data = bytearray(place.size)
        self.store.read_range(place.name, place.offset, [memoryview(data)])
        key, _ = parse_head(data)
        return explain(data, key, self.manifest.fields)

    def _index(self, shard: int) -> tuple[str, NDArray[np.uint64]]:
        """A shard's tar, and offset, size and checksums of its samples, uint64; those of the last shards are kept."""
        known = self._shards.get(shard)
        if known is None:
            index = self.manifest.read_index(self.store, shard)[:, self._columns]
            known = f"{self.manifest.shard_name(shard)}.tar", index
            with self._lock:
                self._shards[shard] = known
                while len(self._shards) * known[1].nbytes > INDEX_CACHE_BYTES:
                    del self._shards[next(iter(self._shards))]
        return known
