"""The demo, shrunken: the same way from clips to separated sounds, with a minute's learning left out."""

import json
import re
from pathlib import Path

import pytest
import soundfile
import yaml
from matplotlib import image

from audiosep.config import load_config
from audiosep.demo import DemoConfig, main

CONFIG = Path(__file__).parents[1] / "configs" / "demo.yaml"


def test_the_way_from_clips_to_sounds(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = tmp_path / "demo.yaml"
    config.write_text(CONFIG.read_text().replace("runs/demo", str(tmp_path / "runs")))
    shrunken = {
        "train_shards.shards.num_samples": 32,
        "train_shards.num_processes": 1,
        "valid_shards.shards.num_samples": 4,
        "test_shards.shards.num_samples": 8,
        "train.trainer": "{max_steps: 4, validate_steps: 2, log_steps: 2, accelerator: cpu, devices: 1}",
    }
    options = [word for key, value in shrunken.items() for word in (f"--{key}", str(value))]
    assert main(["--config", str(config), *options]) == 0
    root = tmp_path / "runs"
    summary = json.loads((root / "summary.json").read_text())
    assert summary.keys() == {
        "si_sdri_db",
        "sdri_db",
        "query_following",
        "untrained_si_sdri_db",
        "num_test_mixtures",
        "seconds",
    }
    assert summary["num_test_mixtures"] == 4
    assert 0 <= summary["query_following"] <= 1
    for split, num_samples in {"train": 32, "valid": 4, "test": 8}.items():
        assert json.loads((root / split / "manifest.json").read_text())["plan"]["num_samples"] == num_samples
    for name in ("mixture", "estimate-1", "estimate-2", "target-1", "target-2"):
        waveform, sample_rate = soundfile.read(root / "separated" / f"{name}.wav")
        assert (len(waveform), sample_rate) == (32000, 16000)
    for picture in ("separated/spectrograms-1.png", "separated/spectrograms-2.png", "loss.png"):
        assert image.imread(root / picture).std() > 0.05
    printed = capsys.readouterr().out
    commands = re.findall(r"^\$ (\S+ \S+)", printed, re.MULTILINE)
    made = ["audiosep precompute", "shards seal", "shards verify"] * 3
    assert commands == [*made, "audiosep train", "audiosep evaluate", "audiosep separate", "audiosep separate"]
    assert "SI-SDRi on unseen recordings" in printed


def test_the_splits_share_no_clip_and_ask_for_every_sound():
    config = load_config(DemoConfig, CONFIG)
    assert yaml.safe_load(CONFIG.read_text())["train"]["root"] == "runs/demo"
    splits = (config.train_shards, config.valid_shards, config.test_shards)
    assert len({split.catalogue for split in splits}) == 3
    assert config.test_shards.shards.targets == "each"
    assert config.test_shards.mixing.max_mix_num == 2
