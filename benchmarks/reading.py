"""Reading side by side: the same float16 samples, page cache warm, to batches of 16 whose every page is touched.

    python -m benchmarks.reading [--samples 512] [--rounds 5] [--folder FOLDER]

Rounds are interleaved, so that whatever else the machine does falls on everyone alike; medians are reported. Peers that
are not installed (benchmarks/peers.txt) are left out. The table goes to benchmarks/results/reading.md as well."""

import argparse
import importlib.util
import multiprocessing
import os
import platform
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import torch
import webdataset
from torch.utils.data import DataLoader

from shards.loader import ShardLoader
from shards.manifest import bind, load_manifest, seal
from shards.storage import open_store
from shards.tar import Sample
from shards.writer import write_shard

SHAPE = (1, 501, 1025)  # 5 s at 32 kHz, windows of 2048, hop 320
FIELDS = ("stft_mixture.2048", "stft_segment.2048")
BATCH_SIZE = 16
SHARD_SAMPLES = 64
GIGABYTES = len(FIELDS) * int(np.prod(SHAPE)) * 2 / 1e9  # of one sample
BUSY_SECONDS = 0.05

Tensors = Iterable[torch.Tensor]


def samples(num_samples: int) -> Iterator[Sample]:
    generator = np.random.default_rng(0)
    arrays = [np.abs(generator.standard_normal(SHAPE)).astype(np.float16) for _ in range(4)]
    for index in range(num_samples):
        pair = {name: arrays[(index + place) % 4] for place, name in enumerate(FIELDS)}
        yield Sample(f"{index:09d}", {"text": "a dog barks while rain falls", "index": index}, pair)


class Ours:
    name = "shards.ShardLoader"

    def write(self, folder: Path, num_samples: int) -> None:
        store = open_store(folder)
        plan = bind(store, {}, num_samples, SHARD_SAMPLES)
        source = samples(num_samples)
        for shard in range(plan.num_shards):
            own = [next(source) for _ in plan.samples(shard)]
            write_shard(store, plan.shard_name(shard), own, num_samples=len(own), spec_digest=plan.spec_digest)
        seal(store)

    def __init__(self) -> None:
        self._loaders: dict[str, ShardLoader] = {}  # kept between rounds, as in training: their memory is used again

    def batches(self, folder: Path, num_threads: int, **options: Any) -> Iterator[Tensors]:
        setting = f"{num_threads} {options}"
        if setting not in self._loaders:
            self._loaders[setting] = ShardLoader(folder, batch_size=BATCH_SIZE, num_threads=num_threads, **options)
        for batch in self._loaders[setting]:
            yield batch.arrays.values()


class WebDataset:
    """Reads the very tars that ours reads."""

    name = f"webdataset {version('webdataset')}"

    def write(self, folder: Path, num_samples: int) -> None:
        folder.symlink_to(folder.parent / "ours")

    def batches(self, folder: Path, num_workers: int) -> Iterator[Tensors]:
        urls = [str(path) for path in sorted(folder.glob("*.tar"))]
        data = webdataset.WebDataset(urls, shardshuffle=False).decode().batched(BATCH_SIZE)
        for batch in DataLoader(data, batch_size=None, num_workers=num_workers):
            yield [torch.as_tensor(batch[f"{name}.npy"]) for name in FIELDS]


class MosaicML:
    name = "MosaicML Streaming"

    def write(self, folder: Path, num_samples: int) -> None:
        encoding = f"ndarray:float16:{','.join(map(str, SHAPE))}"
        columns = {"key": "str", "text": "json", **dict.fromkeys(FIELDS, encoding)}
        with self._module().MDSWriter(out=str(folder), columns=columns, size_limit=1 << 28) as writer:
            for sample in samples(num_samples):
                writer.write({"key": sample.key, "text": sample.text, **sample.arrays})

    def batches(self, folder: Path, num_workers: int) -> Iterator[Tensors]:
        data = self._module().StreamingDataset(local=str(folder), shuffle=False, batch_size=BATCH_SIZE)
        for batch in DataLoader(data, batch_size=BATCH_SIZE, num_workers=num_workers):
            yield [batch[name] for name in FIELDS]

    def _module(self):
        sys.modules.setdefault("streaming.vision", MagicMock())  # its image data sets need torchvision; unused here
        return importlib.import_module("streaming")


class LitData:
    name = "LitData"

    def write(self, folder: Path, num_samples: int) -> None:
        writer = importlib.import_module("litdata.streaming.writer").BinaryWriter(str(folder), chunk_bytes=1 << 28)
        for index, sample in enumerate(samples(num_samples)):
            writer[index] = {"key": sample.key, "text": dict(sample.text), **sample.arrays}
        writer.done()
        writer.merge(1)

    def batches(self, folder: Path, num_workers: int) -> Iterator[Tensors]:
        litdata = importlib.import_module("litdata")
        data = litdata.StreamingDataset(str(folder), shuffle=False)
        for batch in litdata.StreamingDataLoader(data, batch_size=BATCH_SIZE, num_workers=num_workers):
            yield [batch[name] for name in FIELDS]


class Memcpy:
    """The floor: one thread copies samples that are in memory already into rows of a reused buffer."""

    def __init__(self, num_samples: int) -> None:
        size = int(GIGABYTES * 1e9)
        self._source = np.random.default_rng(0).integers(0, 256, (num_samples, size), np.uint8)
        self._rows = np.ones((4 * BATCH_SIZE, size), np.uint8)

    def run(self) -> None:
        for place, index in enumerate(np.random.default_rng(0).permutation(len(self._source))):
            np.copyto(self._rows[place % len(self._rows)], self._source[index])


class Preadv:
    """What one kernel copy costs: one thread reads whole samples from the open shards into rows of a reused buffer."""

    def __init__(self, folder: Path) -> None:
        store = open_store(folder)
        manifest = load_manifest(store)
        self._places: list[tuple[int, int, int]] = []  # descriptor, offset, size
        for shard in range(manifest.num_shards):
            descriptor = os.open(folder / f"{manifest.shard_name(shard)}.tar", os.O_RDONLY)
            self._places += [(descriptor, *place) for place in manifest.read_index(store, shard)[:, :2].tolist()]
        self._rows = np.ones((4 * BATCH_SIZE, max(size for _, _, size in self._places)), np.uint8)

    def run(self) -> None:
        for place, index in enumerate(np.random.default_rng(0).permutation(len(self._places))):
            descriptor, offset, size = self._places[index]
            if os.preadv(descriptor, [self._rows[place % len(self._rows)][:size]], offset) < size:
                raise EOFError(f"sample {index} is cut off")


def consume(batches: Iterator[Tensors], work: Callable[[], object] | None = None) -> int:
    """Touch every page of every tensor, as a training step does; returns the number of batches."""
    count = 0
    for tensors in batches:
        for tensor in tensors:
            tensor.view(-1).view(torch.uint8)[::4096].sum()
        if work:
            work()
        count += 1
    return count


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds, those of child processes included."""
    started, cpu = time.perf_counter(), _cpu_seconds()
    run()
    return time.perf_counter() - started, _cpu_seconds() - cpu


def _cpu_seconds() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def compare(folder: Path, num_samples: int, rounds: int) -> Iterator[str]:
    """The table of all readers, each at its best setting."""
    peers = [WebDataset(), *(peer() for peer, module in _PEERS if importlib.util.find_spec(module))]
    ours = Ours()
    ours.write(folder / "ours", num_samples)
    runs: dict[str, dict[str, Callable[[], object]]] = {
        _MEMCPY: {"": Memcpy(num_samples).run},
        _PREADV: {"": Preadv(folder / "ours").run},
    }
    for label, settings in _OUR_SETTINGS.items():
        runs[label] = {
            f"{threads} threads": partial(_epoch, ours, folder / "ours", threads, settings) for threads in (1, 2)
        }
    for peer in peers:
        peer.write(folder / peer.name, num_samples)
        runs[peer.name] = {f"{n} workers": partial(_epoch, peer, folder / peer.name, n, {}) for n in (0, 1, 2)}
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for number in range(rounds + 1):
        for label, variants in runs.items():
            for variant, run in variants.items():
                times = timed(run)
                if number:  # the first round warms up
                    found.setdefault((label, variant), []).append(times)
    rows = {key: [statistics.median(column) for column in zip(*times)] for key, times in found.items()}
    best = {label: min(variants, key=lambda variant: rows[label, variant][0]) for label, variants in runs.items()}
    reference = rows[peers[0].name, best[peers[0].name]]
    yield "| reader | at | samples/s | against webdataset | CPU s/GB | webdataset's CPU against it |"
    yield "|---|---|---|---|---|---|"
    for label, variants in runs.items():
        for variant in variants:
            wall, cpu = rows[label, variant]
            yield (
                f"| {label} | {variant}{' (best)' if len(variants) > 1 and variant == best[label] else ''} "
                f"| {num_samples / wall:.0f} | {reference[0] / wall:.1f} "
                f"| {cpu / num_samples / GIGABYTES:.3f} | {reference[1] / cpu:.1f} |"
            )
    one_thread = {_PREADV: "", **dict.fromkeys(_OUR_SETTINGS, "1 threads")}
    shares = (f"{rows[_MEMCPY, ''][0] / rows[key][0]:.0%} ({key[0]})" for key in one_thread.items())
    yield f"\nOne thread reaches these shares of memcpy's samples/s in the same process: {', '.join(shares)}."


_MEMCPY = "memcpy, one thread (the floor)"
_PREADV = "bare preadv, one thread (the floor for files)"
_PEERS = ((MosaicML, "streaming"), (LitData, "litdata"))
_OUR_SETTINGS: dict[str, dict[str, Any]] = {
    "ours, headers and checksums (the default)": {},
    "ours, headers": {"checksums": False},
    "ours, headers, widened to float32": {"checksums": False, "float32": True},
}


def _epoch(reader: Ours | WebDataset | MosaicML | LitData, folder: Path, count: int, options: dict) -> None:
    consume(reader.batches(folder, count, **options))


def busy(folder: Path) -> Iterator[str]:
    """How much longer steps of 50 ms take when their batches come from the loader."""
    matrix = torch.rand(512, 512)
    seconds, _ = timed(lambda: [matrix @ matrix for _ in range(20)])
    repeats = max(1, round(20 * BUSY_SECONDS / seconds))

    def work() -> None:
        for _ in range(repeats):
            torch.mm(matrix, matrix)

    ready = [torch.ones(BATCH_SIZE, *SHAPE, dtype=torch.float16) for _ in FIELDS]
    loader = ShardLoader(folder, batch_size=BATCH_SIZE, repeat=4)
    shares = []
    for _ in range(3):
        alone, _ = timed(lambda: consume(iter([ready] * len(loader)), work))
        beside, _ = timed(lambda: consume((batch.arrays.values() for batch in loader), work))
        shares.append((beside - alone) / alone)
    yield (
        f"Steps that compute for {alone / len(loader) * 1000:.0f} ms take {statistics.median(shares):.1%} longer with "
        "the loader than with one batch over and over (median of 3)."
    )


def ranks(folder: Path) -> Iterator[str]:
    """All ranks of one machine together, each a process with one reader thread."""
    yield "| ranks on this machine | samples/s together |"
    yield "|---|---|"
    for world_size in (1, 2, 4):
        with multiprocessing.get_context("spawn").Pool(world_size) as pool:
            shares = [(folder, rank, world_size) for rank in range(world_size)]
            pool.starmap(_read_share, shares, chunksize=1)  # warms up, imports among it
            started = time.perf_counter()
            count = sum(pool.starmap(_read_share, shares, chunksize=1))
            yield f"| {world_size} | {count / (time.perf_counter() - started):.0f} |"


def _read_share(folder: Path, rank: int, world_size: int) -> int:
    loader = ShardLoader(
        folder, batch_size=BATCH_SIZE, rank=rank, world_size=world_size, num_threads=1, repeat=world_size
    )
    return BATCH_SIZE * consume(batch.arrays.values() for batch in loader)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=512, help="2.05 MB each, in each reader's own format")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write them (default: a temporary folder)")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    lines = [
        f"# Reading {options.samples} samples of 2.05 MB, page cache warm, batches of {BATCH_SIZE}\n",
        f"`python -m benchmarks.reading --samples {options.samples} --rounds {options.rounds}` on {_machine()}.\n",
    ]
    try:
        for part in (compare(folder, options.samples, options.rounds), busy(folder / "ours"), ranks(folder / "ours")):
            for line in [*part, ""]:
                print(line, flush=True)
                lines.append(line)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    results = Path(__file__).parent / "results" / "reading.md"
    results.parent.mkdir(exist_ok=True)
    results.write_text("\n".join(lines).rstrip() + "\n")


def _machine() -> str:
    info = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(": ")[1] for line in info if line.startswith("model name")), platform.processor())
    software = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{os.cpu_count()} x {cpu.strip()}, Linux {platform.release()}, {software}"


if __name__ == "__main__":
    main()
