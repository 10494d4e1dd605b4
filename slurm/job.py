"""sbatch text: what a job asks for and what it runs, as a short script that a person can read, keep and submit by hand.

Pure: from configs and strings to text. One convention joins the scripts and the commands in them: Slurm sends
`STOP_SIGNAL` to the job's steps before the time limit, the command stops cleanly and exits with status `STOPPED`, and
the script puts its own job back into the queue."""

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

STOP_SIGNAL = "USR1"
STOPPED = 75  # EX_TEMPFAIL: stopped by a signal with everything finished so far kept
MISTAKE = 2  # ended with a message that says what to mend
OWN_OPTIONS = frozenset(
    ("array", "chdir", "dependency", "error", "job-name", "open-mode", "output", "requeue", "signal", "wait")
)


@dataclass(frozen=True)
class Environment:
    """Where commands run: lines before them, variables, and a container around the heavy ones."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    setup: Annotated[tuple[str, ...], Field(description="shell lines before the command, such as module load")] = ()
    variables: Annotated[dict[str, str], Field(description="exported: NCCL, InfiniBand, threads")] = field(
        default_factory=dict
    )
    container_runtime: Annotated[
        Literal["pyxis", "apptainer"], Field(description="pyxis: options of srun; apptainer: a command after srun")
    ] = "pyxis"
    container_image: Annotated[str, Field(description="image for array and training tasks; empty: none")] = ""
    container_mounts: Annotated[tuple[str, ...], Field(description="HOST:CONTAINER, beside the working folder")] = ()


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one job asks for: each key is one sbatch option."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    time: Annotated[str, Field(description="limit, in quotes: MINUTES, H:M:S or D-H:M:S")] = "1:00:00"
    warn_seconds: Annotated[int, Field(ge=0, description="warning signal this long before the time limit, s")] = 120
    partition: Annotated[str, Field(description="empty: the cluster's default, as for the next keys")] = ""
    account: Annotated[str, Field(description="account to charge")] = ""
    qos: Annotated[str, Field(description="quality of service")] = ""
    constraint: Annotated[str, Field(description="node features wanted")] = ""
    nodes: Annotated[int, Field(ge=1, description="number of nodes")] = 1
    tasks_per_node: Annotated[int, Field(ge=1, description="processes on each node; with GPUs one for each GPU")] = 1
    gpus_per_node: Annotated[int, Field(ge=0, description="GPUs on each node")] = 0
    gpu_type: Annotated[str, Field(description="kind of GPU, as in the cluster's gres")] = ""
    cpus_per_task: Annotated[int, Field(ge=1, description="cores for each process")] = 1
    memory: Annotated[str, Field(description="memory of each node, such as 64G")] = ""
    mail_user: Annotated[str, Field(description="who is told")] = ""
    mail_type: Annotated[str, Field(description="of what: END,FAIL,REQUEUE,...")] = "END,FAIL"
    extra: Annotated[tuple[str, ...], Field(description="further sbatch options, such as --exclusive")] = ()
    max_restarts: Annotated[int, Field(ge=0, description="restarts after which it requeues itself no more")] = 20

    @property
    def num_tasks_per_node(self) -> int:
        return self.gpus_per_node or self.tasks_per_node


def render(
    name: str,
    purpose: str,
    resources: Resources,
    environment: Environment,
    workdir: Path,
    log_folder: Path,
    body: Sequence[str],
    array: str = "",
) -> str:
    """The whole sbatch script: directives, what it is for (`purpose`, one line a comment), settings, then `body`."""
    log = log_folder / ("%x-%A_%a.log" if array else "%x-%j.log")
    options = [
        f"--job-name={shlex.quote(name)}",
        f"--chdir={shlex.quote(str(workdir))}",
        f"--output={shlex.quote(str(log))}",
        "--open-mode=append",
        "--requeue",
        *([f"--array={array}"] if array else []),
        *_resource_options(resources),
    ]
    lines = ["#!/bin/bash"]
    lines += [f"#SBATCH {option}" for option in options]
    lines += [f"# {line}" for line in purpose.splitlines()]
    if environment.setup:  # before `set -u`, which neither modules nor conda bear
        lines += ["# shellcheck disable=SC1091 # what is sourced is not here to be checked", *environment.setup]
    lines += [f"export {key}={shlex.quote(value)}" for key, value in environment.variables.items()]
    return "\n".join([*lines, "set -u", "", *body, ""])


def _resource_options(resources: Resources) -> Iterator[str]:
    named = ("time", "partition", "account", "qos", "constraint", "nodes", "cpus_per_task")
    for key in named:
        if value := getattr(resources, key):
            yield f"--{key.replace('_', '-')}={value}"
    yield f"--ntasks-per-node={resources.num_tasks_per_node}"
    if resources.gpus_per_node:
        yield "--gres=" + ":".join(filter(None, ("gpu", resources.gpu_type, str(resources.gpus_per_node))))
    if resources.memory:
        yield f"--mem={resources.memory}"
    if resources.warn_seconds:
        yield f"--signal={STOP_SIGNAL}@{resources.warn_seconds}"
    if resources.mail_user:
        yield from (f"--mail-user={resources.mail_user}", f"--mail-type={resources.mail_type}")
    yield from resources.extra


def step(command: Sequence[str], resources: Resources, environment: Environment, log: Path | None = None) -> list[str]:
    """Shell lines that run `command`, in parts of a line each, as the job's tasks, and requeue the job when they were
    stopped; with `log`, the job's log less "-JOB.log", also when they crashed or were killed.

    srun hands the warning signal to every task, and ends all of them within seconds when one dies: no rank waits for
    ever in a collective operation. Its status is then that signal, whatever the status of the first, which only srun's
    messages tell: a mistake would be made again in every restart."""
    parts = [f"srun --kill-on-bad-exit=1 --cpus-per-task={resources.cpus_per_task}"]
    image, mounts = shlex.quote(environment.container_image), [*map(shlex.quote, environment.container_mounts)]
    if environment.container_image and environment.container_runtime == "pyxis":
        mounted = ",".join(('"$PWD:$PWD"', *mounts))
        parts += [f"--container-image={image}", f'--container-workdir="$PWD" --container-mounts={mounted}']
    elif environment.container_image:
        gpus = "--nv " if resources.gpus_per_node else ""
        parts += [f"apptainer exec {gpus}" + " ".join(f"--bind {mount}" for mount in ('"$PWD"', *mounts)), image]
    before: list[str] = []
    mistake: list[str] = []
    again, reason = f'[ "$status" -eq {STOPPED} ]', f"{STOPPED}: stopped cleanly by a signal, so it goes on from there."
    if log:
        again, reason = f'{{ {again} || [ "$status" -gt 128 ]; }}', f"{reason} Above 128: a task was killed."
        before = [f'log={shlex.quote(str(log))}"-$SLURM_JOB_ID.log"', 'begin=$(stat --format=%s "$log")']
        mistake = [
            f"# {MISTAKE}: one task told a mistake (255 is apptainer's), which ended the others by a signal.",
            'if tail -c "+$((begin + 1))" "$log" |',
            f"    grep -qaE 'srun: error: .*: Exited with exit code ({MISTAKE}|255)$'; then",
            f"    status={MISTAKE}",
            "fi",
        ]
    requeue = [
        "",
        f"# {reason}",
        f'if {again} && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {resources.max_restarts} ]; then',
        '    scontrol requeue "$SLURM_JOB_ID"',
        "fi",
    ]
    return [*before, *with_status(" \\\n    ".join([*parts, *command]), resources, mistake, requeue)]


def with_status(
    command: str, resources: Resources, correction: Sequence[str] = (), afterwards: Sequence[str] = ()
) -> list[str]:
    """Shell lines that run `command`, tell its status in the last line of the log, and end with it."""
    tell = f'echo "ended with status $status (restart ${{SLURM_RESTART_COUNT:-0}} of {resources.max_restarts})"'
    return [command, "status=$?", *correction, tell, *afterwards, 'exit "$status"']


def check_script(script: str) -> None:
    """ValueError for what `sbatch --test-only` lets through although it would not do what it says."""
    lines = script.splitlines()
    first_command = next(n for n, line in enumerate(lines) if line.strip() and not line.startswith("#"))
    for number, line in enumerate(lines):
        if re.match(r"\s*#\s*SBATCH\b", line) and (number > first_command or not line.startswith("#SBATCH --")):
            raise ValueError(
                f"Line {number + 1}, {line.strip()!r}, looks like an sbatch option but sbatch would ignore it: options "
                "begin with '#SBATCH --' and stand before the first command. Put it under `extra`."
            )
    if "\r" in script:
        raise ValueError("The script holds carriage returns (CRLF), which bash takes for a part of each command.")


def check_resources(resources: Resources) -> None:
    """ValueError for requests that contradict themselves or the options that the submission sets by itself."""
    for option in resources.extra:
        if not re.fullmatch(r"--[a-z][a-z-]*(=\S.*)?", option):
            raise ValueError(f"extra: {option!r} is not an sbatch option of the form --name or --name=value.")
        if option[2:].partition("=")[0] in OWN_OPTIONS:
            raise ValueError(f"extra: {option!r} is set by the submission itself; remove it.")
    limit = time_seconds(resources.time)
    if resources.warn_seconds and limit < 2 * resources.warn_seconds:
        raise ValueError(
            f"time {resources.time!r} is {limit} s and warn_seconds is {resources.warn_seconds}: the job would spend "
            "more time stopping than working. Ask for a longer time or an earlier warning."
        )


def time_seconds(text: str) -> int:
    """An sbatch time limit (M, M:S, H:M:S, D-H, D-H:M, D-H:M:S) in seconds; ValueError for anything else."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if not found:
        raise ValueError(f"time {text!r} is not a limit that sbatch reads; write MINUTES, H:M:S or D-H:M:S.")
    days, *rest = found.groups()
    parts = [int(part) for part in rest if part is not None]
    if days is not None or len(parts) == 3:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    else:
        hours, minutes, seconds = 0, *(*parts, 0)[:2]
    return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds
