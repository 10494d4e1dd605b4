"""`audiosep report`: what is in a data set, as one HTML page that needs no network and no other file."""

import base64
import html
import io
import json
import math
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from audiosep.clips import Rejection
from audiosep.explain import folders_of, render
from audiosep.samples import Batch, decode, open_manifest
from audiosep.stft import istft
from shards.arguments import Parser
from shards.loader import ShardLoader
from shards.manifest import Manifest
from shards.progress import progress
from shards.record import read_record
from shards.storage import open_store, storage_options
from shards.store import StorageConfig, Store

SILENT_DB = -60.0  # below the loudest frame, a frame counts as silence
MAX_RECORDS = 1000  # records looked through for examples of rejected clips


def main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="audiosep report", description=__doc__)
    parser.add_argument("root", help="folder or URL of a sealed data set")
    parser.add_argument("--output", "-o", default="report.html", help="the page (default: report.html)")
    parser.add_argument("--samples", type=int, default=20_000, help="samples looked at, chosen at random, at most")
    parser.add_argument("--examples", type=int, default=6, help="samples shown with pictures and players")
    parser.add_argument("--clips", action="append", help="where the clips are now, once for each catalogue file")
    parser.add_argument("--options", default="{}", help='storage options as JSON: {"endpoint": "https://..."}')
    options = parser.parse_args(arguments)
    if options.samples < 1 or options.examples < 0:
        raise ValueError(f"--samples {options.samples} must be positive, --examples {options.examples} not negative.")
    storage = storage_options(options.options)
    store = open_store(options.root, storage)
    manifest = open_manifest(store)
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    survey, examples = look(manifest, storage, min(options.samples, manifest.num_samples), options.examples)
    folders = options.clips or (folders_of(store) if store.size("origin.json") is not None else [])
    page = "".join(compose(store, manifest, survey, [show(*each, manifest, folders, storage) for each in examples]))
    Path(options.output).write_text(page, encoding="utf-8")
    print(f"wrote {options.output} ({len(page) / 1e6:.1f} MB)")
    return 0


@dataclass
class Survey:
    """What the samples looked at have in common; levels in dB, one number for each sample."""

    num_samples: int = 0
    num_bytes: int = 0
    seconds: float = 0.0  # that the looking took
    kinds: Counter[str] = field(default_factory=Counter)
    captions: Counter[str] = field(default_factory=Counter)
    licences: Counter[str] = field(default_factory=Counter)
    recordings: set[str] = field(default_factory=set)
    sources: Counter[int] = field(default_factory=Counter)  # in a mixture
    snr_db: list[float] = field(default_factory=list)
    level_db: list[float] = field(default_factory=list)
    peak_db: list[float] = field(default_factory=list)  # before declipping
    sounding_seconds: list[float] = field(default_factory=list)


def look(
    manifest: Manifest, storage: StorageConfig, num_samples: int, num_examples: int
) -> tuple[Survey, list[tuple[Batch, int]]]:
    """Stream `num_samples` samples, and keep some as (batch, row) to show."""
    window = min(int(f.name.partition(".")[2]) for f in manifest.fields if f.name.startswith("stft_mixture."))
    names = (f"stft_mixture.{window}", f"stft_segment.{window}")
    batch_size = min(16, num_samples)
    loader = ShardLoader(
        manifest, batch_size=batch_size, fields=names, drop_last=False, max_samples=num_samples, storage=storage
    )
    survey, examples, start = Survey(), list[tuple[Batch, int]](), time.perf_counter()
    with progress(total=num_samples, unit="sample", desc="report") as bar:
        for stored in loader:
            rows = range(len(stored.text)) if stored.valid is None else np.flatnonzero(stored.valid.numpy()).tolist()
            batch = decode(stored.keys, stored.text, stored.arrays, stored.valid).to("cpu")
            _add(survey, batch, window, manifest.spec, rows)
            for row in rows:
                seen = {other.kinds[place] for other, place in examples if other.kinds[place]}
                if len(examples) < num_examples and batch.kinds[row] not in seen:
                    examples.append((batch, row))
            bar.update(len(rows))
    survey.seconds = time.perf_counter() - start
    survey.num_bytes = loader.stats.bytes
    return survey, examples


def _add(survey: Survey, batch: Batch, window: int, spec: Mapping[str, Any], rows: Sequence[int]) -> None:
    hop_length, sample_rate = spec["stft"]["hop_length"], spec["clips"]["sample_rate"]
    mixture, segment = (_frame_powers(each[window], window) for each in (batch.mixture, batch.segment))
    scale = hop_length / (window * 0.375 * window)  # Parseval, for a Hann window
    for row in rows:
        info = batch.info[row]
        length = info["length"]
        mixture_power = float(mixture[row].sum()) * scale / length
        segment_power = float(segment[row].sum()) * scale / length
        survey.num_samples += 1
        survey.kinds[info["kind"] or "no kind"] += 1
        survey.captions[info["text"]] += 1
        survey.sources[1 + len(info["interferers"])] += 1
        for source in (info["target"], *info["interferers"]):
            survey.licences[source["licence"] or "not stated"] += 1
            survey.recordings.add(source["recording"] or source["clip"])
        survey.snr_db.append(_db(segment_power / max(mixture_power - segment_power, 1e-3 * mixture_power, 1e-12)))
        survey.level_db.append(_db(mixture_power))
        survey.peak_db.append(2 * _db(info["peak"]))
        sounding = segment[row] > segment[row].max() * 10 ** (SILENT_DB / 10)
        survey.sounding_seconds.append(float(sounding.sum()) * hop_length / sample_rate)


def _frame_powers(spectrogram: torch.Tensor, window: int) -> torch.Tensor:
    """[B, T]: each frame's power over all bins of the two-sided spectrum, channels averaged."""
    power = spectrogram.abs().square()
    power[..., 1:-1] *= 2
    return power.sum(dim=-1).mean(dim=1)


def _db(power: float) -> float:
    return 10 * math.log10(max(power, 1e-12))


def show(batch: Batch, row: int, manifest: Manifest, folders: Sequence[str], storage: StorageConfig) -> str:
    """One sample as HTML: pictures of mixture and target, players where there is audio, and its sources."""
    info, window = batch.info[row], min(batch.mixture)
    audio = _audio(batch, row, manifest.spec, folders, storage)
    loudest = batch.mixture[window][row, 0].abs().max().item()
    panels = ""
    for name, spectrograms in (("mixture", batch.mixture), ("target", batch.segment)):
        picture = _picture(spectrograms[window][row, 0].abs().numpy(), loudest)
        player = f'<audio controls preload="metadata" src="{audio[name]}"></audio>' if name in audio else ""
        caption = f"<figcaption>{name}, 0 to {info['sample_rate'] / 2000:g} kHz, logarithmic</figcaption>"
        panels += f'<figure><img alt="spectrogram of the {name}" src="{picture}">{player}{caption}</figure>'
    others = ""
    for source in info["interferers"]:
        details = f"{source.get('gain_db', 0):+d} dB, {source['clip']}"
        others += f"<li>{html.escape(source['caption'])} <small>{html.escape(details)}</small></li>"
    silence = f"<p>{html.escape(audio['none'])}</p>" if "none" in audio else ""
    origin = f"<small>sample {batch.keys[row]}, {html.escape(info['target']['clip'])}</small>"
    heading = f"<h3>{html.escape(info['text'])}</h3>"
    sources = f"<p>beside</p><ul>{others}</ul>{origin}"
    return f'<article>{heading}<div class="panels">{panels}</div>{silence}{sources}</article>'


def _audio(
    batch: Batch, row: int, spec: Mapping[str, Any], folders: Sequence[str], storage: StorageConfig
) -> dict[str, str]:
    """Mixture and target as data URLs: from complex spectrograms, else made again from the clips; or why there are
    none."""
    window = min(batch.mixture)
    if batch.mixture[window].is_complex():
        length, hop_length = int(batch.lengths[row]), spec["stft"]["hop_length"]
        mixture, target = (
            istft(each[window][row, 0], window, hop_length, length).numpy() for each in (batch.mixture, batch.segment)
        )
    else:
        try:
            rendered = render(batch.info[row], spec, folders, storage)
        except (Rejection, ValueError, OSError) as error:
            return {"none": f"No players: {error}. Say where the clips are now with --clips FOLDER."}
        mixture, target = rendered.mixed.mixture, rendered.segment
    return {"mixture": _ogg(mixture, batch.info[row]), "target": _ogg(target, batch.info[row])}


def _ogg(waveform: np.ndarray, info: Mapping[str, Any]) -> str:
    buffer = io.BytesIO()
    soundfile.write(buffer, waveform, info["sample_rate"], format="OGG", subtype="VORBIS")
    return "data:audio/ogg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _picture(magnitude: np.ndarray, loudest: float) -> str:
    """A spectrogram [T, F] as the data URL of a picture, 80 dB below `loudest` black; low frequencies get more room."""
    from matplotlib.image import imsave

    frames, bins = magnitude.shape
    rows = np.unique(np.geomspace(1, bins - 1, 160).astype(int))
    columns = np.linspace(0, frames - 1, 320).astype(int)
    level = 20 * np.log10(np.maximum(magnitude[columns][:, rows], 1e-9) / max(loudest, 1e-9))
    buffer = io.BytesIO()
    imsave(buffer, level.T, cmap="magma", vmin=-80, vmax=0, origin="lower", format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def compose(store: Store, manifest: Manifest, survey: Survey, examples: Sequence[str]) -> Iterator[str]:
    """The page, piece by piece."""
    spec = manifest.spec
    hours = manifest.num_samples * spec["clips"]["segment_seconds"] / 3600
    clipped = sum(peak > 0 for peak in survey.peak_db) / survey.num_samples
    silence = 1 - np.mean(survey.sounding_seconds) / spec["clips"]["segment_seconds"]
    digests = {"digest": manifest.digest, "spec_digest": manifest.plan.spec_digest}
    yield PAGE_HEAD.format(title=html.escape(manifest.url), **digests)
    yield _cards(
        {
            "samples": f"{manifest.num_samples:,}",
            "of mixtures": f"{hours:,.1f} h" if hours >= 1 else f"{60 * hours:.1f} min",
            "clips to choose from": f"{spec['catalogue']['num_clips']:,}",
            "kinds": str(len(survey.kinds)),
            "captions seen": f"{len(survey.captions):,}",
            "recordings heard": f"{len(survey.recordings):,}",
            f"in {manifest.num_shards:,} shards": f"{manifest.tar_bytes.sum() / 1e9:,.2f} GB",
            "times a clip was rejected": f"{sum(manifest.rejected.values()):,}",
        }
    )
    if survey.num_samples < manifest.num_samples:
        yield f"<p>What follows is of {survey.num_samples:,} samples, chosen at random.</p>"
    yield '<h2>Examples</h2><div class="examples">' + "".join(examples) + "</div>"
    yield '<h2>Levels</h2><div class="charts">'
    yield _histogram("target over the rest", "dB", survey.snr_db)
    yield _histogram("loudness of mixtures", "dBFS, RMS", survey.level_db)
    yield _histogram(f"peaks before declipping: {clipped:.1%} above full scale", "dBFS", survey.peak_db)
    yield _histogram(f"sounding part of targets: {silence:.1%} is silence", "s", survey.sounding_seconds)
    yield '</div><h2>Contents</h2><div class="charts">'
    yield _bars("kinds of targets", survey.kinds)
    yield _bars("most frequent queries", survey.captions)
    yield _histogram("words in a query", "", [len(caption.split()) for caption in survey.captions.elements()])
    yield _bars("sources in a mixture", {str(count): number for count, number in sorted(survey.sources.items())})
    yield _bars("licences of sources", survey.licences)
    yield "</div><h2>Rejected clips</h2>" + _rejected(store, manifest)
    yield '<h2>Shards</h2><div class="charts">'
    yield _histogram("size of shards", "MB", (manifest.tar_bytes / 1e6).tolist())
    yield "</div>" + _facts(_throughput(store, manifest, survey))
    yield "<h2>How it was made</h2>" + _facts(dict(_flat(spec))) + "</main></body></html>\n"


def _cards(numbers: Mapping[str, str]) -> str:
    cards = "".join(f"<div><b>{number}</b>{html.escape(name)}</div>" for name, number in numbers.items())
    return f'<section class="cards">{cards}</section>'


def _histogram(title: str, unit: str, values: Sequence[float]) -> str:
    """A histogram of at most 30 bars as inline SVG, with its median marked."""
    low, high = float(min(values)), float(max(values))
    if high - low < 1e-9:
        return _chart(title, f'<p class="constant">{low:g} {unit} everywhere</p>')
    whole = all(float(value).is_integer() for value in values) and high - low < 30
    edges = np.arange(low - 0.5, high + 1) if whole else np.linspace(low, high, 31)
    counts, edges = np.histogram(values, edges)
    width = 300 / len(counts)
    bars = ""
    for i, (count, height) in enumerate(zip(counts, 120 * counts / counts.max())):
        place = f'x="{i * width:.1f}" y="{120 - height:.1f}" width="{width - 1:.1f}" height="{height:.1f}"'
        bars += f"<rect {place}><title>{edges[i]:.3g} to {edges[i + 1]:.3g} {unit}: {count}</title></rect>"
    median = float(np.median(values))
    place = 300 * (median - edges[0]) / (edges[-1] - edges[0])
    marker = f'<line x1="{place:.1f}" x2="{place:.1f}" y1="0" y2="120"><title>median {median:.3g} {unit}</title></line>'
    axis = f'<text x="0" y="136">{low:.3g}</text><text x="300" y="136" text-anchor="end">{high:.3g} {unit}</text>'
    middle = f'<text x="150" y="136" text-anchor="middle">median {median:.3g}</text>'
    return _chart(title, f'<svg viewBox="0 0 300 142">{bars}{marker}{axis}{middle}</svg>')


def _bars(title: str, counts: Mapping[str, int]) -> str:
    """The twelve largest of some counts as labelled bars."""
    ordered, most_shown = sorted(counts.items(), key=lambda item: -item[1]), 12
    rows = "".join(
        f'<div class="bar"><span title="{html.escape(name)}">{html.escape(name)}</span>'
        f'<i style="width:{100 * count / ordered[0][1]:.1f}%"></i><em>{count:,}</em></div>'
        for name, count in ordered[:most_shown]
    )
    rest = f"<small>and {len(ordered) - most_shown:,} more</small>" if len(ordered) > most_shown else ""
    return _chart(title, rows + rest)


def _chart(title: str, content: str) -> str:
    return f'<section class="chart"><h3>{html.escape(title)}</h3>{content}</section>'


def _rejected(store: Store, manifest: Manifest) -> str:
    """How many clips were rejected for what, with a few of each reason by name."""
    if not manifest.rejected:
        return "<p>None.</p>"
    named: dict[str, list[str]] = {reason: [] for reason in manifest.rejected}
    for index in range(min(manifest.num_shards, MAX_RECORDS)):
        for entry in read_record(store, manifest.shard_name(index)).rejected:
            clip = f"{entry['clip']} ({entry['detail']})"
            if clip not in named[entry["reason"]] and len(named[entry["reason"]]) < 5:
                named[entry["reason"]].append(clip)
    rows = "".join(
        f"<tr><td>{html.escape(reason)}</td><td>{count:,}</td><td>{html.escape('; '.join(named[reason]))}</td></tr>"
        for reason, count in sorted(manifest.rejected.items(), key=lambda item: -item[1])
    )
    return f"<table><tr><th>reason</th><th>times</th><th>for example</th></tr>{rows}</table>"


def _throughput(store: Store, manifest: Manifest, survey: Survey) -> dict[str, str]:
    facts = {
        "read for this page": f"{survey.num_samples / survey.seconds:,.0f} samples/s, "
        f"{survey.num_bytes / 1e6 / survey.seconds:,.0f} MB/s with everything computed here"
    }
    records = [Path(store.url, f"{manifest.shard_name(i)}.json") for i in range(min(manifest.num_shards, MAX_RECORDS))]
    if "://" not in store.url and len(records) > 1:
        times = [os.stat(record).st_mtime for record in records]
        made = manifest.plan.samples_per_shard * (len(records) - 1)
        facts["made at"] = (
            f"{made / max(max(times) - min(times), 1e-3):,.1f} samples/s, from the first record to the last"
        )
    return facts


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, child in value.items():
            yield from _flat(child, f"{path}.{name}" if path else name)
    else:
        yield path, value if isinstance(value, str) else json.dumps(value)


def _facts(facts: Mapping[str, str]) -> str:
    rows: Iterable[str] = (
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(fact)}</td></tr>" for name, fact in facts.items()
    )
    return f'<table class="facts">{"".join(rows)}</table>'


PAGE_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ --ink: #1d2433; --soft: #667; --paper: #fff; --tint: #f3f5f9;
  --line: #dde2ec; --accent: #3b5bdb; --mark: #e8590c }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e7eaf2; --soft: #98a; --paper: #14171f; --tint: #1d212c;
    --line: #333a4a; --accent: #748ffc; --mark: #ffa94d }}
}}
body {{ margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif }}
main {{ max-width: 1080px; margin: 0 auto; padding: 32px 24px 64px }}
h1 {{ font-size: 26px; margin: 0; overflow-wrap: anywhere }}
h2 {{ font-size: 19px; margin: 40px 0 12px; border-bottom: 1px solid var(--line); padding-bottom: 6px }}
h3 {{ font-size: 14px; margin: 0 0 10px }}
small, .digest {{ color: var(--soft); font-size: 12px }}
.cards {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); gap: 12px; margin: 24px 0 }}
.cards div {{ background: var(--tint); border-radius: 10px; padding: 14px 16px; color: var(--soft); font-size: 13px }}
.cards b {{ display: block; font-size: 22px; color: var(--ink) }}
.charts, .examples {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: 16px }}
.examples {{ grid-template-columns: repeat(auto-fill, minmax(460px, 1fr)) }}
.chart, article {{ background: var(--tint); border-radius: 10px; padding: 16px }}
svg {{ width: 100%; display: block }}
svg rect {{ fill: var(--accent) }} svg line {{ stroke: var(--mark); stroke-width: 2 }}
svg text {{ font-size: 11px; fill: var(--soft) }}
.bar {{ display: grid; grid-template-columns: 45% 1fr auto; gap: 8px; align-items: center; font-size: 13px }}
.bar span {{ overflow: hidden; text-overflow: ellipsis; white-space: nowrap }}
.bar i {{ background: var(--accent); height: 10px; border-radius: 3px; min-width: 1px }}
.bar em {{ font-style: normal; color: var(--soft) }}
.constant {{ font-size: 20px; margin: 24px 0; text-align: center }}
.panels {{ display: grid; grid-template-columns: 1fr 1fr; gap: 12px }}
figure {{ margin: 0 }} figcaption {{ font-size: 12px; color: var(--soft); text-align: center }}
figure img {{ width: 100%; height: 150px; display: block; border-radius: 6px 6px 0 0; object-fit: fill }}
audio {{ width: 100%; height: 32px }}
article p {{ margin: 8px 0 0; font-size: 13px; color: var(--soft) }}
article ul {{ margin: 2px 0 6px; padding-left: 18px; font-size: 13px }}
table {{ border-collapse: collapse; font-size: 13px; margin-top: 12px }}
td, th {{ text-align: left; padding: 4px 16px 4px 0; vertical-align: top; border-bottom: 1px solid var(--line);
  overflow-wrap: anywhere }}
th, td:not(:last-child) {{ white-space: nowrap }}
.facts td:first-child {{ color: var(--soft) }}
</style></head><body><main>
<h1>{title}</h1>
<p class="digest">manifest {digest}, spec {spec_digest}</p>
"""
