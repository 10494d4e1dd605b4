"""The stages of reading as ordinary webdataset stages, and sequential reading of tars that nobody indexed.

Two ways begin here. `ShardSource` is the first stage of a webdataset.DataPipeline over a sealed data set. And
`SequentialLoader` reads any webdataset tars of .npy and .json members from their beginning to their end: files of
strangers, `pipe:` commands, places without random access. Both end in `collate`, so their batches are alike."""

import gzip
import logging
import os
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from queue import Empty, SimpleQueue
from typing import Any, BinaryIO, cast

import braceexpand
import numpy as np
import torch
import torch.distributed
import webdataset
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from shards.batches import Batch
from shards.loader import ShardLoader, check_rank
from shards.manifest import Manifest
from shards.order import Permutation
from shards.storage import is_remote, open_object
from shards.store import StorageConfig
from shards.tar import Sample, members, parse_npy, parse_text

log = logging.getLogger(__name__)

NO_END = 1 << 62  # stands for the length of a stream, which is known only behind its end
GZIP = b"\x1f\x8b"  # what every gzip begins with, and no tar that is read here: it is not UTF-8

Url = str | os.PathLike[str]


class ShardSource(IterableDataset):
    """First stage of a webdataset.DataPipeline: the samples of a sealed data set as decoded webdataset samples.

        webdataset.DataPipeline(ShardSource(root), webdataset.map(...), webdataset.batched(16, collation_fn=...))

    Every iteration is the next epoch, split exactly over ranks and DataLoader workers. But workers that a DataLoader
    starts anew for each epoch know only how far the main process has come: call `set_epoch` there before each, or all
    are the same. All ranks have the same number of samples, fewer than world_size * num_workers are left out; with
    `drop_last=False` none is, and the lower ranks may have one more. A sample is {"__key__", "json": dict,
    "<field>.npy": array}; its arrays live in reused memory, which is theirs for as long as they live."""

    def __init__(self, source: Any, *, rank: int = 0, world_size: int = 1, **options: Any) -> None:
        """`source` and `options` as for ShardLoader; `on_corrupt="skip"` on one rank only."""
        super().__init__()
        self._make_loader = partial(ShardLoader, source, batch_size=1, **options)
        self._rank, self._world_size = rank, world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next iteration is, here and in DataLoader workers that are started after this."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        index, count = (worker.id, worker.num_workers) if worker else (0, 1)
        # The workers' turns give a rank what it would read by itself: every world_size-th place of the epoch.
        loader = self._make_loader(rank=index * self._world_size + self._rank, world_size=self._world_size * count)
        if loader.config.on_corrupt == "skip" and self._world_size > 1:
            raise ValueError(
                f'on_corrupt="skip" leaves samples out here, so that {self._world_size} ranks would make unequal steps '
                "and wait for each other for ever. Use ShardLoader, whose batches keep a row for each sample, or "
                'on_corrupt="fail".'
            )
        loader.set_epoch(self.epoch)
        self.epoch += 1
        for batch in loader:
            if batch.valid[0]:
                arrays = {f"{name}.npy": tensor[0].numpy() for name, tensor in batch.arrays.items()}
                yield {"__key__": batch.keys[0], "json": batch.text[0], **arrays}


class SequentialLoader:
    """Batches of one rank from tars read from beginning to end, each tar by one rank.

    All ranks make the same number of steps: `num_batches` each if it is given (tars are then repeated as needed), and
    otherwise as many as the ranks agree on before every step, by torch.distributed. What goes beyond is left out in
    training; in evaluation (`drop_last` False) ranks that have run out repeat rows that are not `valid` instead.

    Damage is an error: a tar, gzipped or not, that ends early, a sample that lacks a tensor, a shard of a sealed data
    set with other than its number of samples. What cannot be had from a stream is a place to resume at: an epoch that
    was interrupted begins again. Use ShardLoader where there is an index."""

    def __init__(
        self,
        source: Url | Sequence[Url] | Manifest,
        *,
        batch_size: int,
        fields: Sequence[str] | None = None,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        shuffle_samples: int = 0,
        num_batches: int | None = None,
        num_workers: int = 0,
        drop_last: bool = True,
        stages: Sequence[Callable[[Iterable[Sample]], Iterable[Sample]]] = (),
        read_timeout_seconds: float = 300.0,
        storage: StorageConfig | None = None,
    ) -> None:
        """`source`: paths and URLs, with braces expanded, and anything else that webdataset opens; or the manifest of a
        sealed data set. `storage`: how buckets and servers are spoken to.

        `shuffle`: the order of the tars; `shuffle_samples`: size of webdataset's shuffle buffer behind it. `stages`
        stand between decode and collate. `read_timeout_seconds`: a batch that takes longer raises instead of hanging.
        """
        check_rank(rank, world_size)
        if batch_size < 1 or (num_batches is not None and num_batches < 1):
            raise ValueError(f"batch_size = {batch_size} and num_batches = {num_batches}: give 1 or more of each.")
        self._shards = _shards(source, storage)
        num_readers = world_size * max(1, num_workers)
        if len(self._shards) < num_readers:
            raise ValueError(
                f"{len(self._shards)} tars cannot feed {num_readers} readers ({world_size} ranks with {num_workers} "
                "workers): one would have nothing and all would wait for it. Use fewer, or more tars."
            )
        self._group = _agreeing_ranks(world_size) if world_size > 1 and num_batches is None else None
        log.warning("Sequential reading cannot resume within an epoch: after a restart the epoch begins again.")
        self.epoch = 0
        self._rank, self._world_size, self._num_workers = rank, world_size, num_workers
        self._seed, self._shuffle = seed, shuffle
        self._batch_size, self._num_batches, self._drop_last = batch_size, num_batches, drop_last
        self._read_timeout_seconds = read_timeout_seconds
        self._to_batches = [
            webdataset.map(partial(decode, fields=fields)),
            *([webdataset.shuffle(shuffle_samples, seed=seed)] if shuffle_samples else []),
            *stages,
            webdataset.batched(batch_size, collation_fn=None, partial=not drop_last),
            webdataset.map(partial(collate, batch_size=batch_size)),
        ]

    def __len__(self) -> int:
        if self._num_batches is None:
            raise TypeError("The number of batches is not known before the tars have been read; give num_batches.")
        return self._num_batches

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Batch]:
        order = np.arange(len(self._shards))
        if self._shuffle:
            order = Permutation(len(order), (self._seed, self.epoch))(order)
        own = [self._shards[index] for index in order[self._rank :: self._world_size]]
        self.epoch += 1
        reading = [shard.url for shard in own]
        pipeline = webdataset.DataPipeline(
            partial(iter if self._num_batches is None else cycle, own),
            webdataset.split_by_worker,
            partial(read_shards, reading=reading),
            *self._to_batches,
        )
        batches = self._pull(iter(DataLoader(pipeline, batch_size=None, num_workers=self._num_workers)), reading)
        if self._num_batches is None:
            yield from self._in_step(batches)
        else:
            yield from (next(batches) for _ in range(self._num_batches))

    def _pull(self, batches: Iterator[Batch], reading: list[str]) -> Iterator[Batch]:
        """The batches, each fetched when it is asked for by a thread that can be left behind when it is stuck.

        `reading`: the URLs of the tars among which is the one being read."""
        asked: SimpleQueue[bool] = SimpleQueue()
        ready: SimpleQueue[Batch | BaseException | None] = SimpleQueue()
        threading.Thread(None, _fetch, "SequentialLoader", (batches, asked, ready), daemon=True).start()
        del batches  # the thread closes them, which may take as long as a read
        try:
            while True:
                asked.put(True)
                try:
                    batch = _take(ready, self._read_timeout_seconds)
                except Empty:
                    raise TimeoutError(
                        f"No batch came for {self._read_timeout_seconds:g} s, read_timeout_seconds, from "
                        f"{' or '.join(reading[:3])}{' or others' if len(reading) > 3 else ''}: the storage does not "
                        "answer. Look at the file system, network or command, or allow more time."
                    ) from None
                if isinstance(batch, BaseException):
                    raise batch
                if batch is None:
                    return
                yield batch
        finally:
            asked.put(False)

    def _in_step(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches for as many steps as all ranks have (or, in evaluation, as any rank has), one at least."""
        last: Batch | None = None
        while True:
            batch = next(batches, None)
            going_on = torch.tensor(int(batch is not None))
            if self._group is not None:
                all_must = self._drop_last or last is None  # in evaluation, too, each needs rows to fill up with
                agree = torch.distributed.ReduceOp.MIN if all_must else torch.distributed.ReduceOp.MAX
                torch.distributed.all_reduce(going_on, agree, self._group)
            if not going_on:
                break
            if batch is None:
                assert last is not None
                batch = replace(last, valid=torch.zeros_like(last.valid))
            last = batch
            yield batch
        if last is None:
            raise ValueError(
                f"The tars of {'another rank' if batch else f'rank {self._rank}'} do not have one batch of "
                f"{self._batch_size} samples (drop_last = {self._drop_last}, {self._num_workers} workers): there would "
                "be no step. Use smaller batches or fewer workers, or num_batches, which repeats the tars."
            )
        if batch:
            log.info("Rank %d left out at least one batch, because another rank has no more.", self._rank)


def _agreeing_ranks(world_size: int) -> Any:
    """A group of torch.distributed's ranks. Raises ValueError unless they are as many as are to read."""
    is_initialised = torch.distributed.is_available() and torch.distributed.is_initialized()
    count = torch.distributed.get_world_size() if is_initialised else 0
    if count != world_size:
        raise ValueError(
            f"world_size is {world_size}, but torch.distributed, by which ranks agree on when to stop where nobody has "
            f"counted the samples, has {count} of them{'' if is_initialised else ', as it is not initialised'}: they "
            "would wait for ever. Start as many in it, or give num_batches."
        )
    return torch.distributed.new_group(backend="gloo")


def _fetch(
    batches: Iterator[Batch], asked: "SimpleQueue[bool]", ready: "SimpleQueue[Batch | BaseException | None]"
) -> None:
    """Put a batch, None behind the last, or what was raised, for every True that is asked."""
    while asked.get():
        try:
            ready.put(next(batches, None))
        except BaseException as error:  # would end this thread in silence while the consumer waits
            ready.put(error)


def _take(ready: "SimpleQueue[Batch | BaseException | None]", seconds: float) -> Batch | BaseException | None:
    """What comes within `seconds`, or Empty. In short waits: a signal that arrives right before one does not end it."""
    while seconds > 1.0:
        with suppress(Empty):
            return ready.get(timeout=1.0)
        seconds -= 1.0
    return ready.get(timeout=seconds)


@dataclass(frozen=True)
class Shard:
    """A tar to be read from beginning to end."""

    url: str
    storage: StorageConfig | None = None
    num_samples: int | None = None  # of one that belongs to a sealed data set

    @contextmanager
    def open(self) -> Iterator["_ForwardFile"]:
        """A file that can be read and, forward only, positioned."""
        with ExitStack() as stack:
            if self.num_samples or (is_remote(self.url) and "?" not in self.url):  # webdataset has pipes for these
                store, name = open_object(self.url, self.storage)
                pieces = store.stream(name)
                file = _ForwardFile(lambda size: bytes(next(pieces, b"")))
            else:
                file = _ForwardFile(stack.enter_context(webdataset.gopen(self.url)).read)
            if file.peek(len(GZIP)) == GZIP:
                file = _ForwardFile(gzip.GzipFile(fileobj=cast(BinaryIO, file), mode="rb").read)
            yield file
            while file.read(1 << 20):  # behind the tar's end a gzip has its checksum
                pass


def _shards(source: Url | Sequence[Url] | Manifest, storage: StorageConfig | None) -> list[Shard]:
    if isinstance(source, Manifest):
        urls = (f"{source.url}/{source.shard_name(index)}.tar" for index in range(source.num_shards))
        return [Shard(url, storage, len(source.plan.samples(index))) for index, url in enumerate(urls)]
    patterns = [source] if isinstance(source, str | os.PathLike) else source
    return [Shard(url, storage) for pattern in patterns for url in braceexpand.braceexpand(os.fspath(pattern))]


class _ForwardFile:
    """A stream as `shards.tar.members` reads a file: every position is at or behind the last."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read = read
        self._rest = b""
        self._position = 0

    def seek(self, offset: int, whence: int = 0) -> int:
        if whence == 2:
            return NO_END
        assert offset >= self._position, "a stream cannot go back"
        while self._position < offset and self.read(min(offset - self._position, 1 << 20)):
            pass
        return self._position

    def peek(self, size: int) -> bytes:
        """What `read` will give."""
        data = self.read(size)
        self._rest = data + self._rest
        self._position -= len(data)
        return data

    def read(self, size: int) -> bytes:
        """`size` bytes, or what is left."""
        pieces = [self._rest]
        missing = size - len(self._rest)
        while missing > 0 and (piece := self._read(max(missing, 1 << 16))):
            pieces.append(piece)
            missing -= len(piece)
        data = b"".join(pieces)
        self._rest = data[size:]
        self._position += min(size, len(data))
        return data[:size]


def read_shards(shards: Iterable[Shard], reading: list[str]) -> Iterator[dict[str, Any]]:
    """The samples of tars as raw webdataset samples: {"__key__", "__url__", "json": bytes, "<field>.npy": bytes}.

    `reading` is made to hold the URL of the tar that is being read. Raises ValueError, with the tar's URL, for one that
    is broken, ends early, or has not its number of samples; and when tars without samples come round again."""
    first_empty: Shard | None = None  # behind the last sample
    for shard in shards:
        reading[:] = [shard.url]
        count = 0
        try:
            if shard is first_empty:
                raise ValueError("it comes round again, and neither it nor any tar read since has a sample")
            with shard.open() as file:
                for sample in _group(file):
                    count += 1
                    yield {"__url__": shard.url, **sample}
            if shard.num_samples not in (None, count):
                raise ValueError(f"it has {count} samples and not the {shard.num_samples} that it was sealed with")
        except (ValueError, EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{shard.url}: {error}") from None
        first_empty = None if count else first_empty or shard


def _group(file: _ForwardFile) -> Iterator[dict[str, Any]]:
    """Neighbouring members whose names agree up to the first dot behind the folder, as webdataset groups them."""
    sample: dict[str, Any] = {}
    for member in members(cast(BinaryIO, file)):
        folder, slash, base = member.name.rpartition("/")
        stem, _, suffix = base.partition(".")
        key = folder + slash + stem
        if sample.get("__key__") != key:
            if sample:
                yield sample
            sample = {"__key__": key}
        if suffix in sample:
            raise ValueError(f"sample {key} has two members .{suffix}")
        file.seek(member.offset)
        sample[suffix] = file.read(member.size)
        if len(sample[suffix]) < member.size:
            raise ValueError(f"the tar is cut off inside {member.name}")
    if sample:
        yield sample


def decode(sample: dict[str, Any], fields: Sequence[str] | None = None) -> Sample:
    """A sample from the bytes of its members: JSON and .npy, never a pickle. bfloat16 comes as its bits in uint16.

    `fields`: names of tensors, all of which it must have (None: those it has). Raises ValueError naming the sample."""
    try:
        names = fields or [name.removesuffix(".npy") for name in sample if name.endswith(".npy")]
        missing = [name for name in names if f"{name}.npy" not in sample]
        if missing or not names:
            raise ValueError(f"it has no member {', '.join(missing) or '.npy'} among {sorted(sample)}")
        text = parse_text(sample["json"]) if "json" in sample else {}
        return Sample(sample["__key__"], text, {name: _decode_npy(sample[f"{name}.npy"]) for name in names})
    except ValueError as error:
        raise ValueError(f"{sample.get('__url__', '')}: sample {sample['__key__']}: {error}") from None


def _decode_npy(data: bytes) -> np.ndarray:
    dtype, shape, start = parse_npy(data)
    if start + int(np.prod(shape)) * dtype.itemsize != len(data):
        raise ValueError(f"a .npy of {dtype}{list(shape)} has {len(data) - start} bytes")
    return np.frombuffer(data, dtype, offset=start).reshape(shape)


def collate(samples: Sequence[Sample], batch_size: int | None = None) -> Batch:
    """Samples stacked to a batch. Where shapes differ they are padded with zeros; `lengths` has the real ones.

    `batch_size`: fill the batch up to it with rows that are not valid, copies of the first. Raises ValueError for
    samples that differ in which tensors they have, or in a tensor's type or number of axes."""
    rows = [*samples, *[samples[0]] * ((batch_size or 0) - len(samples))]
    arrays, lengths = {}, {}
    for name in dict.fromkeys(name for row in samples for name in row.arrays):
        column = [row.arrays[name] for row in rows if name in row.arrays]
        if len(column) < len(rows) or len({(array.ndim, array.dtype) for array in column}) > 1:
            raise ValueError(f"Samples {[row.key for row in rows]} differ in {name}: they cannot stand in one batch.")
        shapes = np.array([array.shape for array in column], np.int64)
        stacked = np.zeros((len(rows), *shapes.max(axis=0)), column[0].dtype)
        for row, array in enumerate(column):
            stacked[row, ...][tuple(map(slice, array.shape))] = array
        arrays[name] = torch.from_numpy(stacked)
        lengths[name] = torch.from_numpy(shapes)
    valid = torch.arange(len(rows)) < len(samples)
    positions = torch.full((len(rows),), -1)
    return Batch([row.key for row in rows], [dict(row.text) for row in rows], arrays, valid, positions, lengths)
