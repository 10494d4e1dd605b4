"""A clip's crop: found, decoded from where it starts to where it ends and no further, mono, at one sample rate."""

import functools
import io
import os
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Literal

import numpy as np
import soundfile
import soxr
from pydantic import Field

from audiosep.catalogue import Clip
from shards.storage import open_store
from shards.store import StorageConfig, Store

RESAMPLING_MARGIN = 1024  # samples at the lower rate on each side of a crop: longer than half the filter


@dataclass(frozen=True)
class ClipConfig:
    """How clips become waveforms, and which are refused."""

    sample_rate: Annotated[int, Field(gt=0, description="of every waveform, Hz")] = 32000
    segment_seconds: Annotated[
        float, Field(gt=0, allow_inf_nan=False, description="length of a sample, s; shorter clips are zero-padded")
    ] = 5.0
    min_clip_seconds: Annotated[float, Field(ge=0, description="shorter clips are rejected, s")] = 1.0
    silence_dbfs: Annotated[
        float, Field(lt=0, description="crops whose peak stays below are rejected as silent, dB")
    ] = -60.0
    resampler: Annotated[
        Literal["soxr", "torchaudio"],
        Field(description="torchaudio: as upstream; its package needs a CUDA build of torch"),
    ] = "soxr"

    @property
    def length(self) -> int:
        """Samples of a segment."""
        return round(self.segment_seconds * self.sample_rate)


class Rejection(Exception):
    """Why a clip cannot be used: a `reason` to count by, and details for people."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def read_crop(
    clip: Clip, fraction: float, config: ClipConfig, storage: StorageConfig | None = None
) -> tuple[np.ndarray, int]:
    """A crop of `config.length` samples, float32 [L], and where it starts in the clip, samples at `config.sample_rate`.

    `fraction` in [0, 1) says where between the first and the last possible start. A shorter clip is padded with zeros.
    Raises Rejection for a clip that is missing, undecodable, truncated, short, silent or not finite. Other trouble,
    such as a lost connection, says nothing about the clip and comes as OSError."""
    with open_clip(clip, storage) as file:
        seconds = file.frames / file.samplerate
        if seconds < config.min_clip_seconds:
            raise Rejection("short", f"{seconds:.3f} s")
        offset = int(fraction * (max(_length(file, config) - config.length, 0) + 1))
        crop = _crop(file, offset, config)
    peak = abs(float(np.maximum(crop.max(), -crop.min())))  # NaN if any sample is; of silence 0, not -0
    if not np.isfinite(peak):
        raise Rejection("not finite", "NaN or infinite samples")
    if peak < 10 ** (config.silence_dbfs / 20):
        raise Rejection("silent", f"peak {peak:.2g} from sample {offset} on")
    return crop, offset


def read_crop_at(clip: Clip, offset: int, config: ClipConfig, storage: StorageConfig | None = None) -> np.ndarray:
    """The crop that `read_crop` once found at `offset`. Raises Rejection if there is no such audio any more."""
    with open_clip(clip, storage) as file:
        return _crop(file, offset, config)


def _length(file: soundfile.SoundFile, config: ClipConfig) -> int:
    """Samples of the whole clip at the config's rate."""
    return file.frames * config.sample_rate // file.samplerate


def _crop(file: soundfile.SoundFile, offset: int, config: ClipConfig) -> np.ndarray:
    crop = _decode(file, offset, min(config.length, _length(file, config) - offset), config)
    return np.pad(crop, (0, config.length - len(crop))) if len(crop) < config.length else crop


def open_clip(clip: Clip, storage: StorageConfig | None = None) -> soundfile.SoundFile:
    """The clip's audio file, or the part of a larger one that it is. Raises Rejection if there is no audio."""
    try:
        if "://" in clip.location or clip.byte_range:
            return soundfile.SoundFile(io.BytesIO(_read_bytes(clip, storage)))
        # By descriptor, so that a missing file, a forbidden one and one that is no audio are told apart.
        return soundfile.SoundFile(os.open(clip.location, os.O_RDONLY | os.O_CLOEXEC))
    except FileNotFoundError:
        raise Rejection("missing", "no such file") from None
    except PermissionError:
        raise Rejection("unreadable", "no permission to read it") from None
    except soundfile.LibsndfileError as error:
        raise Rejection("undecodable", error.error_string) from None


def _read_bytes(clip: Clip, storage: StorageConfig | None) -> bytes | bytearray:
    folder, _, name = clip.location.rpartition("/")
    store = _open_store(folder, storage)
    if not clip.byte_range:
        return store.read(name)
    offset, size = clip.byte_range
    data = bytearray(size)
    store.read_range(name, offset, [memoryview(data)])
    return data


@functools.lru_cache(64)
def _open_store(folder: str, storage: StorageConfig | None) -> Store:
    """The same store for all clips of a folder: it keeps connections and open files."""
    return open_store(folder, storage)


def _decode(file: soundfile.SoundFile, offset: int, length: int, config: ClipConfig) -> np.ndarray:
    """`length` mono samples from `offset` on, both at the config's rate."""
    if file.samplerate == config.sample_rate:
        return _read_frames(file, offset, offset + length)
    # Both rates' sample times coincide every `native` samples of the file and `wanted` of the result: starting there
    # makes the crop the same as a piece of the whole clip resampled.
    ratio = Fraction(file.samplerate, config.sample_rate)
    native, wanted = ratio.as_integer_ratio()
    margin = RESAMPLING_MARGIN * max(native, wanted) // wanted  # in frames of the file
    first = max(int(offset * ratio - margin) // native * native, 0)
    last = min(int((offset + length) * ratio + margin), file.frames)
    resampled = _resample(_read_frames(file, first, last), file.samplerate, config)
    skipped = offset - first // native * wanted
    return resampled[skipped : skipped + length]


def _read_frames(file: soundfile.SoundFile, first: int, last: int) -> np.ndarray:
    """The file's frames `first` to `last`, channels averaged, float32."""
    try:
        file.seek(first)
        frames = file.read(last - first, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise Rejection("undecodable", error.error_string) from None
    if len(frames) < last - first:
        raise Rejection("truncated", f"ends {last - first - len(frames)} frames before its header says")
    return frames[:, 0] if frames.shape[1] == 1 else frames.mean(axis=1)


def _resample(waveform: np.ndarray, sample_rate: int, config: ClipConfig) -> np.ndarray:
    if config.resampler == "soxr":
        return soxr.resample(waveform, sample_rate, config.sample_rate)
    try:
        import torch
        import torchaudio
    except (ImportError, OSError) as error:  # its extension is linked to CUDA
        raise ValueError(
            f"clips.resampler is torchaudio, not importable here ({error}). Use soxr, or a CUDA build of torch."
        ) from None
    resampled = torchaudio.functional.resample(torch.from_numpy(waveform), sample_rate, config.sample_rate)
    return resampled.numpy()
