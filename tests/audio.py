"""Small catalogues of audio files made on the spot: sine chords in noise, each clip its own."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import yaml

from audiosep.catalogue import read_catalogue
from audiosep.config import build_config
from audiosep.dataset import Dataset, PrecomputeConfig

SMALL = {  # half a second at 8 kHz, 26 frames of 129 bins: a sample is rendered in well under a millisecond
    "clips": {"sample_rate": 8000, "segment_seconds": 0.5, "min_clip_seconds": 0.4},
    "stft": {"window_lengths": [256], "hop_length": 160},
    "device": "cpu",
}


def waveform(seed: int, num_frames: int, sample_rate: int, channels: int = 1) -> np.ndarray:
    """A chord with noise, float32 [num_frames] or [num_frames, channels], peak below 0.5."""
    rng = np.random.default_rng(seed)
    times = np.arange(num_frames) / sample_rate
    chord = sum(np.sin(2 * np.pi * frequency * times) for frequency in rng.uniform(100, 3000, 3)) / 10
    noise = 0.02 * rng.standard_normal((num_frames, channels))
    return (chord[:, None] + noise).astype(np.float32).squeeze()


def write_catalogue(folder: Path, num_clips: int = 8, sample_rate: int = 8000, seconds: float = 1.0) -> Path:
    """FLAC clips with distinct captions and kinds, and the JSON that lists them."""
    (folder / "clips").mkdir(parents=True)
    entries = []
    for i in range(num_clips):
        soundfile.write(folder / f"clips/{i}.flac", waveform(i, round(seconds * sample_rate), sample_rate), sample_rate)
        entries.append({"wav": f"clips/{i}.flac", "caption": f"sound number {i}", "kind": f"kind {i}"})
    file = folder / "catalogue.json"
    file.write_text(json.dumps({"data": entries}))
    return file


def write_bad(path: Path, name: str) -> None:
    """A clip of 1.25 s at 32 kHz with what `name` says wrong with it; nothing at all for "missing"."""
    audio = waveform(6, 40000, 32000)
    if name == "text":
        path.write_text("this is no audio at all\n" * 100)
    elif name == "empty":
        path.write_bytes(b"")
    elif name == "header":
        soundfile.write(path, audio, 32000)
        path.write_bytes(path.read_bytes()[:30])
    elif name == "folder":
        path.mkdir()
    elif name == "flac cut":
        soundfile.write(path, audio, 32000, format="FLAC")
        path.write_bytes(path.read_bytes()[:20000])
    elif name in ("nan", "infinite"):
        audio[::1000] = np.nan if name == "nan" else np.inf
        soundfile.write(path, audio, 32000, subtype="FLOAT")
    elif name == "silence":
        soundfile.write(path, np.zeros(40000), 32000)
    elif name == "0.3 s":
        soundfile.write(path, audio[:9600], 32000)


def small_settings(root: Path, catalogue: Path, **changes: Any) -> dict[str, Any]:
    """A config as plain data; `changes` are laid over its sections."""
    settings: dict[str, Any] = {
        "root": str(root),
        "catalogue": str(catalogue),
        "shards": {"samples_per_shard": 4},
        **SMALL,
    }
    for name, value in changes.items():
        settings[name] = {**settings.get(name, {}), **value} if isinstance(value, Mapping) else value
    return settings


def small_config(root: Path, catalogue: Path, **changes: Any) -> PrecomputeConfig:
    return build_config(PrecomputeConfig, small_settings(root, catalogue, **changes), "test")


def write_config(file: Path, root: Path, catalogue: Path, **changes: Any) -> str:
    file.write_text(yaml.safe_dump(small_settings(root, catalogue, **changes)))
    return str(file)


def open_dataset(config: PrecomputeConfig) -> Dataset:
    return Dataset(config, read_catalogue(config.catalogue, config.check_files))
