"""Losses between spectrograms, by name: `l1_stft_mag`, or a weighted sum like `l1_stft_mag + 0.1 * si_sdr`."""

from collections.abc import Callable

import torch
from torch import Tensor

from audiosep import metrics
from audiosep.stft import istft

Loss = Callable[[Tensor, Tensor], Tensor]
LOG_FLOOR = 1e-5  # added to magnitudes under the logarithm: inaudible, and above float16's smallest step


def loss_by_name(name: str, hop_length: int = 320) -> Loss:
    """The loss (estimate, target) -> scalar that a name, or a sum of names with weights, means.

    Estimate and target are [B, C, T, F], magnitudes or complex. The losses on phase and waveform need complex ones, and
    raise ValueError for magnitudes; waveforms are made with the hop length, in samples."""
    terms = [_term(term, name) for term in name.split("+")]

    def loss(estimate: Tensor, target: Tensor) -> Tensor:
        values = [distance(view(estimate, hop_length), view(target, hop_length)) for _, view, distance in terms]
        return torch.stack([weight * value for (weight, _, _), value in zip(terms, values)]).sum()

    return loss


def _term(term: str, name: str) -> tuple[float, Callable[[Tensor, int], Tensor], Loss]:
    weight, _, loss = term.rpartition("*")
    try:
        return float(weight or 1), *LOSSES[loss.strip()]
    except (KeyError, ValueError):
        raise ValueError(
            f"Cannot read {term.strip()!r} in the loss {name!r}. A loss is NAME, or a sum of WEIGHT * NAME, "
            f"with the names {', '.join(LOSSES)}."
        ) from None


def magnitude(spectrogram: Tensor, hop_length: int) -> Tensor:
    """[B, C, T, F], at least float32: stored magnitudes may be float16."""
    values = spectrogram.abs()
    return values.to(torch.promote_types(values.dtype, torch.float32))


def real_and_imaginary(spectrogram: Tensor, hop_length: int) -> Tensor:
    """[B, C, T, F, 2]"""
    if not spectrogram.is_complex():
        raise ValueError(
            "A loss on phase or waveform needs complex spectrograms, but these are magnitudes. Precompute with "
            "`representation: complex`, or choose a loss on magnitudes: l1_stft_mag, l1_stft_log_mag or "
            "spectral_convergence."
        )
    return torch.view_as_real(spectrogram)


def waveform(spectrogram: Tensor, hop_length: int) -> Tensor:
    """[B, C, L] with L = (T - 1) * hop_length."""
    _, num_frames, num_bins, _ = real_and_imaginary(spectrogram, hop_length).shape[-4:]
    return istft(spectrogram, 2 * (num_bins - 1), hop_length, (num_frames - 1) * hop_length)


def l1(estimate: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference: upstream's loss, there on waveforms."""
    return (estimate - target).abs().mean()


def l1_log(estimate: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference of natural logarithms (Arik et al. 2018, arXiv:1808.06719): quiet bins count too."""
    return l1(torch.log(estimate + LOG_FLOOR), torch.log(target + LOG_FLOOR))


def spectral_convergence(estimate: Tensor, target: Tensor) -> Tensor:
    """Norm of the difference over the norm of the target, for each example, averaged (Arik et al. 2018): 0 is perfect,
    1 as bad as silence, loud and quiet examples alike. The target's norm counts as 1e-3 at least."""
    difference, norm = (torch.linalg.vector_norm(x.flatten(1), dim=1) for x in (estimate - target, target))
    return (difference / norm.clamp(min=1e-3)).mean()


def negative_si_sdr(estimate: Tensor, target: Tensor) -> Tensor:
    """Minus the SI-SDR in dB (Le Roux et al. 2019, arXiv:1811.02508), averaged over the examples."""
    return -metrics.si_sdr(estimate, target).mean()


# Each loss is a view of the spectrograms and a distance between two such views. Real and imaginary parts are compared
# as in complex spectral mapping (Tan and Wang 2020, doi:10.1109/TASLP.2019.2955276).
LOSSES: dict[str, tuple[Callable[[Tensor, int], Tensor], Loss]] = {
    "l1_stft_mag": (magnitude, l1),
    "l1_stft_log_mag": (magnitude, l1_log),
    "spectral_convergence": (magnitude, spectral_convergence),
    "l1_stft_complex": (real_and_imaginary, l1),
    "l1_wav": (waveform, l1),
    "si_sdr": (waveform, negative_si_sdr),
}
