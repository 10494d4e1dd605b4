"""Small sealed data sets whose samples say which they are."""

from pathlib import Path

import numpy as np

from shards.manifest import Manifest, bind, seal
from shards.storage import open_store
from shards.tar import Sample
from shards.writer import write_shard

SHAPES = {"stft_mixture.2048": (1, 7, 5), "stft_segment.2048": (1, 7, 5), "condition": (3,)}


def make_sample(index: int, shapes: dict[str, tuple[int, ...]] = SHAPES, dtype: str = "float16") -> Sample:
    """A sample whose JSON has a length of its own and whose tensors count up from its index."""
    arrays = {
        name: (np.arange(np.prod(shape)).reshape(shape) + index + 10 * place).astype(dtype)
        for place, (name, shape) in enumerate(shapes.items())
    }
    return Sample(f"{index:09d}", {"index": index, "text": "é" * (index % 700)}, arrays)


def make_data_set(
    root: Path,
    num_samples: int,
    samples_per_shard: int = 10,
    first: int = 0,
    shapes: dict[str, tuple[int, ...]] = SHAPES,
    dtype: str = "float16",
    dtypes: dict[str, str] | None = None,
) -> Manifest:
    """A sealed root of samples `first`, `first` + 1, ..."""
    store = open_store(root)
    plan = bind(store, {"first": first}, num_samples, samples_per_shard)
    for shard in range(plan.num_shards):
        indices = plan.samples(shard)
        samples = (make_sample(first + index, shapes, dtype) for index in indices)
        name = plan.shard_name(shard)
        write_shard(store, name, samples, num_samples=len(indices), spec_digest=plan.spec_digest, dtypes=dtypes)
    return seal(store)
