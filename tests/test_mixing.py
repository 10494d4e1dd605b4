"""The mixer equals upstream's on upstream's own draws, and an independent float64 computation."""

from pathlib import Path

import numpy as np
import pytest

from audiosep.mixing import MixingConfig, mix

GOLDEN = np.load(Path(__file__).parent / "golden" / "golden_seed0.npz")


def test_mixtures_and_segments_equal_upstream_on_the_same_draws():
    clips, draws = GOLDEN["clips"][:, 0], [int(value) for _, _, value in GOLDEN["draws"]]
    for n, target in enumerate(clips):
        mix_num, *draws = draws
        gains_db, noise_gain_db, draws = tuple(draws[: mix_num - 1]), draws[mix_num - 1], draws[mix_num:]
        interferers = [clips[(n + i) % len(clips)] for i in range(1, mix_num)]
        result = mix(target, interferers, gains_db, noise_gain_db)
        np.testing.assert_allclose(result.mixture, GOLDEN["mixtures"][n, 0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(result.segment, GOLDEN["segments"][n, 0], rtol=1e-5, atol=1e-6)
    assert draws == []


def test_the_mixture_is_the_sum_of_its_parts_and_loud_ones_peak_at_nine_tenths():
    rng = np.random.default_rng(0)
    target = rng.uniform(-0.9, 0.9, 4000).astype(np.float32)
    interferers = rng.uniform(-0.9, 0.9, (3, 4000)).astype(np.float32)
    result = mix(target, interferers, (10, 3, -10), 10)
    np.testing.assert_allclose(result.mixture, result.segment + sum(map(result.interferer, range(3))), atol=2e-6)
    assert result.declip_scale < 1
    assert np.abs(result.mixture).max() == pytest.approx(0.9, abs=1e-6)
    np.testing.assert_allclose(result.segment, target * result.declip_scale, rtol=1e-6)


def test_energies_follow_the_gains_within_the_ratio_range():
    rng = np.random.default_rng(1)
    target = rng.standard_normal(8000).astype(np.float32) * 0.01
    interferer = rng.standard_normal(8000).astype(np.float32) * 0.1
    result = mix(target, interferer[None], (0,), -6)
    ratio = np.mean(result.interferer(0) ** 2) / np.mean(result.segment**2)
    assert 10 * np.log10(ratio) == pytest.approx(-6, abs=1e-3)
    whisper = mix(target, 1e-6 * interferer[None], (0,), 0)  # 10^5 below the target: a factor of 50 twice is the most
    assert np.std(whisper.interferer(0)) == pytest.approx(2500 * 1e-6 * np.std(interferer), rel=1e-3)


def test_a_silent_interferer_stays_silent_and_nothing_is_nan():
    result = mix(np.ones(100, np.float32) * 0.1, np.zeros((1, 100), np.float32), (5,), 5)
    assert not result.interferer(0).any()
    assert np.isfinite(result.mixture).all()


def test_gains_must_leave_a_choice():
    with pytest.raises(ValueError, match="lower_db 3 is above higher_db 2"):
        MixingConfig(lower_db=3, higher_db=2)
