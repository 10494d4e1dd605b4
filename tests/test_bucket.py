"""The whole way with everything in a bucket on a real S3 server: clips, shards, checkpoints, figures."""

import io
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from audio import small_settings, write_catalogue
from servers import BUCKET, S3Server
from shard_data import content, make_data_set
from training_data import assert_equal, config_of, make_shards, settings

from audiosep import cli
from audiosep.checkpoints import read_checkpoint
from audiosep.train import STOPPED, train
from shards import cli as shards_cli
from shards.loader import ShardLoader
from shards.storage import open_store
from shards.store import StorageConfig

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A server of this test's own, named by the environment as on a cluster."""
    (tmp_path / "server").mkdir()
    server = S3Server(tmp_path / "server")
    server.start()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    yield server
    server.kill()  # it has nothing to put away, and takes long to end by itself


def catalogue_in(bucket: str, folder: Path) -> Path:
    """A catalogue whose clips are objects of the bucket."""
    file = write_catalogue(folder)
    catalogue, clips = json.loads(file.read_text()), open_store(bucket)
    for entry in catalogue["data"]:
        clips.write(entry["wav"], (folder / entry["wav"]).read_bytes())
        entry["wav"] = f"{bucket}/{entry['wav']}"
    file.write_text(json.dumps(catalogue))
    return file


def run(command: str, config: dict[str, Any], file: Path, *words: str) -> None:
    file.write_text(yaml.safe_dump(config))
    assert cli.main([command, "--config", str(file), *words]) == 0


def test_precompute_seal_verify_train_evaluate_separate_in_a_bucket(
    server: S3Server, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket, local = f"s3://{BUCKET}/run", tmp_path / "run"
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    catalogue = catalogue_in(f"s3://{BUCKET}/sounds", tmp_path / "sounds")
    kinds = {"train": ("magnitude", 24), "valid": ("complex", 8)}
    for split, (representation, num_samples) in kinds.items():
        shards = {"representation": representation, "num_samples": num_samples}
        for root in (bucket, local):
            config = small_settings(Path(), catalogue, shards=shards) | {"root": f"{root}/{split}"}
            config["queries"] = {"encoder": "minilm"}
            run("precompute", config, tmp_path / "precompute.yaml")
            assert shards_cli.main(["seal", f"{root}/{split}"]) == 0
            assert shards_cli.main(["verify", f"{root}/{split}"]) == 0
    for command in ("info", "show", "cat"):
        words = [] if command == "info" else ["000000003"]
        assert shards_cli.main([command, f"{bucket}/train", *words]) == 0

    system = {"model": {"window_lengths": [256], "widths": [4, 8], "condition_size": 384}, "window": 256}
    trainer = {"accelerator": "cpu", "devices": 1, "max_steps": 8, "validate_steps": 4, "deterministic": True}
    clip = next((tmp_path / "sounds").rglob("*.flac"))
    for root, logs in ((bucket, ""), (local, str(tmp_path / "logs"))):
        data = {"train": f"{root}/train", "valid": f"{root}/valid", "loader": {"batch_size": 4}}
        training = {"root": f"{root}/model", "data": data, "system": system, "trainer": trainer, "logs": logs}
        run("train", training, tmp_path / "train.yaml")
        checkpoint = {"checkpoint": f"{root}/model/checkpoints/best.ckpt", "accelerator": "cpu"}
        evaluation = {"shards": f"{root}/valid", "output": f"{root}/metrics"}
        run("evaluate", checkpoint | evaluation, tmp_path / "evaluate.yaml")
        separation = {"query": "a dog barks", "output": f"{root}/estimate.wav"}
        run("separate", checkpoint | separation, tmp_path / "separate.yaml", str(clip))
    tree = content(open_store(bucket))
    checkpoints = [name for name in tree if name.endswith(".ckpt")]
    assert checkpoints == ["model/checkpoints/best.ckpt", "model/checkpoints/last.ckpt"]
    assert {"metrics/metrics.json", "metrics/metrics.csv", "estimate.wav"} <= tree.keys()
    tree |= {name: without_clock(f"{bucket}/{name}") for name in checkpoints}
    assert tree == content(open_store(local)) | {name: without_clock(local / name) for name in checkpoints}
    assert json.loads(tree["metrics/metrics.json"])["model"]["overall"]["num_samples"] == 8
    assert {path.parent for path in here.rglob("*") if path.is_file()} == {here / "runs/model/logs"}

    secret = os.environ["AWS_SECRET_ACCESS_KEY"]
    written = [path for path in tmp_path.rglob("*") if path.is_file() and tmp_path / "server" not in path.parents]
    assert all(secret.encode() not in path.read_bytes() for path in written)
    assert all(secret.encode() not in data for data in content(open_store(bucket)).values())
    assert secret not in "".join(capfd.readouterr())


def without_clock(checkpoint: str | Path) -> bytes:
    """A checkpoint's bytes, but for the seconds that training took."""
    state = read_checkpoint(checkpoint)
    state["callbacks"]["LastCheckpoint"]["seconds"] = 0
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def test_training_goes_on_in_the_bucket_after_a_kill_an_outage_and_through_a_restart_of_the_server(
    server: S3Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bucket, data = f"s3://{BUCKET}/killed-training", tmp_path / "data"
    make_shards(data / "train", 100)
    make_shards(data / "valid", 10, "complex")
    for split in ("train", "valid"):
        assert shards_cli.main(["copy", f"{data}/{split}", f"{bucket}/{split}"]) == 0
    limits = {"max_epochs": 10, "checkpoint_steps": 7, "validate_steps": 7, "ema_decay": 0.9}
    assert train(config_of(settings(tmp_path / "whole", data / "train", data / "valid", **limits))) == 0

    config = settings(Path("model"), Path("train"), Path("valid"), **limits)
    config |= {"root": f"{bucket}/model"}
    config["data"] |= {"train": f"{bucket}/train", "valid": f"{bucket}/valid", "ledger": "ledger"}
    config["data"]["loader"]["prefetch_bytes"] = 1  # reading is at most a batch ahead
    here = tmp_path / "here"
    here.mkdir()
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "audiosep.cli", "train", "--config", str(tmp_path / "train.yaml")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}

    def start(*words: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*command, *words], cwd=here, env=environment)

    def wait_for_batches(number: int, process: subprocess.Popen[bytes]) -> None:
        ledger = here / "ledger/rank-00000.jsonl"
        while not ledger.exists() or ledger.read_bytes().count(b'"keys"') < number:
            assert process.poll() is None, "it ended by itself"
            time.sleep(0.002)

    killed = start()
    wait_for_batches(40, killed)
    killed.kill()
    killed.wait()
    impatient = start("--data.storage.retry_seconds", "1")
    wait_for_batches(60, impatient)
    server.kill()
    assert impatient.wait(60) == STOPPED
    for restart, status in (("0", 2), ("1", STOPPED)):  # the outage lasts
        assert start("--data.storage.retry_seconds", "1", "--restart", restart).wait(60) == status
    server.start()
    process = start()
    wait_for_batches(80, process)
    server.kill()
    time.sleep(1)
    server.start()
    assert process.wait(120) == 0
    messages = capfd.readouterr().err
    assert messages.count("Going on from s3://") == 2
    assert "The same command goes on from the last checkpoint" in messages

    assert shards_cli.main(["audit", str(here / "ledger")]) == 0
    audit = capfd.readouterr().out
    assert audit.count("96 of 100 samples served exactly once, 4 left out at the end") == 10
    for name in ("last.ckpt", "best.ckpt"):
        one, other = (read_checkpoint(f"{root}/checkpoints/{name}") for root in (f"{bucket}/model", tmp_path / "whole"))
        assert one["global_step"] == other["global_step"]
        assert_equal(one["state_dict"], other["state_dict"])
    assert {path.relative_to(here).parts[0] for path in here.iterdir()} == {"ledger", "runs"}
    assert {path.parent for path in here.glob("runs/**/*") if path.is_file()} == {here / "runs/model/logs"}


def test_a_place_that_takes_no_checkpoint_is_told_before_training(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_shards(tmp_path / "train", 20)
    config = settings(tmp_path, tmp_path / "train") | {"root": f"s3://{BUCKET}/refused", "logs": str(tmp_path / "logs")}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(config))
    words = ["train", "--config", str(tmp_path / "train.yaml")]
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another-secret")
    assert cli.main(words) == 2
    message = capsys.readouterr().err
    assert f"s3://{BUCKET}/refused/checkpoints" in message
    assert "403 Forbidden" in message
    assert "another-secret" not in message
    assert not (tmp_path / "logs").exists()
    assert cli.main([*words, "--logs", f"s3://{BUCKET}/logs"]) == 2
    assert "name a local folder" in capsys.readouterr().err


def test_the_server_restarts_in_the_middle_of_an_epoch(server: S3Server, tmp_path: Path) -> None:
    make_data_set(tmp_path / "set", 200, samples_per_shard=10)
    root = f"s3://{BUCKET}/restarted"
    assert shards_cli.main(["copy", str(tmp_path / "set"), root]) == 0
    keys: list[str] = []
    for step, batch in enumerate(ShardLoader(root, batch_size=4, prefetch_bytes=1)):
        keys += batch.keys
        if step == 10:
            server.kill()
            restart = threading.Timer(1.0, server.start)
            restart.start()
    restart.join()
    assert sorted(keys) == [f"{index:09d}" for index in range(200)]


def test_killed_precompute_gives_the_same_objects_and_leaves_no_uploads(server: S3Server, tmp_path: Path) -> None:
    catalogue, bucket = write_catalogue(tmp_path / "sounds"), f"s3://{BUCKET}/killed"
    config = small_settings(tmp_path / "local", catalogue, shards={"num_samples": 400})
    run("precompute", config, tmp_path / "precompute.yaml")
    (tmp_path / "precompute.yaml").write_text(yaml.safe_dump(config | {"root": bucket}))
    store, random = open_store(bucket), np.random.default_rng(0)
    for _ in range(3):
        command = [sys.executable, "-m", "audiosep.cli", "precompute", "--config", str(tmp_path / "precompute.yaml")]
        process = subprocess.Popen(command)
        before = len(list(store.list()))
        while process.poll() is None and len(list(store.list())) == before:
            time.sleep(0.02)
        time.sleep(random.uniform(0, 0.1))
        process.kill()
        process.wait()
    assert 0 < sum(name.endswith(".json") for name, _ in store.list()) < 100
    assert cli.main(["precompute", "--config", str(tmp_path / "precompute.yaml")]) == 0
    assert content(store) == content(open_store(tmp_path / "local"))
    open_store(bucket, StorageConfig(stale_temporary_hours=1e-9)).sweep()
    assert server.uploads() == []


def test_what_the_documentation_says_to_run_runs(server: S3Server, tmp_path: Path) -> None:
    text = Path(__file__).parent.parent.joinpath("docs", "object-storage.md").read_text().replace("my-bucket", BUCKET)
    text = text.replace("/tmp/sounds-cache", str(tmp_path / "cache"))
    make_data_set(tmp_path / "runs/sounds/train", 40)
    (commands,) = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    root = Path(__file__).parent.parent
    for line in commands.splitlines():
        words = shlex.split(line, comments=True)
        command = [sys.executable, "-m", "shards.cli", *words[1:]]
        subprocess.run(command, cwd=tmp_path, check=True, env=os.environ | {"PYTHONPATH": str(root)})
    assert content(open_store(tmp_path / "runs/back")) == content(open_store(tmp_path / "runs/sounds/train"))
    exec(program, {})
    assert list((tmp_path / "cache").rglob("*.range"))
