"""Does it learn? The demo's model and variants of it, with several seeds, on recordings that training never heard.

    python -m benchmarks.learning [--seeds 2] [--steps 200] [--jobs 2]      about 12 minutes on 2 quiet cores

writes docs/results.md. Further --section.key VALUE pairs go over the demo's config in all variants, such as
`--train_shards.catalogue larger.json`. Runs that are already done are not made again: runs/learning/ keeps them."""

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from audiosep.config import load_config
from audiosep.demo import DemoConfig, make_shards
from audiosep.evaluate import evaluate
from audiosep.metrics import Summary, summarise
from audiosep.train import train
from benchmarks.precompute import table

ROOT = Path("runs/learning")
RESULTS = Path("docs/results.md")
WINDOWS = [512, 1024]


@dataclass(frozen=True)
class Variant:
    """What is changed in the demo's config: in the shards trained on, and in training."""

    meaning: str
    shards: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)


VARIANTS = {
    "magnitude": Variant("the demo's own: float16 magnitudes, window 512, stored conditions"),
    "float32": Variant("magnitudes stored as float32", {"shards.dtype": "float32"}),
    "captions": Variant(
        "no stored conditions: captions are encoded during training",
        {"queries": None},
        {"data.queries.encoder": "minilm"},
    ),
    "several windows": Variant(
        "windows 512 and 1024, one trunk, losses and estimates averaged",
        {"stft.window_lengths": WINDOWS},
        {"system.model.window_lengths": WINDOWS, "system.window": "all"},
    ),
    "complex": Variant(
        "complex shards; the phase mask is trained and used",
        {"shards.representation": "complex"},
        {"system.phase": "model", "system.loss": "spectral_convergence + 0.1 * si_sdr"},
    ),
    "upstream's loss": Variant(
        "complex shards, phase mask, the L1 distance of waveforms",
        {"shards.representation": "complex"},
        {"system.phase": "model", "system.loss": "l1_wav"},
    ),
    "l1_stft_mag": Variant("the L1 distance of magnitudes", train={"system.loss": "l1_stft_mag"}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at the same time, of one thread each")
    parser.add_argument("--only", nargs=2, metavar=("VARIANT", "SEED"), help="make this run alone")
    options, overrides = parser.parse_known_args()
    if options.only:
        run(options.only[0], int(options.only[1]), options.steps, overrides)
        return
    started = time.monotonic()
    configs = [config_of(name, 0, options.steps, overrides) for name in VARIANTS]
    shards = {made.root: made for config in configs for made in (config.train_shards, config.test_shards)}
    for root, config in shards.items():
        if make_shards(config, ROOT / "configs" / f"{Path(root).name}.yaml"):
            sys.exit(f"{root} could not be made.")
    runs = [(name, seed) for seed in range(options.seeds) for name in VARIANTS]
    command = [sys.executable, "-m", "benchmarks.learning", "--steps", str(options.steps), *overrides, "--only"]
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda each: subprocess.run([*command, each[0], str(each[1])], check=True), runs))
    minutes = (time.monotonic() - started) / 60
    RESULTS.write_text(report(options.seeds, options.steps, minutes))
    print(RESULTS.read_text())


def config_of(name: str, seed: int, steps: int, overrides: list[str]) -> DemoConfig:
    """The demo's config with a variant's changes."""
    variant = VARIANTS[name]
    several = "stft.window_lengths" in variant.shards
    roots = {
        "train_shards": ROOT / ("train-" + name if variant.shards else "train").replace(" ", "-"),
        "test_shards": ROOT / ("test-windows" if several else "test"),
    }
    folder = folder_of(name, seed, steps)
    changes: dict[str, Any] = {f"train_shards.{key}": value for key, value in variant.shards.items()}
    changes |= {f"{split}.root": str(root) for split, root in roots.items()}
    if several:
        changes["test_shards.stft.window_lengths"] = WINDOWS
    changes |= {f"train.{key}": value for key, value in variant.train.items()}
    changes |= {
        "train.root": str(folder),
        "train.seed": seed,
        "train.data.train": str(roots["train_shards"]),
        "train.data.valid": "",
        "train.data.loader.seed": seed,
        "train.trainer.max_steps": steps,
        "train.system.optimizer.reduce_lr_steps": max(15 * steps // 400, 1),  # 15 in the demo's 400 steps
        "train.trainer.monitor": "valid/loss",
        "train.trainer.threads": 1,
        "evaluate.shards": str(roots["test_shards"]),
        "evaluate.checkpoint": str(folder / "checkpoints" / "last.ckpt"),
        "evaluate.output": str(folder / "metrics"),
        "evaluate.baselines": (name, seed) == ("magnitude", 0),
    }
    pairs = [word for key, value in changes.items() for word in (f"--{key}", json.dumps(value))]
    return load_config(DemoConfig, "configs/demo.yaml", [*pairs, *overrides])


def folder_of(name: str, seed: int, steps: int) -> Path:
    return ROOT / f"{name}-{seed}-{steps}".replace(" ", "-")


def run(name: str, seed: int, steps: int, overrides: list[str]) -> None:
    """Train and evaluate one variant with one seed, unless that has been done."""
    config = config_of(name, seed, steps, overrides)
    if not Path(config.evaluate.output, "metrics.csv").exists():
        torch.set_num_threads(1)
        started = time.process_time()
        if train(config.train):
            sys.exit(f"{name}, seed {seed}: training was stopped.")
        seconds = time.process_time() - started
        Path(config.train.root, "seconds.json").write_text(json.dumps(seconds))
        evaluate(config.evaluate)


def report(num_seeds: int, num_steps: int, minutes: float) -> str:
    first = json.loads((folder_of("magnitude", 0, num_steps) / "metrics" / "metrics.json").read_text())
    num_mixtures = first["model"]["overall"]["num_samples"] // 2
    rows = []
    for name in ("half mask", "untrained", "ideal ratio mask"):
        found = first[name]["overall"]
        figures = [
            Summary(*(found[metric][key] for key in ("mean", "low", "high")), 0) for metric in ("si_sdri", "sdri")
        ]
        rows.append([name, *map(str, figures), "", f"{found['query_following']:.0%}", ""])
    for name in VARIANTS:
        folders = [folder_of(name, seed, num_steps) for seed in range(num_seeds)]
        tables = [read_metrics(folder / "metrics" / "metrics.csv") for folder in folders]
        si_sdri, sdri, follows = np.mean(tables, 0).T
        seeds = ", ".join(f"{table[:, 0].mean():.2f}" for table in tables)
        seconds = np.mean([json.loads((folder / "seconds.json").read_text()) for folder in folders])
        rows.append(
            [name, f"{summarise(si_sdri)}", f"{summarise(sdri)}", seeds, f"{follows.mean():.0%}", f"{seconds:.0f}"]
        )
    head = ["", "SI-SDRi, dB", "SDRi, dB", "SI-SDRi of each seed", "queries followed", "CPU s"]
    machine = f"{os.cpu_count()} cores ({platform.machine()}), torch {torch.__version__}"
    meanings = "\n".join(f"- {name}: {variant.meaning}." for name, variant in VARIANTS.items())
    return TEXT.format(
        command=f"python -m benchmarks.learning --seeds {num_seeds} --steps {num_steps}",
        machine=machine,
        minutes=minutes,
        num_mixtures=num_mixtures,
        num_seeds=num_seeds,
        num_steps=num_steps,
        meanings=meanings,
        table=table(head, rows),
    )


def read_metrics(path: Path) -> np.ndarray:
    """SI-SDRi, SDRi and whether the query was followed, for each sample [N, 3]."""
    with path.open(newline="") as file:
        return np.array([[float(r["si_sdri"]), float(r["sdri"]), r["follows"] == "True"] for r in csv.DictReader(file)])


TEXT = """# Results

Does it learn? Written by `{command}` on {machine}, in {minutes:.0f} minutes.

The model of `configs/demo.yaml` and variants of it, trained for {num_steps} steps with each of {num_seeds} seeds on the
bundled training clips, tested on {num_mixtures} mixtures at 0 dB of recordings that are in no training mixture, each
asked for both of its sounds. Improvements are over leaving the mixture as it is, mean over samples and seeds with its
95% bootstrap interval over samples. A query counts as followed when the estimate is nearer (SI-SDR) to the sound asked
for than to the other one: chance is 50%. All variants see the same mixtures in the same order.

{table}

{meanings}

The half mask and the ideal ratio mask (|target| / (|target| + |rest|), on the mixture's phase) bound what is to be had;
"untrained" is the same network with its initial weights. These are minutes of training a narrow network on four minutes
of audio: they show that the system learns and which choices matter, not what AudioSep reaches.
"""


if __name__ == "__main__":
    main()
