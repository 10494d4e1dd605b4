"""SegmentMixer: a target and its interferers into a mixture, as AudioSep's training mixes them.

Pure: every number is drawn before (recipes.py)."""

from dataclasses import dataclass
from typing import Annotated, NamedTuple

import numpy as np
from pydantic import Field

ENERGY_FLOOR = 1e-10
RATIO_RANGE = (0.02, 50.0)
PEAK_AFTER_DECLIPPING = 0.9


@dataclass(frozen=True)
class MixingConfig:
    """What may be drawn for one mixture."""

    max_mix_num: Annotated[int, Field(ge=2, description="sources in a mixture, drawn uniformly in 2..max_mix_num")] = 2
    lower_db: Annotated[int, Field(description="smallest gain of an interferer over the target's energy, dB")] = -10
    higher_db: Annotated[int, Field(description="largest gain of an interferer over the target's energy, dB")] = 10
    distinct_kinds: Annotated[
        bool, Field(description="two sources of a mixture never share a kind, where both have one")
    ] = True

    def __post_init__(self) -> None:
        if self.lower_db > self.higher_db:
            raise ValueError(
                f"lower_db {self.lower_db} is above higher_db {self.higher_db}: no gain lies between them."
            )


class Mixture(NamedTuple):
    """A mixture and its parts, all float32; `mixture` = `segment` + the sum of `interferers` to rounding."""

    mixture: np.ndarray  # [L]
    segment: np.ndarray  # [L], the target as it is in the mixture
    interferers: np.ndarray  # [n, L], each as it is in the mixture
    declip_scale: float  # 1 unless the mixture's peak was above 1


def mix(target: np.ndarray, interferers: np.ndarray, gains_db: tuple[int, ...], noise_gain_db: int) -> Mixture:
    """Mix float32 waveforms `target` [L] and `interferers` [n, L].

    Each interferer is scaled to the target's energy, then by its gain; their sum once more the same way. If the
    mixture's peak exceeds 1, everything is scaled to a peak of 0.9."""
    scaled = np.stack(
        [
            _scale_to(target, waveform, gain_db) * waveform
            for waveform, gain_db in zip(interferers, gains_db, strict=True)
        ]
    )
    noise = scaled.sum(axis=0)
    noise_scale = _scale_to(target, noise, noise_gain_db)
    mixture = target + noise_scale * noise
    peak = float(max(mixture.max(), -mixture.min()))
    declip_scale = np.float32(PEAK_AFTER_DECLIPPING / peak if peak > 1 else 1)
    return Mixture(
        mixture * declip_scale, target * declip_scale, scaled * (noise_scale * declip_scale), float(declip_scale)
    )


def _scale_to(reference: np.ndarray, waveform: np.ndarray, gain_db: int) -> np.float32:
    """The factor that brings `waveform` to `gain_db` above the energy of `reference`, within the ratio's range."""
    ratio = np.sqrt(np.mean(np.square(waveform)) / max(np.mean(np.square(reference)), ENERGY_FLOOR))
    return np.float32(10 ** (gain_db / 20) / np.clip(ratio, *RATIO_RANGE))
