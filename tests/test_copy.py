"""`shards copy`: the same bytes in another place, or an error; and never a second time what is there already."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lossy_proxy import LossyProxy
from servers import BUCKET, HttpServer, S3Server
from shard_data import content, make_data_set

from shards.cli import main
from shards.copy import copy
from shards.local_store import LocalStore
from shards.manifest import IncompleteError, bind, load_manifest
from shards.progress import progress
from shards.storage import open_store
from shards.store import Sink, StorageConfig
from shards.verify import verify


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make_data_set(tmp_path / "set", num_samples=45, samples_per_shard=10)
    return tmp_path / "set"


class CountingStore(LocalStore):
    """A source that counts how often it is streamed from."""

    streamed = 0

    def stream(self, name: str, offset: int = 0, chunk_bytes: int = 1 << 20) -> Iterator[memoryview]:
        self.streamed += 1
        return super().stream(name, offset, chunk_bytes)


def test_a_set_goes_to_a_bucket_and_comes_back_the_same(
    root: Path, s3_server: S3Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bucket, options = f"s3://{BUCKET}/{tmp_path.name}/copied", f'{{"endpoint": "{s3_server.endpoint}"}}'
    assert main(["copy", str(root), bucket, "--verify", "--target-options", options]) == 0
    assert main(["copy", bucket, str(tmp_path / "back"), "--jobs", "2", "--source-options", options]) == 0
    assert load_manifest(root).digest in capsys.readouterr().out
    assert content(open_store(tmp_path / "back")) == content(open_store(root))
    assert content(open_store(bucket, s3_server.options)) == content(open_store(root))


def test_what_is_there_is_not_copied_again_and_what_is_broken_is(root: Path, tmp_path: Path) -> None:
    source, target = CountingStore(str(root), StorageConfig()), open_store(tmp_path / "copy")
    copy(source, target)
    copy(source, target)
    assert source.streamed == 5
    target.delete("manifest.json")
    target.delete("shard-000001.json")
    target.write("shard-000002.tar", b"short")
    target.write("shard-000003.idx.npy", b"")
    copy(source, target)
    assert source.streamed == 8
    assert content(target) == content(source)


def test_damage_in_the_source_is_named_and_nothing_is_sealed(root: Path, tmp_path: Path) -> None:
    source, target = open_store(root), open_store(tmp_path / "copy")
    data = bytearray(source.read("shard-000002.tar"))
    data[5000] ^= 1
    source.write("shard-000002.tar", data)
    source.delete("shard-000004.tar")
    with pytest.raises(IncompleteError, match=r"2 of 5 shards could not be copied \(2,4\).*has the checksum") as caught:
        copy(source, target)
    assert caught.value.shards == [2, 4]
    assert target.size("manifest.json") is None
    assert target.size("shard-000002.tar") is None


def test_other_sets_are_not_mixed_or_replaced(root: Path, tmp_path: Path) -> None:
    target = open_store(tmp_path / "copy")
    bind(target, {"first": 7}, 45, 10)
    with pytest.raises(ValueError, match="bound to another spec"):
        copy(open_store(root), target)
    sealed = open_store(tmp_path / "sealed")
    copy(open_store(root), sealed)
    sealed.write("manifest.json", b"{}")
    with pytest.raises(ValueError, match="holds another sealed data set"):
        copy(open_store(root), sealed)
    with pytest.raises(FileNotFoundError):
        copy(open_store(tmp_path / "nothing"), target)


@pytest.mark.parametrize("option", ['{"endpiont": "http://x"}', '{"concurrency": 0}'])
def test_options_are_checked(root: Path, tmp_path: Path, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["copy", str(root), str(tmp_path / "copy"), "--target-options", option]) == 2
    assert "endpiont" in capsys.readouterr().err or "concurrency" in option


class Flipping(LocalStore):
    """A folder of whose small objects every fifth reading, up to the hundredth, has a bit flipped."""

    request_bytes = 1  # as a place behind a network
    readings = 0

    def read(self, name: str) -> bytes:
        data = bytearray(super().read(name))
        self.readings += 1
        if self.readings % 5 == 0 and self.readings < 100:
            bit = self.readings * 37 % (8 * len(data))
            data[bit // 8] ^= 1 << bit % 8
        return bytes(data)


def test_bits_that_flip_in_what_no_checksum_covers_are_noticed(root: Path, tmp_path: Path) -> None:
    """Manifest, spec and records."""
    for start in range(24):
        source, target = Flipping(str(root), StorageConfig()), open_store(tmp_path / str(start))
        source.readings = start
        for _ in range(50):
            with suppress(ValueError):
                copy(source, target, jobs=1)
                break
        assert content(target) == content(open_store(root))

        source.readings = start
        with suppress(ValueError):
            assert load_manifest(source).digest == load_manifest(root).digest


def test_copies_through_a_lossy_network_are_exact(root: Path, http_server: HttpServer, tmp_path: Path) -> None:
    """Faults of every kind, flipped bits included, on three answers in ten; the copy is repeated until it is whole."""
    copy(open_store(root), http_server.target(tmp_path.name))
    target = open_store(tmp_path / "copy")
    with LossyProxy(http_server.port, rate=0.3, seed=1) as proxy:
        source = http_server.source(tmp_path.name, proxy.url, stall_seconds=0.25, backoff_seconds=0.001)
        for _ in range(50):
            try:
                copy(source, target)
                break
            except (OSError, ValueError):
                continue
        assert proxy.counts.total() > 3
    assert content(target) == content(open_store(root))


COPY = "import sys; from shards.cli import main; sys.exit(main(['copy', '--jobs', '2', *sys.argv[1:]]))"


def test_killed_copies_go_on_where_they_were(tmp_path: Path) -> None:
    make_data_set(tmp_path / "set", num_samples=400, samples_per_shard=4)
    for delay in (0.45, 0.55, 0.65, None):
        command = [sys.executable, "-c", COPY, str(tmp_path / "set"), str(tmp_path / "copy")]
        process: subprocess.Popen[Any] = subprocess.Popen(command)
        if delay is not None:
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
        process.wait()
    target = open_store(tmp_path / "copy")
    assert content(target) == content(open_store(tmp_path / "set"))
    assert not verify(target).bad
    assert list((tmp_path / "copy").rglob(".tmp*")) == []


def test_an_upload_that_breaks_midway_is_begun_anew(
    s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars: list[Any] = []
    monkeypatch.setattr("shards.copy.progress", lambda **options: bars.append(progress(**options)) or bars[0])
    make_data_set(tmp_path / "set", num_samples=2, samples_per_shard=1, shapes={"x": (3 << 20,)})
    place = f"s3://{BUCKET}/{tmp_path.name}/anew"
    with LossyProxy(s3_server.port, faults=["refused"], rate=0.15, seed=3) as proxy:
        options = replace(s3_server.options, endpoint=proxy.url, part_bytes=5 << 20, backoff_seconds=0.001)
        manifest = copy(open_store(tmp_path / "set"), open_store(place, options), jobs=1)
        assert proxy.counts["refused"] > 1
    assert bars[0].n == manifest.tar_bytes.sum()
    target = open_store(place, replace(s3_server.options, stale_temporary_hours=1e-9))
    target.sweep()  # the broken upload
    assert content(target) == content(open_store(tmp_path / "set"))


def test_ctrl_c_does_not_wait_for_a_slow_line_and_leaves_nothing_for_good(s3_server: S3Server, tmp_path: Path) -> None:
    make_data_set(tmp_path / "set", num_samples=4, samples_per_shard=1, shapes={"x": (3 << 20,)})
    place = f"s3://{BUCKET}/{tmp_path.name}/interrupted"
    command = [sys.executable, "-m", "shards.cli", "copy", str(tmp_path / "set"), place, "--target-options"]
    with LossyProxy(s3_server.port, upload_rate=50_000) as proxy:  # which takes eight minutes for the parts
        options = {"endpoint": proxy.url, "region": "us-east-1", "part_bytes": 5 << 20}
        process = subprocess.Popen([*command, json.dumps(options)], stderr=subprocess.PIPE, text=True)
        try:
            while not s3_server.uploads():
                assert process.poll() is None
                time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=100)[1].endswith("shards copy: interrupted\n")
            assert process.returncode == 130
        finally:
            process.kill()
    assert s3_server.uploads() != []
    options["endpoint"] = s3_server.endpoint
    assert main([*command[3:], json.dumps(options)]) == 0
    assert s3_server.uploads() == []
    assert content(open_store(place, s3_server.options)) == content(open_store(tmp_path / "set"))


class Rotten(LocalStore):
    """A folder that damages a shard when it is written, so often."""

    times = 1

    def writer(self, name: str) -> AbstractContextManager[Sink]:
        if name != "shard-000002.tar" or self.times == 0:
            return super().writer(name)
        return self._damaged(name)

    @contextmanager
    def _damaged(self, name: str) -> Iterator[Sink]:
        with super().writer(name) as sink:
            yield sink
        self.times -= 1
        data = bytearray(self.read(name))
        data[5000] ^= 1
        Path(self.url, name).write_bytes(data)


@pytest.mark.parametrize("times", [1, 2])
def test_what_is_bad_when_it_is_read_back_is_copied_once_more(
    root: Path, tmp_path: Path, times: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rotten = Rotten(str(tmp_path / "copy"), StorageConfig())
    rotten.times = times
    monkeypatch.setattr("shards.copy.open_store", lambda url, options: rotten if "copy" in url else open_store(url))
    assert main(["copy", str(root), rotten.url, "--verify"]) == (3 if times == 2 else 0)
    printed = capsys.readouterr()
    assert "copying the shards 2 once more" in printed.err
    assert ("the shards 2 are still bad after they were copied once more" in printed.err) == (times == 2)
    assert (content(rotten) == content(open_store(root))) == (times == 1)
