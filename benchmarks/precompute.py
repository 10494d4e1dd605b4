"""Precompute against the straightforward way, in interleaved rounds on one machine.

    python -m benchmarks.precompute            prints the tables and writes benchmarks/results/precompute.md

Both ways make the same mixtures of the same 10 s, 32 kHz FLAC clips (two to a mixture, 5 s, 2048/320, float16
magnitudes) and leave them in tar shards, in memory (/dev/shm) so that no disk hides the difference. The
straightforward way is soundfile.read of the whole clip, torch.stft, abs, transpose, half, webdataset.TarWriter."""

import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import soundfile
import torch
import webdataset

from audiosep import clips, dataset, samples
from audiosep.catalogue import Catalogue, read_catalogue
from audiosep.config import build_config
from audiosep.dataset import Dataset, PrecomputeConfig, Renderer
from audiosep.mixing import mix
from audiosep.stft import Transform, istft, stft, stored_shape

SAMPLES_PER_SHARD = 64
ROUNDS = 5


def make_clips(folder: Path, num_clips: int, sample_rate: int, suffix: str = "flac") -> Path:
    """Clips of 10 s that compress like music (noise shaped to fall by 6 dB an octave), and their catalogue."""
    folder.mkdir(parents=True)
    rows = []
    for i in range(num_clips):
        walk = np.cumsum(np.random.default_rng(i).standard_normal(10 * sample_rate))
        audio = walk - np.convolve(walk, np.ones(1000) / 1000, "same")
        soundfile.write(folder / f"{i}.{suffix}", 0.5 * audio / np.abs(audio).max(), sample_rate, subtype="PCM_16")
        rows.append({"wav": f"{i}.{suffix}", "caption": f"clip {i}"})
    (folder / "catalogue.json").write_text(json.dumps({"data": rows}))
    return folder / "catalogue.json"


def config_of(root: Path, catalogue: Path, num_shards: int, **changes: object) -> PrecomputeConfig:
    settings = {"root": str(root), "catalogue": str(catalogue), "device": "cpu", **changes}
    settings["shards"] = {"samples_per_shard": SAMPLES_PER_SHARD, "num_samples": num_shards * SAMPLES_PER_SHARD}
    return build_config(PrecomputeConfig, settings, "benchmark")


def open_dataset(config: PrecomputeConfig) -> Dataset:
    return Dataset(config, read_catalogue(config.catalogue, check_files=False))


def ours(made: Dataset, index: int) -> None:
    made.render_shard(index, lambda: None)


def straightforward(made: Dataset, index: int) -> None:
    """The same samples the way one writes it down first."""
    window, length = torch.hann_window(2048), made.config.clips.length
    with webdataset.TarWriter(f"{made.config.root}/plain-{index:06d}.tar") as sink:
        for number in made.plan.samples(index):
            recipe = made.recipes[number]
            crops = []
            for source in recipe.sources:
                audio, _ = soundfile.read(source.clip.location, dtype="float32")
                start = int(source.fraction * (len(audio) - length + 1))
                crops.append(audio[start : start + length])
            mixed = mix(crops[0], crops[1:], recipe.gains_db, recipe.noise_gain_db)
            sample = {"__key__": f"{number:09d}", "json": {"text": recipe.sources[0].caption}}
            for name, waveform in (("mixture", mixed.mixture), ("segment", mixed.segment)):
                spectrogram = torch.stft(torch.from_numpy(waveform), 2048, 320, window=window, return_complex=True)
                magnitude = spectrogram.abs().transpose(0, 1).half().contiguous()
                sample[f"stft_{name}.npy"] = magnitude[None].numpy()
            sink.write(sample)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def side_by_side(folder: Path, catalogue: Path) -> str:
    """Both ways on one core, a shard of each in turn; CPU time is what other work on the machine disturbs less."""
    ways = {"straightforward": straightforward, "audiosep precompute": ours}
    made = {name: open_dataset(config_of(folder / name, catalogue, ROUNDS + 1)) for name in ways}
    walls: dict[str, list[float]] = {name: [] for name in ways}
    cpus: dict[str, list[float]] = {name: [] for name in ways}
    for index in range(ROUNDS + 1):
        for name, way in ways.items():
            start = time.process_time()
            walls[name].append(seconds(lambda way=way, name=name, index=index: way(made[name], index)))
            cpus[name].append(time.process_time() - start)
    rows = []
    for name in ways:
        ratios = [
            [plain / own for plain, own in zip(times["straightforward"][1:], times[name][1:])]
            for times in (walls, cpus)
        ]
        rate = SAMPLES_PER_SHARD / statistics.median(walls[name][1:])
        cpu = 1000 * statistics.median(cpus[name][1:]) / SAMPLES_PER_SHARD
        shown = [f"{statistics.median(each):.2f} ({spread(each)})" for each in ratios]
        rows.append([name, f"{rate:.0f}", shown[0], f"{cpu:.1f}", shown[1]])
    return table(["one core", "samples/s", "ratio", "CPU ms a sample", "ratio of CPU times"], rows)


def _render_share(config: PrecomputeConfig, share: range, barrier: "multiprocessing.synchronize.Barrier") -> None:
    torch.set_num_threads(1)
    made = open_dataset(config)
    ours(made, share[0])
    barrier.wait()
    for index in share[1:]:
        ours(made, index)
    barrier.wait()


def processes(folder: Path, catalogue: Path) -> str:
    """The rate of one and of two processes, start-up left out: both wait for each other after a first shard."""
    context = multiprocessing.get_context("spawn")
    rates: dict[int, list[float]] = {1: [], 2: []}
    for turn in range(ROUNDS):
        for count in rates:
            config = config_of(folder / f"processes-{turn}-{count}", catalogue, 4 * count)
            open_dataset(config)
            barrier = context.Barrier(count + 1)
            shares = [range(rank, 4 * count, count) for rank in range(count)]
            workers = [context.Process(target=_render_share, args=(config, share, barrier)) for share in shares]
            for worker in workers:
                worker.start()
            barrier.wait()
            taken = seconds(barrier.wait)
            for worker in workers:
                worker.join()
            rates[count].append(3 * count * SAMPLES_PER_SHARD / taken)
    ratios = [two / one for one, two in zip(rates[1], rates[2])]
    return table(
        ["processes", "samples/s", "ratio"],
        [
            ["1", f"{statistics.median(rates[1]):.0f}", "1"],
            ["2", f"{statistics.median(rates[2]):.0f}", f"{statistics.median(ratios):.2f} ({spread(ratios)})"],
        ],
    )


@contextmanager
def stopwatch(parts: dict[str, float], names: dict[str, tuple[object, str]]):
    """Adds up the seconds spent in functions, each given by its owner and name."""

    def timed(name: str, function: Callable) -> Callable:
        def call(*arguments: object, **named: object) -> object:
            start = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                parts[name] = parts.get(name, 0) + time.perf_counter() - start

        return call

    patches = [patch.object(owner, name, timed(label, getattr(owner, name))) for label, (owner, name) in names.items()]
    for each in patches:
        each.start()
    try:
        yield
    finally:
        for each in patches:
            each.stop()


PARTS: dict[str, tuple[object, str]] = {
    "decode": (clips, "_read_frames"),
    "resample": (clips, "_resample"),
    "mix": (dataset, "mix"),
    "STFT": (Transform, "__call__"),
    "JSON": (samples, "describe"),
}


def shares(folder: Path) -> str:
    """Where the time of a sample goes, for clips as they are, and for what costs more."""
    cases = {
        "FLAC 32 kHz": (32000, "flac", {}),
        "WAV 32 kHz": (32000, "wav", {}),
        "FLAC 44.1 kHz, resampled": (44100, "flac", {}),
        "FLAC, windows 512, 1024, 2048": (32000, "flac", {"stft": {"window_lengths": [512, 1024, 2048]}}),
    }
    rows = []
    for number, (name, (sample_rate, suffix, changes)) in enumerate(cases.items()):
        catalogue = make_clips(folder / f"audio-{number}", 32, sample_rate, suffix)
        made = open_dataset(config_of(folder / f"shares-{number}", catalogue, 4, **changes))
        ours(made, 0)
        parts: dict[str, float] = {}
        with stopwatch(parts, PARTS):
            total = seconds(lambda made=made: [ours(made, index) for index in range(1, 4)])
        num_samples = 3 * SAMPLES_PER_SHARD
        named = [1000 * parts.get(part, 0) / num_samples for part in PARTS]
        whole = 1000 * total / num_samples
        rows.append(
            [name, f"{1000 / whole:.0f}", f"{whole:.2f}", *(f"{ms:.2f}" for ms in (*named, whole - sum(named)))]
        )
    return table(["ms a sample", "samples/s", "all", *PARTS, "tar, sync, recipe"], rows)


def precision(folder: Path, catalogue: Path) -> str:
    """What each way of storing a spectrogram loses: SDR of the waveform that it gives back, and its size.

    Magnitudes are inverted with the phase of the exact spectrogram."""
    made = open_dataset(config_of(folder / "precision", catalogue, 1))
    waveforms = [Renderer(made.recipes, made.config, []).render(index).mixed.mixture for index in range(8)]
    length, rows = made.config.clips.length, []
    for representation in ("magnitude", "complex"):
        transform = Transform(length, 2048, 320, representation)
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            out = torch.empty(stored_shape(length, 2048, 320, representation), dtype=dtype)
            ratios = []
            for waveform in waveforms:
                transform(waveform, out)
                exact, stored = stft(torch.from_numpy(waveform).double(), 2048, 320), out.double()
                spectrogram = (
                    torch.polar(stored[0], exact.angle()) if len(stored) == 1 else torch.complex(*stored[:, 0])
                )
                again = istft(spectrogram, 2048, 320, length).numpy()
                ratios.append(10 * np.log10(np.sum(waveform**2.0) / np.sum((again - waveform) ** 2)))
            name = str(dtype).removeprefix("torch.")
            rows.append([representation, name, f"{2 * out.nbytes / 1e6:.2f} MB", f"{statistics.median(ratios):.0f} dB"])
    return table(["representation", "dtype", "a sample", "SDR"], rows)


def large_catalogue(folder: Path, num_clips: int) -> str:
    """Time and memory of a generated JSONL catalogue, read once and then mapped by each worker."""
    file = folder / "large.jsonl"
    with open(file, "w") as stream:
        for i in range(num_clips):
            path, caption = f"audio/{i % 1000:03d}/{i:09d}.flac", f"sound number {i} of a large catalogue, heard once"
            stream.write(f'{{"wav": "{path}", "caption": "{caption}", "kind": "kind {i % 500}"}}\n')
    before = resident_bytes()
    start = time.perf_counter()
    catalogue = read_catalogue(str(file), check_files=False)
    read_seconds, grown = time.perf_counter() - start, resident_bytes() - before
    (folder / "saved").mkdir()
    catalogue.save(folder / "saved")
    load_seconds = seconds(lambda: Catalogue.load(folder / "saved"))
    return table(
        ["clips", "file", "read", "memory", "mapped by a worker"],
        [[f"{num_clips:.0e}", f"{file.stat().st_size / 1e9:.2f} GB", f"{read_seconds:.0f} s", f"{grown / 1e9:.2f} GB",
          f"{1000 * load_seconds:.0f} ms"]],
    )  # fmt: skip


def worker_memory(folder: Path, catalogue: Path) -> str:
    """Resident memory of a process after a few shards and after many."""
    made = open_dataset(config_of(folder / "memory", catalogue, 24))
    rows = []
    for index in range(24):
        ours(made, index)
        if index in (3, 11, 23):
            rows.append([f"{index + 1}", f"{resident_bytes() / 1e6:.0f} MB"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return table(["shards rendered", "resident"], [*rows, ["peak", f"{peak:.0f} MB"]])


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def spread(values: list[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    torch.set_num_threads(1)
    num_large = int(sys.argv[1]) if len(sys.argv) > 1 else 10**7
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=memory) as name:
        folder = Path(name)
        catalogue = make_clips(folder / "audio", 64, 32000)
        sections = {
            "A worker's memory": worker_memory(folder, catalogue),
            "Against the straightforward way": side_by_side(folder, catalogue),
            "Processes": processes(folder, catalogue),
            "Where the time goes": shares(folder),
            "Stored precision": precision(folder, catalogue),
            "A large catalogue": large_catalogue(folder, num_large),
        }
    machine = (
        f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}"
    )
    text = "\n\n".join(f"## {title}\n\n{body}" for title, body in sections.items())
    text = f"# Precompute\n\n`python -m benchmarks.precompute` on {machine}, medians of {ROUNDS} rounds.\n\n{text}\n"
    print(text)
    results = Path(__file__).parent / "results" / "precompute.md"
    results.parent.mkdir(exist_ok=True)
    results.write_text(text)


if __name__ == "__main__":
    main()
