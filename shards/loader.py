"""Batches from sealed data sets, in an exact order, by threads that fill reused memory ahead of the consumer."""

import logging
import math
import os
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field as Key
from pydantic import TypeAdapter, ValidationError

from shards.batches import Batch, BufferRing, Layout
from shards.cache import cached
from shards.ledger import Ledger
from shards.manifest import Manifest, load_manifest
from shards.order import StreamOrder
from shards.readahead import Filling, ReadAhead
from shards.reader import CorruptSampleError, SampleReader
from shards.record import explain_invalid
from shards.storage import open_store
from shards.store import StorageConfig
from shards.tar import Field

log = logging.getLogger(__name__)

LOOKUP_SAMPLES = 2048  # places of the order that are computed at once

Source = str | os.PathLike[str] | Manifest


@dataclass(frozen=True)
class LoaderConfig:
    batch_size: Annotated[int, Key(gt=0, description="samples of a batch on each rank")] = 16
    fields: Annotated[
        tuple[str, ...] | None, Key(min_length=1, description="tensors to read, in this order; all when not given")
    ] = None
    seed: Annotated[int, Key(ge=0, description="seed of the order")] = 0
    shuffle: Annotated[bool, Key(description="another order for every epoch; otherwise that of the shards")] = True
    block_samples: Annotated[
        int, Key(gt=0, description="neighbours that stay together when shuffled, samples; more make longer reads")
    ] = 1
    repeat: Annotated[int, Key(gt=0, le=10**9, description="passes over the data in an epoch")] = 1
    max_samples: Annotated[
        int | None,
        Key(gt=0, description="samples after which an epoch ends at the latest; shuffled, the next goes on from there"),
    ] = None
    drop_last: Annotated[
        bool,
        Key(description="leave out the last samples that fill no global batch (training), or pad them (evaluation)"),
    ] = True
    num_threads: Annotated[int | None, Key(gt=0, description="reader threads; by default what the storage likes")] = (
        None
    )
    prefetch_bytes: Annotated[
        int | None,
        Key(
            gt=0,
            description="memory of the batches read ahead of the consumer, bytes; at least one is; by default 256 MiB "
            "from disks, 512 MiB from buckets and http",
        ),
    ] = None
    checksums: Annotated[bool, Key(description="compare the checksums of all that is read")] = True
    on_corrupt: Annotated[
        Literal["fail", "skip"], Key(description="what a damaged sample does: raise, or leave its row invalid")
    ] = "fail"
    max_skipped: Annotated[int, Key(ge=0, description="damaged samples that one rank skips in an epoch")] = 100
    float32: Annotated[bool, Key(description="widen 16-bit floats while reading (the GPU does it faster)")] = False
    pin_memory: Annotated[
        bool | Literal["auto"], Key(description="page-locked batches for fast copies to a GPU; auto: if there is one")
    ] = "auto"
    read_timeout_seconds: Annotated[
        float, Key(gt=0, description="a read of a few samples that takes longer raises instead of hanging, seconds")
    ] = 300.0


_CONFIG = TypeAdapter(LoaderConfig)


@dataclass
class LoaderStats:
    """What a loader has done since it was made, on this rank."""

    samples: int = 0
    bytes: int = 0
    wait_seconds: float = 0.0
    """Time for which the consumer stood still because the next batch was not there yet."""
    skipped: int = 0
    """Damaged samples whose rows were left invalid."""


@dataclass(frozen=True)
class Progress:
    """How far a run has come in one of its data sets, all ranks and epochs together."""

    url: str
    num_samples: int
    """Samples of the data set."""
    served: int
    """Places of the order, so far, that were this data set's."""

    @property
    def passes(self) -> float:
        return self.served / self.num_samples


class ShardLoader:
    """An iterable of the batches of one rank.

    The order is a pure function of data set, seed and epoch. Global batch k takes the next world_size * batch_size
    places in it, of which each rank has its contiguous part; so every rank makes the same number of steps, whatever
    `num_threads`. Iterating goes through one epoch and leaves the loader at the beginning of the next; stopping in
    between and iterating again begins the epoch again. `load_state_dict` makes the next iteration go on where the
    state was taken, on any number of ranks and with any batch size."""

    def __init__(
        self,
        source: Source | Sequence[Source] | Mapping[Source, float],
        config: LoaderConfig | None = None,
        *,
        rank: int = 0,
        world_size: int = 1,
        ledger: str | os.PathLike[str] | None = None,
        storage: StorageConfig | None = None,
        **options: Any,
    ) -> None:
        """`source`: a sealed root (path, URL or manifest), several of them to be read as if they were one, or a mapping
        to the weights to mix them with, each in passes of its own. `options` override fields of `config`. `ledger`: a
        folder in which what is served is recorded."""
        check_rank(rank, world_size)
        try:
            self.config = _CONFIG.validate_python(asdict(replace(config or LoaderConfig(), **options)))
        except ValidationError as error:
            raise ValueError(f"The loader's {explain_invalid(error)}.") from None
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.stats = LoaderStats()
        self._readers, self._weights = _open(source, storage, self.config)
        self._order = self._make_order(self.config.seed, self.config.block_samples)
        self._manifest_digest = _digest(self._readers, self._order)
        self.num_samples = sum(reader.manifest.num_samples for reader in self._readers) * self.config.repeat
        self.num_samples = min(self.num_samples, self.config.max_samples or self.num_samples)
        if self.config.drop_last and self.num_samples < self._global_batch_size:
            raise ValueError(
                f"An epoch of {self.num_samples} samples does not fill one batch of {self.config.batch_size} on each "
                f"of {world_size} ranks: there would be no step. Use smaller batches, or repeat the data."
            )
        self.num_threads = self.config.num_threads or max(reader.store.concurrency for reader in self._readers)
        self._layout = Layout(_served_fields(self._readers, self.config.float32), self.config.batch_size)
        is_remote = any(reader.store.request_bytes for reader in self._readers)
        prefetch_bytes = self.config.prefetch_bytes or (512 << 20 if is_remote else 256 << 20)
        self._prefetch = max(1, prefetch_bytes // self._layout.num_bytes)
        pinned = torch.cuda.is_available() if self.config.pin_memory == "auto" else self.config.pin_memory
        self._ring = BufferRing(self._layout, self._prefetch + 2, pinned)
        self._ledger = Ledger(ledger, rank) if ledger is not None else None
        self._samples = 0  # of this epoch, yielded by all ranks together
        self._resuming = False
        self._iteration: object = None  # the one that moves the place, until another begins or a place is set
        self.sampler, self.batch_sampler = _LightningEpochs(self), None

    @property
    def _global_batch_size(self) -> int:
        return self.config.batch_size * self.world_size

    def _num_batches(self, start: int) -> int:
        left = self.num_samples - start
        return left // self._global_batch_size if self.config.drop_last else -(-left // self._global_batch_size)

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return self._num_batches(0)

    def set_epoch(self, epoch: int) -> None:
        """Which epoch comes next. When it is the one that a loaded state is in the middle of, it goes on there."""
        if epoch < 0:
            raise ValueError(f"There is no epoch {epoch}; they are counted from 0.")
        if epoch != self.epoch:
            if self._resuming:
                log.warning("The place of a loaded state, in epoch %d, gives way to epoch %d.", self.epoch, epoch)
            self.epoch, self._samples, self._resuming, self._iteration = epoch, 0, False, None

    def state_dict(self) -> dict[str, Any]:
        """The place in the order behind the last batch that was yielded: the same few integers on every rank."""
        return {
            "manifest_digest": self._manifest_digest,
            "epoch_samples": self.num_samples,
            "shuffle": self.config.shuffle,
            "seed": self._order.seed,
            "block_samples": self._order.block_samples,
            "epoch": self.epoch,
            "samples": self._samples,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the state was taken. Its seed and block size replace the config's: the order stays the same.

        Raises ValueError if the data sets, the length of an epoch, or `shuffle` are others now."""
        own = self.state_dict()
        if missing := own.keys() - state.keys():
            raise ValueError(f"This is no ShardLoader's state: it has no {', '.join(sorted(missing))}.")
        for name in ("manifest_digest", "epoch_samples", "shuffle"):
            if state[name] != own[name]:
                raise ValueError(
                    f"The state was taken from a loader whose {name} was {state[name]}; here it is {own[name]}, so its "
                    "place in the order has no meaning. Give the same data sets, weights, repeat, max_samples and "
                    "shuffle as then, or begin without the state."
                )
        if state["epoch"] < 0 or not 0 <= state["samples"] <= self.num_samples:
            raise ValueError(
                f"The state's place, sample {state['samples']} of epoch {state['epoch']}, does not exist in epochs of "
                f"{self.num_samples} samples."
            )
        self._order = self._make_order(state["seed"], state["block_samples"])
        self.epoch, self._samples = state["epoch"], state["samples"]
        self._resuming, self._iteration = True, None

    def progress(self) -> list[Progress]:
        """For each data set of the mixture, how far it has been gone through at the place that `state_dict` gives."""
        counts = self._order.counts(self._first_place(self.epoch) + self._samples)
        manifests = [reader.manifest for reader in self._readers]
        return [Progress(each.url, each.num_samples, served) for each, served in zip(manifests, counts)]

    def __iter__(self) -> Iterator[Batch]:
        if not self._resuming:
            self._samples = 0
        self._resuming = False
        self._iteration = iteration = object()
        epoch, start, num_skipped = self.epoch, self._samples, 0
        num_batches = self._num_batches(start)
        if self._ledger:
            own = {"rank": self.rank, "world_size": self.world_size, "time": time.time()}
            shape = {name: getattr(self.config, name) for name in ("batch_size", "drop_last")}
            self._ledger.write({**self.state_dict(), **own, **shape})
        empty = self._empty_batches(epoch, start, num_batches)
        ahead = ReadAhead(
            self._readers,
            empty,
            self.num_threads,
            lambda: self.config.num_threads or max(reader.store.useful_reads for reader in self._readers),
            self._prefetch,
            self.config.read_timeout_seconds,
        )
        try:
            for step in range(1, num_batches + 1):
                started = time.perf_counter()
                filled = ahead.take()
                self.stats.wait_seconds += time.perf_counter() - started
                num_skipped += self._account(filled, num_skipped)
                if self._iteration is iteration:  # otherwise the place is no longer ours to move
                    reached = epoch, start + step * self._global_batch_size
                    self.epoch, self._samples = reached if step < num_batches else (epoch + 1, 0)
                yield filled.batch()
        finally:
            ahead.close()
        left = self.num_samples - start - num_batches * self._global_batch_size
        if left > 0:
            log.info("Epoch %d left out its last %d of %d samples.", epoch, left, self.num_samples)
        if num_batches == 0:  # a state so near to the end that no batch was left
            self.epoch, self._samples = epoch + 1, 0

    def _empty_batches(self, epoch: int, start: int, num_batches: int) -> Iterator[Filling]:
        """The batches of this rank from place `start` of the epoch on, each with what stands at its places."""
        order, first_place = self._order, self._first_place(epoch)
        size = self.config.batch_size
        at_once = max(1, LOOKUP_SAMPLES // size)
        for step in range(0, num_batches, at_once):
            steps = np.arange(step, min(step + at_once, num_batches))[:, None]
            positions = start + steps * self._global_batch_size + self.rank * size + np.arange(size)
            draws = order[first_place + np.minimum(positions, self.num_samples - 1)]
            for row, places in enumerate(positions):
                yield Filling(places, self.num_samples, draws[row], self._layout, self._ring)

    def _make_order(self, seed: int, block_samples: int) -> StreamOrder:
        sources = [(reader.manifest.digest, reader.manifest.num_samples) for reader in self._readers]
        return StreamOrder(sources, self._weights, seed=seed, block_samples=block_samples, shuffle=self.config.shuffle)

    def _first_place(self, epoch: int) -> int:
        """Where in the stream an epoch begins: behind the one before, or without shuffling again at the beginning."""
        return epoch * self.num_samples if self.config.shuffle else 0

    def _account(self, filled: Filling, num_skipped: int) -> int:
        """Count what is about to be served, put it on record, and return how many are skipped in addition to
        `num_skipped` before; raise for damage that is not to be skipped."""
        damaged = [row for row in sorted(filled.damaged) if filled.inside[row]]
        for number, row in enumerate(damaged, num_skipped + 1):
            if self.config.on_corrupt == "fail":
                raise filled.damaged[row]
            log.warning("Skipped: %s", filled.damaged[row])
            if number > self.config.max_skipped:
                raise CorruptSampleError(
                    f"{number} damaged samples in this epoch on rank {self.rank}, more than max_skipped = "
                    f"{self.config.max_skipped}; the last: {filled.damaged[row]}"
                )
        self.stats.skipped += len(damaged)
        self.stats.samples += int(filled.valid.sum())
        self.stats.bytes += self._layout.num_bytes
        if self._ledger:
            own = np.flatnonzero(filled.inside).tolist()
            self._ledger.write(
                {
                    "positions": filled.positions[own].tolist(),
                    "sources": filled.draws.source[own].tolist(),
                    "cycles": filled.draws.cycle[own].tolist(),
                    "keys": [None if row in filled.damaged else filled.found[row][0] for row in own],
                }
            )
        return len(damaged)

    def __reduce__(self) -> Any:
        raise TypeError("A ShardLoader has threads, connections and memory of its own: make one in each process.")


def check_rank(rank: int, world_size: int) -> None:
    """Raise ValueError for a rank that there cannot be."""
    if not 0 <= rank < world_size:
        raise ValueError(f"There is no rank {rank} of {world_size}; ranks go from 0 to world_size - 1.")


class _LightningEpochs:
    """Where Lightning looks for a sampler, to say which epoch begins: so an epoch that it leaves early, or that a
    checkpoint behind it ended, is not begun again. Its count may be another than ours, which a loaded state gives."""

    def __init__(self, loader: ShardLoader) -> None:
        self._loader = weakref.proxy(loader)  # in no circle, so that its memory is freed at once
        self._ahead = 0  # our count is of Lightning's

    def set_epoch(self, epoch: int) -> None:
        loader = self._loader
        if loader._resuming or epoch + self._ahead < loader.epoch:
            self._ahead = loader.epoch - epoch
        else:
            loader.set_epoch(epoch + self._ahead)


def _open(
    source: Source | Sequence[Source] | Mapping[Source, float], storage: StorageConfig | None, config: LoaderConfig
) -> tuple[list[SampleReader], list[float] | None]:
    """A reader for each data set, and the weights to mix several with, if there are any."""
    sources = list(source) if isinstance(source, Mapping | Sequence) and not isinstance(source, str) else [source]
    if not sources:
        raise ValueError("There is no data set to read: the list of sources is empty.")
    if isinstance(source, Mapping) and not all(0 < weight < math.inf for weight in source.values()):
        raise ValueError(f"The weights of data sets must be positive numbers, not {list(source.values())}.")
    readers = []
    for item in sources:
        store = open_store(item.url if isinstance(item, Manifest) else item, storage)
        manifest = item if isinstance(item, Manifest) else load_manifest(store)
        store = cached(store, manifest.digest)
        readers.append(SampleReader(manifest, store, config.fields, config.checksums))
    weights = list(map(float, source.values())) if isinstance(source, Mapping) and len(readers) > 1 else None
    return readers, weights


def _digest(readers: Sequence[SampleReader], order: StreamOrder) -> str:
    """The identity of a data set, or of a mixture."""
    if len(readers) == 1:
        return readers[0].manifest.digest
    shares = None if order.shares is None else order.shares.tolist()
    mixture = [[reader.manifest.digest for reader in readers], shares]
    return sha256(repr(mixture).encode()).hexdigest()[:32]


def _served_fields(readers: Sequence[SampleReader], float32: bool) -> tuple[Field, ...]:
    """The fields of a batch. Raises ValueError where the data sets of a mixture differ in them."""
    fields = readers[0].fields
    for reader in readers:
        if reader.fields != fields:
            raise ValueError(
                f"{reader.manifest.url} has the fields {reader.fields} and {readers[0].manifest.url} has {fields}: "
                "they cannot stand in one batch. Choose `fields` in which they agree."
            )
    return tuple(
        replace(field, dtype="float32") if float32 and field.dtype in ("float16", "bfloat16") else field
        for field in fields
    )
