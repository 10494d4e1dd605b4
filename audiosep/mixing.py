"""SegmentMixer: a target and its interferers into a mixture, as AudioSep's training mixes them.

Pure: every number is drawn before (recipes.py)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

ENERGY_FLOOR = 1e-10
RATIO_RANGE = (0.02, 50.0)
PEAK_AFTER_DECLIPPING = 0.9


@dataclass(frozen=True)
class MixingConfig:
    """What may be drawn for one mixture."""

    max_mix_num: Annotated[int, Field(ge=2, description="sources in a mixture, drawn uniformly in 2..max_mix_num")] = 2
    lower_db: Annotated[
        int, Field(ge=-100, le=100, description="smallest gain of an interferer over the target's energy, dB")
    ] = -10
    higher_db: Annotated[
        int, Field(ge=-100, le=100, description="largest gain of an interferer over the target's energy, dB")
    ] = 10
    distinct_kinds: Annotated[
        bool, Field(description="two sources of a mixture never share a kind, where both have one")
    ] = True

    def __post_init__(self) -> None:
        if self.lower_db > self.higher_db:
            raise ValueError(
                f"lower_db {self.lower_db} is above higher_db {self.higher_db}: no gain lies between them."
            )


@dataclass(frozen=True)
class Mixture:
    """A mixture and its parts, float32 [L] each: `mixture` is `segment` and all interferers added up, to rounding."""

    mixture: np.ndarray
    segment: np.ndarray  # the target as it is in the mixture
    waveforms: Sequence[np.ndarray]  # the interferers as they were
    scales: tuple[np.float32, ...]  # what each of these was multiplied by
    peak: float  # of the mixture before declipping
    declip_scale: float  # 1 unless that is above 1

    def interferer(self, number: int) -> np.ndarray:
        """Interferer `number` as it is in the mixture."""
        return self.scales[number] * self.waveforms[number]


def mix(target: np.ndarray, interferers: Sequence[np.ndarray], gains_db: Sequence[int], noise_gain_db: int) -> Mixture:
    """Mix waveforms, float32 [L] each.

    Each interferer is scaled to the target's energy, then by its gain; their sum once more the same way. If the
    mixture's peak exceeds 1, everything is scaled to a peak of 0.9."""
    energy = _energy(target)
    scales = [_scale(energy, waveform, gain_db) for waveform, gain_db in zip(interferers, gains_db, strict=True)]
    noise = scales[0] * interferers[0]
    for scale, waveform in zip(scales[1:], interferers[1:]):
        noise += scale * waveform
    noise_scale = _scale(energy, noise, noise_gain_db)
    noise *= noise_scale
    mixture = np.add(target, noise, out=noise)
    peak = float(max(mixture.max(), -mixture.min()))
    if peak <= 1:
        return Mixture(mixture, target, interferers, tuple(scale * noise_scale for scale in scales), peak, 1.0)
    declip_scale = np.float32(PEAK_AFTER_DECLIPPING / peak)
    mixture *= declip_scale
    scales = [scale * noise_scale * declip_scale for scale in scales]
    return Mixture(mixture, target * declip_scale, interferers, tuple(scales), peak, float(declip_scale))


def _energy(waveform: np.ndarray) -> float:
    return float(np.mean(np.square(waveform)))


def _scale(energy: float, waveform: np.ndarray, gain_db: int) -> np.float32:
    """The factor that brings `waveform` to `gain_db` above `energy`, as far as the ratio's range allows."""
    ratio = np.sqrt(_energy(waveform) / max(energy, ENERGY_FLOOR))
    return np.float32(10 ** (gain_db / 20) / np.clip(ratio, *RATIO_RANGE))
