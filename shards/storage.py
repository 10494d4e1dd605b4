"""Where shards live: one folder or bucket prefix, with the same few operations for each kind of place.

Everything that reads or writes a data set goes through a `Store`. What a store promises is what the shard format leans
on: a name is absent or whole, never partial; what `write` returned from survives a power cut; a read gives exactly the
bytes asked for or raises."""

import functools
import os
import platform
import re
import secrets
import threading
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Protocol
from urllib.parse import unquote, urlsplit

import numpy as np
import xxhash
from pydantic import ConfigDict, Field

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
        return open_store, (self.url, self.options)

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
        """Put an object unless there is one already; False when there was. Of several callers one gets True."""

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
    def sweep(self, prefix: str = "") -> Sequence[str]:
        """Remove what dead writers left unfinished below names that start with `prefix`, and return its names.

        What a live writer may still be writing, here or on another machine, stays."""


def open_store(url: str | os.PathLike[str], options: StorageConfig | None = None) -> Store:
    """The store at a path or URL; nothing is touched or contacted until it is used.

    Raises ValueError for a URL with a password, user name or query, which would end up in manifests and logs."""
    options = options or StorageConfig()
    text = os.fspath(url)
    parts = urlsplit(text if "://" in text else "")
    if parts.scheme in ("", "file"):
        return LocalStore(unquote(parts.path) if parts.scheme else text, options)
    for each in (parts, urlsplit(options.endpoint or "")):
        if each.password or each.query or (each.username and parts.scheme not in ("abfs", "abfss")):
            raise ValueError(
                f"The URL of {each.hostname} holds a user name, password or query. It would be stored and printed; "
                "give credentials by the environment, a profile or http_token_file."
            )
    if parts.scheme in ("http", "https"):
        from shards.http_store import HttpStore

        return HttpStore(text, options)
    if parts.scheme in ("s3", "gs", "az", "abfs", "abfss"):
        from shards.object_store import ObjectStore

        return ObjectStore(text, options)
    raise ValueError(
        f"{text}: there is no {parts.scheme}:// here; use a path, file://, s3://, gs://, az://, abfs:// or http(s)://."
    )


def open_object(url: str | os.PathLike[str], options: StorageConfig | None = None) -> tuple[Store, str]:
    """The store that holds the object at a path or URL, and the object's name in it."""
    folder, name = os.path.split(url)
    return open_store(folder, options), name


def check_writable(store: Store) -> None:
    """Put an empty object and remove it, so that hours of work aren't done for a place that can't take the result.

    Raises the OSError that the place gave, with what to do."""
    try:
        store.write(_PROBE, b"")
        store.delete(_PROBE)
    except OSError as error:
        raise type(error)(
            f"{store.url} can't be written to, so nothing was begun. Make the folder or bucket, or give the right to "
            f"put and delete there, or name another place. ({error})"
        ) from None


_PROBE = "writable"


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


class LocalStore(Store):
    """A folder of a local or shared file system.

    Objects are written beside their place under a temporary name, synced, renamed, and the folder synced; without
    `durable` nothing is synced, and a power cut may leave objects of the right name and size with other bytes."""

    concurrency = 2
    request_bytes = 0

    def __init__(self, url: str, options: StorageConfig, durable: bool = True) -> None:
        super().__init__(url, options)
        self._folder = Path(url)
        self._prefix = os.path.join(url, "")
        self._sync = os.fsync if durable else _no_sync
        self._files: OrderedDict[str, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def _path(self, name: str) -> str:
        return f"{self._prefix}{check_name(name)}"

    def read(self, name: str) -> bytes:
        return Path(self._path(name)).read_bytes()

    def read_range(self, name: str, offset: int, buffers: Sequence[memoryview | np.ndarray]) -> None:
        file = self._open(self._path(name))
        wanted = sum([buffer.nbytes for buffer in buffers])
        got = os.preadv(file.descriptor, buffers[:MAX_VECTOR], offset)  # type: ignore[arg-type]  # arrays are buffers
        while got < wanted:
            views = unfilled([*map(as_bytes, buffers)], got)
            count = os.preadv(file.descriptor, views[:MAX_VECTOR], offset + got)
            if count == 0:
                raise EOFError(
                    f"{self._path(name)} ends at byte {offset + got}; wanted {wanted} bytes from {offset}, "
                    f"got {got}. The file is shorter than its index says: run `shards verify` and make it again."
                )
            got += count

    def forget(self, name: str) -> None:
        with self._lock:
            self._files.pop(self._path(name), None)

    def stream(self, name: str, offset: int = 0, chunk_bytes: int = 1 << 20) -> Iterator[memoryview]:
        chunk = memoryview(bytearray(chunk_bytes))
        with open(self._path(name), "rb", buffering=0) as file:
            file.seek(offset)
            while count := file.readinto(chunk):
                yield chunk[:count]

    @contextmanager
    def writer(self, name: str) -> Iterator[Sink]:
        path = self._path(name)
        with self._temporary(path) as temporary:
            with _FileSink(temporary, path, self._sync) as sink:
                yield sink
            os.replace(temporary, path)
        self._sync_folder(os.path.dirname(path))

    def create(self, name: str, data: Buffer) -> bool:
        path = self._path(name)
        with self._temporary(path) as temporary:
            with _FileSink(temporary, path, self._sync) as sink:
                sink.write(data)
            try:
                os.link(temporary, path)
                created = True
            except FileExistsError:
                created = os.stat(temporary).st_nlink == 2  # NFS may answer a repeated request with its own success
        self._sync_folder(os.path.dirname(path))
        return created

    def size(self, name: str) -> int | None:
        path = Path(self._path(name))
        return path.stat().st_size if path.is_file() else None

    def list(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        return ((name, size) for name, size in self._walk(prefix) if not _TEMPORARY.fullmatch(os.path.basename(name)))

    def delete(self, name: str) -> None:
        Path(self._path(name)).unlink(missing_ok=True)

    def sweep(self, prefix: str = "") -> Sequence[str]:
        swept = []
        for name, _ in self._walk(prefix[: prefix.rfind("/") + 1]):
            match = _TEMPORARY.fullmatch(os.path.basename(name))
            if match and os.path.join(os.path.dirname(name), match["name"]).startswith(prefix):
                path = self._path(name)
                if self._abandoned(path, match["machine"], int(match["pid"])):
                    Path(path).unlink(missing_ok=True)
                    swept.append(name)
        return swept

    def _abandoned(self, path: str, machine: str, pid: int) -> bool:
        """Whether a temporary's writer is dead: known for processes of this machine, judged by age for others."""
        if machine == _machine():
            return not _is_alive(pid)
        try:
            idle_seconds = time.time() - os.stat(path).st_mtime
        except FileNotFoundError:  # committed or removed meanwhile
            return False
        return idle_seconds > self.options.stale_temporary_hours * 3600

    def _walk(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Files whose names start with `prefix`, temporaries among them, in the order of their whole names."""
        folder = os.path.dirname(prefix)
        try:
            entries = list(os.scandir(self._folder / check_name(folder) if folder else self._folder))
        except (FileNotFoundError, NotADirectoryError):
            return
        for entry in sorted(entries, key=lambda entry: entry.name + "/" * entry.is_dir(follow_symlinks=False)):
            name = os.path.join(folder, entry.name)
            if not name.startswith(prefix):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from self._walk(name + "/")
            elif entry.is_file():
                try:
                    yield name, entry.stat().st_size
                except FileNotFoundError:  # renamed or removed since the folder was read
                    continue

    @contextmanager
    def _temporary(self, path: str) -> Iterator[str]:
        """A fresh name beside `path`, in a folder that exists; nothing is left under it at the end."""
        folder, name = os.path.split(path)
        self._make_folder(folder)
        temporary = os.path.join(folder, f".tmp-{name}-{_machine()}-{os.getpid()}-{secrets.token_hex(4)}")
        try:
            yield temporary
        finally:
            Path(temporary).unlink(missing_ok=True)

    def _open(self, path: str) -> "_OpenFile":
        """The descriptor of the file that has this path now, kept from an earlier read unless that one is gone."""
        with self._lock:
            file = self._files.get(path)
            if file:
                self._files.move_to_end(path)
        if file and os.fstat(file.descriptor).st_nlink:
            return file
        file = _OpenFile(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        with self._lock:
            self._files[path] = file
            self._files.move_to_end(path)
            while len(self._files) > self.options.max_open_files:
                self._files.popitem(last=False)
        return file

    def _make_folder(self, folder: str) -> None:
        """Make a folder and those above it, each durable before anything is put into it."""
        if folder and not os.path.isdir(folder):
            parent = os.path.dirname(folder)
            self._make_folder(parent)
            Path(folder).mkdir(exist_ok=True)
            self._sync_folder(parent)

    def _sync_folder(self, folder: str) -> None:
        descriptor = os.open(folder or ".", os.O_RDONLY | os.O_DIRECTORY)
        try:
            self._sync(descriptor)
        finally:
            os.close(descriptor)


_TEMPORARY = re.compile(r"\.tmp-(?P<name>.+)-(?P<machine>[0-9a-f]{8})-(?P<pid>\d+)-[0-9a-f]{8}")


class _OpenFile:
    """A descriptor that closes when the last thread reading from it lets go, not when it leaves the cache."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


class _FileSink:
    """A new file that is synced to the disk when its block ends cleanly; errors name `path`, what it shall become."""

    def __init__(self, temporary: str, path: str, sync: Callable[[int], None]) -> None:
        self._path, self._sync = path, sync
        self._descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def write(self, *buffers: Buffer) -> None:
        views = [view for view in map(as_bytes, buffers) if view.nbytes]
        with self._errors_named():
            while views:
                views = unfilled(views, os.writev(self._descriptor, views[:MAX_VECTOR]))

    def __enter__(self) -> "_FileSink":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                with self._errors_named():
                    self._sync(self._descriptor)
        finally:
            os.close(self._descriptor)

    @contextmanager
    def _errors_named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}; nothing was written", self._path) from None


def _no_sync(descriptor: int) -> None:
    """In the place of fsync."""


@functools.cache
def _machine() -> str:
    """Eight hex digits for the processes that can see one another by number: this boot, host and pid namespace.

    Where the system doesn't tell, a name that no other process has, so that only age says who is dead."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        return secrets.token_hex(4)
    return xxhash.xxh32_hexdigest(f"{boot} {namespace} {platform.node()}".encode())


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
