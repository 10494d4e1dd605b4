"""ResUNet30 equals upstream's on the same weights, in names and in numbers, and trains everything that it uses."""

import numpy as np
import pytest
import torch
import upstream
from torch import Tensor

from audiosep.resunet import ResUNet30, ResUNetConfig

SMALL = ResUNetConfig(window_lengths=(64, 32), widths=(4, 6, 8), condition_size=5)


def random_batch(num_bins: int = 33, num_frames: int = 10, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    mixture = torch.randn(2, 1, num_frames, num_bins, dtype=dtype)
    return {"stft_mixture": mixture if dtype.is_complex else mixture.abs(), "condition": torch.randn(2, 5)}


@pytest.fixture(scope="module")
def released() -> ResUNet30:
    model = ResUNet30(ResUNetConfig()).eval()
    model.load_state_dict(upstream.formula_weights())
    return model


def test_tensor_names_and_shapes_are_the_released_ones(released: ResUNet30) -> None:
    expected = {name: shape for name, shape in upstream.released_table().items() if "stft." not in name}
    assert {name: tuple(tensor.shape) for name, tensor in released.state_dict().items()} == expected


@torch.no_grad()
def test_waveform_equals_upstreams(released: ResUNet30) -> None:
    golden = {name: torch.from_numpy(array) for name, array in upstream.figures().items()}
    window = torch.hann_window(2048)
    spectrum = torch.stft(golden["mixture"][0], 2048, 320, window=window, pad_mode="reflect", return_complex=True)
    batch = {"stft_mixture": spectrum.mT[None], "condition": golden["condition"]}
    estimate = released(batch)["stft_waveform"]
    waveform = torch.istft(estimate[0].mT, 2048, 320, window=window, length=golden["mixture"].shape[-1])
    assert (waveform - golden["waveform"][0]).abs().max() < 1e-4
    assert golden["waveform"].abs().max() > 0.05  # or 1e-4 would say little


def numpy_estimate(state: dict[str, np.ndarray], depth: int, mixture: np.ndarray, condition: np.ndarray) -> np.ndarray:
    """The complex estimate [B, C, T, F] of a model in eval mode, as AudioSep's paper and table of tensors define it."""

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        mean, var, weight, bias = (
            state[f"base.{name}.{field}"].reshape(-1, 1, 1)
            for field in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / np.sqrt(var + 1e-5) * weight + bias

    def activation(x: np.ndarray, name: str) -> np.ndarray:
        layer = "film." + name.replace(".", "->").replace("bn", "beta")
        x = norm(x, name) + (condition @ state[f"{layer}.weight"].T + state[f"{layer}.bias"])[:, :, None, None]
        return np.where(x > 0, x, 0.01 * x)

    def conv(x: np.ndarray, name: str) -> np.ndarray:
        weight, bias = state[f"base.{name}.weight"], state.get(f"base.{name}.bias", np.zeros(1))
        height, width = weight.shape[2:]
        x = np.pad(x, ((0, 0), (0, 0), (height // 2, height // 2), (width // 2, width // 2)))
        windows = np.lib.stride_tricks.sliding_window_view(x, (height, width), (2, 3))
        return np.einsum("bitfhw,oihw->botf", windows, weight) + bias.reshape(-1, 1, 1)

    def block(x: np.ndarray, name: str) -> np.ndarray:
        y = conv(activation(conv(activation(x, f"{name}.bn1"), f"{name}.conv1"), f"{name}.bn2"), f"{name}.conv2")
        return y + (conv(x, f"{name}.shortcut") if f"base.{name}.shortcut.weight" in state else x)

    magnitude = np.maximum(np.abs(mixture), 1e-5)
    x = norm(magnitude.transpose(0, 3, 2, 1), "bn0").transpose(0, 3, 2, 1)
    num_frames = x.shape[2]
    x = np.pad(x, ((0, 0), (0, 0), (0, -num_frames % 2 ** (depth - 1)), (0, 0)))[..., :-1]
    x, skips = conv(x, "pre_conv"), []
    for level in range(1, depth + 1):
        x = block(x, f"encoder_block{level}.conv_block1")
        skips.append(x)
        b, c, t, f = x.shape
        frames = 1 if level == depth else 2
        x = x.reshape(b, c, t // frames, frames, f // 2, 2).mean((3, 5))
    x = block(x, f"conv_block{depth + 1}a.conv_block1")
    for level in range(1, depth + 1):
        name = f"decoder_block{level}"
        x = np.einsum("bitf,iohw->bothfw", activation(x, f"{name}.bn1"), state[f"base.{name}.conv1.weight"])
        b, o, t, h, f, w = x.shape
        x = block(np.concatenate([x.reshape(b, o, t * h, f * w), skips.pop()], 1), f"{name}.conv_block2")
    mask, real, imaginary = np.pad(conv(x, "after_conv"), ((0, 0), (0, 0), (0, 0), (0, 1)))[:, :, :num_frames].swapaxes(
        0, 1
    )
    phase = np.tanh(real) + 1j * np.tanh(imaginary)
    return mixture * (phase / np.maximum(np.abs(phase), 1e-10) / (1 + np.exp(-mask)))[:, None]


@torch.no_grad()
def test_complex_path_equals_a_numpy_model_in_float64() -> None:
    torch.manual_seed(0)
    model = ResUNet30(ResUNetConfig(window_lengths=(64,), widths=SMALL.widths, condition_size=5)).double().eval()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + 0.5 if name.endswith("var") else torch.randn_like(tensor) / 2)
    batch = random_batch(num_frames=11, dtype=torch.complex128)
    batch["condition"] = batch["condition"].double()
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    expected = numpy_estimate(state, 3, batch["stft_mixture"].numpy(), batch["condition"].numpy())
    np.testing.assert_allclose(model(batch)["stft_waveform"].numpy(), expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_magnitude_mode_is_the_magnitude_of_complex_mode() -> None:
    model = ResUNet30(SMALL).eval()
    torch.nn.init.normal_(model.base.after_conv.weight)  # an untrained model turns no phase
    batch = random_batch(dtype=torch.complex64)
    estimate = model(batch)["stft_waveform"]
    magnitude = model({**batch, "stft_mixture": batch["stft_mixture"].abs()})["stft_waveform"]
    # Upstream gives the last bin no phase at all, that is no sound; its magnitude mask there is the sigmoid of zero.
    torch.testing.assert_close(estimate.abs()[..., :-1], magnitude[..., :-1])
    assert not estimate[..., -1].any()


@torch.no_grad()
def test_float16_magnitudes_are_computed_in_float32() -> None:
    model = ResUNet30(SMALL).eval()
    batch = random_batch()
    batch["stft_mixture"] = batch["stft_mixture"].half()
    exact = {**batch, "stft_mixture": batch["stft_mixture"].float()}
    torch.testing.assert_close(model(batch)["stft_waveform"], model(exact)["stft_waveform"], rtol=0, atol=0)


@torch.no_grad()
def test_training_starts_with_the_phase_of_the_mixture() -> None:
    batch = random_batch(dtype=torch.complex64)
    mask = (ResUNet30(SMALL)(batch)["stft_waveform"] / batch["stft_mixture"])[..., :-1]
    torch.testing.assert_close(mask, mask.abs().to(torch.complex64))
    assert mask.real.std() > 0.1


@pytest.mark.parametrize("num_frames", [1, 4, 5, 501])
def test_any_number_of_frames_keeps_its_shape(num_frames: int) -> None:
    batch = random_batch(num_frames=num_frames)
    assert ResUNet30(SMALL)(batch)["stft_waveform"].shape == batch["stft_mixture"].shape


@pytest.mark.parametrize("num_bins", [33, 17])
def test_every_trained_parameter_gets_a_gradient_on_every_window(num_bins: int) -> None:
    model = ResUNet30(SMALL)
    model(random_batch(num_bins, dtype=torch.complex64))["stft_waveform"].abs().sum().backward()
    assert {name for name, tensor in model.named_parameters() if tensor.grad is None} == set(model.unused_parameters())
    assert all(tensor.grad.isfinite().all() for tensor in model.parameters() if tensor.grad is not None)
    assert len(model.unused_parameters()) == 3 * 4


def test_each_window_has_its_own_normalisation_and_shares_the_trunk() -> None:
    model = ResUNet30(SMALL).train()
    model(random_batch(17))
    assert model.base.bn0.num_batches_tracked == 0
    assert model.base.bn0_32.num_batches_tracked == 1
    single = ResUNet30(ResUNetConfig(window_lengths=(64,), widths=SMALL.widths, condition_size=5))
    assert set(model.state_dict()) - set(single.state_dict()) == {
        f"base.bn0_32.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }


def test_a_window_that_the_model_was_not_made_for_is_named() -> None:
    with pytest.raises(ValueError, match=r"9 bins, that is a window of 16 samples.*\(64, 32\)"):
        ResUNet30(SMALL)(random_batch(9))


def test_bins_that_do_not_halve_evenly_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 128"):
        ResUNetConfig(window_lengths=(2048, 96))
