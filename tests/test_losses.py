"""Each loss equals its formula in float64 numpy, sums add up, and a loss that the data cannot serve says so."""

import numpy as np
import pytest
import torch
from torch import Tensor

from audiosep.losses import LOG_FLOOR, LOSSES, loss_by_name

HOP = 16


def spectrograms(seed: int = 0) -> tuple[Tensor, Tensor]:
    """A complex estimate and target [B, C, T, F] in float64."""
    generator = torch.Generator().manual_seed(seed)
    estimate, target = torch.randn(2, 3, 1, 20, 33, dtype=torch.complex128, generator=generator)
    return estimate, target * torch.tensor([0.1, 1, 10]).view(3, 1, 1, 1)


def inverse(spectrogram: np.ndarray) -> np.ndarray:
    """Waveforms [B, L] of spectrograms [B, 1, T, F]: windowed frames overlap, divided by the sum of squared windows."""
    window = np.sin(np.pi * np.arange(64) / 64) ** 2
    padded, weight = np.zeros((len(spectrogram), 19 * HOP + 64)), np.zeros(19 * HOP + 64)
    for t, frame in enumerate(np.fft.irfft(spectrogram[:, 0], axis=-1).swapaxes(0, 1)):
        padded[:, t * HOP : t * HOP + 64] += frame * window
        weight[t * HOP : t * HOP + 64] += window**2
    return padded[:, 32:-32] / weight[32:-32]


def expected(name: str, estimate: np.ndarray, target: np.ndarray) -> float:
    magnitudes = np.abs(estimate), np.abs(target)
    waves = [inverse(estimate), inverse(target)]
    match name:
        case "l1_stft_mag":
            return np.mean(np.abs(magnitudes[0] - magnitudes[1]))
        case "l1_stft_log_mag":
            return np.mean(np.abs(np.log((magnitudes[0] + LOG_FLOOR) / (magnitudes[1] + LOG_FLOOR))))
        case "spectral_convergence":
            return np.mean(
                [
                    np.sqrt(np.sum((e - t) ** 2) / np.sum(t**2))
                    for e, t in zip(magnitudes[0], magnitudes[1], strict=True)
                ]
            )
        case "l1_stft_complex":
            difference = estimate - target
            return (np.abs(difference.real) + np.abs(difference.imag)).mean() / 2
        case "l1_wav":
            return np.mean(np.abs(waves[0] - waves[1]))
        case "si_sdr":
            values = []
            for e, t in zip(*waves, strict=True):
                projection = t * np.dot(e, t) / np.dot(t, t)
                values.append(10 * np.log10(np.sum(projection**2) / np.sum((e - projection) ** 2)))
            return -float(np.mean(values))
    raise AssertionError(name)


@pytest.mark.parametrize("name", LOSSES)
def test_equals_numpy_and_is_differentiable(name: str) -> None:
    estimate, target = spectrograms()
    loss = loss_by_name(name, HOP)
    assert loss(estimate, target).item() == pytest.approx(expected(name, estimate.numpy(), target.numpy()), rel=1e-6)
    single = estimate.to(torch.complex64).requires_grad_()
    value = loss(single, target.to(torch.complex64))
    assert value.item() == pytest.approx(loss(estimate, target).item(), rel=1e-4)
    value.backward()
    assert single.grad is not None
    assert single.grad.isfinite().all()
    assert single.grad.abs().max() > 0


@pytest.mark.parametrize("name", LOSSES)
def test_silence_is_finite(name: str) -> None:
    estimate = torch.randn(2, 1, 20, 33, dtype=torch.complex64).requires_grad_()
    value = loss_by_name(name, HOP)(estimate, torch.zeros(2, 1, 20, 33, dtype=torch.complex64))
    value.backward()
    assert value.isfinite()
    assert estimate.grad is not None
    assert estimate.grad.isfinite().all()


def test_weighted_sums_add_up() -> None:
    estimate, target = spectrograms()
    total = loss_by_name("l1_stft_mag + 0.5*l1_stft_log_mag+2 * si_sdr", HOP)(estimate, target)
    weights = {"l1_stft_mag": 1, "l1_stft_log_mag": 0.5, "si_sdr": 2}
    parts = [weight * loss_by_name(name, HOP)(estimate, target).item() for name, weight in weights.items()]
    assert total.item() == pytest.approx(sum(parts))


@pytest.mark.parametrize("name", ["l1_stft_mag", "l1_stft_log_mag", "spectral_convergence"])
def test_magnitude_losses_take_stored_float16_targets(name: str) -> None:
    estimate, target = (x.abs().float() for x in spectrograms())
    stored = target.half()
    loss = loss_by_name(name)
    assert loss(estimate, stored).item() == pytest.approx(loss(estimate, stored.float()).item(), rel=1e-6)


@pytest.mark.parametrize("name", ["l1_stft_complex", "l1_wav", "l1_stft_mag + 0.1 * si_sdr"])
def test_losses_on_phase_refuse_magnitudes(name: str) -> None:
    estimate, target = (x.abs() for x in spectrograms())
    with pytest.raises(ValueError, match="representation: complex"):
        loss_by_name(name)(estimate, target)


@pytest.mark.parametrize("name", ["l2", "l1_stft_mag +", "two * si_sdr", ""])
def test_an_unreadable_loss_is_named_with_the_choices(name: str) -> None:
    with pytest.raises(ValueError, match="l1_stft_mag, l1_stft_log_mag"):
        loss_by_name(name)
