"""One synthetic clip the whole way: from its file through shard, reader, model and metric."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from audiosep.catalogue import read_catalogue
from audiosep.config import build_config
from audiosep.dataset import Dataset, PrecomputeConfig
from audiosep.evaluate import ideal_ratio_mask
from audiosep.metrics import si_sdri
from audiosep.samples import decode
from audiosep.system import AudioFormat, SeparationSystem, SystemConfig
from shards.loader import ShardLoader
from shards.manifest import load_manifest, seal

SAMPLE_RATE, LENGTH = 8000, 4000


def test_one_clip_the_whole_way(tmp_path: Path):
    times = np.arange(LENGTH) / SAMPLE_RATE
    clips = {"low": 0.3 * np.sin(2 * np.pi * 440 * times), "high": 0.3 * np.sin(2 * np.pi * 1760 * times)}
    entries = []
    for kind, clip in clips.items():
        soundfile.write(tmp_path / f"{kind}.flac", clip, SAMPLE_RATE)
        entries.append({"wav": f"{kind}.flac", "caption": f"a {kind} tone", "kind": kind})
    (tmp_path / "catalogue.json").write_text(json.dumps({"data": entries}))

    settings = {
        "root": str(tmp_path / "shards"),
        "catalogue": str(tmp_path / "catalogue.json"),
        "clips": {"sample_rate": SAMPLE_RATE, "segment_seconds": LENGTH / SAMPLE_RATE, "min_clip_seconds": 0.1},
        "mixing": {"lower_db": 0, "higher_db": 0},
        "stft": {"window_lengths": [256], "hop_length": 80},
        "shards": {"representation": "complex", "targets": "each", "samples_per_shard": 2},
        "device": "cpu",
    }
    config = build_config(PrecomputeConfig, settings, "test")
    dataset = Dataset(config, read_catalogue(config.catalogue, check_files=True))
    for shard in range(dataset.plan.num_shards):
        dataset.render_shard(shard, lambda: None)
    seal(dataset.store)

    audio = AudioFormat.of(load_manifest(dataset.store).spec, "test:none")
    assert audio == AudioFormat(SAMPLE_RATE, LENGTH, 80, "test:none")
    model = {"window_lengths": [256], "widths": [4, 8], "condition_size": 4}
    system = SeparationSystem(build_config(SystemConfig, {"model": model, "window": 256}, "test"), audio).eval()

    [stored] = list(ShardLoader(config.root, batch_size=2, shuffle=False, max_samples=2))
    batch = decode(stored.keys, stored.text, stored.arrays).to("cpu")
    target, mixture = system.target_and_mixture(batch)
    for row, kind in enumerate(batch.kinds):
        assert batch.text[row] == f"a {kind} tone"
        np.testing.assert_allclose(target[row, 0].numpy(), clips[kind], atol=2e-3)
        np.testing.assert_allclose(mixture[row, 0].numpy(), clips["low"] + clips["high"], atol=2e-3)

    estimate = system(batch.mixture[256], torch.eye(4)[:2])
    assert estimate.shape == batch.mixture[256].shape
    assert (estimate.abs() <= batch.mixture[256].abs() + 1e-5).all()
    assert si_sdri(mixture / 2, target, mixture).numpy() == pytest.approx(0, abs=1e-3)
    assert (si_sdri(ideal_ratio_mask(batch, system), target, mixture) > 30).all()
