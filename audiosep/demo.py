"""`audiosep demo`: the whole way on the bundled audio, from a catalogue of clips to separated sounds."""

import argparse
import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import soundfile
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from audiosep import precompute
from audiosep.config import describe, load_config, plain
from audiosep.datamodule import Batches
from audiosep.dataset import PrecomputeConfig
from audiosep.evaluate import EvaluateConfig, Row, evaluate, open_batches, table
from audiosep.pictures import loss_figure, spectrogram_figure
from audiosep.separate import SeparateConfig, read_audio, separate_file
from audiosep.system import load_system
from audiosep.train import TrainConfig, train
from shards import cli as shards_cli


@dataclass(frozen=True)
class DemoConfig:
    """The configs of every command on the way."""

    train_shards: PrecomputeConfig
    valid_shards: PrecomputeConfig
    test_shards: PrecomputeConfig
    train: TrainConfig
    evaluate: EvaluateConfig


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="audiosep demo",
        description=__doc__,
        epilog="config keys, each also an option --section.key VALUE:\n" + describe(DemoConfig),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="YAML file")
    options, overrides = parser.parse_known_args(arguments)
    return demo(load_config(DemoConfig, options.config, overrides))


def demo(config: DemoConfig) -> int:
    """Clips to shards, shards to a model, the model to figures, sounds and pictures; returns the exit status."""
    started, root = time.monotonic(), Path(config.train.root)
    for name in ("train_shards", "valid_shards", "test_shards"):
        if status := make_shards(getattr(config, name), root / "configs" / f"{name}.yaml"):
            return status
    write_config(config.train, root / "configs" / "train.yaml")
    show("audiosep", "train", "--config", root / "configs" / "train.yaml")
    if status := train(config.train):
        return status
    write_config(config.evaluate, root / "configs" / "evaluate.yaml")
    show("audiosep", "evaluate", "--config", root / "configs" / "evaluate.yaml")
    results = evaluate(config.evaluate)
    made = [*separate_one(config, root), draw_losses(root)]
    overall = results["model"]["overall"]
    summary = {
        "si_sdri_db": overall["si_sdri"]["mean"],
        "sdri_db": overall["sdri"]["mean"],
        "query_following": overall["query_following"],
        "untrained_si_sdri_db": results["untrained"]["overall"]["si_sdri"]["mean"],
        "num_test_mixtures": overall["num_samples"] // 2,
        "seconds": round(time.monotonic() - started, 1),
    }
    (root / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    report(config, root, summary, made)
    return 0
