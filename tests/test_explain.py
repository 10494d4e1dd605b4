"""A sample's story names its clips, and is checked against them."""

import json
import shutil

import numpy as np
import pytest
import soundfile
from audio import open_dataset, small_config, waveform, write_catalogue
from shard_data import make_data_set

from audiosep.cli import main as audiosep
from audiosep.explain import main
from shards.manifest import load_manifest, seal
from shards.verify import read_sample


@pytest.fixture
def sealed(tmp_path):
    """A sealed data set of three sources to a mixture, each asked for once; its root and its clips."""
    catalogue = write_catalogue(tmp_path / "audio")
    config = small_config(
        tmp_path / "root",
        catalogue,
        mixing={"max_mix_num": 3},
        shards={"targets": "each", "representation": "complex"},
        stft={"window_lengths": [256, 512]},
    )
    dataset = open_dataset(config)
    for index in range(dataset.plan.num_shards):
        dataset.render_shard(index, lambda: None)
    seal(dataset.store)
    return tmp_path / "root", tmp_path / "audio"


@pytest.mark.parametrize("key", ["000000000", "7", "000000023"])
def test_every_sample_can_be_made_again_to_the_last_bit(sealed, capsys, key):
    root, _ = sealed
    assert main([str(root), key]) == 0
    told = capsys.readouterr().out
    assert told.count("is the same to the last bit") == 4
    text = read_sample(root_store(root), load_manifest(root), int(key)).text
    for source in (text["target"], *text["interferers"]):
        assert source["clip"] in told
        assert source["caption"] in told


def root_store(root):
    from shards.storage import open_store

    return open_store(root)


def test_what_one_hears_adds_up(sealed, tmp_path):
    root, _ = sealed
    assert main([str(root), "4", "--listen", str(tmp_path / "out")]) == 0
    parts = {path.stem: soundfile.read(path)[0] for path in (tmp_path / "out").glob("*.wav")}
    assert sorted(parts) == [f"000000004-{name}" for name in ("interferer-1", "interferer-2", "mixture", "target")]
    mixture = parts.pop("000000004-mixture")
    np.testing.assert_allclose(sum(parts.values()), mixture, atol=1e-6)


def test_a_clip_that_changed_is_found(sealed, capsys):
    root, audio = sealed
    target = read_sample(root_store(root), load_manifest(root), 0).text["target"]
    soundfile.write(audio / target["clip"], waveform(99, 8000, 8000), 8000)
    assert main([str(root), "0"]) == 3
    assert "DIFFERS" in capsys.readouterr().out


def test_clips_that_moved_are_asked_for(sealed, tmp_path, capsys):
    root, audio = sealed
    shutil.move(audio, tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"missing: .*audio/clips/\d\.flac: no such file.*--clips FOLDER"):
        main([str(root), "0"])
    assert main([str(root), "0", "--clips", str(tmp_path / "elsewhere")]) == 0
    assert json.loads((root / "origin.json").read_text())["folders"] == [str(audio)]


def test_a_key_that_is_none(sealed):
    with pytest.raises(ValueError, match="samples 0 to 23, not 24"):
        main([str(sealed[0]), "24"])


@pytest.mark.parametrize("command", ["explain", "report", "train"])
def test_a_data_set_of_others_is_named_as_such(tmp_path, command, capsys):
    make_data_set(tmp_path / "other", 3)
    root = str(tmp_path / "other")
    arguments = {
        "explain": [root, "000000001"],
        "report": [root],
        "train": ["--config", "configs/train/default.yaml", "--data.train", root, "--data.valid", root],
    }
    assert audiosep([command, *arguments[command]]) == 2
    expected = f"{root} was not made by audiosep precompute: its spec says nothing of clips, query_encoder, "
    assert expected in capsys.readouterr().err
