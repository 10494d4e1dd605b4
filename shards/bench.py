"""`shards bench`: what reading a data set gives from where it stands, and whether that keeps a GPU busy."""

import time
from collections.abc import Sequence
from functools import partial
from itertools import chain, repeat

from shards.arguments import Parser
from shards.loader import ShardLoader
from shards.progress import progress
from shards.storage import storage_options


def bench_command(arguments: Sequence[str]) -> int:
    parser = Parser(
        prog="shards bench",
        description="Read batches as training does, in shuffled order, and say how fast they come. Files that were "
        "read before come from memory: for the storage's own speed, take one larger than memory or not read yet.",
    )
    parser.add_argument("root", help="folder or URL of a sealed data set")
    parser.add_argument("--options", default="{}", help='storage options as JSON: {"endpoint": "https://..."}')
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument(
        "--block-samples", type=int, default=8, help="neighbours that stay together (default: 8, as in configs/train)"
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="time for each number of threads (default: 10)")
    parser.add_argument("--threads", type=int, nargs="+", help="numbers of reader threads to try")
    parser.add_argument("--fields", nargs="+", help="tensors to read (default: all)")
    parser.add_argument("--no-checksums", action="store_true", help="compare headers only")
    parser.add_argument("--samples-per-second", type=float, help="what one GPU trains on, to be judged against")
    options = parser.parse_args(arguments)
    make_loader = partial(
        ShardLoader,
        options.root,
        storage=storage_options(options.options),
        batch_size=options.batch_size,
        block_samples=options.block_samples,
        fields=options.fields and tuple(options.fields),
        checksums=not options.no_checksums,
        drop_last=False,
    )
    usual = make_loader().num_threads
    best, num_threads = max(
        (_measure(make_loader(num_threads=num_threads), options.seconds), num_threads)
        for num_threads in options.threads or sorted({1, usual, 2 * usual})
    )
    if options.samples_per_second:
        missing = 1 - best / options.samples_per_second
        print(
            f"A GPU that trains on {options.samples_per_second:.0f} samples/s "
            + ("is kept busy" if missing <= 0 else f"would wait {missing:.0%} of its time")
            + f" with num_threads = {num_threads}."
        )
    return 0


def _measure(loader: ShardLoader, seconds: float) -> float:
    """Samples/s of reading for about `seconds`; prints what it found."""
    num_samples, first_seconds = 0, 0.0
    started, cpu_started = time.perf_counter(), time.process_time()
    with progress(desc=f"{loader.num_threads} threads", unit=" samples", leave=False) as bar:
        for batch in chain.from_iterable(repeat(loader)):
            elapsed = time.perf_counter() - started
            first_seconds = first_seconds or elapsed
            num_valid = int(batch.valid.sum())
            num_samples += num_valid
            bar.update(num_valid)
            if elapsed > seconds:
                break
    cpu_seconds, gigabytes = time.process_time() - cpu_started, loader.stats.bytes / 1e9
    print(
        f"{loader.num_threads:3} threads: first batch after {first_seconds:.3f} s, {num_samples / elapsed:8.0f} "
        f"samples/s, {gigabytes / elapsed * 1000:7.0f} MB/s, {cpu_seconds / gigabytes:.2f} CPU s/GB"
    )
    return num_samples / elapsed
