"""`audiosep train`: shards into a model. The same command, given again, goes on from the last checkpoint.

Exit status: 0 the run is complete; 2 a mistake to mend; 75 stopped by a signal, or by a storage that went away or
refused, with a checkpoint to go on from."""

import errno
import logging
import math
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal

import pytorch_lightning as pl
import torch
from pydantic import Field
from pytorch_lightning.callbacks import Callback, EarlyStopping, EMAWeightAveraging, TQDMProgressBar
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.plugins.environments import SLURMEnvironment
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from audiosep.checkpoints import load_released, read_checkpoint, write_checkpoint
from audiosep.config import command_parser, load_config
from audiosep.datamodule import DataConfig, ShardDataModule
from audiosep.pictures import spectrogram_figure
from audiosep.samples import Batch
from audiosep.system import SeparationSystem, SystemConfig
from shards.storage import check_writable, open_object
from shards.store import StorageConfig, Store, TransferError

DONE, STOPPED = 0, 75
STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
AWAY = (errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ESHUTDOWN)  # of a file system whose server is gone
LAST, BEST = "last.ckpt", "best.ckpt"


@dataclass(frozen=True)
class TrainerConfig:
    """How long training goes on, on what, and what it keeps."""

    max_steps: Annotated[int, Field(ge=-1, description="optimiser steps in all; -1: as many as max_epochs hold")] = -1
    max_epochs: Annotated[int, Field(gt=0, description="passes over the training data")] = 100
    max_hours: Annotated[float | None, Field(gt=0, description="training time in all, restarts included")] = None
    accumulate_batches: Annotated[int, Field(gt=0, description="batches for each optimiser step")] = 1
    precision: Annotated[Literal["32-true", "bf16-mixed"], Field(description="of the network's arithmetic")] = "32-true"
    accelerator: Annotated[str, Field(description="Lightning's: auto, cpu, gpu")] = "auto"
    devices: Annotated[int | Literal["auto"], Field(description="processes on each node, one for each GPU")] = "auto"
    num_nodes: Annotated[int, Field(gt=0, description="nodes of the job")] = 1
    threads: Annotated[int | None, Field(gt=0, description="of each process on CPU; by default OMP_NUM_THREADS")] = None
    sync_batchnorm: Annotated[bool, Field(description="batch statistics over all GPUs")] = False
    deterministic: Annotated[bool, Field(description="only operations that give the same bits on every run")] = False
    ema_decay: Annotated[
        float | None, Field(gt=0, lt=1, description="validate and keep a running average of the weights; none: off")
    ] = None
    checkpoint_steps: Annotated[int, Field(gt=0, description="steps from one last.ckpt to the next")] = 1000
    validate_steps: Annotated[int, Field(gt=0, description="steps from one validation to the next")] = 1000
    monitor: Annotated[
        Literal["valid/loss", "valid/sdr", "valid/sdri", "valid/si_sdr", "valid/si_sdri"],
        Field(
            description="validation figure that best.ckpt and early stopping go by; all but the first: complex shards"
        ),
    ] = "valid/loss"
    patience: Annotated[
        int | None, Field(gt=0, description="validations without a better figure that end the run; none: go on")
    ] = None
    log_steps: Annotated[int, Field(gt=0, description="steps from one line of the log to the next")] = 50

    @property
    def monitor_mode(self) -> Literal["min", "max"]:
        return "min" if self.monitor == "valid/loss" else "max"


@dataclass(frozen=True)
class TrainConfig:
    """Everything that `audiosep train` needs to know."""

    root: Annotated[str, Field(description="folder or URL of the run: checkpoints/, and logs/ in a folder")]
    data: DataConfig
    system: SystemConfig = field(default_factory=SystemConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    seed: Annotated[int, Field(ge=0, description="of initial weights and random windows")] = 0
    start_from: Annotated[
        str, Field(description="released AudioSep checkpoint to fine-tune, path or URL; empty: random weights")
    ] = ""
    logs: Annotated[
        str,
        Field(
            description="local folder for TensorBoard; empty: ROOT/logs, or runs/NAME/logs for a URL that ends in NAME"
        ),
    ] = ""

    def __post_init__(self) -> None:
        if "://" in self.logs:
            raise ValueError(f"logs is {self.logs}, but TensorBoard appends to its files: name a local folder.")
        if self.trainer.patience and not self.data.valid:
            raise ValueError("trainer.patience counts validations, and data.valid is empty: name a data set there.")

    @property
    def log_folder(self) -> Path:
        if self.logs:
            return Path(self.logs)
        local = Path("runs", Path(self.root).name) if "://" in self.root else Path(self.root)
        return local / "logs"

    def checkpoint(self, name: str) -> str:
        """Path or URL of one of the run's checkpoints."""
        return os.path.join(self.root, "checkpoints", name)


def main(arguments: Sequence[str]) -> int:
    parser = command_parser("train", __doc__, TrainConfig)
    parser.add_argument("--config", required=True, help="YAML file")
    parser.add_argument("--dry-run", action="store_true", help="print the plan at the speed of a few steps made here")
    parser.add_argument("--check", action="store_true", help="read the config, and do nothing if it is right")
    parser.add_argument(
        "--restart",
        type=int,
        default=0,
        metavar="N",
        help="how often a scheduler began this run again; from 1 on it is no mistake if a storage does not answer",
    )
    options, overrides = parser.parse_known_args(arguments)
    config = load_config(TrainConfig, options.config, overrides)
    if options.check:
        return DONE
    if options.dry_run:
        print(plan(config))
        return DONE
    try:
        return train(config)
    except OSError as error:
        if not options.restart or not is_away(error) or isinstance(error, PermissionError | FileNotFoundError):
            raise
        return put_off(error)


def train(config: TrainConfig) -> int:
    """Train from the beginning or the last checkpoint to the end, or until a signal; returns the exit status."""
    quieten()
    system, data = build(config)
    check_monitor(config, data)
    last, storage = config.checkpoint(LAST), config.data.storage
    store, name = open_object(last, storage)
    checkpoint = read_checkpoint(last, storage) if store.size(name) is not None else {}
    if checkpoint:
        complete = is_complete(checkpoint, config.trainer)
        doing = "The run is complete:" if complete else "Going on from"
        print(f"{doing} {last}, step {checkpoint['global_step']}.", file=sys.stderr)
        if complete:
            return DONE
    prepare(store)
    keeper = LastCheckpoint(last, config.trainer.checkpoint_steps, config.trainer.max_hours)
    trainer = make_trainer(config, data, keeper)
    first_step = checkpoint.get("global_step", 0)
    try:
        trainer.fit(system, data, ckpt_path=last if checkpoint else None, weights_only=True)
    except OSError as error:
        if not is_away(error) or trainer.global_step == first_step:  # it never worked: a mistake, not an outage
            raise
        return put_off(error)
    if keeper.stopped and trainer.is_global_zero:
        step = trainer.global_step
        print(f"\nStopped by a signal at step {step}; the same command goes on from {last}.", file=sys.stderr)
    return STOPPED if keeper.stopped else DONE


def check_monitor(config: TrainConfig, data: ShardDataModule) -> None:
    """Raise ValueError now, not at the first validation, for a figure that there will not be."""
    valid, monitor = config.data.valid, config.trainer.monitor
    if valid and monitor != "valid/loss" and data.manifest(valid).spec["shards"]["representation"] != "complex":
        raise ValueError(
            f"trainer.monitor is {monitor!r}, but {valid} stores magnitudes, and validation on them gives valid/loss "
            "alone. Name that, or precompute it with shards.representation: complex."
        )


def is_away(error: OSError) -> bool:
    """Whether an error is a storage's that went away or refused, and may be back."""
    return isinstance(error, TransferError | TimeoutError) or error.errno in AWAY


def put_off(error: OSError) -> int:
    print(
        f"audiosep train: {str(error).rstrip('.')}. The same command goes on from the last checkpoint.", file=sys.stderr
    )
    return STOPPED


@rank_zero_only
def prepare(store: Store) -> None:
    """Find out now, not after the first thousand steps, whether checkpoints can be kept, and sweep up what a process
    left that was killed while it saved one. OSError if they cannot."""
    check_writable(store)
    store.sweep()


def is_complete(checkpoint: Mapping[str, Any], config: TrainerConfig) -> bool:
    """Whether a run's last checkpoint has all the steps, passes or hours it was to have, or was out of patience."""
    states = checkpoint["callbacks"]
    hours = states[LastCheckpoint.__qualname__]["seconds"] / 3600
    waited = states.get(Patience(config).state_key, {"wait_count": 0})["wait_count"]
    return (
        checkpoint["global_step"] == config.max_steps
        or checkpoint[ShardDataModule.__qualname__]["epoch"] >= config.max_epochs
        or hours > (config.max_hours or math.inf)
        or waited >= (config.patience or math.inf)
    )


def quieten() -> None:
    """Leave Lightning's warnings, but not its hints about things that are as they are meant to be."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for text in (
        "The `srun` command is available",
        "The number of training batches",
        "Checkpoint directory",
        "Total length of `list`",
        r"`isinstance\(treespec, LeafSpec\)`",
    ):
        warnings.filterwarnings("ignore", f".*{text}")


def build(config: TrainConfig) -> tuple[SeparationSystem, ShardDataModule]:
    """The system with its initial weights, and its data."""
    if config.trainer.threads:
        torch.set_num_threads(config.trainer.threads)
    data = ShardDataModule(config.data, config.system.windows, config.trainer.max_epochs)
    pl.seed_everything(config.seed, verbose=False)
    system = SeparationSystem(config.system, data.audio, config.seed)
    if config.start_from:
        load_released(config.start_from, system.ss_model, config.data.storage)
    return system, data


def make_trainer(config: TrainConfig, data: ShardDataModule, keeper: "LastCheckpoint") -> pl.Trainer:
    """A Trainer for one Lightning epoch, which is the whole run: passes over the data are the loader's affair."""
    trainer, logs = config.trainer, config.log_folder
    callbacks: list[Callback] = [Progress(refresh_rate=trainer.log_steps), Throughput(data, trainer.log_steps)]
    if trainer.ema_decay:
        callbacks.append(EMAWeightAveraging(decay=trainer.ema_decay))  # before whatever saves its average
    if config.data.valid:
        best = BestCheckpoint(config.checkpoint(BEST), trainer.monitor, trainer.monitor_mode)
        callbacks += [Examples(), best]
        if trainer.patience:
            callbacks.append(Patience(trainer))
    plugins: list[Any] = [StoredCheckpoints(config.data.storage)]
    if SLURMEnvironment.detect():
        plugins.append(SLURMEnvironment(auto_requeue=False))  # the job's script requeues it, by our exit status
    try:
        return pl.Trainer(
            accelerator=trainer.accelerator,
            devices=trainer.devices,
            num_nodes=trainer.num_nodes,
            precision=trainer.precision,
            sync_batchnorm=trainer.sync_batchnorm,
            deterministic=trainer.deterministic,
            max_epochs=1,
            max_steps=trainer.max_steps,
            accumulate_grad_batches=trainer.accumulate_batches,
            check_val_every_n_epoch=None,
            val_check_interval=trainer.validate_steps * trainer.accumulate_batches,
            num_sanity_val_steps=0,
            log_every_n_steps=trainer.log_steps,
            use_distributed_sampler=False,
            enable_model_summary=False,
            enable_checkpointing=False,  # by Lightning itself
            logger=TensorBoardLogger(logs.parent, name="", version=logs.name),
            default_root_dir=logs,
            callbacks=[*callbacks, keeper],
            plugins=plugins,
        )
    except (MisconfigurationException, ValueError) as error:
        raise ValueError(
            f"trainer.accelerator {trainer.accelerator} with trainer.devices {trainer.devices}: {error}"
        ) from None


class Progress(TQDMProgressBar):
    """A bar over the steps that are left."""

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        super().on_train_epoch_start(trainer)
        self.train_progress_bar.set_description("training")

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}


class StoredCheckpoints(TorchCheckpointIO):
    """Checkpoints in a folder or bucket, whole under their name or not there."""

    def __init__(self, storage: StorageConfig) -> None:
        self._storage = storage

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        write_checkpoint(checkpoint, path, self._storage)

    def load_checkpoint(self, path: Any, *_: Any, **__: Any) -> dict[str, Any]:
        return read_checkpoint(path, self._storage)


class LastCheckpoint(Callback):
    """Keeps the state after every `every_steps`-th step and after the last; a stop signal, or the end of the time,
    makes any step the last.

    It saves only when a step is complete, so whoever goes on from there repeats no sample and misses none."""

    def __init__(self, path: str, every_steps: int, max_hours: float | None = None) -> None:
        self._path, self._every_steps = path, every_steps
        self.stopped = False
        """Whether a signal ended the run before it was complete."""
        self._max_seconds = max_hours * 3600 if max_hours else float("inf")
        self._seconds_before = 0.0  # of training, before the last restart
        self._asked = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = time.monotonic()
        self._step = self._saved_step = trainer.global_step
        for number in STOP_SIGNALS:  # only now, because Lightning has just put its own handlers there
            signal.signal(number, self._ask)

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        self._asked = True

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step == self._step:
            return  # gradients are being accumulated
        self._step = trainer.global_step
        agreed = trainer.strategy.reduce_boolean_decision
        if agreed(self._asked, all=False):
            self.stopped = trainer.should_stop = True
            trainer.limit_val_batches = 0  # or Lightning would validate first, while the scheduler counts seconds
        elif agreed(self._seconds() > self._max_seconds, all=False):
            trainer.should_stop = True
        if self._step % self._every_steps == 0:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        has_lost_patience = trainer.should_stop and not self.stopped  # at a validation after the step was saved
        if self._step > self._saved_step or has_lost_patience:
            self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        trainer.save_checkpoint(self._path)
        self._saved_step = self._step

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._started

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self._seconds()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._seconds_before = state_dict["seconds"]


class Patience(EarlyStopping):
    """Ends the run after a number of validations without a better figure: the config's, not the checkpoint's."""

    def __init__(self, config: TrainerConfig) -> None:
        super().__init__(config.monitor, mode=config.monitor_mode, patience=config.patience or sys.maxsize)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict | {"patience": self.patience})


class BestCheckpoint(Callback):
    """Keeps the state after the validation that gave the best figure; of equal ones the first.

    After a restart that checkpoint itself says how good it is: last.ckpt may be from before it."""

    def __init__(self, path: str, monitor: str, mode: Literal["min", "max"]) -> None:
        self._path, self._monitor, self._sign = path, monitor, 1 if mode == "max" else -1
        self._best = -math.inf  # of the figure times the sign; on ranks other than 0 it is not known after a restart

    @property
    def state_key(self) -> str:
        return self._generate_state_key(monitor=self._monitor)  # another figure's best is another matter

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.is_global_zero:
            with suppress(FileNotFoundError):
                kept = trainer.strategy.load_checkpoint(self._path)["callbacks"]
                self._best = kept.get(self.state_key, self.state_dict())["best"]

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        score = self._sign * float(trainer.callback_metrics[self._monitor])
        if trainer.strategy.broadcast(score > self._best):
            self._best = score
            trainer.save_checkpoint(self._path)


class Throughput(Callback):
    """Logs samples/s, and the share of the time for which training waited for data; validation is not counted."""

    def __init__(self, data: ShardDataModule, every_steps: int) -> None:
        self._data, self._every_steps = data, every_steps

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin(trainer)

    def _begin(self, trainer: pl.Trainer) -> None:
        self._step, self._samples = trainer.global_step, 0
        self._started, self._waited = time.perf_counter(), self._data.wait_seconds

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self._samples += len(batch.keys) * trainer.world_size
        if trainer.global_step >= self._step + self._every_steps:
            seconds = time.perf_counter() - self._started
            waited = self._data.wait_seconds - self._waited
            pl_module.log("train/samples_per_second", self._samples / seconds)
            pl_module.log("train/data_wait_share", waited / seconds)
            self._begin(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started += time.perf_counter() - self._paused


class Examples(Callback):
    """Shows the first validation sample in TensorBoard: mixture, estimate and target, to hear and to see."""

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int, *_: Any
    ) -> None:
        assert isinstance(pl_module, SeparationSystem)
        if batch_idx or not trainer.is_global_zero or not batch.mixture[pl_module.config.windows[0]].is_complex():
            return
        target, mixture = pl_module.target_and_mixture(batch)
        waveforms = {"mixture": mixture, "estimate": pl_module.estimate(batch), "target": target}
        pictured = {name: waveform[0].mean(0).float().cpu().numpy() for name, waveform in waveforms.items()}
        assert isinstance(trainer.logger, TensorBoardLogger)
        board, rate = trainer.logger.experiment, pl_module.audio.sample_rate
        for name, waveform in pictured.items():
            board.add_audio(f"example/{name}", waveform, trainer.global_step, rate)
        board.add_figure("example", spectrogram_figure(pictured, rate, batch.text[0]), trainer.global_step)


def plan(config: TrainConfig) -> str:
    """What a run would do, in words, at the speed of its first steps on this machine."""
    quieten()
    with tempfile.TemporaryDirectory() as folder:
        few = replace(config.trainer, max_steps=6, log_steps=3, ema_decay=None)
        probe = replace(config, root=folder, trainer=few, logs="", data=replace(config.data, ledger="", valid=""))
        system, data = build(probe)
        trainer = make_trainer(probe, data, LastCheckpoint(probe.checkpoint(LAST), every_steps=1000))
        trainer.fit(system, data)
        speed = float(trainer.callback_metrics["train/samples_per_second"])
    loader, limits = config.data.loader, config.trainer
    manifests = [data.manifest(root) for root in data.roots]
    stored = sum(manifest.num_samples for manifest in manifests)
    num_bytes = sum(int(manifest.tar_bytes.sum()) for manifest in manifests)
    batch_size = loader.batch_size * trainer.world_size * limits.accumulate_batches
    num_steps = loader.repeat * stored // batch_size * limits.max_epochs
    if limits.max_steps >= 0:
        num_steps = min(num_steps, limits.max_steps)
    num_samples = num_steps * batch_size
    num_parameters = sum(parameter.numel() for parameter in system.parameters() if parameter.requires_grad)
    hours = num_samples / speed / 3600
    return "\n".join(
        (
            f"model   {num_parameters:,} parameters, windows {', '.join(map(str, config.system.windows))}",
            f"data    {stored:,} samples, {num_bytes / 1e9:,.2f} GB in {', '.join(data.roots)}",
            f"steps   {num_steps:,} of {batch_size} samples ({loader.batch_size} on each of {trainer.world_size} ranks,"
            f" {limits.accumulate_batches} batches a step)",
            f"reads   {num_samples:,} samples, {num_samples / stored:.1f} passes, "
            f"{num_samples * num_bytes / stored / 1e9:,.1f} GB",
            f"speed   {speed:,.1f} samples/s measured here",
            f"time    {hours:,.2f} hours" + (f", of which {limits.max_hours} are allowed" if limits.max_hours else ""),
        )
    )
