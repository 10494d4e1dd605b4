"""What every place where shards live has to do: the contract of folders, buckets and web servers.

Everything that reads or writes a data set goes through a `Store`. What a store promises is what the shard format leans
on: a name is absent or whole, never partial; what `write` returned from survives a power cut; a read gives exactly the
bytes asked for or raises."""

import functools
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Annotated, Any, Protocol, TypeVar

import numpy as np
from pydantic import ConfigDict, Field

log = logging.getLogger(__name__)

T = TypeVar("T")
Buffer = bytes | bytearray | memoryview | np.ndarray
MAX_VECTOR = 1024  # buffers that one preadv or recvmsg takes (IOV_MAX)
Range = tuple[int, Sequence[memoryview | np.ndarray]]  # from which byte on, and what is to be filled from there


@dataclass(frozen=True)
class StorageConfig:
    """How places are reached. Credentials are not among the keys: they come from the usual environment variables,
    profiles and instance roles, so that no config, log or checkpoint can hold them."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    endpoint: Annotated[
        str | None, Field(description="URL of an S3 or Azure service other than the provider's own; no credentials")
    ] = None
    region: Annotated[str | None, Field(description="region of the bucket; the environment's by default")] = None
    anonymous: Annotated[bool, Field(description="read a public bucket without credentials")] = False
    signed_urls: Annotated[
        bool, Field(description="read s3 by presigned URLs, the fastest way; false where a bucket policy forbids them")
    ] = True
    http_token_file: Annotated[
        str | None, Field(description="file with a bearer token for http(s), such as ~/.cache/huggingface/token")
    ] = None
    concurrency: Annotated[
        int, Field(ge=1, description="remote reads in flight at once, at most; as many run as raise the throughput")
    ] = 96
    request_bytes: Annotated[
        int, Field(ge=1, description="samples that stand side by side are one remote read up to this size, bytes")
    ] = 16 << 20
    part_bytes: Annotated[
        int, Field(ge=5 << 20, description="part of a multipart upload, bytes; an object has at most 10,000")
    ] = 16 << 20
    retry_attempts: Annotated[
        int, Field(ge=1, description="attempts in a row without progress before a transfer fails")
    ] = 12
    retry_seconds: Annotated[
        float, Field(gt=0, description="time without progress before a transfer fails, seconds")
    ] = 180.0
    backoff_seconds: Annotated[
        float, Field(gt=0, description="pause before the second attempt, doubled for each further one, seconds")
    ] = 0.1
    stall_seconds: Annotated[
        float, Field(gt=0, description="a connection that brings less than 64 KiB in this time is given up, seconds")
    ] = 20.0
    cache_dir: Annotated[
        str | None, Field(description="folder on a local disk that keeps what was read, for the next epoch or run")
    ] = None
    cache_bytes: Annotated[
        int, Field(ge=0, description="most that is kept there, by all processes that share the folder, bytes")
    ] = 100_000_000_000
    max_open_files: Annotated[
        int, Field(ge=1, description="descriptors of local files kept open between reads, for each store")
    ] = 128
    stale_temporary_hours: Annotated[
        float, Field(gt=0, description="age after which another machine's unfinished object counts as abandoned, hours")
    ] = 24.0


class TransferError(OSError):
    """A remote place that kept failing, or gave something else than before, until the transfer was given up."""


class UploadError(TransferError):
    """A large object that a place stopped taking midway; whoever can make its bytes once more may begin anew."""


class NoRangeError(TransferError):
    """A server that sends whole objects only."""


class Sink(Protocol):
    """An object being written; it appears under its name when the `Store.writer` block ends without an exception."""

    def write(self, *buffers: Buffer) -> None: ...


class Store(ABC):
    """One folder or prefix. Names are relative POSIX paths below it, such as `0012/shard-0012345.tar`.

    Stores are safe to use from several threads, and travel to other processes by pickle as their URL and options."""

    url: str
    """Printable: never holds credentials."""
    concurrency: int
    """Reads that may run at once, enough to hide the place's latency."""
    request_bytes: int
    """How much of what stands side by side is best read at once; 0 where a read costs no more than its bytes."""

    def __init__(self, url: str, options: StorageConfig) -> None:
        self.url = url
        self.options = options

    @property
    def useful_reads(self) -> int:
        """Reads at once that the place has been seen to reward lately: at most `concurrency`."""
        return self.concurrency

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.url, self.options)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The whole of a small object. Raises FileNotFoundError naming it when it is absent."""

    @abstractmethod
    def read_range(self, name: str, offset: int, buffers: Sequence[memoryview | np.ndarray]) -> None:
        """Fill every buffer, one after the other, with the object's bytes from `offset` on.

        Buffers are writable and contiguous, of any item type. Raises EOFError when the object ends before the last is
        full, FileNotFoundError when it is absent."""

    def read_ranges(self, name: str, ranges: Sequence[Range]) -> None:
        """As `read_range` for each of the ranges, which follow one another; those that touch are one read."""
        for offset, buffers in joined(ranges) if len(ranges) > 1 else ranges:
            self.read_range(name, offset, buffers)

    def forget(self, name: str) -> None:  # noqa: B027 (most places keep nothing)
        """Drop what is kept of an object nearer than the place itself, because it gave wrong bytes."""

    @abstractmethod
    def stream(self, name: str, offset: int = 0, chunk_bytes: int = 1 << 20) -> Iterator[memoryview]:
        """The object from `offset` to its end in pieces; each is valid until the next is asked for."""

    @abstractmethod
    def writer(self, name: str) -> AbstractContextManager[Sink]:
        """Write a large object piece by piece. It appears whole, replacing an older one, when the block ends cleanly;
        any exception, KeyboardInterrupt included, leaves what was there before and nothing beside it."""

    def write(self, name: str, data: Buffer) -> None:
        """Put an object, replacing an older one: atomic, and durable on return."""
        with self.writer(name) as sink:
            sink.write(data)

    @abstractmethod
    def create(self, name: str, data: Buffer) -> bool:
        """Put an object unless there is one already; False when there was. Of several callers one gets True.

        A bucket's answer may be lost after it took the object. It is asked again then, and bytes that are there and
        equal count as ours: of several callers with equal bytes more than one may get True."""

    @abstractmethod
    def size(self, name: str) -> int | None:
        """Bytes of an object; None when it is absent."""

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """Names that start with `prefix`, sorted, with their sizes; unfinished objects are never among them."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove an object; an absent one is fine."""

    @abstractmethod
    def sweep(self, prefix: str = "", rewritten: Container[str] = ()) -> Sequence[str]:
        """Remove what dead writers left unfinished below names that start with `prefix`, and return its names.

        What a live writer may still be writing, here or on another machine, stays. But a bucket can't tell, and drops
        all uploads to names in `rewritten`, which the caller writes next: a live writer of one gets an UploadError."""


def anew(write: Callable[[], T]) -> T:
    """What `write` returns, which is called again after an UploadError, twice at most."""
    for _ in range(2):
        try:
            return write()
        except UploadError as error:
            log.warning("%s; it is done again", error)
    return write()


def joined(ranges: Sequence[Range]) -> Iterator[Range]:
    """The same bytes in as few ranges as possible; `ranges` follow one another."""
    start, buffers = ranges[0][0], list(ranges[0][1])
    end = start + sum(buffer.nbytes for buffer in buffers)
    for offset, more in ranges[1:]:
        if offset != end:
            yield start, buffers
            start, buffers, end = offset, [], offset
        buffers += more
        end += sum(buffer.nbytes for buffer in more)
    yield start, buffers


@functools.lru_cache(maxsize=4096)
def check_name(name: str) -> str:
    """The name, when it stays below its store; names come from manifests, which are not trusted."""
    path = PurePosixPath(name)
    if path.is_absolute() or not path.parts or ".." in path.parts or "\0" in name:
        raise ValueError(f"{name!r} is not a relative name below its folder or prefix.")
    return name


def as_bytes(buffer: Buffer) -> memoryview:
    """The same memory as plain bytes."""
    if isinstance(buffer, np.ndarray):
        buffer = buffer.reshape(-1).view(np.uint8).data  # memoryview.cast refuses float16
    return memoryview(buffer).cast("B")


def unfilled(views: Sequence[memoryview], count: int) -> list[memoryview]:
    """What is left of the views when their first `count` bytes are done."""
    for index, view in enumerate(views):
        if count < view.nbytes:
            return [view[count:], *views[index + 1 :]]
        count -= view.nbytes
    return []
