"""The loader serves every sample exactly once, to any number of ranks and threads, over any stops and changes."""

import contextlib
import gc
import os
import pickle
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest
import pytorch_lightning
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_lightning.callbacks import ModelCheckpoint
from shard_data import make_data_set, make_sample

from shards.loader import ShardLoader
from shards.local_store import LocalStore
from shards.order import MIXING_PERIOD, StreamOrder
from shards.reader import CorruptSampleError

NUM_SAMPLES = 61


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "train"
    make_data_set(folder, num_samples=NUM_SAMPLES, samples_per_shard=10)
    return folder


@pytest.fixture(scope="module")
def two_roots(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("other") / "train"
    make_data_set(folder, num_samples=20, first=1000)
    return [root, folder]


def keys_of(batches) -> list[str]:
    return [key for batch in batches for key, valid in zip(batch.keys, batch.valid.tolist()) if valid]


def test_batches_hold_the_samples_that_were_written(root):
    for batch in ShardLoader(root, batch_size=8):
        for row, (key, text) in enumerate(zip(batch.keys, batch.text)):
            sample = make_sample(int(key))
            assert text == sample.text
            for name, array in sample.arrays.items():
                assert batch.arrays[name].dtype == torch.float16
                np.testing.assert_array_equal(batch.arrays[name][row], array)


setups = st.fixed_dictionaries(
    {
        "world_size": st.integers(1, 5),
        "batch_size": st.integers(1, 7),
        "num_threads": st.integers(1, 4),
        "prefetch_bytes": st.sampled_from([1, 2000, 1 << 20]),
        "block_samples": st.integers(1, 12),
    }
)


@given(st.lists(st.tuples(setups, st.integers(1, 6)), max_size=4), setups, st.booleans(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_every_sample_comes_once_over_stops_and_changes(root, stops, last, drop_last, shuffle):
    """Whatever changes at a stop, the multiset over the epoch is exact, and all ranks agree on state and steps."""
    served: list[str] = []
    state = {"epoch": 3}
    for setup, num_steps in [*stops, (last, 1000)]:
        reached = []
        for rank in range(setup["world_size"]):
            loader = ShardLoader(root, rank=rank, drop_last=drop_last, shuffle=shuffle, **setup)
            if len(state) > 1:
                loader.load_state_dict(state)
            loader.set_epoch(3)
            batches = iter(loader)
            taken = [batch for _, batch in zip(range(num_steps), batches)]
            batches.close()
            served += keys_of(taken)
            reached.append((len(taken), loader.state_dict()))
        assert all(other == reached[0] for other in reached)
        state = reached[0][1]
        if state["epoch"] == 4:
            break
    assert state["epoch"] == 4
    assert state["samples"] == 0
    assert len(set(served)) == len(served)
    num_missing = NUM_SAMPLES - len(served)
    assert num_missing < setup["world_size"] * setup["batch_size"] if drop_last else num_missing == 0


def test_nothing_depends_on_threads_or_prefetch(root):
    orders = [
        keys_of(ShardLoader(root, batch_size=4, num_threads=num_threads, prefetch_bytes=size))
        for num_threads, size in [(1, 1), (2, 1 << 20), (9, 5000)]
    ]
    assert orders[0] == orders[1] == orders[2]


@pytest.mark.parametrize("float32", [False, True])
def test_nothing_depends_on_how_many_neighbours_are_one_read(root, monkeypatch, float32):
    def content() -> list[tuple[list[str], list[np.ndarray]]]:
        loader = ShardLoader(root, batch_size=13, block_samples=6, num_threads=3, drop_last=False, float32=float32)
        return [(batch.keys, [tensor.numpy().copy() for tensor in batch.arrays.values()]) for batch in loader]

    alone = content()
    for request_bytes in (9000, 1 << 20):
        monkeypatch.setattr(LocalStore, "request_bytes", request_bytes)
        for (keys, arrays), (same_keys, same_arrays) in zip(alone, content(), strict=True):
            assert keys == same_keys
            assert all(map(np.array_equal, arrays, same_arrays))


def test_epochs_follow_one_another_and_set_epoch_chooses(root):
    loader = ShardLoader(root, batch_size=10)
    epochs = [keys_of(loader) for _ in range(3)]
    assert loader.epoch == 3
    loader.set_epoch(1)
    assert keys_of(loader) == epochs[1] != epochs[0]
    next(iter(loader))
    assert keys_of(loader) == epochs[2], "an iteration that was left begins again"


def test_a_state_of_another_data_set_or_epoch_length_is_refused(root, tmp_path):
    state = ShardLoader(root, batch_size=2).state_dict()
    assert all(isinstance(value, int) for name, value in state.items() if name != "manifest_digest")
    make_data_set(tmp_path, NUM_SAMPLES, first=1)
    with pytest.raises(ValueError, match="manifest_digest was"):
        ShardLoader(tmp_path, batch_size=2).load_state_dict(state)
    with pytest.raises(ValueError, match=r"epoch_samples was 61; here it is 122"):
        ShardLoader(root, batch_size=2, repeat=2).load_state_dict(state)
    with pytest.raises(ValueError, match=r"shuffle was True; here it is False"):
        ShardLoader(root, batch_size=2, shuffle=False).load_state_dict(state)
    loader = ShardLoader(root, batch_size=2)
    for samples in (-1, 62):
        with pytest.raises(ValueError, match=f"sample {samples} of epoch 0, does not exist in epochs of 61"):
            loader.load_state_dict(state | {"samples": samples})
    with pytest.raises(ValueError, match="no ShardLoader's state: it has no block_samples, epoch,"):
        loader.load_state_dict({})
    with pytest.raises(ValueError, match="no epoch -1"):
        loader.set_epoch(-1)


def test_a_place_that_is_set_during_an_iteration_stays(root, caplog):
    loader = ShardLoader(root, batch_size=4)
    batches = iter(loader)
    next(batches)
    state = loader.state_dict()
    next(batches)
    loader.load_state_dict(state)
    next(batches)
    assert loader.state_dict() == state
    following = next(iter(loader)).keys
    loader.load_state_dict(state)
    loader.set_epoch(0)
    assert next(iter(loader)).keys == following
    loader.load_state_dict(state)
    loader.set_epoch(3)
    assert "The place of a loaded state, in epoch 0, gives way to epoch 3." in caplog.messages
    assert loader.state_dict() == state | {"epoch": 3, "samples": 0}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"batch_size": 0}, "batch_size: Input should be greater than 0"),
        ({"batch_size": -3}, "batch_size: "),
        ({"num_threads": -1}, "num_threads: "),
        ({"prefetch_bytes": 0}, "prefetch_bytes: "),
        ({"block_samples": 0}, "block_samples: "),
        ({"max_samples": 0}, "max_samples: "),
        ({"repeat": 10**18}, "repeat: "),
        ({"seed": -1}, "seed: "),
        ({"on_corrupt": "Fail"}, "on_corrupt: Input should be 'fail' or 'skip'"),
        ({"max_skipped": -1}, "max_skipped: "),
        ({"read_timeout_seconds": 0}, "read_timeout_seconds: "),
        ({"fields": ()}, "fields: "),
        ({"fields": ("condition", "condition")}, "Of the fields condition, condition one is named twice"),
    ],
)
def test_options_that_make_no_sense_are_refused(root, options, reason):
    with pytest.raises(ValueError, match=reason):
        ShardLoader(root, **options)


def test_an_iteration_that_a_fork_cut_off_from_its_threads_is_an_error(root):
    batches = iter(ShardLoader(root, batch_size=2, prefetch_bytes=1))
    next(batches)
    time.sleep(0.5)  # all its threads are waiting now, so none holds a lock
    pid = os.fork()
    if not pid:
        signal.alarm(30)
        with contextlib.suppress(RuntimeError):
            list(batches)
            os._exit(1)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0


def test_a_loader_is_not_pickled(root):
    with pytest.raises(TypeError, match="make one in each process"):
        pickle.dumps(ShardLoader(root))


def test_a_batch_that_nobody_could_fill_is_refused(root):
    with pytest.raises(ValueError, match=r"61 samples does not fill one batch of 31 on each of 2 ranks"):
        ShardLoader(root, batch_size=31, world_size=2)
    with pytest.raises(ValueError, match="no rank 2 of 2"):
        ShardLoader(root, rank=2, world_size=2)


@given(st.integers(1, 5), st.integers(1, 9))
@settings(max_examples=20, deadline=None)
def test_evaluation_counts_every_sample_once_and_its_fillers_are_samples(root, world_size, batch_size):
    served = []
    for rank in range(world_size):
        loader = ShardLoader(
            root, batch_size=batch_size, rank=rank, world_size=world_size, shuffle=False, drop_last=False
        )
        batches = list(loader)
        assert len(batches) == len(loader) == -(-NUM_SAMPLES // (world_size * batch_size))
        served += keys_of(batches)
        for batch in batches:
            for row, key in enumerate(batch.keys):
                np.testing.assert_array_equal(batch.arrays["condition"][row], make_sample(int(key)).arrays["condition"])
    assert sorted(served) == [f"{index:09d}" for index in range(NUM_SAMPLES)]


def test_repeat_and_max_samples_cut_one_endless_stream_of_whole_passes(root):
    thrice = keys_of(ShardLoader(root, batch_size=61, repeat=3))
    assert Counter(thrice) == {f"{index:09d}": 3 for index in range(NUM_SAMPLES)}
    assert len(set(thrice[:61])) == 61
    loader = ShardLoader(root, batch_size=20, max_samples=20)
    assert [len(loader), *(key for _ in range(6) for key in keys_of(loader))] == [1, *thrice[:120]]


@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 12), st.booleans())
@settings(max_examples=30, deadline=None)
def test_a_list_of_data_sets_is_read_as_one(two_roots, world_size, batch_size, block_samples, shuffle):
    """Every epoch takes each sample of each once, in training and in evaluation."""
    loaders = [
        ShardLoader(
            two_roots,
            batch_size=batch_size,
            block_samples=block_samples,
            rank=rank,
            world_size=world_size,
            shuffle=shuffle,
            drop_last=False,
        )
        for rank in range(world_size)
    ]
    everything = [f"{index:09d}" for index in (*range(NUM_SAMPLES), *range(1000, 1020))]
    epochs = [[key for loader in loaders for key in keys_of(loader)] for _ in range(2)]
    assert [sorted(epoch) for epoch in epochs] == [everything] * 2
    assert (epochs[0] == epochs[1]) == (not shuffle)
    if shuffle:
        assert [(each.served, each.passes) for each in loaders[0].progress()] == [(122, 2), (40, 2)]


def test_sources_that_cannot_be_mixed_are_refused_at_once(root, two_roots):
    first, second = map(str, two_roots)
    for weights in ({first: 0, second: 1}, {first: float("inf"), second: 1}, {first: 1e-9, second: 1}):
        with pytest.raises(ValueError, match="eights"):
            ShardLoader(weights, batch_size=2)
    with pytest.raises(ValueError, match="shuffle, or give the data sets as a list"):
        ShardLoader({first: 1, second: 1}, batch_size=2, shuffle=False)
    with pytest.raises(ValueError, match="no data set to read"):
        ShardLoader([])
    state = ShardLoader({first: 1, second: 2}, batch_size=2).state_dict()
    ShardLoader({first: 2, second: 4}, batch_size=2).load_state_dict(state)
    with pytest.raises(ValueError, match="manifest_digest was"):
        ShardLoader({first: 2, second: 1}, batch_size=2).load_state_dict(state)
    with pytest.raises(ValueError, match="manifest_digest was"):
        ShardLoader(two_roots, batch_size=2).load_state_dict(state)


def test_neighbours_stay_together_in_mixtures():
    order = StreamOrder([("a", 800), ("b", 1600)], [1, 1], seed=0, block_samples=8)
    draws = order[np.arange(2400)]
    for block in range(0, 2400, 8):
        samples = draws.sample[block : block + 8]
        assert np.array_equal(samples, samples[0] + np.arange(8))
        assert len({*draws.source[block : block + 8].tolist()}) == 1


def test_mixtures_keep_weights_passes_and_places_over_a_restart(root, tmp_path):
    """Three parts of one data set to one of the other, exactly; each comes in whole passes of its own."""
    make_data_set(tmp_path, 20, first=1000)
    weights = {str(root): 3.0, str(tmp_path): 1.0}
    whole = keys_of(ShardLoader(weights, batch_size=25, repeat=13, max_samples=1000))
    first = ShardLoader(weights, batch_size=10, world_size=2, repeat=13, max_samples=1000)
    for _ in zip(range(17), first):
        pass
    of_root, other = first.progress()
    served = Counter(int(key) >= 1000 for key in whole[:340])
    assert (of_root.url, of_root.served, other.served) == (str(root), served[False], served[True])
    assert other.passes == served[True] / 20
    rest = [
        ShardLoader(weights, batch_size=33, rank=rank, world_size=2, repeat=13, max_samples=1000) for rank in range(2)
    ]
    resumed = []
    for loader in rest:
        loader.load_state_dict(first.state_dict())
        assert loader.progress() == [of_root, other]
        resumed.append(list(loader))
    assert sum(each.served for each in loader.progress()) == 1000
    order = [key for pair in zip(*resumed) for batch in pair for key in batch.keys]
    assert order == whole[340:][: len(order)]
    order = StreamOrder([("a", 61), ("b", 20)], [3, 1], seed=0)
    draws = order[np.arange(4 * MIXING_PERIOD)]
    assert (draws.source == 1).sum() == MIXING_PERIOD
    for source, size in ((0, 61), (1, 20)):
        own = draws.source == source
        visits = Counter(zip(draws.cycle[own].tolist(), draws.sample[own].tolist()))
        assert set(visits.values()) == {1}
        assert len(visits) == own.sum()
        assert draws.cycle[own].max() == (own.sum() - 1) // size


def test_data_sets_whose_fields_differ_are_not_mixed(root, tmp_path):
    make_data_set(tmp_path, 20, shapes={"condition": (4,)})
    with pytest.raises(ValueError, match="cannot stand in one batch"):
        ShardLoader([root, tmp_path], batch_size=2, fields=("condition",))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_every_float_type_is_served_as_it_is_or_widened(tmp_path, dtype):
    stored = "uint16" if dtype == "bfloat16" else dtype
    make_data_set(tmp_path, 8, shapes={"x": (2, 3)}, dtype=stored, dtypes={"x": dtype})
    [batch] = ShardLoader(tmp_path, batch_size=8, shuffle=False)
    [wide] = ShardLoader(tmp_path, batch_size=8, shuffle=False, float32=True)
    written = torch.from_numpy(np.stack([make_sample(i, {"x": (2, 3)}, stored).arrays["x"] for i in range(8)]))
    assert torch.equal(batch.arrays["x"], written.view(getattr(torch, dtype)))
    assert torch.equal(wide.arrays["x"], written.view(getattr(torch, dtype)).float())


@pytest.fixture
def damaged(tmp_path):
    """61 samples of which two shards of ten lost their tars' last bytes: samples 9, 58 and 59."""
    make_data_set(tmp_path, NUM_SAMPLES)
    for shard, lost in ((0, 1100), (5, 5000)):
        path = tmp_path / f"shard-{shard:06d}.tar"
        path.write_bytes(path.read_bytes()[:-lost])
    return tmp_path


def test_damage_fails_when_its_batch_is_due(damaged):
    batches = iter(ShardLoader(damaged, batch_size=3, shuffle=False))
    assert [next(batches).keys[0] for _ in range(3)] == ["000000000", "000000003", "000000006"]
    with pytest.raises(CorruptSampleError, match=r"sample 9 \(row 9 of .*shard-000000.tar"):
        next(batches)


def test_skipping_leaves_rows_invalid_and_all_ranks_in_step(damaged, tmp_path, caplog):
    steps, served, skipped = [], [], 0
    for rank in range(3):
        loader = ShardLoader(damaged, batch_size=4, rank=rank, world_size=3, on_corrupt="skip", drop_last=False)
        batches = list(loader)
        steps.append(len(batches))
        served += keys_of(batches)
        skipped += loader.stats.skipped
        assert all(torch.isfinite(tensor).all() for batch in batches for tensor in batch.arrays.values())
    lost = {f"{index:09d}" for index in range(NUM_SAMPLES)} - set(served)
    assert len(set(steps)) == 1
    assert len(served) == len(set(served))
    assert "000000009" in lost
    assert len(lost) == skipped == sum("Skipped: sample" in message for message in caplog.messages)


def test_more_damage_than_allowed_is_an_error(damaged):
    loader = ShardLoader(damaged, batch_size=61, on_corrupt="skip", max_skipped=1)
    for _ in range(2):
        with pytest.raises(
            CorruptSampleError, match="2 damaged samples in this epoch on rank 0, more than max_skipped"
        ):
            list(loader)
    loader = ShardLoader(damaged, batch_size=61, on_corrupt="skip", max_skipped=3)
    assert [len(list(loader)) for _ in range(4)] == [1] * 4, "the budget is that of an epoch"


def test_rows_that_only_fill_up_a_batch_are_no_damage(tmp_path):
    make_data_set(tmp_path, 3)
    path = tmp_path / "shard-000000.tar"
    path.write_bytes(path.read_bytes()[:-1100])
    loader = ShardLoader(tmp_path, batch_size=64, shuffle=False, drop_last=False, on_corrupt="skip", max_skipped=1)
    [batch] = loader
    assert loader.stats.skipped == 1
    assert batch.valid.tolist() == [True, True] + [False] * 62


def test_a_batch_without_one_sound_sample_is_zeros(tmp_path):
    make_data_set(tmp_path, 4)
    (tmp_path / "shard-000000.tar").unlink()
    [batch] = ShardLoader(tmp_path, batch_size=4, on_corrupt="skip")
    assert not batch.valid.any()
    assert all((tensor == 0).all() for tensor in batch.arrays.values())


def test_a_stuck_read_is_named_and_raised(root, monkeypatch):
    stuck = threading.Event()
    monkeypatch.setattr(LocalStore, "read_range", lambda *_: stuck.wait())
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"sample 0 \(row 0 of .*shard-000000.tar\)"):
        next(iter(ShardLoader(root, batch_size=2, shuffle=False, num_threads=1, read_timeout_seconds=0.2)))
    assert time.monotonic() - started < 10
    stuck.set()


def test_errors_of_the_storage_reach_the_consumer(root, monkeypatch):
    def fail(*_):
        raise PermissionError("not yours")

    monkeypatch.setattr(LocalStore, "read_range", fail)
    with pytest.raises(PermissionError, match="not yours"):
        next(iter(ShardLoader(root, batch_size=2)))


def test_batches_that_are_kept_stay_as_they_are_and_memory_comes_back(root):
    loader = ShardLoader(root, batch_size=5, prefetch_bytes=1)
    kept = list(loader)
    for batch in kept:
        for row, key in enumerate(batch.keys):
            np.testing.assert_array_equal(batch.arrays["condition"][row], make_sample(int(key)).arrays["condition"])
    row = kept[3].arrays["condition"][2]  # one row of one tensor keeps its batch's memory
    value = row.clone()
    del kept, batch
    gc.collect()
    places = set()
    for _ in range(5):
        for batch in loader:
            places.add(batch.arrays["condition"].untyped_storage().data_ptr())
    assert torch.equal(row, value)
    assert len(places) <= 5
    assert row.untyped_storage().data_ptr() not in places


def test_threads_end_with_the_iteration(root):
    before = threading.active_count()
    for _ in range(3):
        batches = iter(ShardLoader(root, batch_size=2, num_threads=4))
        next(batches)
        batches.close()
    assert threading.active_count() == before


def test_memory_and_descriptors_do_not_grow(tmp_path):
    """Prefetch, batches in use, indices and scratch: nothing grows with epochs, samples or shards."""
    make_data_set(tmp_path, 1200, samples_per_shard=4, shapes={"x": (16384,)})
    loader = ShardLoader(tmp_path, batch_size=16, prefetch_bytes=8 << 20)
    process = psutil.Process()
    seen = []
    for _ in range(6):
        for _ in loader:
            pass
        seen.append((process.memory_info().rss, process.num_fds()))
    assert max(rss for rss, _ in seen[1:]) - seen[1][0] < 8 << 20
    assert max(count for _, count in seen) - seen[0][1] <= 0


def test_a_billion_samples_start_at_once_in_little_memory(root):
    """From a manifest of a million shards: first places of any epoch, state, and resuming in the middle."""
    script = f"""
        import resource, time
        import numpy as np
        from dataclasses import replace
        from shards.loader import ShardLoader
        from shards.manifest import load_manifest
        small = load_manifest({str(root)!r})
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        started = time.perf_counter()
        plan = replace(small.plan, num_samples=10**9, samples_per_shard=1000)
        shards = np.zeros(10**6, np.uint64)
        large = replace(small, plan=plan, tar_bytes=shards.astype(np.int64), checksums=shards, index_checksums=shards)
        loader = ShardLoader(large, batch_size=16, world_size=64, rank=7, block_samples=4)
        first = next(loader._empty_batches(0, 0, len(loader)))
        loader.load_state_dict({{**loader.state_dict(), "epoch": 3, "samples": 500_000_000}})
        middle = next(loader._empty_batches(3, 500_000_000, 1000))
        seconds = time.perf_counter() - started
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert len(first.positions) == 16 and middle.positions[0] == 500_000_000 + 7 * 16
        print(seconds, grown / 1024)
    """
    run = [sys.executable, "-c", textwrap.dedent(script)]
    seconds, megabytes = map(float, subprocess.run(run, check=True, capture_output=True, text=True).stdout.split())
    assert seconds < 1
    assert megabytes < 200


class _Module(pytorch_lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)
        self.trained, self.validated = [], []

    def training_step(self, batch, _):
        self.trained += batch.keys
        return self.layer(batch.arrays["condition"].float()).mean()

    def validation_step(self, batch, _):
        self.validated += keys_of([batch])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-9)


def _fit(root, folder, stop: int, checkpoint: str | None) -> tuple[_Module, str]:
    module = _Module()
    trainer = pytorch_lightning.Trainer(
        max_steps=stop,
        accumulate_grad_batches=2,
        val_check_interval=4,
        limit_val_batches=None,
        num_sanity_val_steps=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        enable_checkpointing=False,
    )
    train = ShardLoader(root, batch_size=4)
    trainer.fit(module, train, ShardLoader(root, batch_size=9, shuffle=False, drop_last=False), ckpt_path=checkpoint)
    trainer.save_checkpoint(folder / "last.ckpt")
    return module, str(folder / "last.ckpt")


def test_lightning_trains_validates_and_resumes_exactly(root, tmp_path):
    """Gradient accumulation, validation in mid-epoch, a stop in mid-epoch: the same samples as without it."""
    whole, _ = _fit(root, tmp_path, 12, None)
    first, checkpoint = _fit(root, tmp_path, 5, None)
    second, _ = _fit(root, tmp_path, 12, checkpoint)
    assert first.trained + second.trained == whole.trained
    assert len(set(whole.trained[:60])) == 60
    rounds = len(whole.validated) // NUM_SAMPLES
    assert Counter(whole.validated[9:]) >= Counter(f"{index:09d}" for index in range(NUM_SAMPLES))
    assert rounds >= 4


@pytest.mark.parametrize("max_samples", [None, 20])
def test_lightning_goes_on_with_the_next_epoch_behind_one_that_ended(root, tmp_path, max_samples):
    def fit(num_epochs: int, checkpoint: str | None, folder: Path) -> list[str]:
        module = _Module()
        trainer = pytorch_lightning.Trainer(
            max_epochs=num_epochs,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[ModelCheckpoint(folder, filename="end", enable_version_counter=False)],
        )
        trainer.fit(module, ShardLoader(root, batch_size=4, max_samples=max_samples), ckpt_path=checkpoint)
        return module.trained

    whole = fit(3, None, tmp_path / "whole")
    first = fit(1, None, tmp_path / "first")
    assert first + fit(3, str(tmp_path / "first" / "end.ckpt"), tmp_path / "second") == whole
    assert len(whole) == 3 * len(first) == 3 * (max_samples or 60)
    assert len(set(whole)) == (60 if max_samples else NUM_SAMPLES)


def test_lightning_epochs_that_are_left_early_are_not_begun_again(root):
    def fit(loader: ShardLoader, **options) -> list[str]:
        module = _Module()
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        pytorch_lightning.Trainer(accelerator="cpu", enable_checkpointing=False, **quiet, **options).fit(module, loader)
        return module.trained

    loader = ShardLoader(root, batch_size=4)
    expected = []
    for epoch in range(4):
        loader.set_epoch(epoch)
        expected += [key for _, batch in zip(range(5), loader) for key in batch.keys]
    loader = ShardLoader(root, batch_size=4)
    assert fit(loader, max_epochs=2, limit_train_batches=5) == expected[:40]
    assert fit(loader, max_epochs=2, limit_train_batches=5)[20:] == expected[40:60], "a second fit goes on"


def test_the_pages_code_runs_as_it_stands(tmp_path, monkeypatch):
    """docs/reading.md, on small data sets in the places that it names."""
    for name in ("mine", "other"):
        make_data_set(tmp_path / "runs" / name / "train", 40, first=len(name) * 100)
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parent.parent / "docs" / "reading.md").read_text()
    names: dict = {}
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(code, names)
    assert names["state"]["epoch"] == 2
    assert len(names["captions"]) == 16
