"""Batches from sealed data sets, in an exact order, by threads that fill reused memory ahead of the consumer."""

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field as Key

from shards.batches import Batch, BufferRing, Layout
from shards.cache import cached
from shards.ledger import Ledger
from shards.manifest import Manifest, load_manifest
from shards.order import StreamOrder
from shards.readahead import Filling, ReadAhead
from shards.reader import CorruptSampleError, SampleReader
from shards.storage import open_store
from shards.store import StorageConfig
from shards.tar import Field

log = logging.getLogger(__name__)

LOOKUP_SAMPLES = 2048  # places of the order that are computed at once

Source = str | os.PathLike[str] | Manifest


@dataclass(frozen=True)
class LoaderConfig:
    batch_size: Annotated[int, Key(gt=0, description="samples of a batch on each rank")] = 16
    fields: Annotated[tuple[str, ...] | None, Key(description="tensors to read, in this order; all when not given")] = (
        None
    )
    seed: Annotated[int, Key(ge=0, description="seed of the order")] = 0
    shuffle: Annotated[bool, Key(description="another order for every epoch; otherwise that of the shards")] = True
    block_samples: Annotated[
        int, Key(gt=0, description="neighbours that stay together when shuffled, samples; more make longer reads")
    ] = 1
    repeat: Annotated[int, Key(gt=0, description="passes over the data in an epoch")] = 1
    max_samples: Annotated[
        int | None,
        Key(gt=0, description="samples after which an epoch ends at the latest; the next goes on from there"),
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
    max_skipped: Annotated[int, Key(ge=0, description="damaged samples that one rank skips before it raises")] = 100
    float32: Annotated[bool, Key(description="widen 16-bit floats while reading (the GPU does it faster)")] = False
    pin_memory: Annotated[
        bool | Literal["auto"], Key(description="page-locked batches for fast copies to a GPU; auto: if there is one")
    ] = "auto"
    read_timeout_seconds: Annotated[
        float, Key(gt=0, description="a read of a few samples that takes longer raises instead of hanging, seconds")
    ] = 300.0


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
        """`source`: a sealed root (path, URL or manifest), several of them to be mixed in proportion to their sizes, or
        a mapping to the weights to mix them with. `options` override fields of `config`. `ledger`: a folder in which
        what is served is recorded."""
        if not 0 <= rank < world_size:
            raise ValueError(f"There is no rank {rank} of {world_size}; ranks go from 0 to world_size - 1.")
        self.config = replace(config or LoaderConfig(), **options)
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.stats = LoaderStats()
        self._readers, self._weights = _open(source, storage, self.config)
        self._manifest_digest = _digest(self._readers, self._weights)
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
        self._seed = self.config.seed
        self._block_samples = self.config.block_samples
        self._samples = 0  # of this epoch, yielded by all ranks together
        self._resuming = False

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
        if epoch != self.epoch:
            self.epoch, self._samples, self._resuming = epoch, 0, False

    def state_dict(self) -> dict[str, Any]:
        """The place in the order behind the last batch that was yielded: the same few integers on every rank."""
        return {
            "manifest_digest": self._manifest_digest,
            "epoch_samples": self.num_samples,
            "seed": self._seed,
            "block_samples": self._block_samples,
            "epoch": self.epoch,
            "samples": self._samples,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the state was taken. Its seed and block size replace the config's: the order stays the same.

        Raises ValueError if the data sets, or the length of an epoch, are others now."""
        for name, now in (("manifest_digest", self._manifest_digest), ("epoch_samples", self.num_samples)):
            if state[name] != now:
                raise ValueError(
                    f"The state was taken from a loader whose {name} was {state[name]}; here it is {now}, so its place "
                    "in the order has no meaning. Give the same data sets, weights, repeat and max_samples as then, or "
                    "begin without the state."
                )
        self._seed, self._block_samples = state["seed"], state["block_samples"]
        self.epoch, self._samples = state["epoch"], state["samples"]
        self._resuming = True

    def progress(self) -> list[Progress]:
        """For each data set of the mixture, how far it has been gone through at the place that `state_dict` gives."""
        counts = self._order().counts(self._first_place(self.epoch) + self._samples)
        manifests = [reader.manifest for reader in self._readers]
        return [Progress(each.url, each.num_samples, served) for each, served in zip(manifests, counts)]

    def __iter__(self) -> Iterator[Batch]:
        if not self._resuming:
            self._samples = 0
        self._resuming = False
        epoch, start = self.epoch, self._samples
        num_batches = self._num_batches(start)
        if self._ledger:
            own = {"rank": self.rank, "world_size": self.world_size, "time": time.time()}
            shape = {name: getattr(self.config, name) for name in ("batch_size", "drop_last", "shuffle")}
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
                self._account(filled)
                if step < num_batches:
                    self.epoch, self._samples = epoch, min(start + step * self._global_batch_size, self.num_samples)
                else:
                    self.epoch, self._samples = epoch + 1, 0
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
        order, first_place = self._order(), self._first_place(epoch)
        size = self.config.batch_size
        at_once = max(1, LOOKUP_SAMPLES // size)
        for step in range(0, num_batches, at_once):
            steps = np.arange(step, min(step + at_once, num_batches))[:, None]
            positions = start + steps * self._global_batch_size + self.rank * size + np.arange(size)
            draws = order[first_place + np.minimum(positions, self.num_samples - 1)]
            for row, places in enumerate(positions):
                yield Filling(places, self.num_samples, draws[row], self._layout, self._ring)

    def _order(self) -> StreamOrder:
        sources = [(reader.manifest.digest, reader.manifest.num_samples) for reader in self._readers]
        return StreamOrder(
            sources,
            self._weights,
            seed=self._seed,
            block_samples=self._block_samples,
            shuffle=self.config.shuffle,
        )

    def _first_place(self, epoch: int) -> int:
        """Where in the stream an epoch begins: behind the one before, or without shuffling again at the beginning."""
        return epoch * self.num_samples if self.config.shuffle else 0

    def _account(self, filled: Filling) -> None:
        """Count what is about to be served and put it on record; raise for damage that is not to be skipped."""
        damaged = sorted(filled.damaged)
        for row in damaged:
            if self.config.on_corrupt == "fail":
                raise filled.damaged[row]
            log.warning("Skipped: %s", filled.damaged[row])
        self.stats.skipped += len(damaged)
        if self.stats.skipped > self.config.max_skipped:
            raise CorruptSampleError(
                f"{self.stats.skipped} damaged samples on rank {self.rank}, more than max_skipped = "
                f"{self.config.max_skipped}; the last: {filled.damaged[damaged[-1]]}"
            )
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


def _open(
    source: Source | Sequence[Source] | Mapping[Source, float], storage: StorageConfig | None, config: LoaderConfig
) -> tuple[list[SampleReader], list[float]]:
    """A reader and a weight for each data set of a mixture."""
    sources = list(source) if isinstance(source, Mapping | Sequence) and not isinstance(source, str) else [source]
    readers = []
    for item in sources:
        store = open_store(item.url if isinstance(item, Manifest) else item, storage)
        manifest = item if isinstance(item, Manifest) else load_manifest(store)
        store = cached(store, manifest.digest)
        readers.append(SampleReader(manifest, store, config.fields, config.checksums))
    weights = [float(w) for w in source.values()] if isinstance(source, Mapping) else None
    return readers, weights or [float(reader.manifest.num_samples) for reader in readers]


def _digest(readers: Sequence[SampleReader], weights: Sequence[float]) -> str:
    """The identity of a data set, or of a mixture."""
    if len(readers) == 1:
        return readers[0].manifest.digest
    mixture = repr([(reader.manifest.digest, weight) for reader, weight in zip(readers, weights)])
    return sha256(mixture.encode()).hexdigest()[:32]


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
