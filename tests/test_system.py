"""The system around the network: schedule, windows, phase, and what its checkpoints carry."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader
from training_data import HOP_LENGTH, LENGTH, SAMPLE_RATE, config_of, make_sample, make_shards, settings

from audiosep.checkpoints import export
from audiosep.config import build_config
from audiosep.metrics import si_sdri
from audiosep.resunet import ResUNet30
from audiosep.samples import Batch, decode
from audiosep.stft import istft
from audiosep.system import (
    AudioFormat,
    OptimizerConfig,
    SeparationSystem,
    SystemConfig,
    learning_rate_scale,
    load_system,
)
from audiosep.train import train

AUDIO = AudioFormat(SAMPLE_RATE, LENGTH, HOP_LENGTH, "test:tones")


def system_of(**changes: Any) -> SeparationSystem:
    torch.manual_seed(0)
    model = {"window_lengths": [64, 128], "widths": [4, 8], "condition_size": 4}
    return SeparationSystem(build_config(SystemConfig, {"model": model, "window": 64, **changes}, "test"), AUDIO).eval()


def batch_of(indices: range, windows: tuple[int, ...] = (64, 128)) -> Batch:
    return stored_batch_of(indices, windows).to("cpu")


def stored_batch_of(indices: range, windows: tuple[int, ...] = (64, 128)) -> Batch:
    samples = [make_sample(index, windows, "complex") for index in indices]
    arrays = {name: torch.stack([torch.from_numpy(s.arrays[name]) for s in samples]) for name in samples[0].arrays}
    return decode([sample.key for sample in samples], [sample.text for sample in samples], arrays)


def test_the_learning_rate_is_upstreams():
    linear = OptimizerConfig(warm_up="linear", warm_up_steps=10, reduce_lr_steps=100)
    assert [learning_rate_scale(step, linear) for step in (0, 5, 10, 99)] == [0, 0.5, 1, 1]
    assert learning_rate_scale(250, linear) == pytest.approx(0.81)
    constant = OptimizerConfig(warm_up="constant", warm_up_steps=10)
    scales = [learning_rate_scale(step, constant) for step in (0, 9, 10, 20, 29, 30, 10**6)]
    assert scales == pytest.approx([0.001, 0.001, 0.01, 0.1, 0.1, 1, 1])


def test_the_phase_is_the_mixtures_or_the_models_own():
    batch = batch_of(range(2))
    mixture = batch.mixture[64]
    system = system_of()
    estimate = system(mixture, batch.condition)
    magnitude = system.ss_model({"stft_mixture": mixture.abs(), "condition": batch.condition})["stft_waveform"]
    torch.testing.assert_close(estimate, torch.polar(magnitude, mixture.angle()), atol=1e-5, rtol=1e-4)
    own = system_of(phase="model")(mixture, batch.condition)
    without_top = (..., slice(-1))  # the highest bin is beside the network, and has no phase of its own
    torch.testing.assert_close(own.abs()[without_top], magnitude[without_top], atol=1e-4, rtol=1e-3)
    assert (own - estimate).abs().max() > 0.1


def test_windows_are_one_all_or_a_random_one_that_a_restart_draws_again(monkeypatch: pytest.MonkeyPatch):
    assert system_of().config.windows == (64,)
    assert system_of(window="all")._windows_of_step() == (64, 128)
    drawn = {}
    for step in range(40):
        monkeypatch.setattr(SeparationSystem, "global_step", step)
        drawn[step] = system_of(window="random")._windows_of_step()
        assert drawn[step] == system_of(window="random")._windows_of_step()
    assert set(drawn.values()) == {(64,), (128,)}
    with pytest.raises(ValueError, match=r"window is 32, but the model takes \(64, 128\)"):
        system_of(window=32)


def test_the_loss_of_all_windows_is_their_mean():
    batch, system = batch_of(range(4)), system_of(window="all")
    each = [system._mean_loss(batch, (window,)) for window in (64, 128)]
    torch.testing.assert_close(system._mean_loss(batch, (64, 128)), torch.stack(each).mean())


def test_the_estimate_from_several_windows_is_their_average():
    batch, system = batch_of(range(2)), system_of(window="all")
    waves = [istft(system(batch.mixture[w], batch.condition), w, HOP_LENGTH, LENGTH) for w in (64, 128)]
    torch.testing.assert_close(system.estimate(batch), (waves[0] + waves[1]) / 2)
    torch.testing.assert_close(system.estimate(batch, (128,)), waves[1])


def test_scores_are_the_metrics_of_the_waveforms():
    batch, system = batch_of(range(3)), system_of()
    target, mixture = system.target_and_mixture(batch)
    torch.testing.assert_close(mixture.shape, (3, 1, LENGTH))
    expected = si_sdri(system.estimate(batch), target, mixture)
    torch.testing.assert_close(system.scores(batch)["si_sdri"], expected)


def test_lightning_tests_with_the_same_figures_each_sample_counted_once():
    batches, system = [stored_batch_of(range(4)), stored_batch_of(range(4, 6))], system_of()
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    (figures,) = trainer.test(system, DataLoader(batches, batch_size=None), verbose=False)
    expected = torch.cat([system.scores(batch.to("cpu"))["si_sdri"] for batch in batches]).mean()
    assert figures["test/si_sdri"] == pytest.approx(float(expected), rel=1e-4)
    assert {"test/loss", "test/sdr", "test/sdri", "test/si_sdr"} <= figures.keys()


@pytest.mark.parametrize("changes", [{"phase": "model", "loss": "l1_wav"}, {"window": "random"}, {"window": "all"}])
def test_every_way_of_training_trains(tmp_path: Path, changes: dict[str, Any]):
    shards = make_shards(tmp_path / "train", 40, "complex", (64, 128))
    config = settings(tmp_path / "run", shards, shards, max_steps=6, validate_steps=6)
    config["system"] |= {"model": config["system"]["model"] | {"window_lengths": [64, 128]}, **changes}
    assert train(config_of(config)) == 0
    trained = load_system(tmp_path / "run/checkpoints/last.ckpt")
    assert trained.config == config_of(config).system
    assert not torch.equal(trained.ss_model.base.pre_conv.weight, system_of().ss_model.base.pre_conv.weight)


def test_precision_compilation_and_fine_tuning(tmp_path: Path):
    shards = make_shards(tmp_path / "train", 40)
    config = settings(tmp_path / "run", shards, max_steps=2, precision="bf16-mixed")
    released = ResUNet30(config_of(config).system.model)
    export(released, tmp_path / "released.ckpt")
    config |= {"start_from": str(tmp_path / "released.ckpt")}
    config["system"]["optimizer"]["learning_rate"] = 1e-9
    assert train(config_of(config)) == 0
    tuned = load_system(tmp_path / "run/checkpoints/last.ckpt").ss_model
    torch.testing.assert_close(tuned.base.pre_conv.weight, released.base.pre_conv.weight)


def test_a_file_of_another_kind_is_refused(tmp_path: Path):
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="neither a checkpoint of `audiosep train` nor a released one"):
        load_system(tmp_path / "other.ckpt")
