"""A crop is the same piece that decoding everything gives; what cannot be used is rejected for the right reason."""

import numpy as np
import pytest
import soundfile
import soxr
from audio import waveform, write_bad

from audiosep.catalogue import Clip
from audiosep.clips import ClipConfig, Rejection, read_crop

CONFIG = ClipConfig(segment_seconds=1.0, min_clip_seconds=0.5)


def clip_of(path, byte_range=None):
    return Clip(0, 0, str(path), str(path), ("a sound",), "", "", "", "", "", byte_range)


@pytest.mark.parametrize("fraction", [0.0, 0.37, 0.999999])
@pytest.mark.parametrize("sample_rate", [8000, 22050, 32000, 44100, 48000, 96000])
@pytest.mark.parametrize("suffix", ["flac", "wav", "ogg", "mp3"])
def test_a_crop_equals_the_piece_of_the_whole_clip(tmp_path, suffix, sample_rate, fraction):
    if suffix == "mp3" and sample_rate == 96000:
        sample_rate = 24000  # MP3 goes up to 48 kHz
    path = tmp_path / f"clip.{suffix}"
    soundfile.write(path, waveform(1, 3 * sample_rate, sample_rate), sample_rate)
    whole, _ = soundfile.read(path, dtype="float32")
    whole = soxr.resample(whole, sample_rate, 32000)
    crop, offset = read_crop(clip_of(path), fraction, CONFIG)
    assert crop.shape == (32000,)
    assert crop.dtype == np.float32
    assert offset == pytest.approx(fraction * (3 * 32000 - 32000), abs=40 if suffix == "mp3" else 2)
    tolerance = 1e-3 if suffix == "mp3" else 2e-5  # an MP3 frame depends a little on those decoded before it
    inside = slice(200, -200)  # at the clip's very ends the filter sees other neighbours
    np.testing.assert_allclose(crop[inside], whole[offset : offset + 32000][inside], atol=tolerance)


@pytest.mark.parametrize("channels", [2, 6])
def test_channels_are_averaged(tmp_path, channels):
    audio = waveform(2, 64000, 32000, channels)
    soundfile.write(tmp_path / "a.wav", audio, 32000, subtype="FLOAT")
    crop, offset = read_crop(clip_of(tmp_path / "a.wav"), 0.5, CONFIG)
    np.testing.assert_allclose(crop, audio.mean(axis=1)[offset : offset + 32000], atol=1e-6)


def test_short_clips_are_padded_with_zeros(tmp_path):
    audio = waveform(3, 20000, 32000)
    soundfile.write(tmp_path / "a.wav", audio, 32000, subtype="FLOAT")
    crop, offset = read_crop(clip_of(tmp_path / "a.wav"), 0.9, CONFIG)
    assert offset == 0
    np.testing.assert_array_equal(crop[:20000], audio)
    assert not crop[20000:].any()


def test_crops_come_from_everywhere(tmp_path):
    soundfile.write(tmp_path / "a.wav", waveform(4, 32000 + 9, 32000), 32000)
    offsets = {read_crop(clip_of(tmp_path / "a.wav"), fraction, CONFIG)[1] for fraction in np.linspace(0, 0.9999, 100)}
    assert offsets == set(range(10))


def test_a_clip_inside_a_larger_file(tmp_path):
    soundfile.write(tmp_path / "a.flac", waveform(5, 40000, 32000), 32000)
    data = (tmp_path / "a.flac").read_bytes()
    (tmp_path / "all.bin").write_bytes(b"x" * 777 + data + b"y" * 99)
    inside = read_crop(clip_of(tmp_path / "all.bin", (777, len(data))), 0.4, CONFIG)
    alone = read_crop(clip_of(tmp_path / "a.flac"), 0.4, CONFIG)
    assert inside[1] == alone[1]
    np.testing.assert_array_equal(inside[0], alone[0])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing", "missing"),
        ("text", "undecodable"),
        ("empty", "undecodable"),
        ("header", "undecodable"),
        ("folder", "undecodable"),
        ("flac cut", "truncated|undecodable"),
        ("nan", "not finite"),
        ("infinite", "not finite"),
        ("silence", "silent"),
        ("0.3 s", "short"),
    ],
)
def test_unusable_clips_are_rejected_with_their_reason(tmp_path, name, reason):
    path = tmp_path / "bad ünï.wav"
    write_bad(path, name)
    with pytest.raises(Rejection, match=f"^({reason}): .") as caught:
        read_crop(clip_of(path), 0.9, CONFIG)
    assert str(tmp_path) not in caught.value.detail  # records must not depend on where the clips are


def test_trouble_with_the_storage_is_no_property_of_the_clip(tmp_path, monkeypatch):
    def broken(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("os.open", broken)
    with pytest.raises(OSError, match="Input/output error"):
        read_crop(clip_of(tmp_path / "a.wav"), 0, CONFIG)


def test_the_upstream_resampler_works_or_says_why_not(tmp_path):
    soundfile.write(tmp_path / "a.wav", waveform(7, 60000, 44100), 44100)
    config = ClipConfig(segment_seconds=1.0, resampler="torchaudio")
    try:
        import torchaudio
    except (ImportError, OSError):
        with pytest.raises(ValueError, match="Use soxr"):
            read_crop(clip_of(tmp_path / "a.wav"), 0.5, config)
        return
    import torch

    whole, _ = soundfile.read(tmp_path / "a.wav", dtype="float32")
    expected = torchaudio.functional.resample(torch.from_numpy(whole), 44100, 32000).numpy()
    crop, offset = read_crop(clip_of(tmp_path / "a.wav"), 0.5, config)
    np.testing.assert_allclose(crop, expected[offset : offset + 32000], atol=1e-5)
