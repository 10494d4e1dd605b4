"""`audiosep explain`: of what one sample was made, made again from the clips and compared with what is stored."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from audiosep.catalogue import Clip, resolve
from audiosep.clips import ClipConfig, Rejection, read_crop_at
from audiosep.config import build_config
from audiosep.dataset import ORIGIN
from audiosep.mixing import Mixture, mix
from audiosep.recipes import Recipe, Source
from audiosep.samples import CONDITION, Encoder, Rendered, open_manifest
from audiosep.stft import StftConfig
from shards.arguments import Parser
from shards.manifest import Manifest
from shards.storage import open_store, storage_options
from shards.store import StorageConfig, Store
from shards.tar import Sample
from shards.verify import read_sample

SAME, DIFFERENT = 0, 3
TOLERANCE = {"float16": 1e-3, "bfloat16": 1e-2, "float32": 1e-4}  # of the largest value, for another kind of machine


def main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="audiosep explain", description=__doc__)
    parser.add_argument("root", help="folder or URL of a sealed data set")
    parser.add_argument("key", type=int, help="the sample's key, which is its number")
    parser.add_argument("--clips", action="append", help="where the clips are now, once for each catalogue file")
    parser.add_argument("--listen", metavar="OUT", help="folder for WAVs of mixture, target and each interferer")
    parser.add_argument("--options", default="{}", help='storage options as JSON: {"endpoint": "https://..."}')
    options = parser.parse_args(arguments)
    storage = storage_options(options.options)
    store = open_store(options.root, storage)
    manifest = open_manifest(store)
    if not 0 <= options.key < manifest.num_samples:
        raise ValueError(f"{options.root} has samples 0 to {manifest.num_samples - 1}, not {options.key}.")
    stored = read_sample(store, manifest, options.key)
    print("\n".join(describe(stored, manifest)))
    try:
        rendered = render(stored.text, manifest.spec, options.clips or folders_of(store), storage)
    except Rejection as rejection:
        raise ValueError(
            f"It can't be made again: {rejection}. Say where the clips are now with --clips FOLDER."
        ) from None
    if options.listen:
        for path in listen(rendered, manifest.spec["clips"]["sample_rate"], Path(options.listen)):
            print(f"wrote {path}")
    differences = compare(stored, rendered, manifest)
    print("\n".join(f"made again: {name} {result}" for name, (_, result) in differences.items()))
    return SAME if all(same for same, _ in differences.values()) else DIFFERENT


def describe(sample: Sample, manifest: Manifest) -> Iterator[str]:
    """The sample's story, line by line."""
    text = sample.text
    shard, row = divmod(text["index"], manifest.plan.samples_per_shard)
    yield f"{sample.key}, row {row} of {manifest.shard_name(shard)}.tar"
    yield f"query: {text['text']}"
    seconds, declip = text["length"] / text["sample_rate"], text["declip_scale"]
    yield f"{seconds:g} s at {text['sample_rate']} Hz, noise gain {text['noise_gain_db']} dB, declipped by {declip:.3f}"
    for source in (text["target"], *text["interferers"]):
        gain = f", {source['gain_db']:+d} dB" if "gain_db" in source else ""
        start = source["offset"] / text["sample_rate"]
        yield f"{'target' if source is text['target'] else 'interferer'}: {source['clip']}"
        yield f"    {source['caption']!r} ({source['kind'] or 'no kind'}), from {start:.3f} s{gain}"
        yield "    " + (", ".join(filter(None, map(source.get, ("author", "licence", "source")))) or "no licence known")


def render(
    text: Mapping[str, Any], spec: Mapping[str, Any], folders: Sequence[str], storage: StorageConfig
) -> Rendered:
    """The mixture that a sample's JSON describes, from clips in `folders`, one for each catalogue file.

    Raises Rejection for a clip that is not there any more."""
    config = build_config(ClipConfig, spec["clips"], "spec.clips")
    described = list(text["interferers"])
    described.insert(text["target_slot"], text["target"])
    sources = tuple(_source(number, each, folders) for number, each in enumerate(described))
    offsets = tuple(each["offset"] for each in described)
    crops = [_crop(source.clip, offset, config, storage) for source, offset in zip(sources, offsets)]
    gains_db = tuple(each["gain_db"] for each in described[1:])
    recipe = Recipe(text["index"], text["index"], sources, gains_db, text["noise_gain_db"], text["target_slot"])
    return Rendered(recipe, sources, offsets, mix(crops[0], crops[1:], gains_db, text["noise_gain_db"]))


def _crop(clip: Clip, offset: int, config: ClipConfig, storage: StorageConfig) -> np.ndarray:
    try:
        return read_crop_at(clip, offset, config, storage)
    except Rejection as rejection:
        raise Rejection(rejection.reason, f"{clip.location}: {rejection.detail}") from None


def _source(number: int, described: dict[str, Any], folders: Sequence[str]) -> Source:
    file, path, caption = described["catalogue"], described["clip"], described["caption"]
    if file >= len(folders):
        raise ValueError(f"{path} is of catalogue file {file}; give --clips once for each of them, in their order.")
    texts = {name: described[name] for name in ("kind", "source", "author", "licence", "recording")}
    offset, size = described.get("byte_range", (0, -1))
    byte_range = None if size < 0 else (offset, size)
    clip = Clip(number, file, path, resolve(path, folders[file]), captions=(caption,), byte_range=byte_range, **texts)
    return Source(clip, caption, 0.0)


def folders_of(store: Store) -> list[str]:
    """Where the clips were when the data set was begun."""
    try:
        return json.loads(store.read(ORIGIN))["folders"]
    except FileNotFoundError:
        raise ValueError(f"{store.url} has no {ORIGIN}; say where the clips are with --clips FOLDER.") from None


def listen(rendered: Rendered, sample_rate: int, folder: Path) -> Iterator[Path]:
    """Write mixture, target and each interferer as they are in the mixture, 32-bit float WAV; yields the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    target, parts = rendered.recipe.target, list(_parts(rendered.mixed))
    waveforms = {"mixture": rendered.mixed.mixture, "target": parts.pop(target)}
    waveforms |= {f"interferer-{number}": waveform for number, waveform in enumerate(parts, 1)}
    for name, waveform in waveforms.items():
        path = folder / f"{rendered.recipe.index:09d}-{name}.wav"
        soundfile.write(path, waveform, sample_rate, subtype="FLOAT")
        yield path


def _parts(mixed: Mixture) -> Iterator[np.ndarray]:
    yield mixed.segment
    yield from map(mixed.interferer, range(len(mixed.waveforms)))


def compare(stored: Sample, rendered: Rendered, manifest: Manifest) -> dict[str, tuple[bool, str]]:
    """Of each stored tensor, whether it is what the clips give today, and in words."""
    spec = manifest.spec
    device = spec["device"] if torch.cuda.is_available() else "cpu"
    shards = spec["shards"]
    encoder = Encoder(
        stored.text["length"],
        stored.text["sample_rate"],
        build_config(StftConfig, spec["stft"], "spec.stft"),
        shards["representation"],
        shards["dtype"],
        device,
    )
    again = encoder(rendered)
    return {
        name: _compare(values, again.arrays[name], shards["dtype"])
        for name, values in stored.arrays.items()
        if name != CONDITION
    }


def _compare(stored: np.ndarray, again: np.ndarray, dtype: str) -> tuple[bool, str]:
    if np.array_equal(stored, again):
        return True, "is the same to the last bit"
    one, other = (torch.from_numpy(np.array(a)).view(getattr(torch, dtype)).float() for a in (stored, again))
    difference = ((one - other).abs().max() / one.abs().max()).item()
    if difference < TOLERANCE[dtype]:
        return True, f"is the same to rounding ({difference:.1e} of its largest value)"
    return False, f"DIFFERS by {difference:.1e} of its largest value: a clip is not what it was"
