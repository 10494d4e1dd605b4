"""`audiosep evaluate`: SDR, SDRi, SI-SDR and SI-SDRi on shards or a benchmark's audio; as a table, JSON and CSV."""

import csv
import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from audiosep.benchmarks import BENCHMARKS, BenchmarkBatches, read_benchmark, upstream_mean
from audiosep.config import command_parser, load_config
from audiosep.datamodule import Batches
from audiosep.metrics import si_sdr, summarise
from audiosep.queries import QueryConfig, make_encoder
from audiosep.samples import Batch, open_manifest
from audiosep.separate import device_of, encoder_of
from audiosep.stft import istft
from audiosep.system import AudioFormat, SeparationSystem, load_system, scores
from shards.loader import LoaderConfig, ShardLoader
from shards.progress import progress
from shards.storage import check_writable, open_store
from shards.store import StorageConfig

METRICS = {"sdr": "SDR", "sdri": "SDRi", "si_sdr": "SI-SDR", "si_sdri": "SI-SDRi"}

Row = dict[str, Any]  # of one sample: key, kind, query, each metric in dB and, with one interferer, `follows`
Separate = Callable[[Batch], Tensor]  # complex spectrograms to estimated waveforms [B, C, L]


@dataclass(frozen=True)
class EvaluateConfig:
    """What a checkpoint is evaluated on."""

    checkpoint: Annotated[str, Field(description="last.ckpt or best.ckpt of a run, or a released one; path or URL")]
    shards: Annotated[str, Field(description="sealed root with complex spectrograms; or give a benchmark")] = ""
    benchmark: Annotated[str, Field(description=f"one of upstream's, from audio files: {', '.join(BENCHMARKS)}")] = ""
    data: Annotated[str, Field(description="folder of the benchmark's audio")] = ""
    output: Annotated[str, Field(description="folder or URL for metrics.json and metrics.csv")] = "runs/evaluation"
    batch_size: Annotated[int, Field(gt=0, description="samples at a time")] = 16
    windows: Annotated[
        tuple[int, ...], Field(description="window lengths whose waveforms are averaged; none: those trained on")
    ] = ()
    baselines: Annotated[
        bool, Field(description="also: the same network untrained, half of the mixture, the ideal ratio mask")
    ] = True
    accelerator: Annotated[str, Field(description="Lightning's: auto, cpu, gpu")] = "auto"
    queries: Annotated[
        QueryConfig | None, Field(description="encoder of the captions, for shards that store no conditions")
    ] = None
    storage: StorageConfig = field(default_factory=StorageConfig)

    def __post_init__(self) -> None:
        if bool(self.shards) == bool(self.benchmark) or bool(self.benchmark) != bool(self.data):
            raise ValueError("Evaluation is on `shards`, or on a `benchmark` and its folder `data`.")


def main(arguments: Sequence[str]) -> int:
    parser = command_parser("evaluate", __doc__, EvaluateConfig)
    parser.add_argument("--config", help="YAML file; or give the keys as options")
    options, overrides = parser.parse_known_args(arguments)
    evaluate(load_config(EvaluateConfig, options.config, overrides))
    return 0


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate, write and print; returns what is in metrics.json: by separator, overall and for each kind of sound."""
    system = load_system(config.checkpoint, config.storage)
    batches = _open(config, system)
    output = open_store(config.output, config.storage)
    check_writable(output)
    device = device_of(config.accelerator)
    separators: dict[str, Separate] = {"model": partial(system.to(device).estimate, windows=config.windows)}
    if config.baselines:
        torch.manual_seed(0)
        untrained = SeparationSystem(system.config, system.audio).eval().to(device)
        separators["untrained"] = partial(untrained.estimate, windows=config.windows)
        separators["half mask"] = lambda batch: system.target_and_mixture(batch)[1] / 2
        separators["ideal ratio mask"] = lambda batch: ideal_ratio_mask(batch, system)
    rows = {name: measure(system, separate, batches, device, name) for name, separate in separators.items()}
    results = {name: summary(measured) for name, measured in rows.items()}
    if config.benchmark:
        kinds = [row["kind"] for row in rows["model"]]
        means = {m: upstream_mean(config.benchmark, [row[m] for row in rows["model"]], kinds) for m in METRICS}
        results["model"]["overall"]["upstream_mean"] = means
    output.write("metrics.json", json.dumps(results, indent=2).encode())
    output.write("metrics.csv", as_csv(rows["model"]).encode())
    print(table(results))
    if config.benchmark:
        print("as upstream averages: " + ", ".join(f"{METRICS[m]} {mean:.2f}" for m, mean in means.items()))
    return results


def _open(config: EvaluateConfig, system: SeparationSystem) -> Batches | BenchmarkBatches:
    """The samples, each once; ValueError unless they are what the system was trained for and keep their phase."""
    if config.benchmark:
        items = read_benchmark(config.benchmark, Path(config.data))
        windows = {*config.windows, *system.config.windows}
        queries = config.queries or QueryConfig()
        return BenchmarkBatches(items, system.audio, windows, encoder_of(system, queries, config.storage))
    store = open_store(config.shards, config.storage)
    manifest = open_manifest(store)
    if not manifest.spec["query_encoder"] and not config.queries:
        raise ValueError(f"{config.shards} stores no conditions: set queries.encoder to encode its captions here.")
    stored, trained = manifest.spec["stft"]["window_lengths"], system.config.model.window_lengths
    if missing := {*config.windows, *system.config.windows} - ({*stored} & {*trained}):
        raise ValueError(
            f"No window of {', '.join(map(str, missing))}: {config.shards} holds {stored}, and the model takes "
            f"{trained}. Choose among those of both by `windows`."
        )
    encoder = make_encoder(config.queries, storage=config.storage) if config.queries else None
    audio = AudioFormat.of(manifest.spec, encoder.identity if encoder else "")
    if audio != system.audio:
        raise ValueError(f"{config.shards} holds {audio}, but {config.checkpoint} was trained for {system.audio}.")
    if manifest.spec["shards"]["representation"] != "complex":
        raise ValueError(
            f"{config.shards} stores magnitudes, and no waveform comes from these alone. Precompute it with "
            "shards.representation: complex."
        )
    loader = LoaderConfig(batch_size=config.batch_size, shuffle=False, drop_last=False)
    return Batches(ShardLoader(config.shards, loader, storage=config.storage), encoder)


def ideal_ratio_mask(batch: Batch, system: SeparationSystem) -> Tensor:
    """Best a mask in [0, 1] on the mixture's phase could do, or nearly: |segment| / (|segment| + |rest|)."""
    window = system.config.windows[0]
    mixture, segment = batch.mixture[window], batch.segment[window]
    target, rest = segment.abs(), (mixture - segment).abs()
    mask = target / (target + rest).clamp(min=1e-8)
    return istft(mixture * mask, window, system.audio.hop_length, int(batch.lengths[0]))


@torch.inference_mode()
def measure(
    system: SeparationSystem, separate: Separate, batches: Iterable[Batch], device: torch.device, name: str
) -> list[Row]:
    """One row for each sample. `follows`: whether the estimate is nearer (SI-SDR) to what the query describes than to
    the mixture's other source."""
    rows: list[Row] = []
    for batch in progress(batches, desc=f"evaluating {name}", unit="batch"):
        batch = batch.to(device)
        estimate = separate(batch)
        target, mixture = system.target_and_mixture(batch)
        values = {metric: figures.tolist() for metric, figures in scores(estimate, target, mixture).items()}
        follows = (si_sdr(estimate, target) > si_sdr(estimate, mixture - target)).tolist()
        for i, key in enumerate(batch.keys):
            row = {"key": key, "kind": batch.kinds[i], "query": batch.text[i]}
            row |= {metric: figures[i] for metric, figures in values.items()}
            rows.append(row | {"follows": follows[i] if len(batch.info[i]["interferers"]) == 1 else None})
    return rows


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Overall and by kind: mean with its 95% interval and median of each metric, and the query-following rate."""
    kinds = sorted({row["kind"] for row in rows if row["kind"]})
    groups = {"overall": list(rows)} | {kind: [row for row in rows if row["kind"] == kind] for kind in kinds}
    return {name: _summary_of(group) for name, group in groups.items()}


def _summary_of(rows: Sequence[Row]) -> dict[str, Any]:
    found: dict[str, Any] = {"num_samples": len(rows)}
    for metric in METRICS:
        values = np.array([row[metric] for row in rows])
        found[metric] = asdict(summarise(values)) | {"median": float(np.median(values))}
    asked = [row["follows"] for row in rows if row["follows"] is not None]
    return found | {"query_following": float(np.mean(asked)) if asked else None, "num_asked": len(asked)}


def as_csv(rows: Sequence[Row]) -> str:
    """One line for each sample."""
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def table(results: dict[str, Any]) -> str:
    """Every separator overall, then the model by kind, for a terminal."""
    groups = {name: result["overall"] for name, result in results.items()}
    groups |= {f"  {kind}": figures for kind, figures in results["model"].items() if kind != "overall"}
    head = ("mean [95% interval], dB", "samples", *METRICS.values(), "median SI-SDRi", "queries followed")
    widths = (25, 8, *(22 for _ in METRICS), 16, 18)
    lines = [head[0].ljust(widths[0]) + "".join(map(str.rjust, head[1:], widths[1:]))]
    for name, figures in groups.items():
        cells = [str(figures["num_samples"])]
        cells += ["{mean:.2f} [{low:.2f}, {high:.2f}]".format(**figures[metric]) for metric in METRICS]
        cells += [f"{figures['si_sdri']['median']:.2f}"]
        cells += ["-" if figures["query_following"] is None else f"{figures['query_following']:.0%}"]
        lines.append(name.ljust(widths[0]) + "".join(map(str.rjust, cells, widths[1:])))
    return "\n".join(lines)
