"""A sealed data set from one place to another: `shards copy SOURCE TARGET`, checked, in parallel, and resumable."""

import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict

import xxhash

from shards.arguments import Parser
from shards.manifest import MANIFEST, SPEC, IncompleteError, Manifest, confirmed, format_ranges, parse_manifest
from shards.progress import progress
from shards.record import Record, complete_record, encode_index, read_record
from shards.storage import open_store, storage_options
from shards.store import Store, anew
from shards.tar import canonical_json
from shards.verify import verify
from shards.writer import discard

STOP_SECONDS = 1.0


def copy(source: Store, target: Store, jobs: int = 4) -> Manifest:
    """Copy a sealed data set, `jobs` shards at a time, and return its manifest, which is written last.

    Every byte is compared with the source's checksums on its way. Shards that are complete in the target are not
    copied again, so the same call goes on after any interruption, and sweeps up what that left. An exception such as
    KeyboardInterrupt waits for STOP_SECONDS at most for uploads that end in order; a slow link may need minutes more.
    Raises ValueError if the target belongs to another data set, IncompleteError naming the shards that could not be
    copied."""
    data, spec = (confirmed(source, name, source.read(name)) for name in (MANIFEST, SPEC))
    manifest = parse_manifest(data, source.url)
    if not target.create(SPEC, spec) and target.read(SPEC) != spec:
        raise ValueError(f"{target.url} is bound to another spec than {source.url}; copy to another place.")
    if target.size(MANIFEST) is not None and target.read(MANIFEST) != data:
        raise ValueError(f"{target.url} holds another sealed data set than {source.url}; copy to another place.")
    target.sweep(rewritten={f"{manifest.shard_name(index)}.tar" for index in range(manifest.num_shards)})
    failed: dict[int, str] = {}
    stop, pool = threading.Event(), ThreadPoolExecutor(jobs)
    with progress(total=int(manifest.tar_bytes.sum()), desc="copy", unit="B", unit_scale=True) as bar:

        def attempt(index: int) -> None:
            shown = 0

            def show(num_bytes: int) -> None:
                nonlocal shown
                bar.update(num_bytes - shown)  # back to the first byte where a shard begins anew
                shown = num_bytes

            try:
                anew(lambda: copy_shard(source, target, manifest, index, show, stop))
            except (ValueError, OSError, EOFError) as error:
                failed[index] = str(error)

        copies = [pool.submit(attempt, index) for index in range(manifest.num_shards)]
        try:
            for each in copies:
                each.result()
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            wait([each for each in copies if each.running()], STOP_SECONDS)
    if failed:
        shown = "; ".join(f"{manifest.shard_name(index)}: {failed[index]}" for index in sorted(failed)[:5])
        raise IncompleteError(
            f"{len(failed)} of {manifest.num_shards} shards could not be copied ({format_ranges(list(failed))}): "
            f"{shown}. Run the same command again to go on with them.",
            sorted(failed),
        )
    target.write(MANIFEST, data)
    return manifest


def copy_shard(
    source: Store,
    target: Store,
    manifest: Manifest,
    index: int,
    copied: Callable[[int], object],
    stop: threading.Event,
) -> None:
    """Copy tar, index and record, the record last; nothing if the target has this very shard.

    `copied` is told how many of the tar's bytes are there. Raises ValueError where the source is not what its manifest
    says, and InterruptedError soon after `stop` is set."""
    name = manifest.shard_name(index)
    record = read_record(source, name)
    confirmed(source, f"{name}.json", canonical_json(asdict(record)))
    if (record.checksum, record.index_checksum) != (manifest.checksum(index), manifest.index_checksum(index)):
        raise ValueError(f"{source.url}/{name}.json is not the record that the manifest was sealed with")
    if _has(target, name, record):
        copied(record.num_bytes)
        return
    with target.writer(f"{name}.tar") as sink:
        state, num_bytes = xxhash.xxh3_64(), 0
        for piece in source.stream(f"{name}.tar"):
            if stop.is_set():
                raise InterruptedError(f"{name} was not finished")
            state.update(piece)
            sink.write(piece)
            num_bytes += len(piece)
            copied(num_bytes)
        if state.hexdigest() != record.checksum:
            raise ValueError(
                f"{source.url}/{name}.tar has the checksum {state.hexdigest()} and its record says {record.checksum}: "
                "check it with `shards verify`"
            )
    target.write(f"{name}.idx.npy", encode_index(record.read_index(source)))  # what was checked, not read once more
    target.write(f"{name}.json", canonical_json(asdict(record)))


def _has(target: Store, name: str, record: Record) -> bool:
    """Whether the target has a complete shard with this record."""
    try:
        return complete_record(target, name, record.spec_digest, target.size) == record
    except (FileNotFoundError, ValueError):
        return False


def copy_command(arguments: Sequence[str]) -> int:
    parser = Parser(prog="shards copy", description="Copy a sealed data set, checking every byte.")
    parser.add_argument("source", metavar="SOURCE", help="folder or URL of a sealed data set")
    parser.add_argument("target", metavar="TARGET", help="folder or URL to copy it to; what is there already is kept")
    parser.add_argument("--jobs", type=int, default=4, help="shards copied at once (default: 4)")
    parser.add_argument("--verify", action="store_true", help="read the copy back and check it, too")
    for side in ("source", "target"):
        parser.add_argument(
            f"--{side}-options", default="{}", help='storage options as JSON: {"endpoint": "https://..."}'
        )
    options = parser.parse_args(arguments)
    source = open_store(options.source, storage_options(options.source_options))
    target = open_store(options.target, storage_options(options.target_options))
    manifest = copy(source, target, options.jobs)
    print(
        f"{target.url}: {manifest.num_shards} shards, {manifest.tar_bytes.sum() / 1e9:.2f} GB, digest {manifest.digest}"
    )
    if options.verify:
        _verify(source, target, manifest, options.jobs)
    return 0


def _verify(source: Store, target: Store, manifest: Manifest, jobs: int) -> None:
    """Read the copy back, and copy once more what is bad in it. Raises IncompleteError if that doesn't help."""
    report = verify(target)
    print(report)
    if not report.bad:
        return
    bad = sorted(report.bad)
    print(f"{target.url}: copying the shards {format_ranges(bad)} once more", file=sys.stderr)
    for index in bad:
        discard(target, manifest.shard_name(index))
    copy(source, target, jobs)
    report = verify(target, bad)
    print(report)
    if bad := sorted(report.bad):
        raise IncompleteError(
            f"{target.url}: the shards {format_ranges(bad)} are still bad after they were copied once more, "
            "every byte checked on its way. Look after the disk or bucket there, or copy to another place; "
            f"`shards verify {source.url}` tells whether the source is good.",
            bad,
        )
