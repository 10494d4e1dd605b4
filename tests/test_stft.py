"""The STFT equals torch's and upstream's, the fast path equals the plain one, and istft inverts it."""

from pathlib import Path

import numpy as np
import pytest
import torch

from audiosep.stft import StftConfig, Transform, hann_window, istft, num_frames, stft, stored_shape

GOLDEN = np.load(Path(__file__).parent / "golden" / "golden_seed0.npz")


def noise(length: int, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(length)).astype(np.float32)


def direct_stft(waveform: np.ndarray, window_length: int, hop_length: int) -> np.ndarray:
    """[T, F] by definition, in float64."""
    padded = np.pad(waveform.astype(np.float64), window_length // 2, mode="reflect")
    window = 0.5 * (1 - np.cos(2 * np.pi * np.arange(window_length) / window_length))
    frames = [padded[i : i + window_length] * window for i in range(0, len(waveform) + 1, hop_length)]
    return np.fft.rfft(frames)


@pytest.mark.parametrize(
    ("window_length", "hop_length", "length"), [(2048, 320, 16000), (512, 100, 7777), (64, 64, 33)]
)
def test_both_paths_equal_the_definition(window_length, hop_length, length):
    waveform = noise(length)
    expected = direct_stft(waveform, window_length, hop_length)
    assert expected.shape == (num_frames(length, hop_length), window_length // 2 + 1)
    np.testing.assert_allclose(stft(torch.from_numpy(waveform), window_length, hop_length), expected, atol=2e-5)
    for representation in ("magnitude", "complex"):
        out = torch.empty(stored_shape(length, window_length, hop_length, representation))
        Transform(length, window_length, hop_length, representation)(waveform, out)
        if representation == "magnitude":
            np.testing.assert_allclose(out[0], np.maximum(np.abs(expected), 1e-5), atol=2e-5)
        else:
            np.testing.assert_allclose(torch.complex(out[0, 0], out[1, 0]), expected, atol=2e-5)


def test_magnitudes_equal_upstreams():
    waveform = GOLDEN["mixture"][0, 0]
    out = torch.empty(stored_shape(len(waveform), 2048, 320, "magnitude"))
    Transform(len(waveform), 2048, 320, "magnitude")(waveform, out)
    np.testing.assert_allclose(out, GOLDEN["magnitude"][0], rtol=1e-3, atol=3e-4)
    spectrogram = stft(torch.from_numpy(waveform), 2048, 320)
    loud = GOLDEN["magnitude"][0, 0] > 0.1
    np.testing.assert_allclose(torch.cos(spectrogram.angle())[loud], GOLDEN["cosine"][0, 0][loud], atol=5e-3)
    np.testing.assert_allclose(torch.sin(spectrogram.angle())[loud], GOLDEN["sine"][0, 0][loud], atol=5e-3)


def test_a_transform_remembers_nothing_of_the_last_waveform():
    transform = Transform(8000, 1024, 320, "magnitude")
    once, again = torch.empty(2, 1, 26, 513, dtype=torch.float16)
    transform(noise(8000, 1), once)
    transform(noise(8000, 2), again)
    transform(noise(8000, 1), again)
    assert torch.equal(once, again)


@pytest.mark.parametrize("shape", [(32000,), (2, 1, 8001)])
def test_istft_inverts_stft(shape):
    waveform = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    again = istft(stft(waveform, 2048, 320), 2048, 320, shape[-1])
    torch.testing.assert_close(again, waveform, atol=1e-5, rtol=0)


def test_the_window_is_periodic():
    assert hann_window(8)[0] == 0
    np.testing.assert_allclose(hann_window(8)[1:], hann_window(8)[:0:-1], atol=1e-7)
    np.testing.assert_allclose(hann_window(2048), torch.hann_window(2048), atol=1e-6)


@pytest.mark.parametrize(("windows", "hop_length"), [((512, 1024), 512), ((512,), 2000), ((512, 512), 128)])
def test_frames_overlap_and_windows_differ(windows, hop_length):
    with pytest.raises(ValueError, match=r"audio between two frames|stands twice"):
        StftConfig(windows, hop_length)


def test_a_waveform_shorter_than_half_a_window_is_refused():
    with pytest.raises(ValueError, match="1024 samples are too few for a window of 2048"):
        Transform(1024, 2048, 320, "magnitude")
