"""The `shards` command as a user types it."""

import io
import json
import subprocess
import sys
import tarfile
import threading
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import xxhash
from audio import write_catalogue, write_config
from shard_data import make_samples, tree, write_one, write_set

from audiosep.precompute import main as precompute
from shards.cli import main
from shards.manifest import load_manifest, seal
from shards.storage import open_store


@pytest.fixture
def root(tmp_path):
    store = open_store(tmp_path / "root")
    write_set(store, num_samples=10, samples_per_shard=4)
    seal(store)
    return tmp_path / "root"


def test_the_command_starts_quickly_and_explains_itself(root):
    command = [sys.executable, "-X", "importtime", "-m", "shards.cli", "info", str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "10 samples in 3 shards" in done.stdout
    assert not {"torch", "audiosep", "obstore"} & {line.split("|")[-1].strip() for line in done.stderr.splitlines()}


def test_help_and_mistakes(root, capsys):
    assert main([]) == main(["--help"]) == 0
    assert "verify" in capsys.readouterr().out
    for words, message in (
        (["weave", "x"], "no such command; there are"),
        (["info", str(root / "elsewhere")], "no data set was begun there"),
        (["show", str(root), "10"], "has samples 0 to 9, not 10"),
        (["cat", str(root), "1", "text"], "has no text; it has json, stft_mixture.2048.npy"),
        (["verify", str(root), "--shards", "1;2"], "no shard number or range"),
        (["info", str(root), "--options", '{"endpiont": "x"}'], "endpiont"),
        (["info", str(root), "--options", '{"aws_secret_access_key": "hidden"}'], "aws_secret_access_key"),
        (["info", str(root), "--options", "{hidden"], "Invalid JSON"),
        (["copy", str(root), "x", "--target-options", '{"aws_secret_access_key": "hidden"}'], "aws_secret_access_key"),
    ):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error
        assert "hidden" not in error


def test_ctrl_c_ends_a_command_with_one_line_and_soon(root, monkeypatch, capsys):
    checked, over = [], threading.Event()

    def interrupted(*arguments):
        checked.append("begun")
        if len(checked) > 1:
            over.wait(20)  # for bytes from a slow link
            checked.append("ended")
        raise KeyboardInterrupt

    monkeypatch.setattr("shards.verify.check_shard", interrupted)
    assert main(["verify", str(root), "--threads", "2"]) == 130
    assert capsys.readouterr().err == "shards verify: interrupted\n"
    assert "ended" not in checked
    over.set()


def test_sealing_says_what_is_missing(tmp_path, capsys):
    store = open_store(tmp_path)
    plan = write_set(store)
    (tmp_path / "shard-000001.json").unlink()
    assert main(["seal", str(tmp_path)]) == 3
    assert "shard-000001: not there" in capsys.readouterr().err
    assert main(["info", str(tmp_path)]) == 0
    assert "not sealed, 2 of 3 shards are complete" in capsys.readouterr().out
    assert main(["info", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["missing_shards"] == "1"
    write_one(store, plan, 1)
    assert main(["seal", str(tmp_path), "--threads", "2"]) == 0
    assert "10 samples in 3 shards" in capsys.readouterr().out


def test_info_and_show_print_what_was_written(root, capsys):
    assert main(["info", str(root), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["num_samples"], facts["num_shards"], facts["spec"]) == (10, 3, {"seed": 0})
    assert facts["fields"][2] == {"name": "condition", "dtype": "float16", "shape": [3]}
    assert main(["show", str(root), "9"]) == 0
    shown = capsys.readouterr().out
    assert "000000009, row 1 of shard-000002.tar" in shown
    assert "ééééééééé" in shown
    assert "stft_mixture.2048: float16[1, 7, 5]" in shown


def test_cat_gives_the_bytes_that_are_in_the_shard(root):
    def cat(*words):
        command = [sys.executable, "-m", "shards.cli", "cat", str(root), *words]
        return subprocess.run(command, capture_output=True, check=True).stdout

    sample = next(make_samples([6]))
    with tarfile.open(fileobj=io.BytesIO(cat("6"))) as tar:
        assert tar.getnames()[0] == "000000006.json"
        assert len(tar.getnames()) == 4
    assert cat("6")[:-1024] in (root / "shard-000001.tar").read_bytes()
    assert json.loads(cat("6", "json")) == sample.text
    np.testing.assert_array_equal(np.load(io.BytesIO(cat("6", "condition.npy"))), sample.arrays["condition"])


def test_verify_repairs_only_the_bad_shards(tmp_path, capfd):
    catalogue = write_catalogue(tmp_path / "audio", num_clips=12)
    root = tmp_path / "root"
    config = write_config(tmp_path / "config.yaml", root, catalogue, shards={"samples_per_shard": 3})
    assert precompute(["--config", config]) == 0
    assert main(["seal", str(root)]) == 0
    assert main(["verify", str(root)]) == 0
    assert "4 of 4 shards are good" in capfd.readouterr().out
    expected = tree(root)
    data = bytearray(expected["shard-000002.tar"])
    data[5000] ^= 4
    (root / "shard-000002.tar").write_bytes(data)
    (root / "shard-000000.idx.npy").unlink()
    untouched = (root / "shard-000001.tar").stat().st_mtime_ns
    assert main(["verify", str(root)]) == 3
    printed = capfd.readouterr()
    assert "BAD shard-000002: sample 0, at byte 0: its bytes have the checksum" in printed.out
    assert "BAD shard-000000: " in printed.out
    assert "--shards 0,2 --repair CONFIG" in printed.err
    damaged = tree(root)
    assert main(["verify", str(root), "--repair", write_config(tmp_path / "b.yaml", root, catalogue, seed=7)]) == 2
    assert "was begun with another configuration" in capfd.readouterr().err
    assert tree(root) == damaged
    assert main(["verify", str(root), "--repair", config]) == 0
    assert "2 of 2 shards are good" in capfd.readouterr().out
    assert tree(root) == expected
    assert (root / "shard-000001.tar").stat().st_mtime_ns == untouched
    for clip in (tmp_path / "audio" / "clips").iterdir():
        clip.unlink()
    (root / "shard-000003.tar").write_bytes(b"")
    assert main(["verify", str(root), "--repair", config]) != 0
    assert main(["verify", str(root), "--shards", "0-2"]) == 0


def test_the_code_in_the_format_page_reads_a_data_set(root, monkeypatch, capsys):
    page = (Path(__file__).parent.parent / "docs" / "format.md").read_text()
    monkeypatch.chdir(root)
    single, whole = (block.partition("```")[0] for block in page.split("```python\n")[1:])
    found: dict = {}
    exec(single, found)
    sample = next(make_samples([5]))
    assert found["text"] == sample.text
    for name, array in sample.arrays.items():
        np.testing.assert_array_equal(found["tensors"][name], array, strict=True)
    exec(whole, {})
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [f"{i:09d}" for i in range(10)]


def test_digests_are_what_the_format_page_says(root):
    manifest = json.loads((root / "manifest.json").read_bytes())
    for number, name in enumerate(f"shard-{index:06d}" for index in range(3)):
        record = json.loads((root / f"{name}.json").read_bytes())
        assert record["spec_digest"] == sha256((root / "spec.json").read_bytes()).hexdigest()[:32]
        assert manifest["plan"] == json.loads((root / "spec.json").read_bytes())
        for file, column in ((f"{name}.tar", "checksum"), (f"{name}.idx.npy", "index_checksum")):
            digits = xxhash.xxh3_64((root / file).read_bytes(), seed=0).hexdigest()
            assert digits == record[column] == manifest["shards"][f"{column}s"][16 * number : 16 * number + 16]
    assert load_manifest(root).digest == sha256((root / "manifest.json").read_bytes()).hexdigest()[:32]
