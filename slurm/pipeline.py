"""Precompute, seal, train: each stage as jobs, and the chain of them.

A round of precompute is an array over the unfinished shards, then a sealing job. When the array has ended, however it
ended, the sealing job seals; or, when shards are missing, it submits the next round for these, a bounded number of
times."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import yaml

from slurm.config import as_yaml, load_config
from slurm.job import STOPPED, Resources, check_resources, render, step, with_status
from slurm.status import last_words
from slurm.submit import (
    Job,
    Plan,
    Run,
    command_output,
    max_array_size,
    move_dependents,
    read_plan,
    shards_command,
    submit,
)

LONGEST_ARGUMENT = 128_000  # bytes; Linux takes 128 KiB


def precompute(run: Run) -> list[Job]:
    """The first round for every config under `precompute.configs`."""
    files = [Path(file) for file in run.config.precompute.configs]
    splits = [file.stem for file in files]
    if not files or len({*splits}) < len(splits):
        raise ValueError(
            f"precompute.configs is {[*map(str, files)]}: name one config of `audiosep precompute` for each split, "
            "with different file names, because jobs are named after them."
        )
    jobs: list[Job] = []
    for file, split in zip(files, splits):
        attempt = run.attempts(f"seal-{split}") + 1
        plan = read_plan(run, file)
        check_free(run, file)
        jobs += render_round(run, file, plan, split, attempt, run.config.precompute.max_rounds - 1)
    return jobs


def train(run: Run, after: Sequence[str] = ()) -> list[Job]:
    """The training job, to start when the jobs named in `after` have succeeded."""
    config = run.config
    if not config.train.config:
        raise ValueError("train.config is empty: name a config of `audiosep train`.")
    command_output(*shlex.split(config.audiosep), "train", "--config", config.train.config, "--check")
    check_free(run, Path(config.train.config))
    name = f"train-{run.attempts('train') + 1}"
    settings = run.folder / f"{name}.yaml"
    world = '--trainer.num_nodes "$SLURM_JOB_NUM_NODES" --trainer.devices "$SLURM_NTASKS_PER_NODE"'
    again = '--restart "${SLURM_RESTART_COUNT:-0}"'
    command = [f"{config.audiosep} train --config {shlex.quote(str(settings))} {again}", world]
    body = [
        "# Every rank finds the others through the first node of the job.",
        'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "export MASTER_ADDR",
        *step(command, config.train, config.environment, run.log_folder / name),
    ]
    purpose = (
        f"Trains with {config.train.num_tasks_per_node} tasks on each of {config.train.nodes} nodes.\n"
        "Submitted again, on any number of nodes, it goes on from its last checkpoint."
    )
    files = {settings.name: Path(config.train.config).read_text()}
    return [Job(name, _script(run, name, purpose, config.train, body), files, tuple(after))]


def pipeline(run: Run) -> list[Job]:
    """Precompute every split, seal them, then train; training is cancelled by Slurm when sealing fails for good."""
    jobs = precompute(run)
    return [*jobs, *train(run, [job.name for job in jobs if job.plan])]


def check_free(run: Run, file: Path) -> None:
    """ValueError if jobs of this run folder have not ended that make what the config in `file` makes."""
    if run.dry_run:
        return
    root = _root(file)
    left = [
        job for job in run.queued() if _root(run.folder / f"{re.sub('^seal', 'precompute', job.name)}.yaml") == root
    ]
    if left:
        raise ValueError(
            f"{', '.join(job.name for job in left)} have not ended and make {root}: shards would be rendered twice, "
            "and two trainings would replace each other's checkpoints. Wait for them, or end them with "
            f"`scancel {' '.join(job.job_id for job in reversed(left))}`."
        )


def _root(file: Path) -> str:
    return str(yaml.safe_load(file.read_text())["root"])


def finish(folder: str, split: str, attempt: int, rounds_left: int) -> int:
    """What a sealing job does: 0 sealed; 75 the next round is in the queue; 1 given up, with the missing shards named.

    Jobs that wait for this sealing job wait for the next one instead. Started twice, it does not submit twice."""
    run = Run(load_config(Path(folder, f"seal-{split}-{attempt}.yaml")))
    file = run.folder / f"precompute-{split}-{attempt}.yaml"
    plan = read_plan(run, file)
    if not plan.unfinished:
        status = subprocess.call(shards_command(run.config, "seal", plan))
        if status == 0 and run.config.seal.verify:
            status = subprocess.call([*shards_command(run.config, "verify", plan), "--repair", str(file)])
        return status
    missing = f"{len(plan.unfinished)} of {plan.num_shards} shards of {plan.root} are missing"
    if not rounds_left:
        print(f"{missing}, and no round is left. Their last words:")
        print("\n".join(f"  {line}" for line in last_words(run, split, plan.unfinished)))
        print("Mend what they tell and submit again: what is there stays.")
        return 1
    sealing = f"seal-{split}-{attempt + 1}"
    ids = {entry.name: entry.job_id for entry in run.submissions()}
    if sealing not in ids:
        ids = submit(run, render_round(run, file, plan, split, attempt + 1, rounds_left - 1))
    if job_id := os.environ.get("SLURM_JOB_ID"):  # unless somebody calls this by hand
        move_dependents(job_id, ids[sealing])
    print(f"{missing}: job {ids[sealing]} seals after another round.")
    return STOPPED


def render_round(run: Run, file: Path, plan: Plan, split: str, attempt: int, rounds_left: int) -> list[Job]:
    """The array over the unfinished shards (none when all are there), and the sealing job after it."""
    name = f"seal-{split}-{attempt}"
    purpose = (
        f"Seals {plan.root} when all of its {plan.num_shards} shards are there.\n"
        f"Otherwise submits another array for those that are missing ({rounds_left} more times at most)."
    )
    words = [sys.executable, "-m", "slurm", "finish", str(run.folder), split, str(attempt), str(rounds_left)]
    settings = {f"precompute-{split}-{attempt}.yaml": file.read_text(), f"{name}.yaml": as_yaml(run.config)}
    script = _script(run, name, purpose, run.config.seal, with_status(shlex.join(words), run.config.seal))
    seal = Job(name, script, settings, plan=plan)
    if not plan.unfinished:
        return [seal]
    array = _array(run, split, attempt, plan.unfinished)
    return [array, replace(seal, after=(array.name,), when="afterany")]


def _array(run: Run, split: str, attempt: int, unfinished: list[int]) -> Job:
    config, name = run.config.precompute, f"precompute-{split}-{attempt}"
    if config.nodes * config.num_tasks_per_node != 1:
        raise ValueError(
            f"precompute asks for {config.nodes} nodes of {config.num_tasks_per_node} tasks, but an array element "
            "is one task: all would render the same shards. Raise max_tasks, and cpus_per_task for more processes."
        )
    num_tasks = min(config.max_tasks, len(unfinished), max_array_size() - 1)
    shares = [",".join(map(str, unfinished[task::num_tasks])) for task in range(num_tasks)]
    if len(shares[0]) > LONGEST_ARGUMENT:
        raise ValueError(
            f"{len(unfinished)} unfinished shards in {num_tasks} tasks give each more than a command line holds. Raise "
            "precompute.max_tasks (within the cluster's MaxArraySize), or put more samples into a shard."
        )
    purpose = (
        f"Renders {len(unfinished)} shards with {num_tasks} tasks: task N those on line N of the list,\n"
        "leaving out what is complete by then. Stopped, killed or run twice, it never leaves half a shard."
    )
    files = shlex.quote(str(run.folder / name))
    share = f'--num_processes {config.cpus_per_task} --shards "$shards"'
    command = [f"{run.config.audiosep} precompute --config {files}.yaml", share]
    body = [
        f'shards=$(sed "${{SLURM_ARRAY_TASK_ID}}q;d" {files}.txt)',
        *step(command, config, run.config.environment),
    ]
    limit = f"%{config.max_running}" if config.max_running else ""
    script = _script(run, name, purpose, config, body, f"1-{num_tasks}{limit}")
    return Job(name, script, {f"{name}.txt": "\n".join(shares) + "\n"})


def _script(run: Run, name: str, purpose: str, resources: Resources, body: list[str], array: str = "") -> str:
    check_resources(resources)
    return render(name, purpose, resources, run.config.environment, Path.cwd(), run.log_folder, body, array)
