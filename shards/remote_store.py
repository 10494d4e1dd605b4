"""What reads of buckets and web servers have in common: attempts at a transfer until it is whole or given up.

Every transfer goes on from the byte it had reached after a failure, and never mixes the bytes of two versions of an
object. How one answer is got is a store's own affair: see `http_store.py` and `object_store.py`."""

import itertools
import random
import threading
import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from shards.store import StorageConfig, Store, TransferError, as_bytes, check_name, unfilled


class RemoteStore(Store):
    """What http servers and buckets have in common: reading in pieces that may fail at any byte."""

    def __init__(self, url: str, options: StorageConfig) -> None:
        super().__init__(url.rstrip("/"), options)
        self.concurrency, self.request_bytes = options.concurrency, options.request_bytes
        self._versions: dict[str, Version] = {}
        self._parallelism = _Parallelism(options.concurrency)

    @property
    def useful_reads(self) -> int:
        return self._parallelism.reads

    @abstractmethod
    def open_body(self, name: str, offset: int, end: int | None, anew: bool) -> "Body":
        """One request for the bytes from `offset` to `end` (None: to the object's end), or to the object's end if
        that comes first. `anew` asks for fresh credentials. Raises Failure, and EOFError when `offset` lies beyond."""

    def read(self, name: str) -> bytes:
        pieces = itertools.repeat([memoryview(bytearray(1 << 16))])
        return b"".join(map(bytes, self._transfer(name, 0, None, pieces, Version(), expected=False)))

    def read_range(self, name: str, offset: int, buffers: Sequence[memoryview | np.ndarray]) -> None:
        views = [view for view in map(as_bytes, buffers) if view.nbytes]
        end = offset + sum(view.nbytes for view in views)
        version = self._versions.setdefault(name, Version())
        for _ in self._transfer(name, offset, end, iter([views]), version):
            pass
        self._parallelism.finished(end - offset)

    def stream(self, name: str, offset: int = 0, chunk_bytes: int = 1 << 20) -> Iterator[memoryview]:
        return self._transfer(name, offset, None, itertools.repeat([memoryview(bytearray(chunk_bytes))]), Version())

    def _transfer(
        self,
        name: str,
        offset: int,
        end: int | None,
        pieces: Iterator[list[memoryview]],
        version: "Version",
        expected: bool = True,
    ) -> Iterator[memoryview]:
        """Fill the views of each piece in turn with the bytes from `offset` to `end`; yield its first when it is full.

        With `end` None the last may be yielded in part. `version` holds, or is given, what every piece must have been
        read from. An object that is `expected` is looked for more than once."""
        what = f"{self.url}/{check_name(name)}"
        patience = Patience(what, self.options, expected)
        start, piece = offset, next(pieces)
        left: Sequence[memoryview] = piece
        while left:
            try:
                with closing(self.open_body(name, offset, end, anew=patience.refused)) as body:
                    version.check(body, what)
                    while left and (count := body.read_into(left)):
                        patience.progress(count)
                        offset, left = offset + count, unfilled(left, count)
                        if not left:
                            yield piece[0]
                            left = piece = next(pieces, [])
                if left and end is not None:
                    raise EOFError(
                        f"{what} ends at byte {offset}; wanted {end - start} bytes from {start}, got {offset - start}. "
                        "The object is shorter than its index says: run `shards verify` and make it again."
                    )
                break
            except OutOfRangeError as error:
                if end is not None or offset != (error.size or 0):
                    raise
                break  # all of it is here: it is empty, or an answer before this one had announced too much
            except Failure as failure:
                patience.wait(offset, failure)
        if left and left[0].nbytes < piece[0].nbytes:
            yield piece[0][: piece[0].nbytes - left[0].nbytes]


class Body(Protocol):
    """The answer to one request: bytes from the offset that was asked for."""

    tag: str | None  # the server's name for this version of the object
    size: int | None  # of the whole object

    def read_into(self, views: Sequence[memoryview]) -> int:
        """Fill the views from their beginning on, at least one byte; 0 at the end of what was asked for. Raises
        Failure."""

    def close(self) -> None: ...


class Failure(Exception):
    """A request that did not bring all it should have, but may if it is made again."""

    def __init__(
        self, reason: str, retry_after: float = 0.0, error: type[OSError] = TransferError, attempts: int | None = None
    ) -> None:
        super().__init__(reason)
        self.retry_after, self.error, self.attempts = retry_after, error, attempts


class OutOfRangeError(EOFError):
    """A request for bytes behind the end of an object, which has `size`, if the server says so."""

    def __init__(self, what: str, offset: int, size: int | None = None) -> None:
        super().__init__(f"{what} has {'fewer' if size is None else size} bytes; wanted those from {offset} on.")
        self.size = size


@dataclass
class Version:
    """The version of an object that its first piece came from, and all others must; told by tag, or else by size."""

    tag: str | None = None
    size: int | None = None

    def check(self, body: Body, what: str) -> None:
        tagged = self.tag is not None and body.tag is not None
        mine, its = (self.tag, body.tag) if tagged else (self.size, body.size)
        if None not in (mine, its) and mine != its:
            raise TransferError(
                f"{what} was replaced while it was read: it was {self.tag} with {self.size} bytes and is "
                f"{body.tag} with {body.size}. Sealed shards never change; if this one was made again, start again."
            )
        self.tag, self.size = self.tag or body.tag, body.size if self.size is None else self.size


class RefusedError(TransferError, PermissionError):
    """A remote place that kept refusing: 401, 403."""


class AbsentError(TransferError, FileNotFoundError):
    """An object that a remote place kept saying not to have: 404, 410."""


PROGRESS_BYTES = 1 << 16  # what an attempt must bring to count as going on, and a connection in each stall_seconds


class Patience:
    """How often and how long one transfer is tried again: bounds on the attempts and seconds without progress. Only an
    object that is `expected` is looked for more than once."""

    def __init__(self, what: str, options: StorageConfig, expected: bool = True) -> None:
        self._what, self._options, self._expected = what, options, expected
        self._bytes = self._attempts = self._all_attempts = 0
        self._since = time.monotonic()
        self.refused = False

    def progress(self, count: int) -> None:
        self._bytes += count
        if self._bytes >= PROGRESS_BYTES:
            self._bytes, self._attempts, self._since = 0, 0, time.monotonic()
            self.refused = False

    def wait(self, offset: int, failure: Failure) -> None:
        """Sleep before the next attempt, or raise the error that ends the transfer."""
        self._attempts += 1
        self._all_attempts += 1
        self.refused = failure.error is RefusedError
        pause = min(self._options.backoff_seconds * 2 ** (self._attempts - 1), 15.0)
        pause = max(pause * random.SystemRandom().uniform(0.5, 1.0), failure.retry_after)
        elapsed = time.monotonic() - self._since
        limit = min(failure.attempts or self._options.retry_attempts, self._options.retry_attempts)
        if failure.error is AbsentError and not self._expected:
            limit = 1
        if self._attempts >= limit or elapsed + pause > self._options.retry_seconds:
            raise failure.error(
                f"{self._what}: gave up at byte {offset} after {self._all_attempts} attempts, the last "
                f"{self._attempts} without progress in {elapsed:.1f} s; last reason: {failure}"
            ) from None
        time.sleep(pause)


class _Parallelism:
    """Finds how many reads at once a place rewards: many where each waits long or comes slowly, few where not, since
    threads that wait for one another cost CPU. It tries twice as many, or a third fewer, goes on while that is right,
    and otherwise turns round and looks again after ever longer pauses."""

    WINDOW_SECONDS = 0.5
    MOST_PAUSES = 16

    def __init__(self, most: int) -> None:
        self._most = most
        self.reads = self._kept = min(most, 8)
        self._rate = 0.0  # bytes/s of `_kept` at once
        self._is_rising = True
        self._pauses, self._paused = 1, 0
        self._is_settling = True  # connections and memory are new
        self._bytes = self._count = 0
        self._since = time.monotonic()
        self._lock = threading.Lock()

    def finished(self, num_bytes: int) -> None:
        """Note that a read has ended, and after some of them draw conclusions."""
        with self._lock:
            self._bytes, self._count = self._bytes + num_bytes, self._count + 1
            seconds = time.monotonic() - self._since
            if seconds > self.WINDOW_SECONDS and self._count >= 2 * self.reads:
                reads = self.reads
                if not self._is_settling:
                    self._adapt(self._bytes / seconds)
                self._is_settling = self.reads != reads
                self._since, self._bytes, self._count = time.monotonic(), 0, 0

    def _adapt(self, rate: float) -> None:
        """Keep more reads if they brought a tenth more bytes, fewer if they brought about as many."""
        if self.reads == self._kept:
            self._rate = rate
        elif rate > self._rate * (1.1 if self._is_rising else 0.97):
            self._kept, self._rate, self._pauses = self.reads, max(rate, self._rate), 0
        else:
            self.reads, self._is_rising = self._kept, not self._is_rising
            self._pauses, self._paused = min(2 * self._pauses + 1, self.MOST_PAUSES), 0
        if self._paused < self._pauses:
            self._paused += 1
            return
        more, fewer = min(self._most, 2 * self._kept), max(2, self._kept * 2 // 3)
        self._is_rising = fewer == self._kept or (self._is_rising and more > self._kept)
        self.reads = more if self._is_rising else fewer
