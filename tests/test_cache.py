"""The node-local cache: what it gives is what the source has, whatever happens to its folder, processes and disk."""

import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from servers import HttpServer

from shards.cache import CachedStore, cached
from shards.local_store import LocalStore
from shards.storage import open_store
from shards.store import NoRangeError, StorageConfig, Store

DIGEST, OTHER = "0123456789abcdef" * 2, "f" * 32


class CountedStore(LocalStore):
    """A source that counts the ranges it was asked for."""

    def __init__(self, url: str, options: StorageConfig) -> None:
        super().__init__(url, options)
        self.asked: list[tuple[str, int]] = []

    def read_range(self, name: str, offset: int, buffers: list[np.ndarray]) -> None:
        self.asked.append((name, offset))
        super().read_range(name, offset, buffers)


@pytest.fixture
def source(tmp_path: Path) -> CountedStore:
    source = CountedStore(str(tmp_path / "set"), StorageConfig(cache_dir=str(tmp_path / "cache"), cache_bytes=1 << 20))
    for shard in range(4):
        source.write(f"{shard}.tar", np.random.default_rng(shard).bytes(100_000))
    return source


def read(store: Store, name: str, offset: int, size: int) -> bytes:
    """The range in two buffers."""
    buffers = [np.zeros(size // 3, np.uint8), np.zeros(size - size // 3, np.uint8)]
    store.read_range(name, offset, buffers)
    return b"".join(map(bytes, buffers))


def test_ranges_that_were_read_at_once_are_found_one_by_one(source: CountedStore) -> None:
    content = source.read("1.tar")
    store = cached(source, DIGEST)
    assert read(store, "1.tar", 4000, 1000) == content[4000:5000]
    rows = [np.zeros(1000, np.uint8) for _ in range(9)]
    store.read_ranges("1.tar", [(1000 * index, [row]) for index, row in enumerate(rows)])
    assert b"".join(map(bytes, rows)) == content[:9000]
    assert source.asked == [("1.tar", 4000), ("1.tar", 0), ("1.tar", 5000)]  # what was kept lies between two reads
    for index in range(9):
        assert read(store, "1.tar", 1000 * index, 1000) == content[1000 * index : 1000 * (index + 1)]
    assert len(source.asked) == 3


def kept(tmp_path: Path) -> list[Path]:
    """All files of the cache but its count."""
    files = (path for path in (tmp_path / "cache").rglob("*") if path.is_file())
    return sorted(path for path in files if path.name != "kept-bytes")


def test_without_a_folder_there_is_no_cache(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    assert cached(store, DIGEST) is store


def test_the_second_read_of_a_range_comes_from_the_cache(source: CountedStore) -> None:
    for round in range(2):
        store = cached(source, DIGEST)
        for offset in (0, 5000, 99_000):
            assert read(store, "1.tar", offset, 1000) == source.read("1.tar")[offset : offset + 1000]
        assert len(source.asked) == 3, round
    assert store.read("1.tar") == source.read("1.tar")
    assert list(store.list()) == list(source.list())


def test_data_sets_with_the_same_names_are_kept_apart(source: CountedStore, tmp_path: Path) -> None:
    other = open_store(tmp_path / "other", source.options)
    other.write("1.tar", bytes(2000))
    assert read(cached(source, DIGEST), "1.tar", 0, 1000) == source.read("1.tar")[:1000]
    assert read(cached(other, OTHER), "1.tar", 0, 1000) == bytes(1000)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "longer", "folder", "unreadable"])
def test_damaged_files_are_dropped_and_read_through(source: CountedStore, tmp_path: Path, damage: str) -> None:
    store, expected = cached(source, DIGEST), source.read("1.tar")[:1000]
    read(store, "1.tar", 0, 1000)
    (path,) = kept(tmp_path)
    data = path.read_bytes()
    if damage in ("folder", "unreadable"):
        path.unlink()
        path.mkdir() if damage == "folder" else path.symlink_to(path)
    else:
        path.write_bytes(
            {"flip": data[:500] + b"?" + data[501:], "cut": data[:999], "empty": b"", "longer": b"?" + data}[damage]
        )
    for _ in range(2):
        assert read(store, "1.tar", 0, 1000) == expected


def test_forgotten_objects_are_read_from_the_source(source: CountedStore, tmp_path: Path) -> None:
    store = cached(source, DIGEST)
    for name in ("1.tar", "2.tar"):
        read(store, name, 0, 1000)
    store.forget("1.tar")
    assert [path.parent.name for path in kept(tmp_path)] == ["2.tar"]


def test_the_folder_stays_within_its_bytes_and_what_is_in_use_stays_in_it(source: CountedStore, tmp_path: Path) -> None:
    """A cache for two fifths of an epoch serves two fifths of the next one, whatever its order."""
    limited = CountedStore(source.url, replace(source.options, cache_bytes=200_000))
    ranges = [(f"{shard}.tar", offset) for shard in range(4) for offset in range(0, 100_000, 1000)]
    store = cached(limited, DIGEST)
    for name, offset in np.random.default_rng(0).permutation(ranges):
        read(store, name, int(offset), 1000)
    assert sum(path.stat().st_size for path in kept(tmp_path)) <= 200_000
    before = len(limited.asked)
    for name, offset in np.random.default_rng(1).permutation(ranges):
        assert read(store, name, int(offset), 1000) == source.read(name)[int(offset) : int(offset) + 1000]
    assert len(limited.asked) - before <= 0.55 * len(ranges)


def test_several_that_fill_the_folder_at_once_keep_to_its_bytes_together(source: CountedStore, tmp_path: Path) -> None:
    options = replace(source.options, cache_bytes=200_000)
    stores = [cached(CountedStore(source.url, options), DIGEST) for _ in range(4)]  # as many processes have
    for step in range(100):
        for shard, store in enumerate(stores):
            if step % (shard + 1) == 0:  # some are slower
                read(store, f"{shard}.tar", 1000 * step, 1000)
    assert 190_000 < sum(path.stat().st_size for path in kept(tmp_path)) <= 200_000


@pytest.mark.parametrize("content", [b"", b"\0", b"\xff" * 99])
def test_a_count_that_cannot_be_right_is_made_anew(source: CountedStore, tmp_path: Path, content: bytes) -> None:
    store, count = cached(source, DIGEST), tmp_path / "cache" / "audiosep-shards" / "kept-bytes"
    read(store, "1.tar", 0, 1000)
    count.write_bytes(content)
    read(store, "1.tar", 1000, 1000)
    assert int.from_bytes(count.read_bytes()[:8], "big") == sum(path.stat().st_size for path in kept(tmp_path))


def test_another_data_sets_ranges_make_room_and_strangers_files_never(source: CountedStore, tmp_path: Path) -> None:
    limited = CountedStore(source.url, replace(source.options, cache_bytes=50_000))
    old = cached(limited, OTHER)
    for offset in range(0, 50_000, 1000):
        read(old, "0.tar", offset, 1000)
    for path in kept(tmp_path):
        os.utime(path, (1, 1))
    strangers = [
        tmp_path / "cache" / name for name in ("thesis.tex", "audiosep-shards/notes", f"audiosep-shards/{OTHER}/x")
    ]
    for path in strangers:
        path.write_bytes(bytes(100_000))
        os.utime(path, (1, 1))
    new = cached(limited, DIGEST)
    for offset in range(0, 50_000, 1000):
        read(new, "0.tar", offset, 1000)
    assert all(path.exists() for path in strangers)
    ours = [path for path in kept(tmp_path) if path not in strangers]
    assert {path.parent.parent.name for path in ours} == {DIGEST}
    assert sum(path.stat().st_size for path in ours) <= 50_000


@pytest.mark.parametrize("when", ["at once", "later"])
def test_a_full_disk_is_read_through(
    source: CountedStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    store = cached(source, DIGEST)
    if when == "later":
        read(store, "0.tar", 0, 1000)

    monkeypatch.setattr(os, "writev", no_space)
    monkeypatch.setattr(os, "mkdir", no_space)
    for offset in (0, 7000, 7000):
        assert read(store, "1.tar", offset, 1000) == source.read("1.tar")[offset : offset + 1000]
    assert len(kept(tmp_path)) == (when == "later")


READER = """
import sys, numpy as np
from shards.cache import cached
from shards.storage import open_store
from shards.store import StorageConfig
store = cached(open_store(sys.argv[1], StorageConfig(cache_dir=sys.argv[2], cache_bytes=10**9)), "0123456789abcdef" * 2)
row, rng = np.zeros(50_000, np.uint8), np.random.default_rng(int(sys.argv[3]))
whole = {f"{shard}.tar": store.read(f"{shard}.tar") for shard in range(4)}
print("reading", flush=True)
while True:
    name, offset = f"{rng.integers(4)}.tar", int(rng.integers(50)) * 1000
    store.read_range(name, offset, [row])
    assert row.tobytes() == whole[name][offset : offset + 50_000]
    if len(sys.argv) > 4:
        break
    store.forget(name)
"""


def test_processes_share_the_folder_and_die_in_it(source: CountedStore, tmp_path: Path) -> None:
    def start(*words: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", READER, source.url, str(tmp_path / "cache"), *words]
        return subprocess.Popen(command, stdout=subprocess.PIPE)

    readers = [start(str(seed)) for seed in range(3)]
    for reader in readers:
        assert reader.stdout is not None
        assert reader.stdout.readline() == b"reading\n"
    for reader in readers:
        threading.Event().wait(0.1)
        assert reader.poll() is None
        reader.send_signal(signal.SIGKILL)
        reader.wait()
        reader.stdout.close()  # type: ignore[union-attr]
    last = start("3", "once")
    assert last.communicate()[0] == b"reading\n"
    assert last.returncode == 0
    assert [path for path in kept(tmp_path) if path.name.startswith(".tmp")] == []


def test_servers_without_range_are_read_through_whole_objects(
    http_server: HttpServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = np.random.default_rng(9).bytes(300_000)
    (http_server.files / "whole.tar").write_bytes(content)
    options = StorageConfig(cache_dir=str(tmp_path / "cache"), backoff_seconds=0.001)
    store = cached(open_store(f"{http_server.url}/plain", options), DIGEST)
    assert isinstance(store, CachedStore)
    for offset in (200_000, 7, 200_000):
        assert read(store, "whole.tar", offset, 1000) == content[offset : offset + 1000]
    assert [path.name for path in kept(tmp_path)] == ["0-300000.range"]
    small = cached(open_store(f"{http_server.url}/plain", replace(options, cache_bytes=1000)), OTHER)
    with pytest.raises(OSError, match=r"take the 300000 bytes of whole.tar, has no room"):
        read(small, "whole.tar", 200_000, 1000)
    monkeypatch.setattr(LocalStore, "_make_folder", no_space)
    full = replace(options, cache_dir=str(tmp_path / "full"))
    with pytest.raises(NoRangeError, match=r"cache_dir \(.*/full\), which has to take the 300000 bytes.*No space left"):
        read(cached(open_store(f"{http_server.url}/plain", full), DIGEST), "whole.tar", 200_000, 1000)


def no_space(*_: object) -> int:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("kind", ["file", "unwritable"])
def test_a_folder_that_cannot_be_one_is_one_warning(
    source: CountedStore, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "file":
        (tmp_path / "cache").write_bytes(b"")
    else:  # for root, too
        monkeypatch.setattr(os, "open", forbidden)
        monkeypatch.setattr(os, "mkdir", forbidden)
    store = cached(source, DIGEST)
    monkeypatch.setattr(source, "read_range", lambda name, offset, buffers: None)
    for offset in range(0, 10_000, 1000):
        read(store, "1.tar", offset, 1000)
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def forbidden(*_: object, **__: object) -> int:
    raise PermissionError(13, "Permission denied")
