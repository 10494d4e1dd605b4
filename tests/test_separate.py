"""Separation of recordings of any length, rate and channel count."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from training_data import HOP_LENGTH, LENGTH, SAMPLE_RATE, config_of, make_shards, settings

from audiosep import separate
from audiosep.checkpoints import read_checkpoint
from audiosep.config import build_config
from audiosep.separate import main, separate_waveform
from audiosep.system import AudioFormat, SeparationSystem, SystemConfig
from audiosep.train import train


def identity() -> SeparationSystem:
    """A system whose mask is 1 everywhere."""
    model = {"window_lengths": [64], "widths": [4, 8], "condition_size": 4}
    config = build_config(SystemConfig, {"model": model, "window": 64}, "test")
    system = SeparationSystem(config, AudioFormat(SAMPLE_RATE, LENGTH, HOP_LENGTH, "test:tones")).eval()
    torch.nn.init.zeros_(system.ss_model.base.after_conv.weight)
    torch.nn.init.constant_(system.ss_model.base.after_conv.bias, 30)
    return system


@pytest.mark.parametrize("num_samples", [1, 100, LENGTH - 1, LENGTH, LENGTH + 1, 3 * LENGTH // 2, 5000])
@pytest.mark.parametrize("channels", [1, 2])
def test_the_segments_add_up_to_the_recording(num_samples: int, channels: int):
    mixture = torch.randn(channels, num_samples, generator=torch.Generator().manual_seed(0))
    estimate = separate_waveform(identity(), mixture, torch.ones(4), batch_size=3)
    assert estimate.shape == mixture.shape
    # The network drops the highest bin; everything else of the mixture must come through, edges included.
    spectrum = torch.fft.rfft(mixture, n=2 * num_samples)
    assert (estimate - mixture).square().sum() < 0.1 * spectrum.abs().square().mean() * 2 + 1e-6


@pytest.mark.parametrize(("sample_rate", "channels"), [(8000, 1), (22050, 2), (44100, 6)])
def test_a_file_keeps_its_length_rate_and_channels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sample_rate: int, channels: int
):
    checkpoint = save(identity(), tmp_path)
    encoder = SimpleNamespace(identity="test:tones", encode=lambda queries: np.ones((1, 4), np.float32))
    monkeypatch.setattr(separate, "make_encoder", lambda *_, **__: encoder)
    times = np.arange(round(0.7 * sample_rate)) / sample_rate
    mixture = np.stack([0.3 * np.sin(2 * np.pi * 300 * (i + 1) * times) for i in range(channels)], axis=1)
    soundfile.write(tmp_path / "a mixture – ü.wav", mixture, sample_rate, subtype="FLOAT")
    output = tmp_path / "out" / "estimate.flac"
    words = [str(tmp_path / "a mixture – ü.wav"), "--query", "a tone", "--checkpoint", str(checkpoint)]
    assert main([*words, "--output", str(output), "--accelerator", "cpu"]) == 0
    estimate, rate = soundfile.read(output, always_2d=True)
    assert (rate, estimate.shape) == (sample_rate, mixture.shape)
    inner = slice(sample_rate // 20, -sample_rate // 20)
    assert np.abs(estimate - mixture)[inner].max() < 0.02


def save(system: SeparationSystem, folder: Path) -> Path:
    """The system as `audiosep train` keeps it."""
    run = settings(folder / "run", make_shards(folder / "train", 20), max_steps=1)
    assert train(config_of(run)) == 0
    path = folder / "run/checkpoints/last.ckpt"
    torch.save(read_checkpoint(path) | {"state_dict": system.state_dict()}, path)
    return path


def test_another_encoder_and_what_is_no_audio_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checkpoint = save(identity(), tmp_path)
    words = ["--query", "a tone", "--checkpoint", str(checkpoint), "--output", str(tmp_path / "out.wav")]
    encoder = SimpleNamespace(identity="other:1", encode=lambda queries: np.ones((1, 4), np.float32))
    monkeypatch.setattr(separate, "make_encoder", lambda *_, **__: encoder)
    (tmp_path / "text.wav").write_text("no audio")
    with pytest.raises(ValueError, match=r"trained with the query encoder test:tones.*other:1"):
        main([str(tmp_path / "text.wav"), *words])
    encoder.identity = "test:tones"
    with pytest.raises(ValueError, match=r"text\.wav cannot be read as audio"):
        main([str(tmp_path / "text.wav"), *words])
    soundfile.write(tmp_path / "nan.wav", np.full(100, np.nan), 8000, subtype="FLOAT")
    with pytest.raises(ValueError, match="not all of them finite"):
        main([str(tmp_path / "nan.wav"), *words])
    with pytest.raises(FileNotFoundError, match=r"missing\.wav"):
        main([str(tmp_path / "missing.wav"), *words])
    assert not (tmp_path / "out.wav").exists()


def test_no_sound_is_clipped_and_no_format_found_out_too_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    checkpoint = save(identity(), tmp_path)
    encoder = SimpleNamespace(identity="test:tones", encode=lambda queries: np.ones((1, 4), np.float32))
    monkeypatch.setattr(separate, "make_encoder", lambda *_, **__: encoder)
    mixture = 3 * np.sin(np.arange(96_000) / 20)
    soundfile.write(tmp_path / "loud.wav", mixture, 96_000, subtype="FLOAT")
    words = [str(tmp_path / "loud.wav"), "--query", "a tone", "--checkpoint", str(checkpoint), "--accelerator", "cpu"]
    assert main([*words, "--output", str(tmp_path / "out.flac")]) == 0
    assert "out.flac, scaled by 0.3" in capsys.readouterr().out
    estimate, _ = soundfile.read(tmp_path / "out.flac")
    inner = slice(5000, -5000)
    assert np.corrcoef(estimate[inner], mixture[inner])[0, 1] > 0.999
    with pytest.raises(ValueError, match=r"out\.mp3 can't be written with 96000 Hz and 1 channels"):
        main([*words, "--output", str(tmp_path / "out.mp3")])
    for name in ("out.m4a", "out"):
        with pytest.raises(ValueError, match=rf"{name} has no name of an audio file"):
            main([*words[:-4], "--checkpoint", "not looked at", "--output", str(tmp_path / name)])
