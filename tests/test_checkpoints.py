"""The released layout goes in and out without loss, strictly, and without running code from a file."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import upstream
from pytorch_lightning import LightningModule
from torch import Tensor

from audiosep.checkpoints import export, from_released, load_released, read_checkpoint, to_released, transform_kernels
from audiosep.resunet import ResUNet30, ResUNetConfig
from audiosep.stft import stft
from audiosep.system import load_system

NARROW = (2, 3, 4, 4, 5, 5)


@pytest.fixture
def narrow() -> ResUNet30:
    return ResUNet30(ResUNetConfig(window_lengths=(128,), widths=NARROW, condition_size=3))


def released_checkpoint(state: dict[str, Tensor]) -> dict:
    """A file's content as upstream's trainer left it: prefixes, the query encoder beside, scores as numpy scalars."""
    encoder = {"query_encoder.model.logit_scale_a": torch.tensor(1.0)}
    tensors = {f"ss_model.{name}": tensor for name, tensor in state.items()} | encoder
    return {"state_dict": tensors, "epoch": 3, "global_step": 9, "callbacks": {"best": np.float64(1.5)}}


def test_the_released_table_loads_at_full_width_and_comes_out_the_same(tmp_path: Path) -> None:
    state = {name: torch.zeros(shape) for name, shape in upstream.released_table().items()}
    state |= upstream.formula_weights()
    torch.save(released_checkpoint(state), tmp_path / "released.ckpt")
    model = ResUNet30(ResUNetConfig())
    load_released(tmp_path / "released.ckpt", model)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    written = to_released(model)
    assert {name: tuple(tensor.shape) for name, tensor in written.items()} == {
        f"ss_model.{name}": shape for name, shape in upstream.released_table().items()
    }
    assert all(torch.equal(written[f"ss_model.{name}"], state[name]) for name in model.state_dict())


@torch.no_grad()
def test_a_released_checkpoint_separates_as_upstream_does(tmp_path: Path) -> None:
    torch.save(released_checkpoint(upstream.formula_weights()), tmp_path / "released.ckpt")
    system = load_system(tmp_path / "released.ckpt")
    assert (system.audio.sample_rate, system.audio.hop_length) == (32000, 320)
    golden = {name: torch.from_numpy(array) for name, array in upstream.figures().items()}
    mixtures = {2048: stft(golden["mixture"], 2048, 320)}
    estimate = system.separate(mixtures, golden["condition"], golden["mixture"].shape[-1])
    torch.testing.assert_close(estimate, golden["waveform"], rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Found keys")  # this model has no transform kernels
def test_exported_file_loads_as_upstream_loads_it_and_as_ours(tmp_path: Path, narrow: ResUNet30) -> None:
    class AudioSep(LightningModule):
        def __init__(self, ss_model: ResUNet30) -> None:
            super().__init__()
            self.ss_model = ss_model

    export(narrow, tmp_path / "out.ckpt")
    again, theirs = ResUNet30(narrow.config), ResUNet30(narrow.config)
    load_released(tmp_path / "out.ckpt", again)
    AudioSep.load_from_checkpoint(tmp_path / "out.ckpt", strict=False, ss_model=theirs)
    for name, tensor in narrow.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
        assert torch.equal(theirs.state_dict()[name], tensor)


@pytest.mark.parametrize("change", ["missing", "left over", "another shape"])
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, narrow: ResUNet30, change: str) -> None:
    state = to_released(narrow)
    if change == "missing":
        del state["ss_model.base.pre_conv.weight"]
    elif change == "left over":
        state["ss_model.base.post_conv.weight"] = torch.zeros(1)
    else:
        state["ss_model.base.pre_conv.weight"] = torch.zeros(7, 1, 1, 1)
    torch.save({"state_dict": state}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"other.ckpt is not .*(?s:.*)base.(pre|post)_conv.weight"):
        load_released(tmp_path / "other.ckpt", narrow)


def test_files_that_would_run_code_or_are_damaged_are_refused(tmp_path: Path, narrow: ResUNet30) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"state_dict": {}, "extra": Bomb()}, tmp_path / "bomb.ckpt")
    export(narrow, tmp_path / "cut.ckpt")
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "cut.ckpt").read_bytes()[:-100])
    (tmp_path / "text.ckpt").write_text("not a checkpoint")
    (tmp_path / "empty.ckpt").write_bytes(b"")
    export(narrow, tmp_path / "flipped.ckpt")
    data = bytearray((tmp_path / "flipped.ckpt").read_bytes())
    data[len(data) // 2] ^= 1  # in a tensor
    (tmp_path / "flipped.ckpt").write_bytes(data)
    (tmp_path / "short.ckpt").write_bytes(data[:3000])
    for name in ("bomb", "cut", "text", "empty", "flipped", "short"):
        with pytest.raises(ValueError, match=f"{name}.ckpt cannot be read"):
            read_checkpoint(tmp_path / f"{name}.ckpt")
    assert not (tmp_path / "ran").exists()


def test_further_windows_start_from_the_released_normalisation(narrow: ResUNet30) -> None:
    several = ResUNet30(ResUNetConfig(window_lengths=(128, 512), widths=NARROW, condition_size=3))
    noise = torch.randn(1, 64000)
    for window_length, norm in ((128, narrow.base.bn0), (512, None)):
        window = torch.hann_window(window_length)
        spectrum = torch.stft(noise, window_length, 32, window=window, return_complex=True).abs()[0]
        measured = spectrum.mean(1), spectrum.var(1)
        if norm is not None:
            norm.running_mean.copy_(measured[0])
            norm.running_var.copy_(measured[1])
    several.load_state_dict(from_released(to_released(narrow), several))
    inner = slice(4, -4)  # the outermost bins of a real signal's spectrum are real, with other statistics
    assert (several.base.bn0_512.running_mean / measured[0])[inner].mean() == pytest.approx(1, rel=0.02)
    assert (several.base.bn0_512.running_var / measured[1])[inner].mean() == pytest.approx(1, rel=0.1)
    assert {name.removeprefix("ss_model.") for name in to_released(several)} == {
        name.removeprefix("ss_model.") for name in to_released(narrow)
    }


def test_transform_kernels_are_the_transforms() -> None:
    golden = {name: torch.from_numpy(array) for name, array in upstream.figures().items()}
    kernels = {name: kernel.double() for name, kernel in transform_kernels(2048).items()}
    padded = F.pad(golden["mixture"].double(), (1024, 1024), mode="reflect")
    real = F.conv1d(padded, kernels["base.stft.conv_real.weight"], stride=320)
    imaginary = F.conv1d(padded, kernels["base.stft.conv_imag.weight"], stride=320)
    torch.testing.assert_close(
        (real**2 + imaginary**2).clamp(min=1e-10).sqrt().mT.float(), golden["magnitude"][0], rtol=1e-4, atol=3e-4
    )
    full = torch.cat([real, real[:, 1:-1].flip(1)], 1), torch.cat([imaginary, -imaginary[:, 1:-1].flip(1)], 1)
    frames = F.conv1d(full[0], kernels["base.istft.conv_real.weight"])
    frames -= F.conv1d(full[1], kernels["base.istft.conv_imag.weight"])
    weights = kernels["base.istft.ola_window"][None, :, None].expand_as(frames)
    added, weight = (
        F.fold(x, (1, padded.shape[-1]), (1, 2048), stride=(1, 320))[0, 0, 0, 1024:-1024] for x in (frames, weights)
    )
    torch.testing.assert_close((added / weight).float(), golden["mixture"][0, 0], rtol=0, atol=1e-5)
