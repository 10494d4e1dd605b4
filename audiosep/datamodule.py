"""Sealed shards into the batches of a training run: all that is left of it, for this rank, on from any checkpoint."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import pytorch_lightning as pl
import torch
from pydantic import Field

from audiosep.queries import Encoder, QueryConfig, make_encoder
from audiosep.samples import CONDITION, Batch, decode, open_manifest
from audiosep.system import AudioFormat
from shards.loader import LoaderConfig, ShardLoader
from shards.manifest import Manifest
from shards.storage import open_store
from shards.store import StorageConfig


@dataclass(frozen=True)
class DataConfig:
    """What a model is trained and validated on."""

    train: Annotated[
        str | dict[str, float],
        Field(description="sealed root, or several with the weights to mix them by, {root: weight}"),
    ]
    valid: Annotated[str, Field(description="sealed root; complex shards give SDR and SI-SDR too; empty: none")] = ""
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    valid_batch_size: Annotated[int | None, Field(gt=0, description="on each rank; by default as in training")] = None
    ledger: Annotated[str, Field(description="local folder to record in what every rank was served; empty: none")] = ""
    queries: Annotated[
        QueryConfig | None, Field(description="encoder of the captions, for shards that store no conditions")
    ] = None
    storage: StorageConfig = field(default_factory=StorageConfig)


class ShardDataModule(pl.LightningDataModule):
    """Loaders over sealed shards. Its state is the training loader's place in the data, counted in samples."""

    def __init__(self, config: DataConfig, windows: tuple[int, ...], num_epochs: int) -> None:
        """`windows`: the window lengths to read; `num_epochs`: passes over the training data, in all.

        Raises ValueError for data sets that do not hold these windows or do not fit together."""
        super().__init__()
        self.config, self._windows, self._num_epochs = config, windows, num_epochs
        self._encoder = make_encoder(config.queries, storage=config.storage) if config.queries else None
        self.roots = [config.train] if isinstance(config.train, str) else list(config.train)
        if not self.roots:
            raise ValueError("data.train names no data set.")
        first, *others = self.roots + [config.valid] * bool(config.valid)
        self.audio = self._format(first)
        for root in others:
            if self._format(root) != self.audio:
                raise ValueError(
                    f"{root} and {first} do not fit together: {self._format(root)}, but {self.audio}. One model needs "
                    "one sample rate, segment and hop length and query encoder: precompute one of them again."
                )
        self._training_loader: ShardLoader | None = None
        self._state: dict[str, Any] = {}

    def manifest(self, root: str) -> Manifest:
        return open_manifest(open_store(root, self.config.storage))

    def _format(self, root: str) -> AudioFormat:
        spec = self.manifest(root).spec
        stored = spec["stft"]["window_lengths"]
        if not {*self._windows} <= {*stored}:
            raise ValueError(
                f"{root} holds spectrograms of the window lengths {stored}, but the model trains on {self._windows}. "
                "Precompute them too, or change system.window and system.model.window_lengths."
            )
        if not spec["query_encoder"] and not self._encoder:
            raise ValueError(f"{root} stores no conditions: set data.queries.encoder to encode its captions here.")
        return AudioFormat.of(spec, self._encoder.identity if self._encoder else "")

    def train_dataloader(self) -> "RemainingBatches":
        loader = self._loader(self.config.train, self.config.loader, self.config.ledger)
        if self._state:
            loader.load_state_dict(self._state)
        self._training_loader = loader
        batches = RemainingBatches(loader, self._num_epochs, self._encoder)
        trainer = self._attached_trainer()
        if trainer.max_steps >= 0:
            batches.limit = (trainer.max_steps - trainer.global_step) * trainer.accumulate_grad_batches
        return batches

    def val_dataloader(self) -> "Batches | list[Any]":
        if not self.config.valid:
            return []
        batch_size = self.config.valid_batch_size or self.config.loader.batch_size
        config = replace(self.config.loader, batch_size=batch_size, shuffle=False, drop_last=False)
        return Batches(self._loader(self.config.valid, config), self._encoder)

    def _attached_trainer(self) -> pl.Trainer:
        assert self.trainer, "Lightning attaches its trainer before it asks for loaders"
        return self.trainer

    def _loader(self, source: str | Mapping[Any, float], config: LoaderConfig, ledger: str = "") -> ShardLoader:
        root = source if isinstance(source, str) else next(iter(source))
        trainer = self._attached_trainer()
        stored = (field.name for field in self.manifest(root).fields)
        needed = tuple(name for name in stored if name == CONDITION or int(name.rpartition(".")[2]) in self._windows)
        return ShardLoader(
            source,
            replace(config, fields=needed),
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            ledger=ledger or None,
            storage=self.config.storage,
        )

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return batch.to(device)

    def state_dict(self) -> dict[str, Any]:
        return self._training_loader.state_dict() if self._training_loader else self._state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = state_dict

    @property
    def wait_seconds(self) -> float:
        """Time for which training stood still for want of data, since it began on this rank."""
        return self._training_loader.stats.wait_seconds if self._training_loader else 0.0


class Batches:
    """One pass over a loader's batches, as the model takes them.

    Rows that only fill up a batch, or stand for damaged samples, are left out, unless there is no other row in it:
    then its `valid` says so."""

    def __init__(self, loader: ShardLoader, encoder: Encoder | None) -> None:
        self._loader, self._encoder = loader, encoder

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        for stored in self._loader:
            keep = stored.valid.nonzero().flatten().tolist() or range(len(stored.keys))
            arrays = stored.arrays if len(keep) == len(stored.keys) else {n: x[keep] for n, x in stored.arrays.items()}
            text = [stored.text[row] for row in keep]
            batch = decode([stored.keys[row] for row in keep], text, arrays, stored.valid[keep])
            if batch.condition is None and self._encoder:
                batch = replace(batch, condition=torch.from_numpy(self._encoder.encode(batch.text)))
            yield batch


class RemainingBatches(Batches):
    """The batches of all passes from the loader's state to the end of the run."""

    limit: float = float("inf")  # batches left at most

    def __init__(self, loader: ShardLoader, num_epochs: int, encoder: Encoder | None) -> None:
        super().__init__(loader, encoder)
        self._num_epochs = num_epochs

    def __len__(self) -> int:
        if self._loader.epoch >= self._num_epochs:
            return 0
        global_batch_size = self._loader.config.batch_size * self._loader.world_size
        left_of_epoch = (self._loader.num_samples - self._loader.state_dict()["samples"]) // global_batch_size
        epochs_after = self._num_epochs - self._loader.epoch - 1
        return int(min(left_of_epoch + epochs_after * len(self._loader), self.limit))

    def __iter__(self) -> Iterator[Batch]:
        while self._loader.epoch < self._num_epochs:
            yield from super().__iter__()
