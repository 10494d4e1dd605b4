"""DDP training over gloo on the test cluster, with its checkpoints in a bucket: preempted, killed, and gone on with
another number of nodes."""

import json
import shlex
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from servers import BUCKET, S3Server
from shard_data import write_one
from slurm_lab import Cluster, kill, processes
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shards.manifest import bind, seal
from shards.storage import open_store
from shards.store import StorageConfig
from shards.tar import Sample
from slurm.__main__ import main
from slurm.config import load_config
from slurm.submit import Run

NUM_SAMPLES, BATCH_SIZE = 1920, 2  # batch size of each rank


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of a task that a model of any size learns: the target is a third of the mixture."""
    root = tmp_path_factory.mktemp("data") / "train"
    store = open_store(root)
    spec = {"clips": {"sample_rate": 8000, "segment_seconds": 0.1}, "stft": {"window_lengths": [64], "hop_length": 32}}
    plan = bind(store, spec | {"query_encoder": "test"}, NUM_SAMPLES, 120)
    for shard in range(plan.num_shards):
        write_one(store, plan, shard, make_sample)
    seal(store)
    return root


def make_sample(index: int) -> Sample:
    rng = np.random.default_rng(index)
    mixture = rng.uniform(1, 2, (1, 26, 33)).astype(np.float16)
    arrays = {"stft_mixture.64": mixture, "stft_segment.64": mixture / 3, "condition": np.ones(4, np.float16)}
    return Sample(f"{index:09d}", {"text": "a third", "kind": "test", "length": 800, "index": index}, arrays)


def write_run(folder: Path, root: Path, model: str, storage: StorageConfig) -> str:
    settings = {
        "root": model,
        "logs": str(folder / "logs"),
        "data": {"train": str(root), "loader": {"batch_size": BATCH_SIZE}, "ledger": str(folder / "ledger")},
        "system": {"window": 64, "model": {"window_lengths": [64], "widths": [4], "condition_size": 4}},
        "trainer": {"max_epochs": 1, "checkpoint_steps": 10, "log_steps": 1, "accelerator": "cpu"},
    }
    settings["system"]["optimizer"] = {"warm_up_steps": 1}
    settings["data"]["storage"] = asdict(storage)
    (folder / "train.yaml").write_text(yaml.safe_dump(settings))
    config = {
        "folder": str(folder / "run"),
        "audiosep": shlex.join([sys.executable, "-m", "audiosep.cli"]),
        "environment": {"variables": {"OMP_NUM_THREADS": "1"}},
        "train": {"config": str(folder / "train.yaml"), "nodes": 2, "memory": "1500M", "time": "10"},
    }
    (folder / "slurm.yaml").write_text(yaml.safe_dump(config))
    return str(folder / "slurm.yaml")


def served(folder: Path) -> int:
    """Batches that rank 0 was served so far, in all sessions."""
    file = folder / "ledger" / "rank-00000.jsonl"
    return file.read_text().count('"positions"') if file.exists() else 0


def wait_for_batches(cluster: Cluster, folder: Path) -> None:
    enough = served(folder) + 40
    cluster.wait("more batches", lambda: served(folder) > enough, 180)


def test_training_goes_on_exactly_after_preemption_a_killed_rank_and_on_more_nodes(
    cluster: Cluster, root: Path, s3_server: S3Server, tmp_path: Path
) -> None:
    config = write_run(tmp_path, root, f"s3://{BUCKET}/training", s3_server.options)
    assert main(["train", "--config", config]) == 0
    job = job_of(tmp_path)
    wait_for_batches(cluster, tmp_path)
    cluster.preempt()
    wait_for_batches(cluster, tmp_path)

    ranks = processes("audiosep.cli train", str(tmp_path), "--restart 1")
    assert len(ranks) == 2
    kill(ranks[1:])
    cluster.wait("the end of the other rank", lambda: cluster.state(job) == "PENDING", 30)
    wait_for_batches(cluster, tmp_path)

    cluster.run("scancel", job)
    cluster.wait_idle(60)
    assert main(["train", "--config", config, "--nodes", "3"]) == 0
    cluster.wait_idle(180)
    assert cluster.state(job_of(tmp_path)) == "COMPLETED"
    sessions = read_ledger(tmp_path / "ledger")
    assert [len(ranks) for ranks in sessions] == [2, 2, 2, 3]
    exactly_once(sessions)
    loss_goes_on(tmp_path / "logs")
    store = open_store(f"s3://{BUCKET}/training", s3_server.options)
    assert [name for name, _ in store.list()] == ["checkpoints/last.ckpt"]


def test_a_mistake_of_one_rank_ends_the_job_and_is_not_made_again(
    cluster: Cluster, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """srun's own status tells that the other rank was terminated, which is not what happened."""
    damaged = tmp_path / "damaged"
    shutil.copytree(root, damaged)
    tar = damaged / "shard-000003.tar"
    data = bytearray(tar.read_bytes())
    data[len(data) // 2] ^= 1
    tar.write_bytes(data)
    config = write_run(tmp_path, damaged, str(tmp_path / "model"), StorageConfig())
    assert main(["train", "--config", config]) == 0
    cluster.wait_idle(120)
    shown = cluster.run("scontrol", "-o", "show", "job", job_of(tmp_path))
    assert {"JobState=FAILED", "ExitCode=2:0", "Restarts=0"} < {*shown.split(" ")}
    log = (tmp_path / "run" / "logs" / f"train-1-{job_of(tmp_path)}.log").read_text()
    assert "Terminated" in log or "Killed" in log, "the other rank was ended by srun"
    capsys.readouterr()
    assert main(["status", "--config", config]) == 0
    assert "shard-000003.tar) at byte" in capsys.readouterr().out


def job_of(folder: Path) -> str:
    return Run(load_config(folder / "slurm.yaml")).submissions()[-1].job_id


Session = list[dict[str, Any]]  # the header of one rank, then its batches


def read_ledger(folder: Path) -> list[list[Session]]:
    """What was served between one start of the job and the next: for each start, each rank's header and batches."""
    starts: list[list[Session]] = []
    for file in sorted(folder.iterdir()):
        mine: list[Session] = []
        for line in map(json.loads, file.read_text().splitlines()):
            mine = [*mine, [line]] if "world_size" in line else [*mine[:-1], [*mine[-1], line]]
        first = len(starts) - len(mine) if starts else 0  # ranks that came later were there from a later start on
        starts = starts or [[] for _ in mine]
        for start, session in zip(starts[first:], mine):
            start.append(session)
    return starts


def exactly_once(starts: list[list[Session]]) -> None:
    """What counts of a session is what came before the state that the next one took up; that is every sample, once."""
    ends = [start[0][0]["samples"] for start in starts[1:]] + [NUM_SAMPLES]
    positions: list[int] = []
    for ranks, end in zip(starts, ends):
        begin = ranks[0][0]["samples"]
        num_steps = (end - begin) // (BATCH_SIZE * len(ranks))
        for header, *batches in ranks:
            assert header["samples"] == begin, "every rank begins at the same place"
            assert len(batches) >= num_steps, "and makes the same number of steps"
            positions += [position for batch in batches[:num_steps] for position in batch["positions"]]
    assert sorted(positions) == [*range(len(positions))]
    assert NUM_SAMPLES - BATCH_SIZE * 3 < len(positions) <= NUM_SAMPLES, "less than one batch of three ranks is dropped"


def loss_goes_on(folder: Path) -> None:
    """Each step has a loss, and no restart throws it back."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload().Scalars("train/loss")
    steps = {event.step for event in events}
    assert steps == {*range(len(steps))}
    settled = [event.value for event in events if event.step > 40]
    assert max(settled) < events[0].value / 2
