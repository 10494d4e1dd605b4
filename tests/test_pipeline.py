"""webdataset pipelines over our shards and over strangers' tars: the same tensors, damage refused, ranks in step."""

import contextlib
import gzip
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from lossy_proxy import LossyProxy
from shard_data import SHAPES, make_data_set, make_sample

from shards.loader import ShardLoader
from shards.manifest import load_manifest
from shards.pipeline import SequentialLoader, ShardSource, collate
from shards.tar import Sample


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "train"
    make_data_set(folder, 57, samples_per_shard=10)
    return folder


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """Tars that webdataset's own writer made, with pax headers and folders in their keys."""
    folder = tmp_path_factory.mktemp("foreign")
    for shard in range(4):
        with webdataset.TarWriter(str(folder / f"part-{shard}.tar")) as writer:
            for index in range(shard * 7, shard * 7 + 7 - shard):
                array = np.full((2, index + 1), index, np.float32)
                writer.write({"__key__": f"a/b/{index}", "x.npy": array, "json": {"index": index}})
    return folder


@pytest.mark.parametrize("kind", ["http", "s3"])
def test_tars_behind_broken_connections_are_read_whole(foreign, tmp_path, request, kind):
    server = request.getfixturevalue(f"{kind}_server")
    for path in foreign.glob("*.tar"):
        server.target(tmp_path.name).write(path.name, path.read_bytes())
    with LossyProxy(server.port, faults=("cut",), rate=0.4) as proxy:
        source = server.source(tmp_path.name, proxy.url, backoff_seconds=0.001)
        loader = SequentialLoader(source.url + "/part-{0..3}.tar", batch_size=22, storage=source.options)
        for _ in range(5):
            [batch] = loader
            assert sorted(text["index"] for text in batch.text) == [
                index for shard in range(4) for index in range(shard * 7, shard * 7 + 7 - shard)
            ]
        assert proxy.counts["cut"] > 3


def test_stock_webdataset_reads_the_same_tensors(root):
    urls = [str(path) for path in sorted(root.glob("*.tar"))]
    theirs = {sample["__key__"]: sample for sample in webdataset.WebDataset(urls, shardshuffle=False).decode()}
    assert len(theirs) == 57
    for batch in ShardLoader(root, batch_size=19):
        for row, key in enumerate(batch.keys):
            assert theirs[key]["json"] == batch.text[row]
            for name, tensor in batch.arrays.items():
                np.testing.assert_array_equal(theirs[key][f"{name}.npy"], tensor[row])


def test_shard_source_feeds_a_webdataset_pipeline_with_own_stages(root):
    pipeline = webdataset.DataPipeline(
        ShardSource(root, drop_last=False),
        webdataset.map(lambda sample: {**sample, "sum": float(sample["condition.npy"].sum())}),
        webdataset.batched(10),
    )
    for _ in range(2):
        batches = list(pipeline)
        keys = [key for batch in batches for key in batch["__key__"]]
        assert sorted(keys) == [f"{index:09d}" for index in range(57)]
    assert batches[0]["sum"][0] == make_sample(int(keys[0])).arrays["condition"].sum()
    assert keys != [key for batch in pipeline for key in batch["__key__"]]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("drop_last", [True, False])
def test_shard_source_is_split_over_ranks_and_workers(root, num_workers, drop_last):
    keys = []
    for rank in range(2):
        source = ShardSource(root, rank=rank, world_size=2, drop_last=drop_last, num_threads=1)
        loader = torch.utils.data.DataLoader(source, batch_size=None, num_workers=num_workers)
        keys.append([sample["__key__"] for sample in loader])
    order = [sample["__key__"] for sample in ShardSource(root)]
    if drop_last:
        del order[56:]
    assert keys == [order[0::2], order[1::2]]


def test_dataloader_workers_started_anew_follow_the_epoch_that_was_set(root):
    source = ShardSource(root, drop_last=False, num_threads=1)
    loader = torch.utils.data.DataLoader(source, batch_size=None, num_workers=2)
    orders = []
    for epoch in (0, 1, 0):
        source.set_epoch(epoch)
        orders.append([sample["__key__"] for sample in loader])
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] == orders[2] != orders[1]


def test_dataloader_workers_that_persist_advance_by_themselves(root):
    source = ShardSource(root, drop_last=False, num_threads=1)
    loader = torch.utils.data.DataLoader(source, batch_size=None, num_workers=1, persistent_workers=True)
    first, second = ([sample["__key__"] for sample in loader] for _ in range(2))
    assert first != second
    assert sorted(first) == sorted(second)


def test_shard_source_skips_on_one_rank_only(root):
    assert len(list(ShardSource(root, on_corrupt="skip"))) == 57
    with pytest.raises(ValueError, match="2 ranks would make unequal steps"):
        next(iter(ShardSource(root, rank=1, world_size=2, on_corrupt="skip")))


def test_foreign_tars_by_braces_are_padded_with_lengths(foreign):
    loader = SequentialLoader(foreign / "part-{0..3}.tar", batch_size=4, drop_last=False)
    seen = set()
    for batch in loader:
        lengths = batch.lengths["x"]
        for row, key in enumerate(batch.keys):
            index = int(key.rpartition("/")[2])
            assert lengths[row].tolist() == [2, index + 1]
            tensor = batch.arrays["x"][row]
            assert (tensor[:, : index + 1] == index).all()
            assert (tensor[:, index + 1 :] == 0).all()
            assert batch.text[row] == {"index": index}
            if batch.valid[row]:
                assert index not in seen
                seen.add(index)
    assert len(seen) == 7 + 6 + 5 + 4


def test_pipe_sources_and_workers_read_the_same(root):
    urls = [f"pipe:cat {path}" for path in sorted(root.glob("*.tar"))]
    for num_workers in (0, 2):
        loader = SequentialLoader(urls, batch_size=5, fields=["condition"], drop_last=False, num_workers=num_workers)
        batches = list(loader)
        assert all(set(batch.arrays) == {"condition"} for batch in batches)
        keys = [key for batch in batches for key, valid in zip(batch.keys, batch.valid) if valid]
        assert sorted(keys) == [f"{index:09d}" for index in range(57)]


def test_a_sealed_data_set_read_sequentially_equals_it_read_by_index(root):
    batches = SequentialLoader(load_manifest(root), batch_size=57, shuffle=False)
    [by_stream], [by_index] = batches, ShardLoader(root, batch_size=57, shuffle=False)
    assert by_stream.keys == by_index.keys
    assert by_stream.text == by_index.text
    for name in SHAPES:
        assert torch.equal(by_stream.arrays[name], by_index.arrays[name])


def _tar(path, files: dict[str, bytes]) -> str:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return str(path)


def _npy(array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=array.dtype == object)
    return buffer.getvalue()


def test_gzipped_tars_are_read_by_whatever_name(foreign, tmp_path):
    paths = [tmp_path / "a.tar.gz", tmp_path / "b.tgz"]
    for path in paths:
        path.write_bytes(gzip.compress((foreign / "part-0.tar").read_bytes()))
    [plain] = SequentialLoader(foreign / "part-0.tar", batch_size=7)
    batches = list(SequentialLoader([*paths, f"pipe:cat {paths[0]}", f"pipe:zcat {paths[0]}"], batch_size=7))
    assert len(batches) == 4
    for batch in batches:
        assert batch.keys == plain.keys
        assert torch.equal(batch.arrays["x"], plain.arrays["x"])


@pytest.mark.parametrize(("place", "cut"), [(0, 1), (0, 4), (0, 200), (100, 0), (-6, 0)])
def test_damaged_gzips_are_refused_with_their_name(tmp_path, place, cut):
    """Bytes lost at the end, or one changed in the middle or in the checksum."""
    tar = _tar(tmp_path / "sound.tar", {"0.x.npy": _npy(np.random.default_rng(0).random(99))})
    data = bytearray(gzip.compress(Path(tar).read_bytes()))
    data[place] ^= 0 if cut else 1
    (tmp_path / "bad.tar.gz").write_bytes(data[: len(data) - cut])
    with pytest.raises(ValueError, match=r"bad\.tar\.gz: "):
        list(SequentialLoader(tmp_path / "bad.tar.gz", batch_size=1))


@pytest.mark.parametrize(
    ("files", "cut", "complaint"),
    [
        ({"0.x.npy": _npy(np.zeros(3)), "0.json": b"{}"}, -10240 + 512, "cut off"),
        ({"0.x.npy": _npy(np.zeros(9000))}, 20000, "cut off"),
        ({"0.x.npy": _npy(np.zeros(3)), "1.json": b"{}"}, None, "sample 1: it has no member x"),
        ({"0.x.npy": _npy(np.zeros(3))[:-1]}, None, "has 23 bytes"),
        ({"0.x.npy": _npy(np.array([None], object))}, None, "pickle"),
        ({"0.x.npy": _npy(np.zeros(3)), "0.json": b"[]"}, None, "not an object"),
        ({"../0.x.npy": _npy(np.zeros(3))}, None, "leads out"),
    ],
)
def test_damaged_foreign_tars_are_refused_with_their_name(tmp_path, files, cut, complaint):
    url = _tar(tmp_path / "bad.tar", files)
    with open(url, "rb+") as file:
        file.truncate(os.path.getsize(url) if cut is None else cut % os.path.getsize(url))
    with pytest.raises(ValueError, match=f"bad.tar.*{complaint}"):
        list(SequentialLoader(url, batch_size=1, fields=["x"], drop_last=False))


def test_a_sealed_shard_with_a_sample_less_is_refused(tmp_path):
    manifest = make_data_set(tmp_path, 20)
    shard = tmp_path / "shard-000001.tar"
    with open(shard, "rb+") as file:
        file.truncate(5120)
        file.seek(0, 2)
        file.write(bytes(1024))
    with pytest.raises(ValueError, match="shard-000001"):
        list(SequentialLoader(manifest, batch_size=1))


def test_samples_that_cannot_stand_in_one_batch_are_named():
    samples = [Sample("a", {}, {"x": np.zeros(3)}), Sample("b", {}, {"x": np.zeros((3, 3))})]
    with pytest.raises(ValueError, match=r"\['a', 'b'\] differ in x"):
        collate(samples)


def test_samples_must_have_the_same_tensors_in_whatever_order_they_come():
    both, one = Sample("a", {}, {"x": np.zeros(3), "y": np.zeros(3)}), Sample("b", {}, {"x": np.zeros(3)})
    for samples in ([both, one], [one, both]):
        with pytest.raises(ValueError, match="differ in y"):
            collate(samples)


def test_scalars_are_collated_to_one_number_each(tmp_path):
    url = _tar(tmp_path / "scalars.tar", {f"{index}.x.npy": _npy(np.float32(index)) for index in range(3)})
    [batch] = SequentialLoader(url, batch_size=3)
    assert torch.equal(batch.arrays["x"], torch.arange(3, dtype=torch.float32))
    assert batch.lengths["x"].shape == (3, 0)


def test_lengths_are_there_for_equal_shapes_and_move_with_the_batch():
    batch = collate([Sample("a", {}, {"x": np.zeros((2, 5))})], batch_size=2)
    assert batch.lengths["x"].tolist() == [[2, 5], [2, 5]]
    assert batch.valid.tolist() == [True, False]
    assert batch.to("meta").lengths["x"].device.type == "meta"


def test_readers_that_would_run_dry_are_refused(foreign):
    with pytest.raises(ValueError, match="4 tars cannot feed 5 readers"):
        SequentialLoader(f"{foreign}/part-{{0..3}}.tar", batch_size=4, world_size=5, num_batches=1)
    with pytest.raises(ValueError, match="no rank 2 of 2"):
        SequentialLoader(f"{foreign}/part-{{0..3}}.tar", batch_size=4, rank=2, world_size=2, num_batches=1)
    for wrong in ({"batch_size": 0}, {"batch_size": 4, "num_batches": 0}):
        with pytest.raises(ValueError, match=r"= 0.*give 1 or more"):
            SequentialLoader(f"{foreign}/part-{{0..3}}.tar", **wrong)
    with pytest.raises(ValueError, match="give num_batches"):
        SequentialLoader(f"{foreign}/part-{{0..3}}.tar", batch_size=4, world_size=2)


def test_an_epoch_without_a_batch_is_an_error(foreign, tmp_path):
    with pytest.raises(ValueError, match="rank 0 do not have one batch of 20 samples"):
        list(SequentialLoader(foreign / "part-0.tar", batch_size=20))
    empty = _tar(tmp_path / "empty.tar", {})
    with pytest.raises(ValueError, match="rank 0 do not have one batch"):
        list(SequentialLoader(empty, batch_size=1, drop_last=False))


def test_tars_without_samples_are_not_repeated_for_ever(foreign, tmp_path):
    empty = [_tar(tmp_path / f"empty-{index}.tar", {}) for index in range(2)]
    with pytest.raises(ValueError, match=r"empty-0\.tar: it comes round again"):
        list(SequentialLoader(empty, batch_size=1, num_batches=1, shuffle=False))
    urls = [empty[0], empty[0], empty[1], foreign / "part-0.tar"]
    assert len(list(SequentialLoader(urls, batch_size=7, num_batches=3, shuffle=False))) == 3


@pytest.fixture
def stuck(tmp_path):
    """A tar that never comes, a named pipe that nobody writes to. Once it ends no loader may have a thread left."""
    path = tmp_path / "stuck.tar"
    os.mkfifo(path)
    yield path
    for thread in threading.enumerate():
        while thread.name == "SequentialLoader" and thread.is_alive():
            with contextlib.suppress(OSError):  # nobody waits for it yet
                os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
            thread.join(0.1)


@pytest.mark.parametrize(("num_workers", "tars"), [(0, r"\S*stuck\.tar"), (1, r"\S*part-0\.tar or \S*stuck\.tar")])
def test_a_stuck_read_is_an_error_that_names_the_tar(foreign, stuck, num_workers, tars):
    urls, options = [foreign / "part-0.tar", stuck], {"num_workers": num_workers, "read_timeout_seconds": 0.3}
    with pytest.raises(TimeoutError, match=rf"0\.3 s, read_timeout_seconds, from {tars}: "):
        list(SequentialLoader(urls, batch_size=7, shuffle=False, **options))


@pytest.mark.parametrize("blocked", [[], [signal.SIGINT]])
def test_an_interrupt_comes_through_a_stuck_read(stuck, blocked):
    """Also when it does not wake the main thread, as if it came right before that began to wait."""
    batches = iter(SequentialLoader(stuck, batch_size=1))

    def interrupt():
        writer = os.open(stuck, os.O_WRONLY)  # as soon as it is being read
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)
        return writer

    with ThreadPoolExecutor(1) as pool:
        interrupting = pool.submit(interrupt)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
        try:
            with pytest.raises(KeyboardInterrupt):
                next(batches)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    os.close(interrupting.result())


def test_a_process_ends_though_a_read_is_stuck(stuck):
    program = f"""
        from shards.pipeline import SequentialLoader
        try:
            list(SequentialLoader("{stuck}", batch_size=1, read_timeout_seconds=0.1))
        except TimeoutError:
            print("left")
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], timeout=120, stdout=subprocess.PIPE)
    assert (ended.returncode, ended.stdout) == (0, b"left\n")


def test_an_iterator_left_early_waits_for_nothing_and_ends_its_thread(tmp_path, stuck):
    """Not even for a command that has more to do before it ends."""
    tar = _tar(tmp_path / "large.tar", {f"{index}.x.npy": _npy(np.zeros(50000)) for index in range(3)})
    for batch in SequentialLoader(f"pipe:cat {tar}; cat {stuck}", batch_size=1):
        assert batch.keys == ["0"]
        break
    assert "SequentialLoader" in [thread.name for thread in threading.enumerate()]  # waiting for the command


def test_uneven_tars_on_two_ranks_of_torchrun_make_equal_steps(foreign, tmp_path):
    """Part 0 and 2 have 12 samples, 1 and 3 have 10: training leaves some out, evaluation fills up. With 11 in a batch
    neither rank makes a step. And a rank may read alone."""
    script = tmp_path / "ranks.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import json, logging, sys, torch.distributed as dist
            from shards.pipeline import SequentialLoader
            dist.init_process_group("gloo")
            rank, size = dist.get_rank(), dist.get_world_size()
            logging.basicConfig(filename="{tmp_path}/log." + str(rank), level=logging.INFO)
            result = {{}}
            for drop_last in (True, False):
                loader = SequentialLoader("{foreign}/part-{{0..3}}.tar", batch_size=2, rank=rank, world_size=size,
                                          shuffle=False, drop_last=drop_last)
                batches = list(loader)
                keys = [k for b in batches for k, v in zip(b.keys, b.valid.tolist()) if v]
                result[str(drop_last)] = [len(batches), keys]
            loader = SequentialLoader("{foreign}/part-{{0..3}}.tar", batch_size=2, rank=rank, world_size=size,
                                      num_batches=11)
            result["repeated"] = [len(list(loader)), []]
            for name, other in (("none", dict(batch_size=11)), ("others", dict(batch_size=2, world_size=3))):
                try:
                    list(SequentialLoader("{foreign}/part-{{0..3}}.tar", shuffle=False,
                                          **dict(rank=rank, world_size=size) | other))
                except ValueError as error:
                    result[name] = str(error)
            if rank == 0:
                result["alone"] = len(list(SequentialLoader("{foreign}/part-0.tar", batch_size=1)))
            json.dump(result, open("{tmp_path}/" + str(rank), "w"))
            dist.destroy_process_group()
            """
        )
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    subprocess.run(command, check=True, timeout=120)
    first, second = (json.loads((tmp_path / str(rank)).read_text()) for rank in range(2))
    assert first["True"][0] == second["True"][0] == 5
    assert first["False"][0] == second["False"][0] == 6
    assert sorted(first["False"][1] + second["False"][1]) == sorted(
        f"a/b/{index}" for shard in range(4) for index in range(shard * 7, shard * 7 + 7 - shard)
    )
    assert first["repeated"][0] == second["repeated"][0] == 11
    assert "another rank do not have one batch of 11" in first["none"]
    assert "rank 1 do not have one batch of 11" in second["none"]
    assert "world_size is 3" in first["others"]
    assert first["alone"] == 7
    assert "Rank 0 left out at least one batch" in (tmp_path / "log.0").read_text()
    assert "left out" not in (tmp_path / "log.1").read_text()
