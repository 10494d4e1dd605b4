"""Training from shards against training on the fly: the same model on the same mixtures in the same order.

    python -m benchmarks.training [--steps 24] [--widths 4,8] [--rounds 3]       on a CPU, about 5 minutes
    python -m benchmarks.training --device cuda --steps 300 --batch-size 32 --widths 32,64,128,256,384,384 --workers 16

On the fly means decode, mix and STFT by the very code of `audiosep precompute`, in DataLoader workers, in float32. A
GPU trains in bf16, compiled, from page-locked batches. The table goes to benchmarks/results/training-DEVICE.md."""

import argparse
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from audiosep.dataset import Dataset as Mixtures
from audiosep.dataset import Renderer
from audiosep.losses import loss_by_name
from audiosep.resunet import ResUNet30, ResUNetConfig
from audiosep.samples import Batch, Encoder, decode
from benchmarks.precompute import SAMPLES_PER_SHARD, config_of, make_clips, open_dataset, table
from shards.loader import ShardLoader
from shards.manifest import seal

CONDITION_SIZE = 8
WINDOW = 2048


@dataclass
class Run:
    """What one way of training came to."""

    seconds: float
    wait_seconds: float  # that the loop stood still for want of a batch
    cpu_seconds: float  # of this process, its threads and its workers
    losses: list[float]
    memory: float  # GPU memory at its peak, bytes


class OnTheFly(Dataset):
    """The samples of a data set, rendered when they are asked for."""

    def __init__(self, mixtures: Mixtures, num_samples: int) -> None:
        self._mixtures, self._num_samples = mixtures, num_samples
        self._renderer: Renderer | None = None

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> tuple[str, dict, dict[str, np.ndarray]]:
        if self._renderer is None:  # in each worker its own
            torch.set_num_threads(1)
            config = self._mixtures.config
            self._renderer = Renderer(self._mixtures.recipes, config, [])
            self._encode = Encoder(config.clips.length, config.clips.sample_rate, config.stft, dtype="float32")
        sample = self._encode(self._renderer.render(index))
        return sample.key, sample.text, {name: array.copy() for name, array in sample.arrays.items()}


def collate(samples: list[tuple[str, dict, dict[str, np.ndarray]]]) -> Batch:
    keys, texts, arrays = zip(*samples)
    stacked = {name: torch.from_numpy(np.stack([each[name] for each in arrays])) for name in arrays[0]}
    return decode(keys, texts, stacked)


def from_shards(mixtures: Mixtures, batch_size: int, num_samples: int) -> Iterator[Batch]:
    for stored in ShardLoader(mixtures.config.root, batch_size=batch_size, shuffle=False, max_samples=num_samples):
        yield decode(stored.keys, stored.text, stored.arrays)


def on_the_fly(mixtures: Mixtures, batch_size: int, num_samples: int, workers: int) -> Iterable[Batch]:
    dataset = OnTheFly(mixtures, num_samples)
    return DataLoader(dataset, batch_size, num_workers=workers, collate_fn=collate)


def train(batches: Iterable[Batch], widths: tuple[int, ...], device: str) -> Run:
    """A step for each batch; the clock starts when the first batch is there and the first step is done."""
    torch.manual_seed(0)
    model = ResUNet30(ResUNetConfig(widths=widths, condition_size=CONDITION_SIZE)).to(device)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if device == "cuda":
        model.compile()
        torch.cuda.reset_peak_memory_stats()
    loss_of = loss_by_name("l1_stft_mag")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    run = Run(0, 0, 0, [], 0)
    losses = []
    iterator = iter(batches)
    asked = time.perf_counter()
    while (stored := next(iterator, None)) is not None:
        run.wait_seconds += time.perf_counter() - asked
        batch = stored.to(device)
        condition = torch.zeros(len(batch.keys), CONDITION_SIZE, device=device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            estimate = model({"stft_mixture": batch.mixture[WINDOW], "condition": condition})["stft_waveform"]
            loss = loss_of(estimate, batch.segment[WINDOW])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if len(losses) == 1:
            started, cpu, run.wait_seconds = time.perf_counter(), cpu_seconds(), 0
        asked = time.perf_counter()
    run.losses = [loss.item() for loss in losses]  # waits for the GPU
    run.seconds = time.perf_counter() - started
    del iterator  # its workers end, and their time counts
    run.cpu_seconds = cpu_seconds() - cpu
    run.memory = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return run


def supply(batches: Iterable[Batch]) -> float:
    """Batches a second that a network of no cost would get, the first left out."""
    iterator = iter(batches)
    next(iterator)
    started = time.perf_counter()
    return sum(1 for _ in iterator) / (time.perf_counter() - started)


def cpu_seconds() -> float:
    """Of this process and of those of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--widths", type=lambda text: tuple(map(int, text.split(","))), default=(4, 8))
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="of the DataLoader on the fly")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1 if options.device == "cpu" else os.cpu_count() or 1)
    num_samples = options.steps * options.batch_size
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        mixtures = precompute(Path(name), num_samples)
        ways: dict[str, Callable[[], Iterable[Batch]]] = {
            "precomputed shards": partial(from_shards, mixtures, options.batch_size, num_samples),
            **{
                f"on the fly, {workers} workers": partial(
                    on_the_fly, mixtures, options.batch_size, num_samples, workers
                )
                for workers in sorted({0, options.workers})
            },
        }
        runs: dict[str, list[Run]] = {way: [] for way in ways}
        supplies: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(options.rounds):
            for way, batches in ways.items():
                supplies[way].append(supply(batches()) * options.batch_size)
                runs[way].append(train(batches(), options.widths, options.device))
    text = report(runs, supplies, options.steps, options.batch_size, options.widths, options.device)
    print(text)
    results = Path(__file__).parent / "results" / f"training-{options.device}.md"
    results.parent.mkdir(exist_ok=True)
    results.write_text(text)


def precompute(folder: Path, num_samples: int) -> Mixtures:
    """Sealed shards of 5 s, 32 kHz, 2048/320, float16 magnitudes, of two 10 s FLAC clips each."""
    catalogue = make_clips(folder / "audio", 64, 32000)
    num_shards = -(-num_samples // SAMPLES_PER_SHARD)
    mixtures = open_dataset(config_of(folder / "shards", catalogue, num_shards))
    for index in range(num_shards):
        mixtures.render_shard(index, lambda: None)
    seal(mixtures.store)
    return mixtures


def report(
    runs: dict[str, list[Run]],
    supplies: dict[str, list[float]],
    steps: int,
    batch_size: int,
    widths: tuple[int, ...],
    device: str,
) -> str:
    first = np.array(next(iter(runs.values()))[0].losses)
    rows = []
    for way, measured in runs.items():
        rates = [(steps - 1) * batch_size / run.seconds for run in measured]
        waits = statistics.median(run.wait_seconds / run.seconds for run in measured)
        cpu = statistics.median(run.cpu_seconds for run in measured) / (steps - 1) / batch_size
        apart = np.abs(np.array(measured[0].losses) / first - 1).max()
        row = [way, f"{statistics.median(supplies[way]):.0f}"]
        row += [f"{statistics.median(rates):.1f} ({min(rates):.1f} to {max(rates):.1f})", f"{waits:.1%}"]
        rows.append([*row, f"{1000 * cpu:.0f}", f"{measured[0].losses[-1]:.5f}", f"{apart:.1e}"])
    head = [
        "",
        "samples/s without a network",
        "samples/s in training",
        "waiting for data",
        "CPU ms a sample",
        "last loss",
        "losses apart, relative",
    ]
    machine = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    memory = max(run.memory for measured in runs.values() for run in measured)
    return TEXT.format(
        command=" ".join(["python -m benchmarks.training", *sys.argv[1:]]),
        table=table(head, rows),
        steps=steps,
        batch_size=batch_size,
        widths=", ".join(map(str, widths)),
        machine=f"{machine}, {os.cpu_count()} cores, torch {torch.__version__}",
        memory=f" {memory / 2**30:.1f} GiB of GPU memory at most." if memory else "",
        rounds=len(next(iter(runs.values()))),
    )


TEXT = """# Training from shards and on the fly

`{command}` on {machine}: {steps} steps of {batch_size} samples (5 s, 32 kHz, window 2048, hop 320), network widths
{widths}; medians of {rounds} interleaved rounds, the first step left out.{memory}

{table}

The same mixtures in the same order, so the losses differ only by the float16 that shards store; on the fly everything
is float32. The CPU time on the fly includes the start of the workers. Whether training waits for data is a matter of
the network's speed against the first column; that is for this machine, which has the network on the same cores.
"""


if __name__ == "__main__":
    main()
