"""How far a run is, from the shards themselves, one look at the queue, and the logs.

Slurm forgets jobs minutes after they end and may keep no accounting, so what is done is decided by the shards and by
the last line that each script writes into its log; squeue, and sacct where it exists, only add to that."""

import contextlib
import json
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from slurm.job import STOPPED
from slurm.submit import DataSet, Run, Submission, command_output, shards_command, slurm_command

NOISE = re.compile(
    r"srun: (launch|Force|forc|Job step|got )|slurmstepd\S* error: \*\*\* STEP .* AT \S+ \*\*\*"
    r"|\[rank\d+\]:(  | Traceback|$)"
)
BAD_STATES = {"BOOT_FAIL", "CANCELLED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"}


@dataclass(frozen=True)
class Progress:
    """One data set on its way; `rate` in shards/hour since the round was submitted, `end` in ISO 8601 or empty."""

    root: str
    num_shards: int
    done: int
    left: int
    rate: float
    end: str


@dataclass(frozen=True)
class Stage:
    """One submission and how many of its tasks are in which state."""

    name: str
    job_id: str
    states: dict[str, int]


@dataclass(frozen=True)
class Failure:
    """A task of a stage's newest submission that ended badly, with the last lines of its log."""

    task: str
    state: str
    log: str
    tail: list[str]


@dataclass(frozen=True)
class Status:
    data_sets: list[Progress]
    stages: list[Stage]
    failures: list[Failure]

    @property
    def active(self) -> bool:
        """Whether anything is still waiting or running."""
        states = {state.split(" ")[0] for stage in self.stages for state in stage.states}
        return not states.isdisjoint(("PENDING", "RUNNING", "COMPLETING"))


def read_status(run: Run) -> Status:
    """Asks `shards info` once for each data set and the scheduler once for everything."""
    submissions = run.submissions()
    if not submissions:
        return Status([], [], [])
    newest = {entry.name.rpartition("-")[0]: entry for entry in submissions}
    states = _states([entry.job_id for entry in submissions])
    data_sets = [_progress(run, entry, entry.data_set) for entry in newest.values() if entry.data_set]
    stages, failures = [], []
    for entry in submissions:
        logs = {log.stem.rpartition("-")[2]: log for log in run.log_folder.glob(f"{entry.name}-{entry.job_id}[._]*")}
        tasks = {task: state for task, state in states.items() if task.split("_")[0] == entry.job_id}
        tasks |= {task: _state_in(log) for task, log in logs.items() if task not in tasks}
        if entry.name.startswith("seal-"):  # to Slurm 75, another round, is a failure
            again = {task for task, log in logs.items() if tasks[task] == "FAILED" and _state_in(log) == "REQUEUED"}
            tasks |= dict.fromkeys(again, "REQUEUED")
        stages.append(Stage(entry.name, entry.job_id, dict(Counter(tasks.values()))))
        if entry in newest.values():
            bad = [task for task, state in tasks.items() if state.split(" ")[0] in BAD_STATES]
            failures += [Failure(task, tasks[task], str(logs.get(task, "")), _tail(logs.get(task))) for task in bad]
    return Status(data_sets, stages, failures)


def lines(status: Status, folder: Path) -> Iterator[str]:
    """The status of the run in `folder`, for people."""
    if not status.stages:
        yield f"Nothing was submitted from {folder} yet."
    for data in status.data_sets:
        rate = f", {data.rate:.0f} shards/h, done about {data.end}" if data.end else ""
        yield f"{data.root}: {data.done} of {data.num_shards} shards, {data.left} left{rate}"
    for stage in status.stages:
        counts = ", ".join(f"{count} {state}" for state, count in stage.states.items())
        yield f"  {stage.name} ({stage.job_id}): {counts or 'unknown to Slurm, and no log'}"
    for failure in status.failures:
        yield f"{failure.task} {failure.state}, {failure.log or 'no log'}:"
        yield from (f"  | {line}" for line in failure.tail)


def last_words(run: Run, split: str, shard_indices: Iterable[int]) -> list[str]:
    """For each shard the last line of its tasks' logs that names it, or how the last of these logs ends."""
    words = dict.fromkeys(shard_indices, "no task had it")
    for log in sorted(run.log_folder.glob("precompute-*"), key=lambda path: path.stat().st_mtime):
        if of := re.fullmatch(rf"(precompute-{re.escape(split)}-\d+)-\d+_(\d+)", log.stem):
            share = (run.folder / f"{of[1]}.txt").read_text().splitlines()[int(of[2]) - 1]
            mine = words.keys() & map(int, share.split(","))
            words |= dict.fromkeys(mine, f"{log} ends with {' | '.join(_tail(log, 3))}")
            for line in log.read_text(errors="replace").splitlines():
                words |= {int(index): line for index in re.findall(r"shard-(\d+)", line) if int(index) in mine}
    shards: dict[str, list[int]] = {}
    for index, text in words.items():
        shards.setdefault(text, []).append(index)
    return [f"shard {','.join(map(str, indices))}: {text}" for text, indices in shards.items()]


def _progress(run: Run, entry: Submission, data_set: DataSet) -> Progress:
    facts = json.loads(command_output(*shards_command(run.config, "info", data_set), "--quick", "--json"))
    missing = [part.split("-") for part in facts.get("missing_shards", "").split(",") if part]
    left = sum(int(ends[-1]) - int(ends[0]) + 1 for ends in missing)
    rate = (entry.num_unfinished - left) / max(time.time() - entry.time, 1.0) * 3600
    end = ""
    if left and rate > 0:
        end = datetime.fromtimestamp(time.time() + left / rate * 3600).isoformat(" ", "minutes")
    return Progress(data_set.root, facts["num_shards"], facts["num_shards"] - left, left, rate, end)


def _states(job_ids: list[str]) -> dict[str, str]:
    """State of each task that Slurm still knows, by "job" or "array_task"."""
    rows: list[str] = []
    with contextlib.suppress(ValueError):  # many clusters keep no accounting
        rows += slurm_command("sacct", "-X", "-n", "-P", "-j", ",".join(job_ids), "-o", "JobID,State").splitlines()
    queue = slurm_command("squeue", "--me", "-h", "-r", "-t", "all", "-o", "%i|%T|%r").splitlines()
    for job, state, reason in (row.split("|", 2) for row in queue):  # newer, so it wins
        told = state in ("PENDING", "CANCELLED") and reason != "None"
        rows.append(f"{job}|{state} ({reason})" if told else f"{job}|{state}")
    states = dict(row.split("|", 1) for row in rows)
    return {
        task: state
        for task, state in states.items()
        if re.fullmatch(r"(\d+)(_\d+)?", task) and task.split("_")[0] in job_ids
    }


def _state_in(log: Path) -> str:
    """The state of a task by its log's last line, for when Slurm has forgotten it."""
    ended = re.fullmatch(r"ended with status (\d+) \(restart (\d+) of (\d+)\)", (_tail(log) or [""])[-1])
    if not ended:
        return "UNKNOWN"
    status, restart, most = map(int, ended.groups())
    if status == STOPPED and restart < most:
        return "REQUEUED"
    return f"FAILED {status}" if status else "COMPLETED"


def _tail(log: Path | None, count: int = 8) -> list[str]:
    """The last lines, less what Slurm tells of ending the other ranks and where in the code each of these was."""
    if not log:
        return []
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 100_000))
        lines = file.read().decode(errors="replace").split("\n")
    return [line.rpartition("\r")[2] for line in lines if line and not NOISE.match(line)][-count:]
