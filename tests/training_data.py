"""Sealed shards that a tiny model can learn from: low tones mixed with high ones, asked for by one-hot conditions."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shard_data import write_one

from audiosep.config import build_config
from audiosep.stft import stft
from audiosep.train import TrainConfig
from shards.manifest import bind, seal
from shards.storage import open_store
from shards.tar import Sample

SAMPLE_RATE, LENGTH, HOP_LENGTH = 8000, 1024, 32
KINDS = ("low", "high")
ENCODER = "test:tones"


def tones(index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The asked and the other source of sample `index`, float32 [1, L]; 2 n and 2 n + 1 ask for both of a mixture."""
    rng = np.random.default_rng(index // 2)
    times = np.arange(LENGTH) / SAMPLE_RATE
    both = [np.sin(2 * np.pi * (rng.uniform(low, low + 900) * times + rng.random())) for low in (300, 2400)]
    waves = [torch.from_numpy(rng.uniform(0.2, 0.5) * wave[None]).float() for wave in both]
    return waves[index % 2], waves[1 - index % 2]


def make_sample(index: int, windows: tuple[int, ...], representation: str) -> Sample:
    asked, other = tones(index)
    arrays: dict[str, np.ndarray] = {}
    for window in windows:
        for name, wave in (("stft_mixture", asked + other), ("stft_segment", asked)):
            spectrogram = stft(wave, window, HOP_LENGTH)
            planes = (
                torch.stack((spectrogram.real, spectrogram.imag)) if representation == "complex" else spectrogram.abs()
            )
            arrays[f"{name}.{window}"] = planes.numpy().astype(np.float16)
    arrays["condition"] = np.eye(4, dtype=np.float16)[index % 2]
    kinds = KINDS[index % 2], KINDS[1 - index % 2]
    text = {"text": f"a {kinds[0]} tone", "kind": kinds[0], "length": LENGTH, "sample_rate": SAMPLE_RATE}
    return Sample(f"{index:09d}", text | {"interferers": [{"kind": kinds[1]}]}, arrays)


def make_shards(
    root: Path,
    num_samples: int,
    representation: str = "magnitude",
    windows: tuple[int, ...] = (64,),
    spoil: int | None = None,
    encoder: str | None = ENCODER,
) -> Path:
    """A sealed root; sample `spoil` has a segment of NaN."""
    spec = {
        "clips": {"sample_rate": SAMPLE_RATE, "segment_seconds": LENGTH / SAMPLE_RATE},
        "stft": {"window_lengths": list(windows), "hop_length": HOP_LENGTH},
        "shards": {"representation": representation},
        "query_encoder": encoder,
    }
    store = open_store(root)
    plan = bind(store, spec, num_samples, 20)

    def make(index: int) -> Sample:
        sample = make_sample(index, windows, representation)
        if index == spoil:
            sample.arrays[f"stft_segment.{windows[0]}"][:] = np.nan
        return sample

    for shard in range(plan.num_shards):
        write_one(store, plan, shard, make)
    seal(store)
    return root


def settings(root: Path, train: Path, valid: Path | None = None, **trainer: Any) -> dict[str, Any]:
    """Config of a run in `root`, as plain data."""
    return {
        "root": str(root),
        "data": {"train": str(train), "valid": str(valid or ""), "loader": {"batch_size": 8, "pin_memory": False}},
        "system": {
            "model": {"window_lengths": [64], "widths": [4, 8], "condition_size": 4, "norm_momentum": 0.1},
            "window": 64,
            "optimizer": {"learning_rate": 1e-2, "warm_up_steps": 5, "reduce_lr_steps": 50},
        },
        "trainer": {"accelerator": "cpu", "devices": 1, "deterministic": True, "log_steps": 5, **trainer},
    }


def config_of(data: dict[str, Any]) -> TrainConfig:
    return build_config(TrainConfig, data, "test")


def served(folder: Path, rank: int = 0) -> list[tuple[dict[str, Any], list[list[str]]]]:
    """A ledger's readings: where each took up the order, and the keys of its batches."""
    readings: list[tuple[dict[str, Any], list[list[str]]]] = []
    for line in (folder / f"rank-{rank:05d}.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if "keys" in entry:
            readings[-1][1].append(entry["keys"])
        else:
            readings.append((entry, []))
    return readings


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
