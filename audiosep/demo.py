"""`audiosep demo`: the whole way on the bundled audio, from a catalogue of clips to separated sounds."""

import csv
import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from audiosep import precompute
from audiosep.config import command_parser, load_config, plain
from audiosep.dataset import PrecomputeConfig
from audiosep.evaluate import EvaluateConfig, evaluate
from audiosep.pictures import loss_figure, spectrogram_figure
from audiosep.samples import decode
from audiosep.separate import SeparateConfig, separate_file
from audiosep.stft import istft
from audiosep.train import TrainConfig, train
from shards import cli as shards_cli
from shards.loader import ShardLoader


@dataclass(frozen=True)
class DemoConfig:
    """The configs of every command on the way."""

    train_shards: PrecomputeConfig
    valid_shards: PrecomputeConfig
    test_shards: PrecomputeConfig
    train: TrainConfig
    evaluate: EvaluateConfig


def main(arguments: Sequence[str]) -> int:
    parser = command_parser("demo", __doc__, DemoConfig)
    parser.add_argument("--config", required=True, help="YAML file")
    options, overrides = parser.parse_known_args(arguments)
    return demo(load_config(DemoConfig, options.config, overrides))


def demo(config: DemoConfig) -> int:
    """Clips to shards, shards to a model, the model to figures, sounds and pictures; returns the exit status."""
    started, root = time.monotonic(), Path(config.train.root)
    for name in ("train_shards", "valid_shards", "test_shards"):
        if status := make_shards(getattr(config, name), root / "configs" / f"{name}.yaml"):
            return status
    announce("audiosep", "train", "--config", save(config.train, root / "configs" / "train.yaml"))
    if status := train(config.train):
        return status
    announce("audiosep", "evaluate", "--config", save(config.evaluate, root / "configs" / "evaluate.yaml"))
    results = evaluate(config.evaluate)
    separate_one(config, root / "separated")
    draw_losses(config.train.log_folder, root / "loss.png")
    overall = results["model"]["overall"]
    summary = {
        "si_sdri_db": overall["si_sdri"]["mean"],
        "sdri_db": overall["sdri"]["mean"],
        "query_following": overall["query_following"],
        "untrained_si_sdri_db": results["untrained"]["overall"]["si_sdri"]["mean"],
        "num_test_mixtures": overall["num_samples"] // 2,  # each is asked for both of its sounds
        "seconds": round(time.monotonic() - started, 1),
    }
    (root / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(report(config, root, summary))
    return 0


def announce(*words: str | Path) -> None:
    """The command that does on its own what comes next."""
    print(f"\n$ {shlex.join(map(str, words))}", flush=True)


def save(config: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(plain(config), sort_keys=False))
    return path


def make_shards(config: PrecomputeConfig, file: Path) -> int:
    """Render, seal and verify one split; returns the exit status."""
    announce("audiosep", "precompute", "--config", save(config, file))
    status = precompute.main(["--config", str(file)])
    for command in ("seal", "verify"):
        if not status:
            announce("shards", command, config.root)
            status = shards_cli.main([command, config.root])
    return status


def separate_one(config: DemoConfig, folder: Path) -> None:
    """Take a test mixture apart by each of its two captions: the mixture for which the model is of median quality."""
    with Path(config.evaluate.output, "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    pairs = [(rows[i], rows[i + 1]) for i in range(0, len(rows) - 1, 2)]
    pairs.sort(key=lambda pair: sum(float(row["si_sdri"]) for row in pair))
    chosen = [row["key"] for row in pairs[len(pairs) // 2]]
    folder.mkdir(parents=True, exist_ok=True)
    window, hop_length = config.test_shards.stft.window_lengths[0], config.test_shards.stft.hop_length
    sample_rate, length = config.test_shards.clips.sample_rate, config.test_shards.clips.length
    for stored in ShardLoader(config.evaluate.shards, batch_size=1, shuffle=False):
        if stored.keys[0] not in chosen:
            continue
        batch = decode(stored.keys, stored.text, stored.arrays).to("cpu")
        both = (batch.mixture[window], batch.segment[window])
        mixture, target = (istft(x, window, hop_length, length)[0, 0].numpy() for x in both)
        number, query = chosen.index(batch.keys[0]) + 1, batch.text[0]
        soundfile.write(folder / "mixture.wav", mixture, sample_rate)
        soundfile.write(folder / f"target-{number}.wav", target, sample_rate)
        output = folder / f"estimate-{number}.wav"
        settings = SeparateConfig(config.evaluate.checkpoint, query, str(output))
        command = ("audiosep", "separate", folder / "mixture.wav", "--query", query)
        announce(*command, "--checkpoint", settings.checkpoint, "--output", output)
        separate_file(folder / "mixture.wav", settings)
        estimate = np.asarray(soundfile.read(output, dtype="float32")[0])
        waveforms = {"mixture": mixture, f"estimate {number}": estimate, f"target {number}": target}
        spectrogram_figure(waveforms, sample_rate, f"“{query}”").savefig(folder / f"spectrograms-{number}.png")


def draw_losses(logs: Path, picture: Path) -> None:
    """The loss curves in a run's TensorBoard logs."""
    events = EventAccumulator(str(logs)).Reload()
    curves = {
        name: ([event.step for event in events.Scalars(name)], [event.value for event in events.Scalars(name)])
        for name in ("train/loss", "valid/loss")
        if name in events.Tags()["scalars"]
    }
    loss_figure(curves).savefig(picture)


def report(config: DemoConfig, root: Path, summary: dict[str, Any]) -> str:
    """What came out, and what was made, for a terminal."""
    figures = {
        "SI-SDRi on unseen recordings": f"{summary['si_sdri_db']:.2f} dB",
        "  the same network untrained": f"{summary['untrained_si_sdri_db']:.2f} dB",
        "SDRi": f"{summary['sdri_db']:.2f} dB (half of the mixture: about 3)",
        "queries followed": f"{summary['query_following']:.0%} (untrained: 50%)",
        "test mixtures": str(summary["num_test_mixtures"]),
        "time": f"{summary['seconds']:.0f} s",
    }
    made = {
        "shards": ", ".join(shards.root for shards in (config.train_shards, config.valid_shards, config.test_shards)),
        "checkpoint": config.evaluate.checkpoint,
        "metrics": f"{root}/summary.json, {config.evaluate.output}/metrics.json, {config.evaluate.output}/metrics.csv",
        "sounds": f"{root}/separated/*.wav",
        "pictures": f"{root}/separated/*.png, {root}/loss.png",
        "logs": f"tensorboard --logdir {config.train.log_folder}",
    }
    blocks = ("\n".join(f"{name:30}{text}" for name, text in block.items()) for block in (figures, made))
    return "\n" + "\n\n".join(blocks)
