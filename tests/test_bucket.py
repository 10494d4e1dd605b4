"""The whole way with every byte of data in a bucket on a real S3 server: clips, shards, training, evaluation."""

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

import boto3
import numpy as np
import pytest
import yaml
from audio import small_settings, write_catalogue
from servers import BUCKET, S3Server
from shard_data import make_data_set

from audiosep import cli
from shards import cli as shards_cli
from shards.loader import ShardLoader
from shards.storage import StorageConfig, Store, open_store

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
    server.stop()


def content(store: Store) -> dict[str, bytes]:
    return {name: store.read(name) for name, _ in store.list()}


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


def test_precompute_seal_verify_train_evaluate_in_a_bucket(
    server: S3Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bucket, local = f"s3://{BUCKET}/run", tmp_path / "run"
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
    assert content(open_store(bucket)) == content(open_store(local))
    for command in ("info", "show", "cat"):
        words = [] if command == "info" else ["000000003"]
        assert shards_cli.main([command, f"{bucket}/train", *words]) == 0

    training = {
        "root": str(tmp_path / "training"),
        "data": {"train": f"{bucket}/train", "valid": f"{bucket}/valid", "loader": {"batch_size": 4}},
        "system": {"model": {"window_lengths": [256], "widths": [4, 8], "condition_size": 384}, "window": 256},
        "trainer": {"accelerator": "cpu", "devices": 1, "max_steps": 8, "validate_steps": 4, "deterministic": True},
    }
    run("train", training, tmp_path / "train.yaml")
    checkpoint = str(tmp_path / "training/checkpoints/last.ckpt")
    evaluation = {"checkpoint": checkpoint, "shards": f"{bucket}/valid", "accelerator": "cpu"}
    run("evaluate", evaluation | {"output": str(tmp_path / "metrics")}, tmp_path / "evaluate.yaml")
    assert json.loads((tmp_path / "metrics/metrics.json").read_text())["model"]["overall"]["num_samples"] == 8

    secret = os.environ["AWS_SECRET_ACCESS_KEY"]
    written = [path for path in tmp_path.rglob("*") if path.is_file() and tmp_path / "server" not in path.parents]
    assert all(secret.encode() not in path.read_bytes() for path in written)
    assert all(secret.encode() not in data for data in content(open_store(bucket)).values())
    assert secret not in "".join(capfd.readouterr())


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
    client = boto3.client("s3")
    assert "Uploads" not in client.list_multipart_uploads(Bucket=BUCKET)


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
