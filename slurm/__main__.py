"""`python -m slurm COMMAND`: see USAGE."""

import argparse
import json
import re
import sys
import time
from dataclasses import asdict
from typing import NoReturn

from slurm import pipeline
from slurm.config import known_keys, load_config
from slurm.status import lines, read_status
from slurm.submit import Run, show, submit

USAGE = """
precompute  an array over the unfinished shards, then a job that seals them or starts another round
train       one task for each GPU; goes on from its last checkpoint, also on another number of nodes
pipeline    precompute, seal and train, each after the other
status      what is done, running, failed and left
"""


def main(words: list[str] | None = None) -> int:
    """Run one command; a failure that a user can act on is one message on stderr and exit status 2."""
    try:
        return _run(sys.argv[1:] if words is None else words)
    except (ValueError, OSError) as error:
        print(f"slurm: {error}", file=sys.stderr)
        return 2


def _run(words: list[str]) -> int:
    if words[:1] == ["finish"]:  # the sealing job's own command
        folder, split, attempt, rounds_left = words[1:]
        return pipeline.finish(folder, split, int(attempt), int(rounds_left))
    keys = "\n".join(f"  --{key}\n        {meaning}" for key, meaning in known_keys().items())
    parser = _Parser(
        "python -m slurm",
        description=USAGE,
        epilog=f"config keys (a key of the command's own section needs no section):\n{keys}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("command", choices=["precompute", "train", "pipeline", "status"])
    parser.add_argument("--config", required=True, help="YAML file, such as those in configs/slurm/")
    parser.add_argument("--dry-run", action="store_true", help="print the scripts and submit nothing")
    parser.add_argument("--json", action="store_true", help="status as JSON")
    parser.add_argument("--watch", type=float, metavar="SECONDS", help="status again and again while jobs are left")
    options, overrides = parser.parse_known_args(words)
    run = Run(load_config(options.config, overrides, options.command), options.dry_run)
    if options.command == "status":
        return _status(run, options.json, options.watch)
    stages = {"precompute": pipeline.precompute, "train": pipeline.train, "pipeline": pipeline.pipeline}
    jobs = stages[options.command](run)
    if options.dry_run:
        print("\n".join(show(jobs)))
        return 0
    ids = submit(run, jobs)
    for name, job_id in ids.items():
        print(f"{name}: job {job_id}")
    print(f"All end with: scancel {' '.join(reversed(ids.values()))}")
    print(f"Scripts, configs and logs: {run.folder}")
    return 0


class _Parser(argparse.ArgumentParser):
    """Its errors name arguments, but repeat no value: it may be a secret that was meant for another place."""

    def error(self, message: str) -> NoReturn:
        super().error(re.split("['\"=]", message)[0].rstrip(": "))


def _status(run: Run, as_json: bool, every_seconds: float | None) -> int:
    while True:
        status = read_status(run)
        print(json.dumps(asdict(status)) if as_json else "\n".join(lines(status, run.folder)), flush=True)
        if every_seconds is None or not status.active:
            return 0
        time.sleep(every_seconds)
        print()


if __name__ == "__main__":
    sys.exit(main())
