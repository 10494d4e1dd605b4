"""A shard is there whole or not at all, whatever befalls its writer, and always in the same bytes."""

import errno
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xxhash
from shard_data import make_sample, make_samples, tree, write_one, write_set

from shards.manifest import bind, load_manifest, seal
from shards.record import OtherSpecError, Record, examine, read_record
from shards.storage import open_store
from shards.tar import Field, Sample, decode
from shards.verify import read_sample, verify
from shards.writer import discard, write_shard

NAME = "shard-000000"


@pytest.fixture
def memory():
    """A folder in memory where there is one: hundreds of fsyncs cost nothing there."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        yield Path(folder)


@pytest.fixture
def reference(memory):
    """The bytes of one finished shard and its spec."""
    store = open_store(memory / "reference")
    write_set(store, num_samples=4, samples_per_shard=4)
    return tree(memory / "reference")


@pytest.fixture
def root(memory):
    """An empty root, bound to the same spec."""
    bind(open_store(memory / "root"), {"seed": 0}, 4, 4)
    return memory / "root"


def is_complete(store, name, spec_digest):
    return isinstance(examine(store, name, spec_digest, store.size), Record)


def rewrite(root):
    """What every run does: sweep, and write what is not complete."""
    store = open_store(root)
    plan = bind(store, {"seed": 0}, 4, 4)
    store.sweep()
    if not is_complete(store, NAME, plan.spec_digest):
        write_one(store, plan, 0)


def test_record_and_index_describe_the_tar(tmp_path):
    store = open_store(tmp_path)
    write_set(store)
    record = read_record(store, NAME)
    data = store.read(f"{NAME}.tar")
    index = seal(store).read_index(store, 0)
    assert np.load(tmp_path / f"{NAME}.idx.npy").tolist() == index.tolist()
    for sample, (offset, size, *checksums) in zip(make_samples(range(4)), index.tolist(), strict=True):
        key, text, tensors = decode(data[offset : offset + size], record.fields)
        assert (key, text) == (sample.key, sample.text)
        own = [array.tobytes() for array in sample.arrays.values()]
        assert [bytes(tensor) for tensor in tensors] == own
        head = data[offset : data.index(own[0], offset)]
        assert checksums == [xxhash.xxh3_64_intdigest(part) for part in (head, *own)]
    assert len(data) == record.num_bytes == offset + size + 1024
    assert (record.first_key, record.last_key) == ("000000000", "000000003")
    for index, sample in enumerate(make_samples(range(10))):
        read = read_sample(store, load_manifest(store), index)
        assert (read.key, read.text) == (sample.key, sample.text)
        for name, array in sample.arrays.items():
            np.testing.assert_array_equal(read.arrays[name], array, strict=True)


def test_bfloat16_is_stored_as_its_bits(tmp_path):
    store = open_store(tmp_path)
    bits = np.arange(6, dtype=np.uint16)
    samples = [Sample("a", {}, {"condition": bits})]
    record = write_shard(store, NAME, samples, num_samples=1, spec_digest="", dtypes={"condition": "bfloat16"})
    assert record.fields == (Field("condition", "bfloat16", (6,)),)
    wrong = [Sample("a", {}, {"condition": bits.astype(np.float16)})]
    with pytest.raises(ValueError, match="as bfloat16 is stored as <u2, not <f2"):
        write_shard(store, "other", wrong, num_samples=1, spec_digest="", dtypes={"condition": "bfloat16"})


def test_rejections_are_recorded_as_they_are_when_the_last_sample_is_done(tmp_path):
    rejected = []

    def samples():
        for sample in make_samples(range(3)):
            rejected.append({"reason": "silent", "clip": sample.key})
            yield sample

    store = open_store(tmp_path)
    record = write_shard(store, NAME, samples(), num_samples=3, spec_digest="", rejected=rejected)
    assert [entry["clip"] for entry in read_record(store, NAME).rejected] == ["000000000", "000000001", "000000002"]
    assert read_record(store, NAME) == record


def failing(error):
    yield from make_samples(range(2))
    raise error


@pytest.mark.parametrize(
    ("samples", "error", "message"),
    [
        (lambda: make_samples(range(3)), ValueError, "only 3 of 4"),
        (lambda: make_samples(range(5)), ValueError, "000000004 came twice or after all 4"),
        (lambda: make_samples([0, 1, 2, 1]), ValueError, "000000001 came twice"),
        (lambda: [make_sample(0), make_sample(1, {"condition": (3,)})], ValueError, "000000001 has the fields"),
        (lambda: [Sample("a", {}, {})] * 4, ValueError, "came twice"),
        (lambda: failing(RuntimeError("from the model")), RuntimeError, "from the model"),
        (lambda: failing(KeyboardInterrupt()), KeyboardInterrupt, None),
        (lambda: failing(SystemExit(75)), SystemExit, "75"),
    ],
)
def test_a_shard_that_fails_leaves_nothing(root, samples, error, message):
    before = tree(root)
    with pytest.raises(error, match=message):
        write_shard(open_store(root), NAME, samples(), num_samples=4, spec_digest="")
    assert tree(root) == before


def test_completion_is_bound_to_the_spec_and_to_the_sizes(root):
    store = open_store(root)
    digest = bind(store, {"seed": 0}, 4, 4).spec_digest
    assert not is_complete(store, NAME, digest)
    rewrite(root)
    assert is_complete(store, NAME, digest)
    with pytest.raises(OtherSpecError, match="Delete the shards of the other spec"):
        is_complete(store, NAME, "other")
    for suffix in (".tar", ".idx.npy", ".json"):
        path = root / f"{NAME}{suffix}"
        whole = path.read_bytes()
        for damaged in (whole[:-1], whole + b"\0", b""):
            path.write_bytes(damaged)
            assert not is_complete(store, NAME, digest)
        path.unlink()
        assert not is_complete(store, NAME, digest)
        path.write_bytes(whole)
    assert is_complete(store, NAME, digest)
    discard(store, NAME)
    discard(store, NAME)
    assert list(tree(root)) == ["spec.json"]


STEPS = ("open", "writev", "fsync", "replace", "unlink")


def at_step(patch, number, moment, act):
    """Let `act` happen at call `number` of those in the os module that change a disk, before or after it, or, for
    writes, when half of it is written. Returns the list of calls that were made."""
    calls = []

    def wrap(name, original):
        def call(*args, **kwargs):
            calls.append(name)
            if len(calls) != number:
                return original(*args, **kwargs)
            if moment == "half" and name == "writev":
                original(args[0], [memoryview(args[1][0])[: len(args[1][0]) // 2]])
            elif moment == "after":
                original(*args, **kwargs)
            return act()

        return call

    for name in STEPS:
        patch.setattr(os, name, wrap(name, getattr(os, name)))
    return calls


def start(function):
    """The process id of a forked process that runs `function`; its status is 1 after any exception."""
    child = os.fork()
    if not child:
        try:
            function()
            os._exit(0)
        finally:
            os._exit(1)
    return child


def status(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("moment", ["before", "half", "after"])
def test_a_crash_at_any_write_step_leaves_a_root_that_the_next_run_finishes(root, reference, monkeypatch, moment):
    bound = tree(root)
    number = 0
    crashed = True
    while crashed:
        number += 1

        def crash(number=number):
            at_step(monkeypatch, number, moment, lambda: os._exit(9))
            rewrite(root)

        crashed = status(start(crash)) == 9
        store = open_store(root)
        if is_complete(store, NAME, bind(store, {"seed": 0}, 4, 4).spec_digest):
            assert not verify(store).bad
        if crashed:
            rewrite(root)
        assert tree(root) == reference
        discard(store, NAME)
        assert tree(root) == bound
    assert number > 12  # three files, each opened, written, synced, renamed, and the folder synced


def test_an_old_record_never_speaks_for_new_bytes(root, reference, monkeypatch):
    """As after an update of the software that rounds otherwise: the same sizes, other bytes."""
    store = open_store(root)
    plan = bind(store, {"seed": 0}, 4, 4)
    for number in range(1, 100):
        write_one(store, plan, 0, lambda index: replace(make_sample(index), arrays=make_sample(index + 4).arrays))
        assert not verify(store).bad

        def crash(number=number):
            at_step(monkeypatch, number, "after", lambda: os._exit(9))
            write_one(open_store(root), plan, 0)

        if status(start(crash)) == 0:
            break
        if is_complete(store, NAME, plan.spec_digest):
            assert not verify(store).bad
        discard(store, NAME)
    assert number > 8
    assert {name: data for name, data in tree(root).items() if "tmp" not in name} == reference


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_an_error_at_any_write_step_is_raised_and_leaves_no_temporary(root, reference, monkeypatch, code):
    def fail():
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        steps = at_step(patch, None, "before", fail)
        rewrite(root)
    for number, step in enumerate(steps, 1):
        discard(open_store(root), NAME)
        with monkeypatch.context() as patch:
            at_step(patch, number, "before", fail)
            with pytest.raises(OSError, match=os.strerror(code)):
                rewrite(root)
        leftovers = [name for name in tree(root) if "tmp" in name]
        assert not leftovers or step == "unlink"  # a temporary that can't be removed stays while this process lives
        rewrite(root)
        for name in leftovers:
            (root / name).unlink()
        assert tree(root) == reference


def test_killed_writers_leave_nothing_that_the_next_run_does_not_mend(memory, longer):
    root, rng, kills = memory / "root", random.Random(0), 0

    def run(root):
        store = open_store(root)
        store.sweep()
        plan = bind(store, {"seed": 0}, 20, 2)
        for index in range(plan.num_shards):
            if not is_complete(store, plan.shard_name(index), plan.spec_digest):
                write_one(store, plan, index)

    started = time.perf_counter()
    assert status(start(lambda: run(memory / "reference"))) == 0
    whole_seconds = time.perf_counter() - started
    while kills < 50 * longer:
        child = start(lambda: run(root))
        time.sleep(rng.uniform(0, whole_seconds))
        os.kill(child, signal.SIGKILL)
        killed = status(child) == -signal.SIGKILL
        kills += killed
        done = [index for index in range(10) if (root / f"shard-{index:06d}.json").exists()]
        assert not done or not verify(open_store(root), done, num_threads=1).bad
        if not killed:
            assert tree(root) == tree(memory / "reference")
            shutil.rmtree(root)
    run(root)
    assert tree(root) == tree(memory / "reference")


@pytest.mark.parametrize("jump_seconds", [0, -1e9, 1e9])
def test_two_writers_of_one_shard_do_no_harm_whatever_the_clock_says(root, reference, monkeypatch, jump_seconds):
    store = open_store(root)
    plan = bind(store, {"seed": 0}, 4, 4)
    now = time.time()

    def interrupted_by_another_writer():
        for number, sample in enumerate(make_samples(range(4))):
            if number == 2:
                monkeypatch.setattr(time, "time", lambda: now + jump_seconds)
                rewrite(root)
            yield sample

    write_shard(store, NAME, interrupted_by_another_writer(), num_samples=4, spec_digest=plan.spec_digest)
    assert tree(root) == reference
    discard(store, NAME)
    children = [start(lambda: [write_one(open_store(root), plan, 0) for _ in range(5)]) for _ in range(6)]
    assert [status(child) for child in children] == [0] * 6
    assert tree(root) == reference


def test_a_tar_that_another_writer_replaced_with_other_bytes_is_never_taken_for_good(root):
    rewrite(root)
    store = open_store(root)
    other = bytearray(store.read(f"{NAME}.tar"))
    other[2000] ^= 1  # a JSON padding byte: the same size, as from a processor that rounds otherwise
    store.write(f"{NAME}.tar", other)
    assert list(verify(store).bad) == [0]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_a_full_disk_is_an_error_that_names_the_file_and_leaves_nothing(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs here: {mounted.stderr}")
    try:
        store = open_store(disk)
        plan = bind(store, {"seed": 0}, 40, 4)
        with pytest.raises(OSError, match=r"No space left.*shard-00000\d") as error:
            write_set(store, num_samples=40, samples_per_shard=4)
        assert error.value.errno == errno.ENOSPC
        assert not [name for name in tree(disk) if "tmp" in name]
        done = [index for index in range(10) if is_complete(store, plan.shard_name(index), plan.spec_digest)]
        assert done
        assert not verify(store, done).bad
        subprocess.run(["mount", "-o", "remount,size=1m", disk], check=True)
        write_set(store, num_samples=40, samples_per_shard=4)
        write_set(open_store(tmp_path / "reference"), num_samples=40, samples_per_shard=4)
        assert tree(disk) == tree(tmp_path / "reference")
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)  # the store keeps a file open


def test_a_folder_that_may_not_be_written_is_named():
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o555)

        def write_as_nobody():
            if os.geteuid() == 0:
                os.setuid(65534)
            with pytest.raises(PermissionError, match=folder):
                write_shard(open_store(folder), NAME, make_samples([0]), num_samples=1, spec_digest="")

        assert status(start(write_as_nobody)) == 0


def test_a_folder_deleted_in_the_middle_is_an_error_and_the_next_run_starts_over(root, reference):
    store = open_store(root)

    def samples():
        for number, sample in enumerate(make_samples(range(4))):
            if number == 2:
                shutil.rmtree(root)
            yield sample

    with pytest.raises(FileNotFoundError):
        write_shard(store, NAME, samples(), num_samples=4, spec_digest=bind(store, {"seed": 0}, 4, 4).spec_digest)
    rewrite(root)
    assert tree(root) == reference
