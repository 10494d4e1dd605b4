"""`audiosep separate`: from a recording of any length, rate and channel count the sounds that a query describes."""

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import soundfile
import soxr
import torch
from lightning_fabric import Fabric
from pydantic import Field
from torch import Tensor

from audiosep.config import command_parser, load_config
from audiosep.queries import Encoder, QueryConfig, make_encoder
from audiosep.stft import stft
from audiosep.system import SeparationSystem, load_system
from shards.storage import open_object
from shards.store import StorageConfig

FADE_FLOOR = 1e-3  # least weight of a segment's sample, so that the recording's first and last one have some


@dataclass(frozen=True)
class SeparateConfig:
    """How a recording is separated."""

    checkpoint: Annotated[str, Field(description="last.ckpt or best.ckpt of a run, or a released one; path or URL")]
    query: Annotated[str, Field(min_length=1, description="what to take out, in words")]
    output: Annotated[str, Field(description="audio file to write, with the mixture's rate and channels; path or URL")]
    queries: QueryConfig = field(default_factory=QueryConfig)
    batch_size: Annotated[int, Field(gt=0, description="segments at a time")] = 8
    accelerator: Annotated[str, Field(description="Lightning's: auto, cpu, gpu")] = "auto"
    storage: StorageConfig = field(default_factory=StorageConfig)


def main(arguments: Sequence[str]) -> int:
    parser = command_parser("separate", __doc__, SeparateConfig)
    parser.add_argument("mixture", help="audio file that soundfile reads: WAV, FLAC, OGG, MP3, ...")
    parser.add_argument("--config", help="YAML file with the keys below; or give them as options")
    options, overrides = parser.parse_known_args(arguments)
    separate_file(options.mixture, load_config(SeparateConfig, options.config, overrides))
    return 0


def separate_file(path: str | Path, config: SeparateConfig) -> None:
    """Write what the query describes in an audio file to `config.output`."""
    store, name = open_object(config.output, config.storage)
    file_format = Path(name).suffix[1:].upper()
    if file_format not in soundfile.available_formats():
        raise ValueError(f"{config.output} has no name of an audio file, such as estimate.wav or estimate.flac.")
    system = load_system(config.checkpoint, config.storage)
    system.to(device_of(config.accelerator))
    condition = torch.from_numpy(encoder_of(system, config.queries, config.storage).encode([config.query])[0])
    mixture, sample_rate = read_audio(path)
    resampled = soxr.resample(mixture, sample_rate, system.audio.sample_rate)
    estimate = separate_waveform(system, torch.from_numpy(resampled.T), condition, config.batch_size).numpy().T
    estimate = soxr.resample(estimate, system.audio.sample_rate, sample_rate)
    whole = np.zeros_like(mixture)  # resampling there and back may miss the length by a sample
    whole[: len(estimate)] = estimate[: len(whole)]
    peak = float(np.abs(whole).max())
    if peak > 1:
        whole /= peak  # files of integers would clip it
    sound = io.BytesIO()
    try:
        soundfile.write(sound, whole, sample_rate, format=file_format)
    except soundfile.LibsndfileError as error:
        raise ValueError(
            f"{config.output} can't be written with {sample_rate} Hz and {whole.shape[1]} channels, as a .wav can: "
            f"{error.error_string}"
        ) from None
    store.write(name, sound.getbuffer())
    print(f"wrote {config.output}" + (f", scaled by {1 / peak:.3f}: its peak was {peak:.3f}" if peak > 1 else ""))


def device_of(accelerator: str) -> torch.device:
    """The device of one of Lightning's accelerators. Raises ValueError for one that is not here."""
    warnings.filterwarnings("ignore", ".*The `srun` command is available")
    try:
        return Fabric(accelerator=accelerator, devices=1).device
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"accelerator is {accelerator!r}: {error}") from None


def read_audio(path: str | Path) -> tuple[np.ndarray, int]:
    """Float32 [L, channels] and the sample rate; ValueError for what is no audio, empty or not finite."""
    try:
        with open(path, "rb") as file:  # by ourselves, so that a missing file and one that is no audio are told apart
            waveform, sample_rate = soundfile.read(file, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{path} cannot be read as audio: {error.error_string}") from None
    if not len(waveform) or not np.isfinite(waveform).all():
        raise ValueError(f"{path} has {len(waveform)} samples, not all of them finite: there is nothing to separate.")
    return waveform, sample_rate


def encoder_of(system: SeparationSystem, config: QueryConfig, storage: StorageConfig) -> Encoder:
    """The query encoder of a config; ValueError unless it is the one that the system was trained with."""
    encoder = make_encoder(config, storage=storage)
    if encoder.identity != system.audio.query_encoder:
        raise ValueError(
            f"The model was trained with the query encoder {system.audio.query_encoder} and would not understand a "
            f"query from {encoder.identity}. Set queries.encoder and queries.checkpoint to the former (for a released "
            "checkpoint to clap and the checkpoint itself)."
        )
    return encoder


@torch.inference_mode()
def separate_waveform(system: SeparationSystem, mixture: Tensor, condition: Tensor, batch_size: int = 8) -> Tensor:
    """The estimate [channels, L] of a mixture [channels, L] at the system's sample rate, each channel on its own.

    Segments of the length that the system was trained on overlap by half and are cross-faded."""
    length, num_samples = system.audio.length, mixture.shape[-1]
    step = length // 2
    starts = range(0, max(num_samples - length, 0) + step, step)
    padded = torch.nn.functional.pad(mixture, (0, starts[-1] + length - num_samples))
    segments = torch.cat([padded[:, start : start + length] for start in starts])[:, None]
    estimates = torch.cat([_separate(system, part, condition) for part in segments.split(batch_size)])
    fade = torch.hann_window(length).clamp(min=FADE_FLOOR)
    total, weight = torch.zeros_like(padded), torch.zeros(padded.shape[-1])
    for start, estimate in zip(starts, estimates.split(len(mixture))):
        total[:, start : start + length] += fade * estimate[:, 0]
        weight[start : start + length] += fade
    return (total / weight)[:, :num_samples]


def _separate(system: SeparationSystem, segments: Tensor, condition: Tensor) -> Tensor:
    """Estimates [B, 1, L] of segments [B, 1, L], on the CPU."""
    segments, length = segments.to(system.device), segments.shape[-1]
    mixtures = {window: stft(segments, window, system.audio.hop_length) for window in system.config.windows}
    conditions = condition.to(system.device).expand(len(segments), -1)
    return system.separate(mixtures, conditions, length).cpu()
