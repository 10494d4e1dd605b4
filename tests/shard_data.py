"""Small data sets whose samples say which they are."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from shards.manifest import Manifest, Plan, bind, seal
from shards.record import Record
from shards.storage import open_store
from shards.store import Store
from shards.tar import Sample
from shards.writer import write_shard

SHAPES = {"stft_mixture.2048": (1, 7, 5), "stft_segment.2048": (1, 7, 5), "condition": (3,)}


def make_sample(index: int, shapes: Mapping[str, tuple[int, ...]] = SHAPES, dtype: str = "float16") -> Sample:
    """A sample whose JSON has a length of its own and whose tensors count up from its index."""
    arrays = {
        name: (np.arange(np.prod(shape)).reshape(shape) % 1000 + index + 10 * place).astype(dtype)
        for place, (name, shape) in enumerate(shapes.items())
    }
    return Sample(f"{index:09d}", {"index": index, "text": "é" * (index % 700)}, arrays)


def make_samples(indices: Iterable[int]) -> Iterator[Sample]:
    return map(make_sample, indices)


def write_one(
    store: Store,
    plan: Plan,
    shard: int,
    make: Callable[[int], Sample] = make_sample,
    dtypes: Mapping[str, str] | None = None,
) -> Record:
    """Write one shard of a plan; `make` makes the sample of an index."""
    name, indices = plan.shard_name(shard), plan.samples(shard)
    samples = map(make, indices)
    return write_shard(store, name, samples, num_samples=len(indices), spec_digest=plan.spec_digest, dtypes=dtypes)


def write_set(store: Store, num_samples: int = 10, samples_per_shard: int = 4) -> Plan:
    """Every shard of a plan, ready to be sealed."""
    plan = bind(store, {"seed": 0}, num_samples, samples_per_shard)
    for shard in range(plan.num_shards):
        write_one(store, plan, shard)
    return plan


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
        write_one(store, plan, shard, lambda index: make_sample(first + index, shapes, dtype), dtypes)
    return seal(store)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def content(store: Store) -> dict[str, bytes]:
    return {name: store.read(name) for name, _ in store.list()}
