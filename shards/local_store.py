"""Shards in a folder of a local or shared file system."""

import functools
import os
import platform
import re
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import xxhash

from shards.store import MAX_VECTOR, Buffer, Sink, StorageConfig, Store, as_bytes, check_name, unfilled


class LocalStore(Store):
    """A folder.

    Objects are written beside their place under a temporary name, synced, renamed, and the folder synced; without
    `durable` nothing is synced, and a power cut may leave objects of the right name and size with other bytes."""

    concurrency = 2
    request_bytes = 0

    def __init__(self, url: str, options: StorageConfig, durable: bool = True) -> None:
        super().__init__(url, options)
        self._folder = Path(url)
        self._prefix = os.path.join(url, "")
        self._sync: Callable[[int], None] = os.fsync if durable else lambda _: None
        self._files: OrderedDict[str, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def _path(self, name: str) -> str:
        return f"{self._prefix}{check_name(name)}"

    def read(self, name: str) -> bytes:
        return Path(self._path(name)).read_bytes()

    def read_range(self, name: str, offset: int, buffers: Sequence[memoryview | np.ndarray]) -> None:
        path = self._path(name)
        file = self._open(path)
        wanted = sum([buffer.nbytes for buffer in buffers])
        try:
            got = os.preadv(file.descriptor, buffers[:MAX_VECTOR], offset)  # type: ignore[arg-type]  # are buffers
            while got < wanted:
                views = unfilled([*map(as_bytes, buffers)], got)
                count = os.preadv(file.descriptor, views[:MAX_VECTOR], offset + got)
                if count == 0:
                    raise EOFError(
                        f"{path} ends at byte {offset + got}; wanted {wanted} bytes from {offset}, got {got}. "
                        "The file is shorter than its index says: run `shards verify` and make it again."
                    )
                got += count
        except OSError as error:
            raise OSError(error.errno, error.strerror, path) from None

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

    def sweep(self, prefix: str = "", rewritten: Container[str] = ()) -> Sequence[str]:
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
        temporary = os.path.join(folder, temporary_name(name))
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


def temporary_name(name: str) -> str:
    """A name that no one else uses, and that sweeping a folder knows by: one for what is to become `name`."""
    return f".tmp-{name}-{_machine()}-{os.getpid()}-{secrets.token_hex(4)}"


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
