"""Small folders in the layouts of upstream's benchmarks are read as upstream reads them."""

import csv
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from audiosep import cli, metrics
from audiosep.benchmarks import BENCHMARKS, read_benchmark, upstream_mean
from audiosep.config import plain
from audiosep.queries import QueryConfig, make_encoder
from audiosep.resunet import ResUNetConfig
from audiosep.stft import stft
from audiosep.system import AudioFormat, SeparationSystem, SystemConfig

RATE = 16000


def write_list(path: Path, *rows: tuple) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def write_sound(path: Path, seed: int, scale: float = 0.1, seconds: float = 0.5) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    sound = (scale * np.random.default_rng(seed).standard_normal(round(seconds * RATE))).astype(np.float32)
    soundfile.write(path, sound, RATE, subtype="FLOAT")
    return sound


def make_folder(name: str, root: Path) -> Path:
    """A folder of two queries, with its list where upstream's tree has it: metadata/ beside data/<name>/."""
    audio, metadata = root / "data" / name, root / "metadata"
    if name in ("audiocaps", "clotho", "esc50", "music"):
        more = ("a", "b", "c")[: 3 if name in ("audiocaps", "clotho") else 2]
        rows = [("12", "a dog, barking", *more), ("7", "rain", *more)]
        write_list(metadata / f"{name}_eval.csv", ("idx", "caption", *more), *rows)
        for number, seed in (("12", 0), ("7", 2)):
            write_sound(audio / f"segment-{number}.wav", seed)
            write_sound(audio / f"mixture-{number}.wav", seed + 1)
    elif name == "vggsound":
        rows = [
            (f"id{i}", f"m{i}.wav", f"s{i}.wav", text, "x.wav", "other")
            for i, text in ((0, "a dog, barking"), (2, "rain"))
        ]
        write_list(
            metadata / "vggsound_eval.csv", ("file_id", "mix_wav", "s0_wav", "s0_text", "s1_wav", "s1_text"), *rows
        )
        for seed in (0, 2):
            write_sound(audio / f"s{seed}.wav", seed)
            write_sound(audio / f"m{seed}.wav", seed + 1)
    elif name == "audioset":
        rows = [("0", "/m/1", "a dog, barking"), ("1", "/m/2", "rain")]
        write_list(metadata / "class_labels_indices.csv", ("index", "mid", "display_name"), *rows)
        for number, seed in (("0", 0), ("1", 2)):
            write_sound(audio / f"class_id={number}" / "Yab,c,source.wav", seed)
            write_sound(audio / f"class_id={number}" / "Yab,c,mixture.wav", seed + 1)
    else:
        rows = [("s0", "n0", "-3", "a dog, barking"), ("s2", "n2", "12", "rain")]
        write_list(audio.parent / "lass_synthetic_validation.csv", ("source", "noise", "snr", "query"), *rows)
        for seed in (0, 2):
            write_sound(audio / f"s{seed}.wav", seed)
            write_sound(audio / f"n{seed}.wav", seed + 1)
    return audio


@pytest.mark.parametrize("name", BENCHMARKS)
def test_each_layout_gives_its_captions_mixtures_and_targets(name: str, tmp_path: Path) -> None:
    items = read_benchmark(name, make_folder(name, tmp_path))
    assert [item.caption for item in items] == ["a dog, barking", "rain"]
    assert len({item.key for item in items}) == 2
    assert any(item.kind for item in items) == (name in ("music", "audioset"))
    for item, seed in zip(items, (0, 2), strict=True):
        mixture, target = item.read(RATE)
        assert mixture.dtype == target.dtype == np.float32
        np.testing.assert_array_equal(target, write_sound(tmp_path / "again.wav", seed))
        other = write_sound(tmp_path / "again.wav", seed + 1)
        if name == "dcase2024":
            noise = mixture - target
            ratio_db = 10 * np.log10(np.sum(target**2) / np.sum(noise**2))
            assert ratio_db == pytest.approx(item.snr_db, abs=1e-3)
            assert np.corrcoef(noise, other)[0, 1] == pytest.approx(1, abs=1e-5)
        else:
            np.testing.assert_array_equal(mixture, other)


def test_other_sample_rates_are_resampled(tmp_path: Path) -> None:
    item = read_benchmark("esc50", make_folder("esc50", tmp_path))[0]
    assert item.read(32000)[0].shape == (RATE,)


def test_loud_dcase_mixtures_are_scaled_with_their_targets(tmp_path: Path) -> None:
    write_list(tmp_path / "lass_synthetic_validation.csv", ("source", "noise", "snr", "query"), ("s", "n", "0", "rain"))
    source = write_sound(tmp_path / "s.wav", 0, scale=0.5)
    write_sound(tmp_path / "n.wav", 1)
    mixture, target = read_benchmark("dcase2024", tmp_path)[0].read(RATE)
    assert np.abs(mixture).max() == pytest.approx(0.9, rel=1e-6)
    scale = target[0] / source[0]
    np.testing.assert_allclose(target, scale * source, rtol=1e-6)
    assert np.sum(target**2) == pytest.approx(np.sum((mixture - target) ** 2), rel=1e-4)


def test_at_most_ten_examples_of_an_audioset_class(tmp_path: Path) -> None:
    write_list(tmp_path / "class_labels_indices.csv", ("index", "mid", "display_name"), ("3", "/m/1", "rain"))
    for number in range(12):
        for role in ("source", "mixture"):
            write_sound(tmp_path / "class_id=3" / f"clip{number:02d},{role}.wav", number, seconds=0.01)
    assert [item.key for item in read_benchmark("audioset", tmp_path)] == [f"class_id=3/clip{n:02d}" for n in range(10)]


def test_what_is_missing_or_does_not_fit_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"musicnet.*audiocaps, clotho"):
        read_benchmark("musicnet", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"clotho_eval.csv"):
        read_benchmark("clotho", tmp_path)
    folder = make_folder("clotho", tmp_path)
    (folder / "mixture-7.wav").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 files.*mixture-7\.wav"):
        read_benchmark("clotho", folder)
    write_sound(folder / "mixture-7.wav", 0, seconds=0.4)
    with pytest.raises(ValueError, match=r"mixture-7\.wav has 6400 samples.*segment-7\.wav 8000"):
        read_benchmark("clotho", folder)[1].read(RATE)


def test_upstream_means() -> None:
    values, kinds = [1.0, 2.0, 9.0, 5.0], ["a", "a", "a", "b"]
    assert upstream_mean("esc50", values, [""] * 4) == 4.25
    assert upstream_mean("music", values, kinds) == 4.5
    assert upstream_mean("audioset", values, kinds) == 3.5


@pytest.mark.parametrize("name", ["esc50", "dcase2024"])
def test_evaluate_reads_a_benchmark_whole_and_averages_as_upstream(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_folder(name, tmp_path)
    model = ResUNetConfig(window_lengths=(256,), widths=(2, 2), condition_size=384)
    audio = AudioFormat(RATE, RATE // 4, 80, make_encoder(QueryConfig()).identity)  # segments shorter than the audio
    system = SeparationSystem(SystemConfig(model=model, window=256), audio).eval()
    content = {"config": plain(system.config), "audio": asdict(audio), "state_dict": system.state_dict()}
    torch.save(content, tmp_path / "last.ckpt")
    words = [
        "--checkpoint",
        tmp_path / "last.ckpt",
        "--benchmark",
        name,
        "--data",
        folder,
        "--output",
        tmp_path / "out",
    ]
    assert cli.main(["evaluate", "--accelerator", "cpu", *map(str, words)]) == 0
    results = json.loads((tmp_path / "out" / "metrics.json").read_text())
    sounds = [[torch.from_numpy(sound)[None] for sound in item.read(RATE)] for item in read_benchmark(name, folder)]
    half = [metrics.sdr(mixture / 2, target).item() for mixture, target in sounds]
    assert results["half mask"]["overall"]["sdr"]["mean"] == pytest.approx(np.mean(half), abs=1e-3)
    condition = torch.from_numpy(make_encoder(QueryConfig()).encode(["a dog, barking", "rain"]))
    estimates = [
        system.separate({256: stft(mixture[None], 256, 80)}, condition[i : i + 1], mixture.shape[-1])[0]
        for i, (mixture, _) in enumerate(sounds)
    ]
    expected = [metrics.si_sdri(e, t, m).item() for e, (m, t) in zip(estimates, sounds, strict=True)]
    assert results["model"]["overall"]["upstream_mean"]["si_sdri"] == pytest.approx(np.mean(expected), abs=1e-3)
    assert f"SI-SDRi {np.mean(expected):.2f}" in capsys.readouterr().out
