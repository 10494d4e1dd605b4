"""The LightningModule: loss and optimiser around ResUNet30, and the estimate of a waveform from it."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
from pydantic import Field
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from audiosep.checkpoints import MODEL_PREFIX, load_released, read_checkpoint
from audiosep.config import build_config, plain
from audiosep.losses import loss_by_name
from audiosep.metrics import sdr, sdri, si_sdr, si_sdri
from audiosep.queries import QueryConfig, make_encoder
from audiosep.resunet import ResUNet30, ResUNetConfig
from audiosep.samples import Batch
from audiosep.stft import istft
from shards.store import StorageConfig


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW as upstream trains with it: amsgrad, and a learning rate that warms up and then falls in steps."""

    learning_rate: Annotated[float, Field(gt=0, description="after the warm-up")] = 1e-3
    weight_decay: Annotated[float, Field(ge=0, description="of AdamW")] = 0.0
    warm_up: Annotated[
        Literal["linear", "constant"],
        Field(description="linear, or upstream's default of 0.001, 0.01 and 0.1 of the rate, warm_up_steps each"),
    ] = "linear"
    warm_up_steps: Annotated[int, Field(ge=1, description="steps of the warm-up")] = 10_000
    reduce_lr_steps: Annotated[
        int, Field(ge=1, description="steps after which a linear one falls to 0.9 of itself")
    ] = 1_000_000
    clip_norm: Annotated[float, Field(gt=0, description="gradients of a larger norm are scaled down to it")] = 10.0


def learning_rate_scale(step: int, config: OptimizerConfig) -> float:
    """Upstream's `linear_warm_up` and `constant_warm_up`: what the learning rate is multiplied with at a step."""
    if config.warm_up == "constant":
        return 10.0 ** min(step // config.warm_up_steps - 3, 0)
    if step < config.warm_up_steps:
        return step / config.warm_up_steps
    return 0.9 ** (step // config.reduce_lr_steps)


@dataclass(frozen=True)
class SystemConfig:
    """What is trained, and for what."""

    model: ResUNetConfig = field(default_factory=ResUNetConfig)
    loss: Annotated[str, Field(description="name, or sum of WEIGHT * NAME; losses.py lists them")] = "l1_stft_mag"
    window: Annotated[
        int | Literal["random", "all"],
        Field(description="window length trained on, samples; random: another one each step; all: their losses' mean"),
    ] = 2048
    phase: Annotated[
        Literal["mixture", "model"],
        Field(description="of the estimate; model: its own phase mask, trained on and used with complex shards only"),
    ] = "mixture"
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    compile: Annotated[bool, Field(description="torch.compile the model")] = False
    channels_last: Annotated[bool, Field(description="keep images as [B, H, W, C] in memory, which is faster")] = True

    def __post_init__(self) -> None:
        if isinstance(self.window, int) and self.window not in self.model.window_lengths:
            raise ValueError(
                f"window is {self.window}, but the model takes {self.model.window_lengths}. Add it to "
                "model.window_lengths or train on one of these."
            )

    @property
    def windows(self) -> tuple[int, ...]:
        """The window lengths that are trained on."""
        return (self.window,) if isinstance(self.window, int) else self.model.window_lengths


@dataclass(frozen=True)
class AudioFormat:
    """What the numbers in spectrograms and conditions mean: a model works on the format it was trained on."""

    sample_rate: int  # Hz
    length: int  # samples of a segment
    hop_length: int  # samples
    query_encoder: str  # identity of the encoder of the conditions

    @classmethod
    def of(cls, spec: Mapping[str, Any], query_encoder: str = "") -> "AudioFormat":
        """The format of shards with this spec, whose conditions, if they store none, are made by `query_encoder`."""
        sample_rate = spec["clips"]["sample_rate"]
        length = round(spec["clips"]["segment_seconds"] * sample_rate)
        return cls(sample_rate, length, spec["stft"]["hop_length"], spec["query_encoder"] or query_encoder)


class SeparationSystem(pl.LightningModule):
    """ResUNet30 in training. Its checkpoints carry config and format, and the model's tensors as `ss_model.*`."""

    def __init__(self, config: SystemConfig, audio: AudioFormat, seed: int = 0) -> None:
        """`seed`: of the random windows; initial weights come from torch's global generator."""
        super().__init__()
        self.config, self.audio, self._seed = config, audio, seed
        self.ss_model = ResUNet30(config.model)
        if config.channels_last:
            self.ss_model = self.ss_model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if config.compile:
            self.ss_model.compile()
        self._loss = loss_by_name(config.loss, audio.hop_length)
        self._keys: list[str] = []  # of the batches since the last optimiser step

    # From a mixture to an estimate

    def forward(self, mixture: Tensor, condition: Tensor) -> Tensor:
        """The estimate [B, C, T, F], complex as the mixture, of the sounds described by conditions [B, D]."""
        if self.config.phase == "model":
            return self._estimate(mixture, condition)
        magnitude = mixture.abs()
        return mixture * (self._estimate(magnitude, condition) / magnitude.clamp(min=1e-8))

    def separate(self, mixtures: Mapping[int, Tensor], condition: Tensor, length: int) -> Tensor:
        """The estimated waveform [B, C, length] from complex mixtures by window; from several windows their average."""
        waveforms = [
            istft(self(mixture, condition), window, self.audio.hop_length, length)
            for window, mixture in mixtures.items()
        ]
        return torch.stack(waveforms).mean(0)

    def _estimate(self, mixture: Tensor, condition: Tensor) -> Tensor:
        return self.ss_model({"stft_mixture": mixture, "condition": condition})["stft_waveform"]

    # Training

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self._keys += batch.keys
        loss = self._mean_loss(batch, self._windows_of_step())
        self.log("train/loss", loss, batch_size=len(batch.keys), prog_bar=True)
        # 1 for a finite loss. Otherwise NaN: some losses of NaN have finite gradients, and so every rank hears of it.
        return loss * (1 + 0 * loss.detach())

    def _windows_of_step(self) -> tuple[int, ...]:
        """What this step trains on: the same on every rank, and again after a restart."""
        if self.config.window != "random":
            return self.config.windows
        return (
            self.config.windows[
                np.random.default_rng((self._seed, self.global_step)).integers(len(self.config.windows))
            ],
        )

    def _mean_loss(self, batch: Batch, windows: tuple[int, ...]) -> Tensor:
        losses = []
        for window in windows:
            mixture, segment = batch.mixture[window], batch.segment[window]
            if self.config.phase == "mixture" and mixture.is_complex():
                mixture, segment = mixture.abs(), segment.abs()
            losses.append(self._loss(self._estimate(mixture, self._condition(batch)), segment))
        return torch.stack(losses).mean()

    def configure_optimizers(self) -> Any:
        config = self.config.optimizer
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(
            trained, lr=config.learning_rate, weight_decay=config.weight_decay, amsgrad=True, betas=(0.9, 0.999)
        )
        schedule = LambdaLR(optimizer, partial(learning_rate_scale, config=config))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *_: Any, **__: Any) -> None:
        """Clip, log the norm, and stop before a gradient that is not finite spoils the weights."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters(), self.config.optimizer.clip_norm)
        if not math.isfinite(norm):
            self._stop_at_bad_gradient(float(norm))
        self.log_dict({"train/gradient_norm": norm, "train/learning_rate": optimizer.param_groups[0]["lr"]})
        self._keys.clear()

    def _stop_at_bad_gradient(self, norm: float) -> None:
        step, rank = self.trainer.global_step, self.trainer.global_rank
        file = Path(self.trainer.default_root_dir, f"bad-gradient-step-{step}-rank-{rank}.json")
        loss = float(self.trainer.callback_metrics["train/loss"])
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"step": step, "loss": loss, "gradient_norm": str(norm), "keys": self._keys}))
        raise ValueError(
            f"The gradient's norm is {norm} at step {step} (loss {loss}). The weights are still as before, and the "
            f"keys of the samples are in {file}: look at them with `shards show`. If they are sound, lower "
            "system.optimizer.learning_rate and start again from the last checkpoint."
        )

    # Validation

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._log_figures("valid", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._log_figures("test", batch)

    def _log_figures(self, stage: str, batch: Batch) -> None:
        figures = {"loss": self._mean_loss(batch, self.config.windows)}
        if batch.mixture[self.config.windows[0]].is_complex():
            figures |= {name: values.mean() for name, values in self.scores(batch).items()}
        weight = len(batch.keys) if batch.valid is None else int(batch.valid.sum())
        for name, value in figures.items():
            self.log(f"{stage}/{name}", value, batch_size=weight, sync_dist=True, prog_bar=name == "si_sdri")

    def scores(self, batch: Batch) -> dict[str, Tensor]:
        """SDR, SDRi, SI-SDR and SI-SDRi [B] of the estimates for a batch of complex spectrograms, dB."""
        return scores(self.estimate(batch), *self.target_and_mixture(batch))

    def estimate(self, batch: Batch, windows: tuple[int, ...] = ()) -> Tensor:
        """The estimated waveforms [B, C, L] for a batch of complex spectrograms; `windows`: by default as trained."""
        mixtures = {window: batch.mixture[window] for window in windows or self.config.windows}
        return self.separate(mixtures, self._condition(batch), int(batch.lengths[0]))

    def target_and_mixture(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Their waveforms [B, C, L], from a batch of complex spectrograms."""
        window, hop_length, length = self.config.windows[0], self.audio.hop_length, int(batch.lengths[0])
        return (
            istft(batch.segment[window], window, hop_length, length),
            istft(batch.mixture[window], window, hop_length, length),
        )

    def _condition(self, batch: Batch) -> Tensor:
        assert batch.condition is not None, "Batches encodes what shards do not store"
        size, expected = batch.condition.shape[-1], self.config.model.condition_size
        if size != expected:
            raise ValueError(
                f"Conditions have {size} values, those of {self.audio.query_encoder}, but the model takes {expected}: "
                f"set system.model.condition_size to {size}."
            )
        return batch.condition

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["config"], checkpoint["audio"] = plain(self.config), asdict(self.audio)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take from Lightning's loops the number of steps and nothing else.

        A run is one Lightning epoch: what is left of it comes from the loader's own state, for any number of ranks
        and any batch size (datamodule.py). Lightning's counters of batches would be wrong for another number."""
        del checkpoint["loops"]
        now = {"system.model": plain(self.config.model), "data": asdict(self.audio)}
        for what, kept in (("system.model", checkpoint["config"]["model"]), ("data", checkpoint["audio"])):
            changed = [
                f"{what}'s {name} was {kept[name]!r} and is now {value!r}"
                for name, value in now[what].items()
                if name in kept and kept[name] != value and name != "norm_momentum"
            ]
            if changed:
                raise ValueError(
                    f"The last checkpoint is of another run: {'; '.join(changed)}. Its weights would not fit. Change "
                    "this back, or give another root."
                )
        steps, loop = checkpoint["global_step"], self.trainer.fit_loop.epoch_loop
        loop.automatic_optimization.optim_progress.optimizer.step.total.completed = steps
        loop.batch_progress.total.ready = steps * self.trainer.accumulate_grad_batches
        loop._batches_that_stepped = steps  # the step that loggers are told


def scores(estimate: Tensor, target: Tensor, mixture: Tensor) -> dict[str, Tensor]:
    """Upstream's metrics of waveforms [B, C, L] by name: [B] each, dB."""
    return {
        "sdr": sdr(estimate, target),
        "sdri": sdri(estimate, target, mixture),
        "si_sdr": si_sdr(estimate, target),
        "si_sdri": si_sdri(estimate, target, mixture),
    }


def load_system(path: str | Path, storage: StorageConfig | None = None) -> SeparationSystem:
    """The trained system in a checkpoint, ready for use: from `audiosep train`, with its averaged weights if it has
    them, or a released AudioSep one, whose queries are encoded by the text tower that is in the same file."""
    content = read_checkpoint(path, storage)
    if "audio" not in content:
        return _released_system(str(path), content.get("state_dict", {}), storage)
    config = build_config(SystemConfig, content["config"] | {"compile": False}, str(path))
    system = SeparationSystem(config, AudioFormat(**content["audio"]))
    system.load_state_dict(content["state_dict"])
    return system.eval()


RELEASED_FORMATS = {
    2048: (32000, 320),
    1024: (16000, 160),
}  # by window: sample rate and hop; DCASE 2024 Task 9's is the second


def _released_system(path: str, tensors: Mapping[str, Tensor], storage: StorageConfig | None) -> SeparationSystem:
    norm = tensors.get(f"{MODEL_PREFIX}base.bn0.weight", torch.empty(1))
    window = 2 * (len(norm) - 1)
    if window not in RELEASED_FORMATS:
        raise ValueError(
            f"{path} is neither a checkpoint of `audiosep train` nor a released one: there is no format of its audio, "
            f"and no {MODEL_PREFIX}base.bn0 for a window of {' or '.join(map(str, RELEASED_FORMATS))} samples."
        )
    sample_rate, hop_length = RELEASED_FORMATS[window]
    encoder = make_encoder(QueryConfig("clap", path), storage=storage)
    audio = AudioFormat(sample_rate, 5 * sample_rate, hop_length, encoder.identity)
    model = ResUNetConfig(window_lengths=(window,))
    system = SeparationSystem(SystemConfig(model=model, window=window, phase="model", loss="l1_wav"), audio)
    load_released(path, system.ss_model, storage)
    return system.eval()
