"""The same sound is found under other names, formats, rates and gains; different sounds are not taken for the same."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
from audio import write_catalogue

from audiosep.catalogue import read_catalogue
from audiosep.check import fingerprint, main, same_sounds

DEMO = Path(__file__).parent.parent / "data" / "demo"


def add(catalogue: Path, name: str, audio: np.ndarray, sample_rate: int, recording: str = "") -> None:
    soundfile.write(catalogue.parent / name, audio, sample_rate)
    entries = json.loads(catalogue.read_text())["data"]
    entries.append({"wav": name, "caption": name, "recording": recording})
    catalogue.write_text(json.dumps({"data": entries}))


@pytest.mark.parametrize("change", ["format", "rate", "gain", "channels"])
def test_a_disguised_copy_in_another_split_is_a_leak(tmp_path, capsys, change):
    train = write_catalogue(tmp_path / "train", num_clips=5)
    test = write_catalogue(tmp_path / "test", num_clips=1)
    clip = json.loads((DEMO / "train.json").read_text())["data"][7]["wav"]
    audio, sample_rate = soundfile.read(DEMO / clip)
    add(train, "original.flac", audio, sample_rate)
    if change == "format":
        add(test, "copy.ogg", audio, sample_rate)
    elif change == "rate":
        add(test, "copy.wav", soxr.resample(audio, sample_rate, 22050), 22050)
    elif change == "gain":
        add(test, "copy.wav", 0.2 * audio, sample_rate)
    else:
        add(test, "copy.wav", np.stack([audio, audio], axis=1), sample_rate)
    (test.parent / "clips/0.flac").unlink()
    assert main([str(train), str(test)]) == 3
    told = capsys.readouterr().out
    assert f"LEAK: original.flac of {train} sounds like copy" in told
    assert "8 clips, 1 of them not compared; 1 leaks" in told


def test_what_gives_no_sound_is_named_and_no_leak(tmp_path, capsys):
    splits = [write_catalogue(tmp_path / name, 1) for name in ("train", "test")]
    add(splits[0], "zeros.wav", np.zeros(8000), 8000)
    add(splits[1], "quiet.wav", np.full(8000, 0.0005), 8000)
    add(splits[1], "empty.wav", np.zeros(0), 8000)
    (splits[1].parent / "clips/0.flac").write_bytes(b"")
    assert main([str(split) for split in splits]) == 0
    told = capsys.readouterr().out
    for name in ("zeros.wav", "quiet.wav", "empty.wav"):
        assert f"not compared: {name} of " in told
    assert f"not compared: clips/0.flac of {splits[1]} (undecodable: " in told
    assert "5 clips, 4 of them not compared; 0 leaks" in told


def test_one_recording_in_two_splits_is_a_leak(tmp_path, capsys):
    train, test = write_catalogue(tmp_path / "train", 2), write_catalogue(tmp_path / "test", 1)
    rng = np.random.default_rng(0)
    add(train, "start.wav", rng.uniform(-0.1, 0.1, 8000), 8000, "field tape 7")
    add(test, "end.wav", rng.uniform(-0.1, 0.1, 8000), 8000, "field tape 7")
    (test.parent / "clips/0.flac").unlink()
    assert main([str(train), str(test)]) == 3
    assert f"LEAK: recording 'field tape 7' is in {train} and in {test}" in capsys.readouterr().out


def test_the_bundled_splits_do_not_leak_and_its_sounds_differ():
    assert main([str(DEMO / f"{split}.json") for split in ("train", "valid", "test")]) == 0
    catalogue = read_catalogue(str(DEMO / "train.json"), check_files=True)
    prints = [fingerprint(catalogue, number) for number in range(len(catalogue))]
    assert list(same_sounds(prints)) == []
