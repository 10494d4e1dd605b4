"""Local stores: objects are whole or absent, durable, and read back exactly, whatever happens around them."""

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from servers import BUCKET, S3Server

from shards.local_store import LocalStore
from shards.storage import check_writable, open_store
from shards.store import StorageConfig, Store, check_name


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "set")


def files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_objects_come_back_whole_and_absent_ones_are_named(store: Store) -> None:
    store.write("0001/shard-000000.tar", b"one")
    store.write("0001/shard-000000.tar", b"three")
    assert store.read("0001/shard-000000.tar") == b"three"
    assert store.size("0001/shard-000000.tar") == 5
    assert store.size("0001") is None
    assert store.size("absent") is None
    with pytest.raises(FileNotFoundError, match=r"set/absent\.tar"):
        store.read("absent.tar")
    with pytest.raises(FileNotFoundError, match=r"set/absent\.tar"):
        store.read_range("absent.tar", 0, [np.empty(1)])
    store.delete("0001/shard-000000.tar")
    store.delete("0001/shard-000000.tar")
    assert list(store.list()) == []


@given(st.binary(max_size=300), st.data())
def test_a_range_fills_buffers_of_any_type_and_number(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, data
) -> None:
    store = open_store(tmp_path_factory.mktemp("set"))
    store.write("a", content)
    offset = data.draw(st.integers(0, len(content)))
    sizes = data.draw(st.lists(st.integers(0, 40), max_size=8))
    buffers = [np.empty(size, np.uint8) if size % 2 else memoryview(bytearray(size)) for size in sizes]
    if offset + sum(sizes) <= len(content):
        store.read_range("a", offset, buffers)
        assert b"".join(bytes(buffer) for buffer in buffers) == content[offset : offset + sum(sizes)]
    else:
        with pytest.raises(EOFError, match=f"ends at byte {len(content)}; wanted {sum(sizes)} bytes from {offset}"):
            store.read_range("a", offset, buffers)


def test_more_buffers_than_one_call_takes(store: Store) -> None:
    rows = np.random.default_rng(0).random((3000, 7)).astype(np.float16)
    with store.writer("rows") as sink:
        sink.write(*rows)
    back = np.empty_like(rows)
    store.read_range("rows", 0, list(back))
    np.testing.assert_array_equal(back, rows)
    assert b"".join(map(bytes, store.stream("rows", 4, chunk_bytes=1000))) == rows.tobytes()[4:]


def test_an_exception_of_any_kind_leaves_the_old_object_and_nothing_beside_it(store: Store, tmp_path: Path) -> None:
    store.write("a", b"old")
    for error in (ValueError, KeyboardInterrupt, GeneratorExit):
        with pytest.raises(error), store.writer("a") as sink:
            raise sink.write(b"new") or error
    assert store.read("a") == b"old"
    assert files_in(tmp_path / "set") == ["a"]


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path)
    real_writev = os.writev
    monkeypatch.setattr(os, "writev", lambda descriptor, views: os.write(descriptor, views[0][:5]))
    store.write("short-writes", b"0123456789" * 5)
    assert store.read("short-writes") == b"0123456789" * 5

    def no_space(descriptor: int, views: list[memoryview]) -> int:
        real_writev(descriptor, [views[0][:1]])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "writev", no_space)
    with pytest.raises(OSError, match=r"No space left on device; nothing was written: '.*/big'"):
        store.write("big", b"0123456789")
    assert files_in(tmp_path) == ["short-writes"]


def test_writes_are_synced_before_they_are_renamed_and_their_folders_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(descriptor: int) -> None:
        steps.append(("sync", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def recorded_replace(source: str, target: str) -> None:
        steps.append(("rename", os.path.basename(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    open_store(tmp_path / "new").write("deep/a", b"1")
    assert steps[:2] == [("sync", tmp_path.name), ("sync", "new")]
    assert steps[2][1].startswith(".tmp-a-")
    assert steps[3:] == [("rename", "a"), ("sync", "deep")]


def test_of_many_creators_one_wins_and_all_see_its_object(store: Store, tmp_path: Path) -> None:
    barrier = threading.Barrier(16)

    def create(index: int) -> bool:
        barrier.wait()
        created = store.create("spec.json", b"%d" % index)
        assert store.size("spec.json")
        return created

    with ThreadPoolExecutor(16) as pool:
        outcomes = pool.map(create, range(16))
    assert [b"%d" % index for index, won in enumerate(outcomes) if won] == [store.read("spec.json")]
    assert files_in(tmp_path / "set") == ["spec.json"]


@given(st.sets(st.text("ab-./", min_size=1, max_size=6), max_size=12), st.data())
def test_listing_is_sorted_and_selected_as_strings(
    tmp_path_factory: pytest.TempPathFactory, candidates: set[str], data: st.DataObject
) -> None:
    store = open_store(tmp_path_factory.mktemp("set"))
    names: set[str] = set()
    for name in sorted(candidates):
        proper = all(part not in ("", ".", "..") for part in name.split("/"))
        if proper and not any(other.startswith(name + "/") or name.startswith(other + "/") for other in names):
            store.write(name, name.encode())
            names.add(name)
    assert list(store.list()) == [(name, len(name)) for name in sorted(names)]
    some_name = data.draw(st.sampled_from(sorted(names | {"ab"})))
    prefix = some_name[: data.draw(st.integers(0, len(some_name)))] + data.draw(st.sampled_from(["", "b"]))
    assert [name for name, _ in store.list(prefix)] == sorted(name for name in names if name.startswith(prefix))


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../other", "a/../../b", "a\0b"])
def test_names_stay_below_their_store(store: Store, name: str) -> None:
    with pytest.raises(ValueError, match="not a relative name"):
        check_name(name)
    with pytest.raises(ValueError, match="not a relative name"):
        store.write(name, b"")


def test_listing_stays_below_the_store_and_follows_no_folder_links(store: Store, tmp_path: Path) -> None:
    store.write("a/b", b"1")
    (tmp_path / "set" / "a" / "loop").symlink_to(tmp_path)
    assert list(store.list()) == [("a/b", 1)]
    for prefix in ("/etc/", "../"):
        with pytest.raises(ValueError, match="not a relative name"):
            list(store.list(prefix))


def test_a_replaced_file_is_read_anew_and_descriptors_stay_few(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path), StorageConfig(max_open_files=4))
    row = np.empty(4, np.uint8)
    for version in range(3):
        for index in range(20):
            store.write(f"{index}", b"%02d%02d" % (index, version))
        before = len(os.listdir("/proc/self/fd"))
        for index in range(20):
            store.read_range(f"{index}", 0, [row])
            assert row.tobytes() == b"%02d%02d" % (index, version)
        assert len(os.listdir("/proc/self/fd")) <= before + 4


def test_a_replaced_file_that_lives_on_under_another_name_is_let_go_when_it_is_forgotten(tmp_path: Path) -> None:
    store, row = LocalStore(str(tmp_path), StorageConfig()), np.empty(3, np.uint8)
    store.write("a", b"old")
    store.read_range("a", 0, [row])
    os.link(tmp_path / "a", tmp_path / "backup")
    store.write("a", b"new")
    store.forget("a")
    store.read_range("a", 0, [row])
    assert row.tobytes() == b"new"


def test_threads_read_right_bytes_while_files_are_replaced_and_descriptors_evicted(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path), StorageConfig(max_open_files=2))
    for index in range(8):
        store.write(f"{index}", bytes([index]) * 5000)
    end = time.monotonic() + 1.0

    def work(seed: int) -> None:
        rng, row = np.random.default_rng(seed), np.empty(5000, np.uint8)
        while time.monotonic() < end:
            index = int(rng.integers(8))
            if seed == 0:
                store.write(f"{index}", bytes([index]) * 5000)
            else:
                store.read_range(f"{index}", 0, [row])
                assert (row == index).all()

    with ThreadPoolExecutor(5) as pool:
        list(pool.map(work, range(5)))


WRITER = """
import sys, time
from shards.storage import open_store
with open_store(sys.argv[1]).writer("shard.tar") as sink:
    sink.write(b"x" * 100)
    print("writing", flush=True)
    time.sleep(60)
"""


def test_sweeping_takes_dead_writers_files_and_no_others(tmp_path: Path) -> None:
    (tmp_path / "users.tmp").write_bytes(b"1")
    (tmp_path / ".tmp-mine").write_bytes(b"1")
    other_machines = tmp_path / ".tmp-shard.tar-00000000-1-0123abcd"
    other_machines.write_bytes(b"1")
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    assert writer.stdout.readline() == b"writing\n"
    store = open_store(tmp_path)
    with store.writer("shard.tar") as sink:
        sink.write(b"mine")
        assert store.sweep() == []
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    assert [name for name, _ in store.list()] == [".tmp-mine", "shard.tar", "users.tmp"]
    assert store.sweep("other") == []
    assert len(store.sweep("shard")) == 1
    assert store.read("shard.tar") == b"mine"
    day_ago = time.time() - 25 * 3600
    os.utime(other_machines, (day_ago, day_ago))
    assert store.sweep() == [other_machines.name]
    assert files_in(tmp_path) == [".tmp-mine", "shard.tar", "users.tmp"]


def test_urls_open_the_same_folder_and_stores_travel_by_pickle(tmp_path: Path) -> None:
    open_store(tmp_path / "a b").write("x", b"1")
    for url in (str(tmp_path / "a b"), f"file://{tmp_path}/a%20b"):
        assert pickle.loads(pickle.dumps(open_store(url))).read("x") == b"1"
    with pytest.raises(ValueError, match="ftp://"):
        open_store("ftp://host/x")


def test_the_url_of_a_manifest_is_that_of_its_root(tmp_path: Path) -> None:
    for root in (str(tmp_path), f"file://{tmp_path}", "s3://bucket/x", "https://host/x"):
        assert open_store(f"{root}/manifest.json").url == open_store(root).url


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("file:///a/b#1", "no effect; in a name write %23"),
        ("s3://bucket/a#1", "no effect; in a name write %23"),
        ("http://host/a#1", "no effect; in a name write %23"),
        ("file:///a?b", "no host and no query"),
        ("file://a/b", "no host and no query"),
        ("file:/a/b", "two slashes behind its colon"),
        ("s3:/bucket/b", "two slashes behind its colon"),
        ("http:///a", "a server or bucket must be named"),
        ("s3:///a", "a server or bucket must be named"),
    ],
)
def test_urls_of_which_a_part_would_be_dropped_are_refused(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_store(url)


def test_trying_whether_a_folder_can_be_written_to_leaves_all_that_is_there(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.write("writable", b"mine")
    check_writable(store)
    assert files_in(tmp_path) == ["writable"]
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="can't be written to, so nothing was begun"):
        check_writable(open_store(tmp_path / "file"))


PROBE = """
import os, sys
from shards.storage import check_writable, open_store
from shards.store import StorageConfig
store = open_store(sys.argv[1], StorageConfig(endpoint=sys.argv[2], region="us-east-1"))
store.delete = lambda name: os.kill(os.getpid(), 9)
check_writable(store)
"""


@pytest.mark.parametrize("kind", ["folder", "bucket"])
def test_what_a_killed_trial_leaves_goes_with_the_next(kind: str, tmp_path: Path, s3_server: S3Server) -> None:
    place = str(tmp_path) if kind == "folder" else f"s3://{BUCKET}/{tmp_path.name}"
    store = open_store(place, s3_server.options)
    assert subprocess.run([sys.executable, "-c", PROBE, place, s3_server.endpoint], check=False).returncode == -9
    assert [*store.list(), *files_in(tmp_path)] != []
    check_writable(store)
    store.sweep()
    assert [*store.list(), *files_in(tmp_path)] == []
