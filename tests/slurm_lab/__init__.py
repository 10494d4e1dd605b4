"""A real Slurm cluster of four nodes on this machine, for the tests of `slurm/`."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

T = TypeVar("T")
SCRIPT = Path(__file__).parent / "cluster.sh"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "unshare", "nsenter", "shellcheck")


class Cluster:
    """The running lab: partitions main (preemptible, default) and high, node1 to node4 of 2 cores, and stand-ins for
    eight nodes of eight GPUs in partition gpu, on which nothing can run but everything can be asked for."""

    def __init__(self, folder: Path) -> None:
        self._environment = {"SLURM_LAB": str(folder), "SLURM_LAB_PORT": str(_free_ports(5))}
        self.conf = folder / "etc" / "slurm.conf"

    def control(self, *words: str) -> None:
        """Call cluster.sh: up, down, crash NODE, start NODE."""
        done = subprocess.run([SCRIPT, *words], env=os.environ | self._environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def run(self, *words: str, check: bool = True) -> str:
        done = subprocess.run(words, capture_output=True, text=True)
        assert not check or done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout.strip()

    def jobs(self) -> dict[str, tuple[str, str]]:
        """State and node of every task that Slurm knows, by "job" or "array_task"."""
        rows = self.run("squeue", "-h", "-r", "-t", "all", "-o", "%i|%T|%N").splitlines()
        return {name: (state, node) for name, state, node in (row.split("|") for row in rows)}

    def state(self, job: str) -> str:
        return self.jobs()[job][0]

    def preempt(self) -> None:
        """A job of the partition high takes all nodes for two seconds."""
        whole = ("--parsable", "--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null")
        job = self.run("sbatch", *whole, "--wrap=sleep 2")
        self.wait("the preemptor to run", lambda: self.state(job) != "PENDING", 60)

    def crash(self, node: str) -> None:
        """A power loss, noticed at once; then the node boots again."""
        self.control("crash", node)
        self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=power loss")
        self.control("start", node)
        self.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)

    def wait(self, what: str, ask: Callable[[], T], seconds: float) -> T:
        """The first answer that is true, or not empty."""
        end = time.monotonic() + seconds
        while not (answer := ask()):
            assert time.monotonic() < end, f"not within {seconds} s: {what}; jobs: {self.jobs()}"
            time.sleep(0.2)
        return answer

    def wait_idle(self, seconds: float) -> None:
        """Until no job is waiting, running or ending."""
        self.wait("an empty queue", lambda: not self.run("squeue", "-h", "-o", "%i"), seconds)


def processes(*words: str) -> list[int]:
    """Ids of the processes of this Python, on all nodes, whose command line holds all of `words`.

    One of the words should be a path of the test, or it may find those of somebody else."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().decode(errors="replace").replace("\0", " ")
        except OSError:  # it ended meanwhile
            continue
        if line.startswith(sys.executable) and all(word in line for word in words):
            found.append(int(entry.parent.name))
    return found


def kill(pids: list[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Start the lab, make it the cluster that Slurm's commands talk to, and end it afterwards; skip where it can't run.

    In CI (environment variable CI) a lab that can't run is a failure."""
    missing = [program for program in PROGRAMS if not shutil.which(program, path=os.environ["PATH"] + ":/usr/sbin")]
    reason = f"no {', '.join(missing)} here" if missing else "not root" if os.geteuid() else ""
    if reason and not os.environ.get("CI"):
        pytest.skip(
            f"a Slurm cluster needs the packages munge slurmctld slurmd slurm-client shellcheck, and root: {reason}"
        )
    assert not reason, reason
    cluster = Cluster(tmp_path_factory.mktemp("lab"))
    os.environ["SLURM_CONF"] = str(cluster.conf)
    try:
        cluster.control("up")
        yield cluster
    finally:
        cluster.control("down")
        del os.environ["SLURM_CONF"]


def _free_ports(count: int) -> int:
    """The first of `count` consecutive free ports."""
    for first in range(17000, 30000, 10):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("", port))
            return first
        except OSError:
            continue
    raise RuntimeError("no free ports")
