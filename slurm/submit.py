"""From jobs as text to jobs in the queue: checked, all or none, with everything written into one run folder."""

import json
import os
import re
import shlex
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from slurm.config import SlurmConfig
from slurm.job import check_script


@dataclass(frozen=True)
class DataSet:
    """Where a data set is, and how that place is reached: the storage section of its config."""

    root: str
    storage: dict[str, Any]


@dataclass(frozen=True)
class Plan(DataSet):
    """What `audiosep precompute --plan` prints: `unfinished` are shard indices."""

    num_shards: int
    unfinished: list[int]
    spec_digest: str


@dataclass(frozen=True)
class Job:
    """One script and its place in a chain: it starts `when` (afterany, afterok) the jobs named in `after` have ended.

    The plan of the data set that it makes is for `status`."""

    name: str
    script: str
    files: dict[str, str] = field(default_factory=dict)  # further files that the script reads, beside it
    after: tuple[str, ...] = ()
    when: str = "afterok"
    plan: Plan | None = None


@dataclass(frozen=True)
class Submission:
    """One line of jobs.jsonl: when, in seconds since 1970, and how many shards of which data set were to be made."""

    job_id: str
    name: str
    time: float
    data_set: DataSet | None
    num_unfinished: int


@dataclass(frozen=True)
class Run:
    """The run folder: one .sbatch and its files for each job, jobs.jsonl, logs/."""

    config: SlurmConfig
    dry_run: bool = False  # jobs are only shown, and no data set is begun

    @property
    def folder(self) -> Path:
        return Path(self.config.folder)

    @property
    def log_folder(self) -> Path:
        return self.folder / "logs"

    def submissions(self) -> list[Submission]:
        """Everything submitted from this folder so far, oldest first."""
        jobs = self.folder / "jobs.jsonl"
        lines = jobs.read_text().splitlines() if jobs.exists() else []
        return [TypeAdapter(Submission).validate_json(line) for line in lines]

    def queued(self) -> list[Submission]:
        """Those that Slurm has not ended."""
        ids = slurm_command("squeue", "--me", "--noheader", "--format=%F").split()
        return [entry for entry in self.submissions() if entry.job_id in ids]

    def attempts(self, stem: str) -> int:
        """How many jobs named `stem`-1, `stem`-2, ... were submitted."""
        return sum(entry.name.rpartition("-")[0] == stem for entry in self.submissions())


def read_plan(run: Run, file: Path) -> Plan:
    """The plan of one precompute config, to which the root is bound from now on, unless in a dry run.

    Raises ValueError with the command's own words when it refuses the config."""
    words = [*shlex.split(run.config.audiosep), "precompute", "--config", str(file), "--plan"]
    words += [] if run.dry_run else ["--begin"]
    return Plan(**json.loads(command_output(*words)))


def shards_command(config: SlurmConfig, verb: str, data_set: DataSet) -> list[str]:
    """The words of `shards VERB` on a data set."""
    return [*shlex.split(config.shards), verb, data_set.root, "--options", json.dumps(data_set.storage)]


def submit(run: Run, jobs: Sequence[Job]) -> dict[str, str]:
    """Submit all `jobs`, in order, and return their ids by name; on any refusal nothing stays in the queue.

    Raises ValueError with sbatch's words and what the cluster offers, OSError when the run folder cannot be written."""
    for job in jobs:
        check_script(job.script)
    run.log_folder.mkdir(parents=True, exist_ok=True)
    for job in jobs:
        for name, text in {**job.files, f"{job.name}.sbatch": job.script}.items():
            (run.folder / name).write_text(text)
        try:
            _sbatch(run.folder / f"{job.name}.sbatch", "--test-only")
        except ValueError as error:  # sbatch itself would wait for nodes that are down, and judges what needs no wait
            if job.after or "Requested node configuration is not available" not in str(error):
                raise
    ids: dict[str, str] = {}
    try:
        for job in jobs:
            dependency = ",".join(f"{job.when}:{ids[name]}" for name in job.after)
            waiting = [f"--dependency={dependency}", "--kill-on-invalid-dep=yes"] if dependency else []
            ids[job.name] = _sbatch(run.folder / f"{job.name}.sbatch", "--parsable", *waiting).split(";")[0]
            with (run.folder / "jobs.jsonl").open("a") as log:
                data_set = DataSet(job.plan.root, job.plan.storage) if job.plan else None
                num_unfinished = len(job.plan.unfinished) if job.plan else 0
                entry = Submission(ids[job.name], job.name, time.time(), data_set, num_unfinished)
                log.write(json.dumps(asdict(entry)) + "\n")
    except BaseException:
        for job_id in ids.values():
            slurm_command("scancel", job_id)
        raise
    return ids


def show(jobs: Sequence[Job]) -> Iterator[str]:
    """What `submit` would submit, as text."""
    for job in jobs:
        waits = f", {job.when} {', '.join(job.after)}" if job.after else ""
        yield f"### {job.name}.sbatch{waits}\n{job.script}"


def max_array_size() -> int:
    """The cluster's limit on an array's indices (the largest is one less); Slurm's default where no cluster answers."""
    try:
        settings = slurm_command("scontrol", "show", "config")
    except ValueError:
        return 1001
    return int(re.findall(r"^MaxArraySize\s*=\s*(\d+)", settings, re.MULTILINE)[0])


def move_dependents(old_id: str, new_id: str) -> None:
    """Let every waiting job of ours that depends on `old_id` depend on `new_id` in the same way."""
    for line in slurm_command("squeue", "--me", "--noheader", "--format=%i %E").splitlines():
        job_id, _, dependency = line.partition(" ")
        if re.search(rf":{old_id}\b", dependency):
            moved = re.sub(rf":{old_id}\b", f":{new_id}", dependency.replace("(unfulfilled)", ""))
            slurm_command("scontrol", "update", f"JobId={job_id.split('_')[0]}", f"Dependency={moved}")


def slurm_command(*words: str) -> str:
    """The output of one of Slurm's commands, freed of settings that leak in from the caller's shell or job."""
    leaks = re.compile(r"SBATCH_|SRUN_|SQUEUE_|SCANCEL_|SLURM_(?!CONF$)")
    return command_output(*words, environment={key: value for key, value in os.environ.items() if not leaks.match(key)})


def command_output(*words: str, environment: dict[str, str] | None = None) -> str:
    """What a command prints. Raises ValueError with its own words of complaint when it fails."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, env=environment)
    except FileNotFoundError:
        raise ValueError(f"There is no command {words[0]!r} on the PATH here.") from None
    if done.returncode:
        raise ValueError(f"`{shlex.join(words)}` failed with status {done.returncode}:\n{done.stderr.strip()}")
    return done.stdout.rstrip()


def _sbatch(script: Path, *options: str) -> str:
    try:
        return slurm_command("sbatch", *options, str(script))
    except ValueError as error:
        wanted = r"^#SBATCH (--(?:partition|nodes|ntasks|gres|cpus|mem|time|constraint|account|qos)\S*)"
        asked = " ".join(re.findall(wanted, script.read_text(), re.MULTILINE))
        columns = "  %P: %D nodes of %c cores, %m MB, GPUs %G, features %f, limit %l; in use/idle/down/all %F"
        offered = slurm_command("sinfo", "--noheader", f"--format={columns}")
        raise ValueError(
            f"{error}\n{script.name} asks for {asked}\nThe cluster has\n{offered}\nNothing was submitted."
        ) from None
