"""A rendered mixture into the sample that is stored, and a batch of stored samples into what the model takes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from audiosep.mixing import Mixture
from audiosep.recipes import Recipe, Source
from audiosep.stft import Precision, Representation, StftConfig, Transform, stored_shape
from shards.manifest import Manifest, load_manifest
from shards.store import Store
from shards.tar import Sample as StoredSample

MIXTURE, SEGMENT, CONDITION = "stft_mixture", "stft_segment", "condition"


def open_manifest(store: Store) -> Manifest:
    """The manifest of a data set of ours. Raises ValueError for one whose spec is not that of `audiosep precompute`."""
    manifest = load_manifest(store)
    if missing := {"clips", "stft", "query_encoder"} - manifest.spec.keys():
        raise ValueError(
            f"{store.url} was not made by audiosep precompute: its spec says nothing of {', '.join(sorted(missing))}. "
            "ShardLoader and the shards commands read it; what deals with audio does not."
        )
    return manifest


@dataclass(frozen=True)
class Rendered:
    """What became of a recipe: the sources that were used, in place of rejected ones too, and their mixture."""

    recipe: Recipe
    sources: tuple[Source, ...]
    offsets: tuple[int, ...]  # where each source's crop starts in its clip, samples
    mixed: Mixture

    @property
    def target(self) -> Source:
        return self.sources[self.recipe.target]

    @property
    def segment(self) -> np.ndarray:
        """The target as it is in the mixture, float32 [L]."""
        return self.mixed.segment if self.recipe.target == 0 else self.mixed.interferer(self.recipe.target - 1)


class Encoder:
    """Rendered mixtures to stored samples. The tensors of a sample are valid until the next one is encoded."""

    def __init__(
        self,
        length: int,
        sample_rate: int,
        stft: StftConfig,
        representation: Representation = "magnitude",
        dtype: Precision = "float16",
        device: str = "cpu",
    ) -> None:
        """`length` in samples."""
        self._length, self._sample_rate = length, sample_rate
        self._transforms: dict[int, Transform] = {}
        self._spectrograms: dict[str, torch.Tensor] = {}
        self.dtypes: dict[str, str] = {}
        for window_length in stft.window_lengths:
            shape = stored_shape(length, window_length, stft.hop_length, representation)
            self._transforms[window_length] = Transform(length, window_length, stft.hop_length, representation, device)
            for name in (MIXTURE, SEGMENT):
                self._spectrograms[f"{name}.{window_length}"] = torch.empty(shape, dtype=getattr(torch, dtype))
                self.dtypes[f"{name}.{window_length}"] = dtype

    def __call__(self, rendered: Rendered, condition: np.ndarray | None = None) -> StoredSample:
        """The sample of a mixture; `condition` is the embedding [D] of its query."""
        for window_length, transform in self._transforms.items():
            transform(rendered.mixed.mixture, self._spectrograms[f"{MIXTURE}.{window_length}"])
            transform(rendered.segment, self._spectrograms[f"{SEGMENT}.{window_length}"])
        arrays = {name: _as_numpy(spectrogram) for name, spectrogram in self._spectrograms.items()}
        if condition is not None:
            arrays[CONDITION] = condition.astype(np.float16)
        text = describe(rendered) | {"length": self._length, "sample_rate": self._sample_rate}
        return StoredSample(f"{rendered.recipe.index:09d}", text, arrays)


def _as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The same memory; bfloat16 as its bit patterns, uint16."""
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def describe(rendered: Rendered) -> dict[str, Any]:
    """The sample's JSON: its query, and all that it takes to make it again from the clips."""
    recipe = rendered.recipe
    gains = (None, *recipe.gains_db)
    sources = [_describe_source(*each) for each in zip(rendered.sources, rendered.offsets, gains, strict=True)]
    target = sources.pop(recipe.target)
    return {
        "index": recipe.index,
        "text": target["caption"],
        "query": recipe.query,
        "kind": target["kind"],
        "target": target,
        "target_slot": recipe.target,
        "interferers": sources,
        "noise_gain_db": recipe.noise_gain_db,
        "peak": rendered.mixed.peak,
        "declip_scale": rendered.mixed.declip_scale,
    }


def _describe_source(source: Source, offset: int, gain_db: int | None) -> dict[str, Any]:
    clip = source.clip
    described: dict[str, Any] = {"clip": clip.path, "catalogue": clip.file, "caption": source.caption, "offset": offset}
    described |= {"kind": clip.kind, "source": clip.source, "author": clip.author, "licence": clip.licence}
    described["recording"] = clip.recording
    if clip.byte_range:
        described["byte_range"] = list(clip.byte_range)
    if gain_db is not None:
        described["gain_db"] = gain_db
    return described


@dataclass(frozen=True)
class Batch:
    """Samples as the model takes them. Spectrograms are by window length; as stored until `to`: float16 or another
    precision, [B, C, T, F] magnitudes or [B, 2, C, T, F] real and imaginary planes."""

    keys: list[str]
    text: list[str]  # the queries
    kinds: list[str]
    mixture: dict[int, torch.Tensor]
    segment: dict[int, torch.Tensor]
    condition: torch.Tensor | None  # [B, D]
    lengths: torch.Tensor  # int64 [B], samples of each waveform
    info: list[dict[str, Any]]  # each sample's JSON: clips, offsets, gains, licences
    valid: torch.Tensor | None = None  # bool [B]: False for rows that only fill up an evaluation batch

    def to(self, device: torch.device | str) -> "Batch":
        """On a device, in float32; planes become complex64 [B, C, T, F]."""
        return replace(
            self,
            mixture={window: _to_device(stored, device) for window, stored in self.mixture.items()},
            segment={window: _to_device(stored, device) for window, stored in self.segment.items()},
            condition=None if self.condition is None else self.condition.to(device, non_blocking=True).float(),
            lengths=self.lengths.to(device, non_blocking=True),
            valid=None if self.valid is None else self.valid.to(device, non_blocking=True),
        )


def decode(
    keys: Sequence[str],
    text: Sequence[dict[str, Any]],
    arrays: dict[str, torch.Tensor],
    valid: torch.Tensor | None = None,
) -> Batch:
    """The batch in a `shards.loader.Batch`'s keys, text, arrays and valid: same memory, names made plain.

    Raises ValueError if these are not samples that precompute made."""
    by_window: dict[str, dict[int, torch.Tensor]] = {MIXTURE: {}, SEGMENT: {}}
    for name, array in arrays.items():
        field, _, window_length = name.partition(".")
        if field in by_window:
            stored = array.view(torch.bfloat16) if array.dtype == torch.uint16 else array
            by_window[field][int(window_length)] = stored
    if not by_window[MIXTURE] or by_window[MIXTURE].keys() != by_window[SEGMENT].keys():
        raise ValueError(
            f"The shards hold {', '.join(arrays)}: training needs {MIXTURE}.<window> and {SEGMENT}.<window> as "
            "`audiosep precompute` makes them."
        )
    return Batch(
        keys=list(keys),
        text=[sample["text"] for sample in text],
        kinds=[sample["kind"] for sample in text],
        mixture=by_window[MIXTURE],
        segment=by_window[SEGMENT],
        condition=arrays.get(CONDITION),
        lengths=torch.tensor([sample["length"] for sample in text]),
        info=list(text),
        valid=valid,
    )


def _to_device(stored: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    moved = stored.to(device, non_blocking=True).float()
    return torch.complex(moved[:, 0], moved[:, 1]) if moved.ndim == 5 else moved
