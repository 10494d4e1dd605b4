"""Arrays, rounds, signals, requests and status on a real cluster, with a stand-in for the rendering itself."""

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from slurm_lab import Cluster, kill, processes

from slurm.__main__ import main
from slurm.config import load_config
from slurm.submit import Run

STANDIN = shlex.join([sys.executable, str(Path(__file__).parent / "slurm_lab" / "standin.py")])


def write_config(
    folder: Path, *, num_shards: int = 6, seconds: float = 0.0, poison: int = -1, luck: int = 99, **sections: Any
) -> str:
    """The file of a run of the stand-in under `folder`; `sections` are laid over it."""
    settings = {"root": str(folder / "demo"), "num_shards": num_shards, "seconds": seconds}
    (folder / "demo.yaml").write_text(yaml.safe_dump(settings | {"poison": poison, "luck": luck}))
    small = {"memory": "100M", "time": "10"}
    config = {"folder": str(folder / "run of it"), "audiosep": STANDIN, "shards": STANDIN, "seal": small}
    config["precompute"] = small | {"configs": [str(folder / "demo.yaml")], "max_tasks": 3}
    config["train"] = small | {"config": str(folder / "demo.yaml")}
    for name, section in sections.items():
        config[name] = config.get(name, {}) | section
    (folder / "slurm.yaml").write_text(yaml.safe_dump(config))
    return str(folder / "slurm.yaml")


def job_ids(folder: Path) -> dict[str, str]:
    return {entry.name: entry.job_id for entry in Run(load_config(folder / "slurm.yaml")).submissions()}


def log_of(folder: Path, name: str) -> str:
    return "".join(log.read_text() for log in (folder / "run of it" / "logs").glob(f"{name}-*"))


def status_of(config: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["status", "--config", config, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_an_array_is_followed_by_its_sealing_job(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path)
    assert main(["precompute", "--config", config]) == 0
    cluster.wait_idle(60)
    assert len(json.loads((tmp_path / "demo" / "manifest.json").read_text())) == 6
    status = status_of(config, capsys)
    assert [stage["states"] for stage in status["stages"]] == [{"COMPLETED": 3}, {"COMPLETED": 1}]
    assert (status["data_sets"][0]["done"], status["data_sets"][0]["left"], status["failures"]) == (6, 0, [])
    assert main(["precompute", "--config", config, "--dry-run"]) == 0
    again = capsys.readouterr().out
    assert "seal-demo-2.sbatch" in again
    assert "--array" not in again, "nothing is unfinished, so there is nothing to render"


def test_names_with_spaces_go_the_whole_way(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, precompute={"configs": [str(tmp_path / "a demo.yaml")]})
    (tmp_path / "demo.yaml").rename(tmp_path / "a demo.yaml")
    (tmp_path / "train.yaml").write_text(f"root: {tmp_path / 'model'}")
    assert main(["pipeline", "--config", config, "--train.config", str(tmp_path / "train.yaml")]) == 0
    cluster.wait_idle(60)
    states = [(stage["name"], stage["states"]) for stage in status_of(config, capsys)["stages"]]
    assert states[:2] == [("precompute-a demo-1", {"COMPLETED": 3}), ("seal-a demo-1", {"COMPLETED": 1})]
    assert states[2] == ("train-1", {"COMPLETED": 1})
    assert "ended with status 0" in log_of(tmp_path, "precompute-a demo-1")


def test_what_is_being_made_is_not_begun_again_but_ends_as_the_refusal_says(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, seconds=60.0)
    (tmp_path / "train.yaml").write_text(f"root: {tmp_path / 'model'}")
    (tmp_path / "other.yaml").write_text(f"root: {tmp_path / 'other'}")
    training = ["--config", config, "--train.config", str(tmp_path / "train.yaml")]
    assert main(["pipeline", *training]) == 0
    for words, named in ((["precompute", "--config", config], "seal-demo-1"), (["train", *training], "train-1")):
        capsys.readouterr()
        assert main(words) == 2
        refusal = capsys.readouterr().err
        assert named in refusal
        assert main([*words, "--dry-run"]) == 0
    assert main(["train", "--config", config, "--train.config", str(tmp_path / "other.yaml")]) == 0
    assert main(["precompute", "--config", config]) == 2
    cluster.run(*re.findall(r"`(scancel .*)`", capsys.readouterr().err)[0].split())
    cluster.wait_idle(30)
    assert "seal-demo-2" not in job_ids(tmp_path), "no other round"
    assert main(["precompute", "--config", config]) == 0
    cluster.run("scancel", *job_ids(tmp_path).values(), check=False)
    cluster.wait_idle(30)


def test_what_must_wait_for_nodes_that_are_down_is_taken_and_status_tells_why_it_waits(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path)
    cluster.run("scontrol", "update", "nodename=node4", "state=drain", "reason=repair")
    try:
        assert main(["train", "--config", config, "--nodes", "4"]) == 0
        job = job_ids(tmp_path)["train-1"]
        assert main(["status", "--config", config]) == 0
        assert f"train-1 ({job}): 1 PENDING (" in capsys.readouterr().out
        assert main(["train", "--config", config, "--nodes", "4", "--memory", "900G"]) == 2, "no node has that"
    finally:
        cluster.run("scontrol", "update", "nodename=node4", "state=resume")
    cluster.wait("training", lambda: cluster.state(job) == "COMPLETED", 60)


def test_a_task_near_its_time_limit_stops_and_requeues_itself(cluster: Cluster, tmp_path: Path) -> None:
    config = write_config(tmp_path, num_shards=1, seconds=40.0, precompute={"time": "2", "warn_seconds": 50})
    assert main(["precompute", "--config", config]) == 0
    task = f"{job_ids(tmp_path)['precompute-demo-1']}_1"
    cluster.wait("the task's own process", lambda: processes("standin.py", str(tmp_path), "--shards"), 20)
    cluster.run("scontrol", "update", f"JobId={task}", "TimeLimit=1")  # so the warning is due 10 s after the start
    cluster.wait("the requeue", lambda: cluster.state(task) == "PENDING", 39)
    settings = tmp_path / "run of it" / "precompute-demo-1.yaml"
    settings.write_text(settings.read_text().replace("40.0", "0.0"))
    cluster.wait_idle(60)
    log = log_of(tmp_path, "precompute-demo-1")
    assert "ended with status 75 (restart 0 of 20)" in log
    assert "ended with status 0 (restart 1 of 20)" in log
    assert "seal-demo-2" not in job_ids(tmp_path), "one round was enough"


def test_a_job_that_is_cancelled_stays_cancelled(cluster: Cluster, tmp_path: Path) -> None:
    main(["precompute", "--config", write_config(tmp_path, num_shards=1, seconds=60.0)])
    ids = job_ids(tmp_path)
    cluster.wait("the task's own process", lambda: processes("standin.py", str(tmp_path), "--shards"), 20)
    cluster.run("scancel", ids["seal-demo-1"], ids["precompute-demo-1"])
    cluster.wait_idle(20)
    assert cluster.state(f"{ids['precompute-demo-1']}_1") == "CANCELLED"


def test_what_is_missing_is_submitted_again_and_training_waits_for_it(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, poison=4, luck=1)
    assert main(["pipeline", "--config", config]) == 0
    cluster.wait_idle(90)
    ids = job_ids(tmp_path)
    assert [*ids] == ["precompute-demo-1", "seal-demo-1", "train-1", "precompute-demo-2", "seal-demo-2"]
    cluster.run("shellcheck", *(str(tmp_path / "run of it" / f"{name}.sbatch") for name in ids))
    assert (tmp_path / "run of it" / "precompute-demo-2.txt").read_text() == "4\n"
    assert cluster.state(ids["train-1"]) == "COMPLETED"
    order = (
        cluster.run("scontrol", "-o", "show", "job", ids["train-1"]),
        cluster.run("scontrol", "-o", "show", "job", ids["seal-demo-2"]),
    )
    started, sealed = order[0].split("StartTime=")[1][:19], order[1].split("EndTime=")[1][:19]
    assert started >= sealed
    stages = {stage["name"]: stage["states"] for stage in status_of(config, capsys)["stages"]}
    assert (stages["seal-demo-1"], stages["seal-demo-2"]) == ({"REQUEUED": 1}, {"COMPLETED": 1})


def test_a_shard_that_never_succeeds_ends_the_run_with_its_name(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, poison=4, precompute={"max_rounds": 2})
    assert main(["pipeline", "--config", config]) == 0
    cluster.wait_idle(90)
    ids = job_ids(tmp_path)
    assert len([*(tmp_path / "demo").glob("shard-*")]) == 5, "the rest is complete"
    assert "seal-demo-3" not in ids
    assert (cluster.state(ids["seal-demo-2"]), cluster.state(ids["train-1"])) == ("FAILED", "CANCELLED")
    assert "shard-000004 failed: clip bad.wav cannot be read" in log_of(tmp_path, "seal-demo-2")
    status = status_of(config, capsys)
    failed = {failure["task"]: failure for failure in status["failures"]}
    assert f"{ids['precompute-demo-2']}_1" in failed
    assert any("bad.wav" in line for line in failed[ids["seal-demo-2"]]["tail"])
    assert failed[ids["train-1"]]["state"] == "CANCELLED (DependencyNeverSatisfied)"


def test_last_words_are_of_the_split_itself_and_of_a_killed_task_how_its_log_ends(
    cluster: Cluster, tmp_path: Path
) -> None:
    both = [str(tmp_path / "demo.yaml"), str(tmp_path / "demo-2.yaml")]
    config = write_config(tmp_path, poison=4, precompute={"configs": both, "max_rounds": 1})
    other = {"root": str(tmp_path / "demo-2"), "num_shards": 6, "seconds": 60.0}
    (tmp_path / "demo-2.yaml").write_text(yaml.safe_dump(other))
    assert main(["precompute", "--config", config]) == 0
    words = ("precompute-demo-2-1.yaml", str(tmp_path), "--shards")
    kill(cluster.wait("three tasks", lambda: len(found := processes(*words)) == 3 and found, 60))
    cluster.wait_idle(60)
    assert "shard 4: shard-000004 failed: clip bad.wav" in log_of(tmp_path, "seal-demo-1")
    told = log_of(tmp_path, "seal-demo-2-1")
    assert "bad.wav" not in told
    for task, shards in enumerate(("0,3", "1,4", "2,5"), 1):
        assert re.search(rf"shard {shards}: .*precompute-demo-2-1-\d+_{task}\.log ends with .*Killed", told)


def test_a_sealing_job_that_runs_twice_starts_one_round_by_the_config_of_its_submission(
    cluster: Cluster, tmp_path: Path
) -> None:
    config = write_config(tmp_path, poison=4)
    assert main(["precompute", "--config", config]) == 0
    (tmp_path / "train.yaml").write_text(f"root: {tmp_path / 'model'}")
    later = ["--train.config", str(tmp_path / "train.yaml"), "--precompute.max_running", "1"]
    assert main(["train", "--config", config, *later]) == 0
    cluster.wait("the second round", lambda: "seal-demo-2" in job_ids(tmp_path), 60)
    cluster.run("scontrol", "requeue", job_ids(tmp_path)["seal-demo-1"])
    cluster.wait_idle(120)
    made = [name for name in job_ids(tmp_path) if name != "train-1"]
    assert made == [f"{job}-demo-{attempt}" for attempt in (1, 2, 3) for job in ("precompute", "seal")]
    assert "%1" not in (tmp_path / "run of it" / "precompute-demo-2.sbatch").read_text()


@pytest.mark.parametrize(
    ("train", "complaint"),
    [
        ({"partition": "nowhere"}, "invalid partition"),
        ({"nodes": 4, "gpus_per_node": 8}, "main*: 4 nodes of 2 cores, 4000 mb, gpus gpu:1"),
        ({"gpus_per_node": 1, "gpu_type": "h100"}, "gres"),
        ({"time": "1", "warn_seconds": 50}, "more time stopping than working"),
        ({"time": "tomorrow"}, "not a limit"),
        ({"extra": ["--dependency=afterok:1"]}, "set by the submission itself"),
        ({"extra": ["-N 3"]}, "not an sbatch option"),
        ({"constraint": "moon"}, "feature"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused_and_leaves_nothing_behind(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str], train: dict[str, Any], complaint: str
) -> None:
    before = cluster.jobs()
    assert main(["pipeline", "--config", write_config(tmp_path, train=train)]) == 2
    assert complaint in capsys.readouterr().err.lower()
    assert cluster.jobs() == before


def test_an_array_element_of_several_tasks_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, precompute={"gpus_per_node": 4})
    assert main(["precompute", "--config", config, "--dry-run"]) == 2
    assert "would render the same shards" in capsys.readouterr().err


def test_how_jobs_ended_is_known_when_slurm_has_forgotten_them(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path, poison=4, precompute={"max_rounds": 1})
    assert main(["precompute", "--config", config]) == 0
    cluster.wait_idle(60)
    (tmp_path / "squeue").write_text("#!/bin/sh\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    status = status_of(config, capsys)
    assert [stage["states"] for stage in status["stages"]] == [{"COMPLETED": 2, "FAILED 3": 1}, {"FAILED 1": 1}]


def test_a_job_that_may_not_requeue_itself_again_has_failed(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path, num_shards=1, seconds=60.0, precompute={"max_rounds": 1, "max_restarts": 0})
    assert main(["precompute", "--config", config]) == 0
    cluster.wait("the task at work", lambda: "rendering" in log_of(tmp_path, "precompute-demo-1"), 20)
    cluster.run("scancel", "--signal=USR1", f"{job_ids(tmp_path)['precompute-demo-1']}_1")
    cluster.wait_idle(60)
    (tmp_path / "squeue").write_text("#!/bin/sh\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert status_of(config, capsys)["stages"][0]["states"] == {"FAILED 75": 1}


def test_a_big_request_is_accepted_where_such_nodes_are(cluster: Cluster, tmp_path: Path) -> None:
    train = {"nodes": 4, "gpus_per_node": 8, "gpu_type": "a100", "partition": "gpu", "constraint": "a100&ib"}
    train |= {"cpus_per_task": 8, "memory": "400G", "time": "2-00:00:00"}
    config = write_config(tmp_path, train=train)
    assert main(["train", "--config", config]) == 0
    job = job_ids(tmp_path)["train-1"]
    shown = cluster.run("scontrol", "-o", "show", "job", job)
    cluster.run("scancel", job)
    assert "NumNodes=4" in shown
    assert "NumTasks=32" in shown


def test_a_broken_config_is_reported_at_once(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path)
    (tmp_path / "demo.yaml").write_text("root: demo")
    assert main(["precompute", "--config", config]) == 2
    assert "num_shards is missing" in capsys.readouterr().err
    (tmp_path / "run of it").write_text("a file where the run folder should be")
    assert main(["train", "--config", config]) == 2
    assert "run" in capsys.readouterr().err


def test_settings_in_the_shell_do_not_leak_into_jobs(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBATCH_PARTITION", "high")
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "1")
    main(["precompute", "--config", write_config(tmp_path)])
    shown = cluster.run("scontrol", "-o", "show", "job", job_ids(tmp_path)["seal-demo-1"])
    cluster.wait_idle(60)
    assert "Partition=main" in shown
    assert (tmp_path / "demo" / "manifest.json").exists()
