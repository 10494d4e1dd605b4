"""Ranges of remote shards kept on a node's own disk, so that later epochs and runs read them from there.

    <cache_dir>/audiosep-shards/<manifest digest>/<object>/<offset>-<size>.range    the bytes and their xxh3-64
    <cache_dir>/audiosep-shards/kept-bytes                                          how many there are, or more

A sealed data set never changes, and its manifest's digest names it; so a file, once there, is right for ever, whoever
wrote it. Any number of processes and nodes may share the folder. What is not right, or not there, is read from the
source; nothing here can make a read fail."""

import fcntl
import logging
import os
import re
import threading
import time
from collections.abc import Container, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from shards.local_store import LocalStore
from shards.store import Buffer, NoRangeError, Range, Sink, Store, as_bytes

log = logging.getLogger(__name__)

_FOLDER = "audiosep-shards"
_RANGE = re.compile(r"[0-9a-f]{32}/.+/\d+-\d+\.range")
_COUNT = "kept-bytes"
_CHECKSUM_BYTES = 8


def cached(store: Store, digest: str) -> Store:
    """The store of a data set with this manifest digest, with a cache before it where its options name a folder."""
    return CachedStore(store, digest) if store.options.cache_dir else store


class CachedStore(Store):
    """Reads ranges of `source` and keeps them; everything else goes to `source` as it is."""

    def __init__(self, source: Store, digest: str) -> None:
        super().__init__(source.url, source.options)
        self.concurrency, self.request_bytes = source.concurrency, source.request_bytes
        self._source, self._digest = source, digest
        folder = Path(source.options.cache_dir or "").expanduser() / _FOLDER
        self._kept = LocalStore(str(folder), source.options, durable=False)
        self._room = _Room(self._kept, source.options.cache_bytes)
        self._locks: dict[str, threading.Lock] = {}

    @property
    def useful_reads(self) -> int:
        return self._source.useful_reads

    def __reduce__(self) -> tuple[Any, ...]:
        return CachedStore, (self._source, self._digest)

    def read_range(self, name: str, offset: int, buffers: Sequence[memoryview | np.ndarray]) -> None:
        self.read_ranges(name, [(offset, buffers)])

    def read_ranges(self, name: str, ranges: Sequence[Range]) -> None:
        """Each range is kept by itself, so that it is found again whatever it is read together with next time."""
        missing = [each for each in ranges if not self._read_kept(self._kept_name(name, each), each[1])]
        if not missing:
            return
        try:
            self._source.read_ranges(name, missing)
        except NoRangeError:
            for offset, buffers in missing:
                self._read_from_whole(name, offset, buffers)
            return
        for each in missing:
            self._keep(self._kept_name(name, each), each[1])

    def _kept_name(self, name: str, wanted: Range) -> str:
        offset, buffers = wanted
        return f"{self._digest}/{name}/{offset}-{_num_bytes(buffers)}.range"

    def _keep(self, kept: str, buffers: Sequence[memoryview | np.ndarray]) -> None:
        if self._room.take(_num_bytes(buffers)):
            try:
                with self._kept.writer(kept) as sink:
                    sink.write(*buffers, _checksum(buffers))
            except OSError as error:
                self._room.close(error)

    def _read_kept(self, kept: str, buffers: Sequence[memoryview | np.ndarray]) -> bool:
        """Fill the buffers from a kept range; False if it is not there or broken."""
        checksum = bytearray(_CHECKSUM_BYTES)
        try:
            self._kept.read_range(kept, 0, [*buffers, memoryview(checksum)])
            if checksum == _checksum(buffers):
                self._room.used(kept)
                return True
        except FileNotFoundError:
            return False
        except (NotADirectoryError, PermissionError) as error:  # of the folder: nothing will be found in it
            self._room.close(error)
            return False
        except (EOFError, OSError) as error:
            log.warning("A kept range cannot be read, so its source is: %s", error)
        self._discard(kept)
        return False

    def _read_from_whole(self, name: str, offset: int, buffers: Sequence[memoryview | np.ndarray]) -> None:
        """Fill the buffers from a kept copy of the whole object, made first if there is none."""
        size = self._source.size(name)
        if size is None:
            raise FileNotFoundError(f"{self.url}/{name} does not exist.")
        whole = f"{self._digest}/{name}/0-{size}.range"
        with self._locks.setdefault(name, threading.Lock()):
            if self._kept.size(whole) != size + _CHECKSUM_BYTES:
                if not self._room.take(size):
                    raise self._no_room(name, size, "has no room")
                state = xxhash.xxh3_64()
                try:
                    with self._kept.writer(whole) as sink:
                        for piece in self._source.stream(name):
                            state.update(piece)
                            sink.write(piece)
                        sink.write(state.digest())
                except OSError as error:
                    if error.errno is None:  # the source's own
                        raise
                    raise self._no_room(name, size, f"gave {error}") from None
        self._kept.read_range(whole, offset, buffers)
        self._room.used(whole)

    def _no_room(self, name: str, size: int, reason: str) -> NoRangeError:
        return NoRangeError(
            f"{self.url}: the server sends whole objects only, and cache_dir ({self.options.cache_dir}), which has to "
            f"take the {size} bytes of {name}, {reason}. Make room, raise cache_bytes or name another cache_dir."
        )

    def forget(self, name: str) -> None:
        for kept, _ in list(self._kept.list(f"{self._digest}/{name}/")):
            self._discard(kept)
        self._source.forget(name)

    def _discard(self, kept: str) -> None:
        with suppress(OSError):
            self._kept.delete(kept)

    def read(self, name: str) -> bytes:
        return self._source.read(name)

    def stream(self, name: str, offset: int = 0, chunk_bytes: int = 1 << 20) -> Iterator[memoryview]:
        return self._source.stream(name, offset, chunk_bytes)

    def size(self, name: str) -> int | None:
        return self._source.size(name)

    def list(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        return self._source.list(prefix)

    def writer(self, name: str) -> AbstractContextManager[Sink]:
        return self._source.writer(name)

    def create(self, name: str, data: Buffer) -> bool:
        return self._source.create(name, data)

    def delete(self, name: str) -> None:
        self._source.delete(name)

    def sweep(self, prefix: str = "", rewritten: Container[str] = ()) -> Sequence[str]:
        return self._source.sweep(prefix, rewritten)


class _Room:
    """How much more may be kept, counted for all processes in a file of the folder. What lay unused since before this
    process began makes room for what it reads; what this process has used stays, because to replace ranges of one
    shuffled epoch by others gains nothing."""

    def __init__(self, kept: LocalStore, limit: int) -> None:
        self._kept, self._limit = kept, limit
        self._began = time.time()
        self._lock = threading.Lock()
        self._open, self._swept = True, False

    def take(self, size: int) -> bool:
        """Whether a range of this size may be written. Once the folder is full of what is in use, no more are."""
        try:
            with self._lock:
                self._open = self._open and self._count(size + _CHECKSUM_BYTES)
                return self._open
        except OSError as error:
            self.close(error)
            return False

    def _count(self, size: int) -> bool:
        """Count so many bytes more, unless they are too many even when all have been measured."""
        if not self._swept:
            self._kept.sweep()
            self._swept = True
        os.makedirs(self._kept.url, exist_ok=True)
        path = os.path.join(self._kept.url, _COUNT)
        with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0) as file:
            with suppress(OSError):  # where a shared file system has no locks, the count is only nearly right
                fcntl.flock(file, fcntl.LOCK_EX)
            total = size + (int.from_bytes(file.read(8), "big") or self._limit)
            if total > self._limit:
                total = size + self._measure(size)
            if total <= self._limit:
                os.pwrite(file.fileno(), total.to_bytes(8, "big"), 0)
            return total <= self._limit

    def _measure(self, size: int) -> int:
        """The bytes that are kept, once what is old has made room for `size` and for some time."""
        found = sorted(self._ranges())
        total = sum(num_bytes for _, num_bytes, _ in found)
        for used, num_bytes, name in found:
            if total + max(size, self._limit // 16) <= self._limit or used >= self._began:
                break
            self._kept.delete(name)
            total -= num_bytes
        return total

    def used(self, name: str) -> None:
        with suppress(OSError):  # another process may have removed it
            os.utime(os.path.join(self._kept.url, name))

    def _ranges(self) -> Iterator[tuple[float, int, str]]:
        """When each kept range was last used, its bytes, and its name; nothing else in the folder counts as ours."""
        for name, num_bytes in self._kept.list():
            if _RANGE.fullmatch(name):
                with suppress(FileNotFoundError):  # another process may have removed it
                    yield os.stat(os.path.join(self._kept.url, name)).st_mtime, num_bytes, name

    def close(self, error: OSError) -> None:
        """Keep no more: the disk is full or broken."""
        with self._lock:
            was_open, self._open = self._open, False
        if was_open:
            log.warning("Nothing more is kept in %s: %s", self._kept.url, error)


def _num_bytes(buffers: Sequence[memoryview | np.ndarray]) -> int:
    return sum(buffer.nbytes for buffer in buffers)


def _checksum(buffers: Sequence[memoryview | np.ndarray]) -> bytes:
    state = xxhash.xxh3_64()
    for buffer in buffers:
        state.update(as_bytes(buffer))
    return state.digest()
