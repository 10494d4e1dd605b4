"""The night that a cluster spares nobody: arrays of the real `audiosep precompute`, ended by the real `shards seal`."""

import shlex
import sys
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from audio import small_settings, write_catalogue, write_config
from servers import BUCKET, S3Server
from shard_data import tree
from slurm_lab import Cluster, kill, processes

from audiosep.cli import main as audiosep
from shards.cli import main as shards
from shards.manifest import load_manifest
from shards.storage import open_store
from shards.store import StorageConfig, Store
from shards.verify import read_sample
from slurm.__main__ import main
from slurm.config import load_config
from slurm.submit import Run

SHARDS = {"passes": 40, "samples_per_shard": 20}  # of 20 clips: 40 shards


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_catalogue(tmp_path_factory.mktemp("audio"), num_clips=20)


@pytest.fixture(scope="module")
def expected(catalogue: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process on this machine makes of the same config: name to bytes."""
    folder = tmp_path_factory.mktemp("expected")
    config = write_config(folder / "demo.yaml", folder / "root", catalogue, shards=SHARDS)
    assert audiosep(["precompute", "--config", config]) == 0
    assert shards(["seal", str(folder / "root")]) == 0
    return tree(folder / "root")


def write_run(folder: Path, settings: dict[str, object], **precompute: object) -> str:
    """The file of a run that renders `settings` with the real commands."""
    (folder / "demo.yaml").write_text(yaml.safe_dump(settings))
    small = {"memory": "400M", "time": "10"}
    config = {
        "folder": str(folder / "run"),
        "audiosep": shlex.join([sys.executable, "-m", "audiosep.cli"]),
        "shards": shlex.join([sys.executable, "-m", "shards.cli"]),
        "environment": {"variables": {"OMP_NUM_THREADS": "1"}},
        "precompute": small | {"configs": [str(folder / "demo.yaml")], "max_tasks": 8, "max_running": 4} | precompute,
        "seal": small,
    }
    (folder / "slurm.yaml").write_text(yaml.safe_dump(config))
    return str(folder / "slurm.yaml")


def running(cluster: Cluster, array: str) -> dict[str, str]:
    """The tasks of an array that run now, and their nodes."""
    jobs = cluster.jobs().items()
    return {task: node for task, (state, node) in jobs if task.startswith(f"{array}_") and state == "RUNNING"}


def trouble(cluster: Cluster, folder: Path, array: str, store: Store) -> None:
    """kill -9, requeue, preemption, a power loss and a rotten bit, once shards are being written."""
    cluster.wait("the first shards", lambda: len([*store.list("shard-")]) > 6, 180)
    name = next(name for name, _ in store.list("shard-") if name.endswith(".json")).replace(".json", ".tar")
    data = bytearray(store.read(name))
    data[len(data) // 2] ^= 1
    store.write(name, data)
    words = ("audiosep.cli precompute", str(folder), "--shards")
    kill(cluster.wait("a process to kill", lambda: processes(*words), 60)[:1])
    tasks = cluster.wait("a task to requeue", lambda: running(cluster, array), 60)
    cluster.run("scontrol", "requeue", next(iter(tasks)))
    cluster.wait("tasks to preempt", lambda: len(running(cluster, array)) > 1, 60)
    cluster.preempt()
    tasks = cluster.wait("a node to crash", lambda: running(cluster, array), 60)
    cluster.crash(next(iter(tasks.values())))


@pytest.mark.parametrize("place", ["folder", "bucket"])
def test_an_array_in_trouble_ends_sealed_with_the_same_bytes(
    place: str,
    cluster: Cluster,
    catalogue: Path,
    expected: dict[str, bytes],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    root, storage = str(tmp_path / "root"), StorageConfig()
    if place == "bucket":
        server: S3Server = request.getfixturevalue("s3_server")
        root, storage = f"s3://{BUCKET}/night", server.options
    settings = small_settings(Path("ROOT"), catalogue, shards=SHARDS) | {"root": root, "storage": asdict(storage)}
    store = open_store(root, storage)
    config = write_run(tmp_path, settings)
    assert main(["precompute", "--config", config, "--dry-run"]) == 0
    assert not list(store.list()), "a dry run begins nothing"
    assert main(["precompute", "--config", config]) == 0
    trouble(cluster, tmp_path, Run(load_config(tmp_path / "slurm.yaml")).submissions()[0].job_id, store)
    cluster.wait_idle(240)
    found = {name: store.read(name) for name, _ in store.list()}
    assert found.keys() == expected.keys()
    assert {name for name in found if found[name] != expected[name]} == set()


def test_a_poisoned_shard_ends_the_run_with_its_name_and_its_clip(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    catalogue = write_catalogue(tmp_path / "audio", num_clips=30)
    settings = small_settings(Path("ROOT"), catalogue, shards={"samples_per_shard": 3}) | {"max_rejected_fraction": 0.0}
    config = write_run(tmp_path, settings | {"root": str(tmp_path / "root")}, max_tasks=3, max_rounds=2)
    clip, shard = clip_of_one_shard(tmp_path, settings)
    (catalogue.parent / clip).write_bytes(b"not audio at all")
    assert main(["precompute", "--config", config]) == 0
    cluster.wait_idle(120)
    assert len([*(tmp_path / "root").glob("shard-*.json")]) == 9, "the rest is complete"
    seals = {
        entry.name: entry.job_id
        for entry in Run(load_config(tmp_path / "slurm.yaml")).submissions()
        if "seal" in entry.name
    }
    assert [*seals] == ["seal-demo-1", "seal-demo-2"]
    assert cluster.state(seals["seal-demo-2"]) == "FAILED"
    log = (tmp_path / "run" / "logs" / f"seal-demo-2-{seals['seal-demo-2']}.log").read_text()
    assert shard in log
    assert clip in log
    capsys.readouterr()
    assert main(["status", "--config", config]) == 0
    status = capsys.readouterr().out
    assert "9 of 10 shards, 1 left" in status
    assert clip in status


def clip_of_one_shard(folder: Path, settings: dict[str, object]) -> tuple[str, str]:
    """A clip that only one shard needs, and that shard's name, by rendering everything once elsewhere."""
    (folder / "whole.yaml").write_text(yaml.safe_dump(settings | {"root": str(folder / "whole")}))
    assert audiosep(["precompute", "--config", str(folder / "whole.yaml")]) == 0
    assert shards(["seal", str(folder / "whole")]) == 0
    store = open_store(folder / "whole")
    manifest = load_manifest(store)
    uses: dict[str, set[str]] = defaultdict(set)
    for index in range(manifest.num_samples):
        text = read_sample(store, manifest, index).text
        for source in (text["target"], *text["interferers"]):
            uses[source["clip"]].add(manifest.shard_name(index // manifest.plan.samples_per_shard))
    clip = next(clip for clip, names in uses.items() if len(names) == 1)
    return clip, *uses[clip]
