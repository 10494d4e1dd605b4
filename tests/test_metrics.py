"""Metrics equal upstream's figures and float64 formulas, and intervals cover what they say."""

import math

import numpy as np
import pytest
import torch
import upstream

from audiosep import metrics


def test_equal_upstreams_figures() -> None:
    golden = upstream.figures()
    estimate, target = (torch.from_numpy(golden[name])[None] for name in ("estimate", "reference"))
    assert metrics.sdr(estimate, target).item() == pytest.approx(float(golden["sdr"]), abs=1e-4)
    assert metrics.si_sdr(estimate, target).item() == pytest.approx(float(golden["sisdr"]), abs=1e-4)


def test_equal_float64_formulas_for_each_example_of_a_batch() -> None:
    rng = np.random.default_rng(0)
    target = rng.standard_normal((4, 1, 500)) * np.array([1, 10, 0.1, 1]).reshape(4, 1, 1)
    estimate = target * 0.7 + 0.3 * rng.standard_normal(target.shape) + 0.05
    t, e = target[:, 0], estimate[:, 0]
    ratio = 10 * np.log10((t**2).sum(1) / ((e - t) ** 2).sum(1))
    projection = t * ((t * e).sum(1) / (t * t).sum(1))[:, None]
    invariant = 10 * np.log10((projection**2).sum(1) / ((e - projection) ** 2).sum(1))
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        tensors = torch.from_numpy(estimate).to(dtype), torch.from_numpy(target).to(dtype)
        np.testing.assert_allclose(metrics.sdr(*tensors), ratio, atol=tolerance)
        np.testing.assert_allclose(metrics.si_sdr(*tensors), invariant, atol=tolerance)


def test_scale_matters_to_sdr_only_and_improvements_are_over_the_mixture() -> None:
    target, noise = torch.randn(2, 3, 8000)
    mixture = target + noise
    estimate = target + 0.1 * noise
    torch.testing.assert_close(
        metrics.si_sdr(3 * estimate, target), metrics.si_sdr(estimate, target), rtol=1e-3, atol=1e-3
    )
    assert (metrics.sdr(3 * estimate, target) < 0).all()
    torch.testing.assert_close(metrics.sdri(estimate, target, mixture), torch.full((3,), 20.0), rtol=0, atol=0.01)
    assert not metrics.sdri(mixture, target, mixture).any()
    assert not metrics.si_sdri(mixture, target, mixture).any()


def test_silence_and_perfection_are_finite() -> None:
    silence, sound = torch.zeros(1, 100), torch.randn(1, 100)
    for estimate, target in ((silence, sound), (sound, silence), (sound, sound), (silence, silence)):
        assert metrics.sdr(estimate, target).isfinite().all()
        assert metrics.si_sdr(estimate, target).isfinite().all()


def test_intervals_cover_the_mean_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    summaries = [metrics.summarise(rng.normal(3, 2, 50), confidence=0.9, num_resamples=300) for _ in range(300)]
    coverage = sum(summary.low <= 3 <= summary.high for summary in summaries) / len(summaries)
    assert 0.84 < coverage < 0.94
    width = np.mean([summary.high - summary.low for summary in summaries])
    assert width == pytest.approx(2 * 1.645 * 2 / math.sqrt(50), rel=0.1)


def test_summaries_are_repeatable_and_refuse_nothing() -> None:
    values = np.arange(10.0)
    assert metrics.summarise(values) == metrics.summarise(values)
    assert metrics.summarise(values).num_examples == 10
    with pytest.raises(ValueError, match="no examples"):
        metrics.summarise(np.array([]))
