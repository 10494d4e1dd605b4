"""sbatch text: legal for bash and ShellCheck, and what sbatch would silently ignore is refused."""

import itertools
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from slurm.config import as_yaml, load_config
from slurm.job import Environment, Resources, check_resources, check_script, render, step, time_seconds

CONTAINERS = [
    Environment(),
    Environment(
        setup=("module load cuda", "source .venv/bin/activate"),
        variables={"NCCL_SOCKET_IFNAME": "ib0", "NOTE": "it's; odd"},
    ),
    Environment(container_runtime="pyxis", container_image="a b.sqsh", container_mounts=("/data:/data",)),
    Environment(container_runtime="apptainer", container_image="a b.sif", container_mounts=("/data:/data",)),
]
REQUESTS = [
    Resources(),
    Resources(
        nodes=4, gpus_per_node=8, gpu_type="a100", memory="400G", mail_user="me@example.org", extra=("--exclusive",)
    ),
]


def script(resources: Resources = REQUESTS[0], environment: Environment = CONTAINERS[0], array: str = "") -> str:
    log = None if array else Path("/work dir/logs/train-1")
    body = step(["audiosep train", "--config x.yaml"], resources, environment, log)
    return render("train-1", "Trains.", resources, environment, Path("/work dir"), Path("/work dir/logs"), body, array)


@pytest.mark.parametrize(
    ("resources", "environment", "array"), [*itertools.product(REQUESTS, CONTAINERS, ("", "1-8%4"))]
)
def test_scripts_are_clean_shell(resources: Resources, environment: Environment, array: str, tmp_path: Path) -> None:
    if not shutil.which("shellcheck") and not os.environ.get("CI"):
        pytest.skip("needs the package shellcheck")
    text = script(resources, environment, array)
    check_script(text)
    (tmp_path / "job.sbatch").write_text(text)
    done = subprocess.run(["shellcheck", tmp_path / "job.sbatch"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert max(map(len, text.splitlines())) <= 120, "people read it"


def test_a_container_runs_exactly_the_command_in_the_working_folder(tmp_path: Path) -> None:
    """The step is executed with stand-ins on PATH that print their arguments, one a line."""
    for name in ("srun", "apptainer", "scontrol"):
        (tmp_path / name).write_text(f'#!/bin/bash\nprintf "{name}: %s\\n" "$@"\n')
        (tmp_path / name).chmod(0o755)
    for environment in CONTAINERS[2:]:
        body = "\n".join(step(["audiosep train --config 'x y.yaml'"], Resources(), environment))
        env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        shown = subprocess.run(["bash", "-c", body], capture_output=True, text=True, cwd=tmp_path, env=env).stdout
        assert environment.container_image in shown
        assert f"{tmp_path}" in shown
        assert "/data:/data" in shown
        assert "srun: --config\nsrun: x y.yaml\n" in shown


@pytest.mark.parametrize("status", [0, 1, 2, 3, 75, 137, 253])
@pytest.mark.parametrize("restart", ["0", "20"])
@pytest.mark.parametrize("requeue_killed", [False, True])
def test_only_stopped_and_killed_work_is_requeued_and_only_so_often(
    status: int, restart: str, requeue_killed: bool, tmp_path: Path
) -> None:
    done = run_step(f"exit {status}", tmp_path / "train-1" if requeue_killed else None, tmp_path, restart)
    assert done.returncode == status
    goes_on = restart == "0" and (status == 75 or (status > 128 and requeue_killed))
    assert ("scontrol requeue 7" in done.stdout) == goes_on


@pytest.mark.parametrize(
    ("earlier", "told", "status"),
    [
        ("", "srun: error: node[1-4]: tasks 0-7: Exited with exit code 2", 2),
        ("", "srun: error: node1: task 0: Exited with exit code 255", 2),
        ("", "training:  25%|##  | 1/4srun: error: node1: task 0: Exited with exit code 2", 2),
        ("", "srun: error: node1: task 0: Exited with exit code 1", 143),
        ("", "srun: error: node1: task 0: Exited with exit code 75", 143),
        ("", "srun: error: node1: task 0: Out Of Memory", 143),
        ("srun: error: node1: task 0: Exited with exit code 2\nended with status 2 (restart 0 of 20)\n", "", 143),
    ],
)
def test_a_mistake_that_one_rank_told_is_not_made_again(earlier: str, told: str, status: int, tmp_path: Path) -> None:
    """Messages as srun writes them, be it behind a progress bar; an earlier start's no longer count."""
    (tmp_path / "a log-7.log").write_text(earlier)
    done = run_step(f'echo "{told}" >>"$LOG"; exit 143', tmp_path / "a log", tmp_path)
    assert done.returncode == status
    assert f"ended with status {status} (restart 0 of 20)" in done.stdout
    assert ("scontrol requeue 7" in done.stdout) == (status == 143)


def run_step(srun: str, log: Path | None, folder: Path, restart: str = "0") -> subprocess.CompletedProcess[str]:
    """Run a step's shell lines with a stand-in for srun, whose messages go to $LOG, and for scontrol."""
    for name, text in {"srun": srun, "scontrol": 'echo "scontrol $*"'}.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    body = "\n".join(["set -u", *step(["anything"], Resources(), Environment(), log)])
    env = {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": restart}
    return subprocess.run(["bash", "-c", body], capture_output=True, text=True, env=env | {"LOG": f"{log}-7.log"})


@pytest.mark.parametrize("stray", ["#SBATCH --nodes=2", "# SBATCH --nodes=2", "  #SBATCH --nodes=2"])
def test_options_that_sbatch_would_ignore_are_refused(stray: str) -> None:
    with pytest.raises(ValueError, match="ignore"):
        check_script(script(environment=Environment(setup=("module load cuda", stray))))


def test_carriage_returns_are_refused() -> None:
    with pytest.raises(ValueError, match="CRLF"):
        check_script(script(environment=Environment(setup=("module load cuda\r",))))


@pytest.mark.parametrize("extra", ["exclusive", "--array=1-9", "--output=x", "--error=x", "--mem 3G", "-p gpu"])
def test_options_of_its_own_and_malformed_ones_are_refused(extra: str) -> None:
    with pytest.raises(ValueError, match="extra"):
        check_resources(Resources(extra=(extra,)))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("1:30", 90), ("2:00:00", 7200), ("1-0", 86400), ("1-2:30", 95400), ("1-2:03:04", 93784)],
)
def test_time_limits_are_read_as_sbatch_reads_them(text: str, seconds: int) -> None:
    assert time_seconds(text) == seconds


def test_a_config_survives_the_run_folder_and_names_its_mistakes(tmp_path: Path) -> None:
    shown = re.findall(r"```yaml\n(.*?)```", Path("docs/slurm.md").read_text(), re.DOTALL)
    (tmp_path / "shown.yaml").write_text(*shown)
    for file in [*Path("configs/slurm").glob("*.yaml"), tmp_path / "shown.yaml"]:
        config = load_config(file, ["--nodes", "3", "--precompute.max_tasks", "7"], "train")
        assert (config.train.nodes, config.precompute.max_tasks) == (3, 7)
        (tmp_path / "config.yaml").write_text(as_yaml(config))
        assert load_config(tmp_path / "config.yaml") == config
        with pytest.raises(ValueError, match=r"unknown key 'train\.node'; the nearest valid one is 'train\.nodes'"):
            load_config(file, ["--node", "3"], "train")
        with pytest.raises(ValueError, match="--nodes needs a value"):
            load_config(file, ["--nodes"], "train")
        assert load_config(file, ["--time=1:00:00", "--extra", "[--exclusive]"], "train").train.time == "1:00:00"
    (tmp_path / "config.yaml").write_text("folder: run\ntrain: {time: 1:00:00}")
    with pytest.raises(ValueError, match=r"train\.time: .* \(got 3600\); put it in quotes"):
        load_config(tmp_path / "config.yaml")
