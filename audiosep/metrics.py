"""How well an estimate matches its target, in dB, by upstream's formulas, and how sure a mean over examples is."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def sdr(estimate: Tensor, target: Tensor) -> Tensor:
    """Signal-to-distortion ratio [B] of waveforms [B, ..., L] in dB: the target's power over the error's, both floored
    at 1e-10, so a perfect estimate and a silent target have finite values."""
    signal, noise = _mean_square(target), _mean_square(estimate - target)
    return 10 * torch.log10(signal.clamp(min=1e-10) / noise.clamp(min=1e-10))


def si_sdr(estimate: Tensor, target: Tensor) -> Tensor:
    """Scale-invariant SDR [B] of waveforms [B, ..., L] in dB: the target is first scaled to fit the estimate best
    (Le Roux et al. 2019). The means are kept in, as upstream does; machine epsilon keeps silence finite."""
    estimate, target = estimate.flatten(1), target.flatten(1)
    eps = torch.finfo(target.dtype).eps
    scale = (eps + (target * estimate).sum(1, keepdim=True)) / (eps + target.square().sum(1, keepdim=True))
    signal, noise = (scale * target).square().sum(1), (estimate - scale * target).square().sum(1)
    return 10 * torch.log10((eps + signal) / (eps + noise))


def sdri(estimate: Tensor, target: Tensor, mixture: Tensor) -> Tensor:
    """SDR improvement [B] in dB over leaving the mixture as it is."""
    return sdr(estimate, target) - sdr(mixture, target)


def si_sdri(estimate: Tensor, target: Tensor, mixture: Tensor) -> Tensor:
    """SI-SDR improvement [B] in dB over leaving the mixture as it is."""
    return si_sdr(estimate, target) - si_sdr(mixture, target)


def _mean_square(waveform: Tensor) -> Tensor:
    return waveform.flatten(1).square().mean(1)


@dataclass(frozen=True)
class Summary:
    """A mean over examples with its confidence interval."""

    mean: float
    low: float
    high: float
    num_examples: int

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"


def summarise(values: np.ndarray, confidence: float = 0.95, num_resamples: int = 1000, seed: int = 0) -> Summary:
    """The mean of values [N] and its percentile bootstrap interval (Efron 1979), the same at every call."""
    if not len(values):
        raise ValueError("There are no examples to average; evaluate at least one.")
    values = np.asarray(values, np.float64)
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(num_resamples)]
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Summary(float(values.mean()), float(low), float(high), len(values))
