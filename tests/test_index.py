"""Clips inside tars, here and in a bucket, give what they give as files."""

import io
import json
import tarfile

import numpy as np
import pytest
import soundfile
import webdataset
from audio import waveform, write_config
from servers import BUCKET

from audiosep.catalogue import read_catalogue
from audiosep.clips import ClipConfig, read_crop
from audiosep.explain import main as explain
from audiosep.index import main
from audiosep.precompute import main as precompute
from shards.manifest import seal
from shards.storage import open_store

CONFIG = ClipConfig(segment_seconds=1.0)


def flac(seed):
    buffer = io.BytesIO()
    soundfile.write(buffer, waveform(seed, 40000, 32000), 32000, format="FLAC")
    return buffer.getvalue()


def write_tars(folder):
    """Two tars by webdataset's own writer: LAION's JSON in one, text files in the other."""
    with webdataset.TarWriter(str(folder / "a-00.tar")) as sink:
        for i in range(3):
            described = {"text": [f"first {i}", f"second {i}"], "original_data": {"license": "CC0"}}
            sink.write({"__key__": f"clip{i}", "flac": flac(i), "json": described})
    with webdataset.TarWriter(str(folder / "a-01.tar")) as sink:
        for i in range(3, 5):
            sink.write({"__key__": f"sub/clip{i}", "flac": flac(i), "txt": f"sound {i}\n"})
        sink.write({"__key__": "mute", "flac": flac(9)})
        sink.write({"__key__": "unknown", "m4a": flac(9), "txt": "of another kind"})


def test_members_of_tars_become_clips(tmp_path, capsys):
    write_tars(tmp_path)
    assert main([str(tmp_path / "a-{00..01}.tar"), "-o", str(tmp_path / "catalogue.jsonl")]) == 0
    assert "5 clips of 2 tars; left out: 1 without a caption, 1 keys without audio (flac, " in capsys.readouterr().out
    catalogue = read_catalogue(str(tmp_path / "catalogue.jsonl"), check_files=True)
    assert [catalogue.clip(i).captions[0] for i in range(5)] == ["first 0", "first 1", "first 2", "sound 3", "sound 4"]
    assert catalogue.clip(0).captions == ("first 0", "second 0")
    assert catalogue.clip(0).licence == "CC0"
    assert catalogue.clip(4).path == "a-01.tar#sub/clip4.flac"
    for i in range(5):
        (tmp_path / "alone.flac").write_bytes(flac(i))
        expected, _ = soundfile.read(tmp_path / "alone.flac", dtype="float32")
        crop, offset = read_crop(catalogue.clip(i), 0.5, CONFIG)
        np.testing.assert_array_equal(crop, expected[offset : offset + 32000])


def test_from_tars_in_a_bucket_into_a_bucket(tmp_path, s3_server, capsys):
    """The whole way without a local file but the catalogue; the shards are those that local tars give."""
    write_tars(tmp_path)
    bucket, storage = f"s3://{BUCKET}/{tmp_path.name}", {"endpoint": s3_server.endpoint, "region": "us-east-1"}
    store = open_store(bucket, s3_server.options)
    for name in ("a-00.tar", "a-01.tar"):
        store.write(f"audio/{name}", (tmp_path / name).read_bytes())
    here, there = tmp_path / "here.jsonl", tmp_path / "there.jsonl"
    assert main([str(tmp_path / "a-{00..01}.tar"), "-o", str(here)]) == 0
    assert main([f"{bucket}/audio/a-{{00..01}}.tar", "-o", str(there), "--options", json.dumps(storage)]) == 0
    for catalogue, root in ((here, str(tmp_path / "root")), (there, f"{bucket}/root")):
        config = write_config(tmp_path / "config.yaml", root, catalogue, storage=storage)
        assert precompute(["--config", config]) == 0
    far = io.BytesIO(store.read("root/shard-000000.tar"))
    with tarfile.open(tmp_path / "root/shard-000000.tar") as local, tarfile.open(fileobj=far) as remote:
        for one, other in zip(local, remote, strict=True):
            if one.name.endswith(".npy"):
                assert local.extractfile(one).read() == remote.extractfile(other).read()
    seal(open_store(f"{bucket}/root", s3_server.options))
    assert explain([f"{bucket}/root", "2", "--options", json.dumps(storage)]) == 0
    assert "is the same to the last bit" in capsys.readouterr().out


def test_a_damaged_tar_is_named(tmp_path):
    write_tars(tmp_path)
    data = (tmp_path / "a-00.tar").read_bytes()
    (tmp_path / "a-00.tar").write_bytes(data[: len(data) // 2 + 100])
    with pytest.raises(ValueError, match=r"a-00\.tar: .*byte"):
        main([str(tmp_path / "a-00.tar"), "-o", str(tmp_path / "catalogue.jsonl")])
    with pytest.raises(FileNotFoundError, match=r"none\.tar does not exist"):
        main([str(tmp_path / "none.tar"), "-o", str(tmp_path / "catalogue.jsonl")])


@pytest.mark.parametrize(("suffix", "data"), [("json", b"[1]"), ("json", b'{"text": '), ("txt", b"caf\xe9")])
def test_what_describes_no_clip_is_named_and_leaves_no_catalogue(tmp_path, suffix, data):
    write_tars(tmp_path)
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        member = tarfile.TarInfo(f"x.{suffix}")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    with pytest.raises(ValueError, match=rf"b\.tar: x\.{suffix}: "):
        main([str(tmp_path / "a-00.tar"), str(tmp_path / "b.tar"), "-o", str(tmp_path / "catalogue.jsonl")])
    assert not (tmp_path / "catalogue.jsonl").exists()


def test_old_tars_by_tarfile_are_read_too(tmp_path):
    with tarfile.open(tmp_path / "old.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        long = "x" * 120
        for name, data in ((f"{long}.wav", flac(1)), (f"{long}.json", json.dumps({"caption": "a sound"}).encode())):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    assert main([str(tmp_path / "old.tar"), "-o", str(tmp_path / "catalogue.jsonl")]) == 0
    catalogue = read_catalogue(str(tmp_path / "catalogue.jsonl"), check_files=True)
    assert read_crop(catalogue.clip(0), 0, CONFIG)[0].any()
