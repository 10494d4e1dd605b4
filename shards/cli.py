"""The `shards` command: what one does with a data set in a folder or bucket, each imported only when asked for."""

import argparse
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from shards.arguments import Parser
from shards.manifest import (
    MANIFEST,
    IncompleteError,
    Manifest,
    format_ranges,
    load_manifest,
    parse_ranges,
    read_plan,
    seal,
    survey,
    unrecorded,
)
from shards.storage import open_store, storage_options
from shards.store import Store
from shards.writer import discard

COMMANDS = {
    "seal": ("shards.cli", "check that every shard is complete and write manifest.json"),
    "verify": ("shards.cli", "read every byte and check it; with --repair make bad shards again"),
    "info": ("shards.cli", "what a data set holds, or how far it has come"),
    "show": ("shards.cli", "one sample's JSON and what is in its tensors"),
    "cat": ("shards.cli", "one sample as a tar, or one of its members, to stdout"),
    "copy": ("shards.copy", "a sealed data set to another folder or bucket, checked and resumable"),
    "bench": ("shards.bench", "what reading it gives here, and whether that keeps a GPU busy"),
    "audit": ("shards.ledger", "proof from training's ledgers that every sample was served exactly once"),
}
BAD_SHARDS = 3
INTERRUPTED = 130  # as shells say it


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `shards COMMAND ...`.

    Exit status 0 is success, 2 a failure explained in one message, 3 shards missing or bad (named), 130 Ctrl-C."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        listing = "\n".join(f"  {name:8} {meaning}" for name, (_, meaning) in COMMANDS.items())
        print(f"usage: shards COMMAND ...\n\n{listing}\n\nROOT is a folder or a URL. See also shards COMMAND --help.")
        return 0
    command = words.pop(0)
    if command not in COMMANDS:
        print(f"shards: no such command; there are {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    try:
        return getattr(importlib.import_module(COMMANDS[command][0]), f"{command}_command")(words)
    except (ValueError, OSError, EOFError) as error:
        print(f"shards {command}: {error}", file=sys.stderr)
        return BAD_SHARDS if isinstance(error, IncompleteError) else 2
    except KeyboardInterrupt:
        print(f"shards {command}: interrupted", file=sys.stderr, flush=True)
        if arguments is None:  # the process is ours, and would wait for what its threads do on a slow link
            sys.stdout.flush()
            os._exit(INTERRUPTED)
        return INTERRUPTED


def _parser(command: str) -> Parser:
    parser = Parser(prog=f"shards {command}", description=f"{COMMANDS[command][1].capitalize()}.")
    parser.add_argument("root", metavar="ROOT", help="folder or URL of the shards")
    parser.add_argument("--options", default="{}", help='storage options as JSON: {"endpoint": "https://..."}')
    return parser


def _open(options: argparse.Namespace) -> Store:
    return open_store(options.root, storage_options(options.options))


def seal_command(arguments: Sequence[str]) -> int:
    parser = _parser("seal")
    parser.add_argument("--threads", type=int, help="records read at once (default: enough to hide the latency)")
    options = parser.parse_args(arguments)
    print(_summary(seal(_open(options), options.threads)))
    return 0


def _summary(manifest: Manifest) -> str:
    rejected = ", ".join(f"{count} {reason}" for reason, count in manifest.rejected.items())
    return (
        f"{manifest.url}: {manifest.num_samples} samples in {manifest.num_shards} shards, "
        f"{manifest.tar_bytes.sum() / 1e9:.3f} GB, digest {manifest.digest}"
        f"{f'; inputs rejected: {rejected}' if rejected else ''}"
    )


def verify_command(arguments: Sequence[str]) -> int:
    from shards.verify import verify

    parser = _parser("verify")
    parser.add_argument("--shards", metavar="3,17,40-52", help="only these (default: all)")
    parser.add_argument("--threads", type=int, help="shards read at once (default: one for each core, more in buckets)")
    parser.add_argument(
        "--repair", metavar="CONFIG", help="make bad shards again by this config of audiosep precompute"
    )
    options = parser.parse_args(arguments)
    store = _open(options)
    report = verify(store, parse_ranges(options.shards) if options.shards else None, options.threads)
    if report.bad and options.repair:
        print(report)
        if status := _repair(store, list(report.bad), options.repair):
            return status
        report = verify(store, list(report.bad), options.threads)
    print(report)
    if report.bad:
        ranges = format_ranges(list(report.bad))
        print(f"Make them again: shards verify {store.url} --shards {ranges} --repair CONFIG", file=sys.stderr)
    return BAD_SHARDS if report.bad else 0


def _repair(store: Store, bad: Sequence[int], config: str) -> int:
    """Delete the bad shards and let `audiosep precompute` make them again; its exit status.

    A sealed root is sealed again: where the same software runs on the same kind of processor, to the same digest."""
    plan = read_plan(store)
    command = [sys.executable, "-m", "audiosep.cli", "precompute", "--config", config, "--root", store.url]
    command += ["--shards", format_ranges(bad)]
    if status := subprocess.run([*command, "--plan"], check=False, stdout=subprocess.DEVNULL).returncode:
        return status  # a config of another data set, say: nothing is deleted
    for index in bad:
        discard(store, plan.shard_name(index))
    status = subprocess.run(command, check=False).returncode
    if not status and store.size(MANIFEST) is not None:
        before, after = load_manifest(store), seal(store)
        if after.digest != before.digest:
            print(f"{store.url}: the new shards have other bytes; the digest {before.digest} became {after.digest}.")
    return status


def info_command(arguments: Sequence[str]) -> int:
    parser = _parser("info")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--quick", action="store_true", help="count records by name instead of reading them")
    options = parser.parse_args(arguments)
    store = _open(options)
    plan = read_plan(store)
    facts = {"url": store.url, **asdict(plan), "num_shards": plan.num_shards, "spec_digest": plan.spec_digest}
    if store.size(MANIFEST) is not None:
        manifest = load_manifest(store)
        summary = _summary(manifest)
        num_bytes = int(manifest.tar_bytes.sum())
        fields = [asdict(field) for field in manifest.fields]
        facts |= {"digest": manifest.digest, "num_bytes": num_bytes, "fields": fields, "rejected": manifest.rejected}
    else:
        if options.quick:
            missing = list(unrecorded(store, plan))
        else:
            missing = [index for index, found in enumerate(survey(store, plan)) if isinstance(found, str)]
        facts["missing_shards"] = format_ranges(missing)
        summary = f"{store.url}: not sealed, {plan.num_shards - len(missing)} of {plan.num_shards} shards are complete"
    if options.json:
        print(json.dumps(facts, indent=2))
        return 0
    print(summary)
    for name in ("fields", "rejected", "missing_shards", "spec"):
        if facts.get(name):
            print(f"{name}: {json.dumps(facts[name], indent=2)}")
    return 0


def _sample_parser(command: str) -> Parser:
    parser = _parser(command)
    parser.add_argument("sample", type=int, metavar="SAMPLE", help="its number, from 0")
    return parser


def show_command(arguments: Sequence[str]) -> int:
    from shards.verify import read_sample

    options = _sample_parser("show").parse_args(arguments)
    store = _open(options)
    manifest = load_manifest(store)
    sample = read_sample(store, manifest, options.sample)
    shard, row = manifest.locate(options.sample)
    print(f"{sample.key}, row {row} of {manifest.shard_name(shard)}.tar")
    print(json.dumps(sample.text, indent=2, ensure_ascii=False))
    for field in manifest.fields:
        values = sample.arrays[field.name]
        if field.dtype == "bfloat16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        finite = values[np.isfinite(values)]
        low, high = (finite.min(), finite.max()) if finite.size else (np.nan, np.nan)
        mean = np.abs(finite).mean(dtype=np.float64) if finite.size else np.nan
        print(
            f"{field.name}: {field.dtype}{list(field.shape)}, {low:.4g} to {high:.4g}, mean magnitude {mean:.4g}, "
            f"{values.size - finite.size} not finite"
        )
    return 0


def cat_command(arguments: Sequence[str]) -> int:
    from shards.tar import END, encode, members
    from shards.verify import read_sample

    parser = _sample_parser("cat")
    parser.add_argument("member", nargs="?", help="such as json or condition.npy (default: all, as a tar)")
    options = parser.parse_args(arguments)
    store = _open(options)
    sample = read_sample(store, load_manifest(store), options.sample)
    data = b"".join([*encode(sample), END])
    if options.member:
        places = {member.name.partition(".")[2]: member for member in members(data)}
        if options.member not in places:
            raise ValueError(f"sample {sample.key} has no {options.member}; it has {', '.join(places)}.")
        member = places[options.member]
        data = data[member.offset : member.offset + member.size]
    sys.stdout.buffer.write(data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
