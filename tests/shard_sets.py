"""Small data sets for the tests of `shards`."""

from collections.abc import Iterable, Iterator

import numpy as np

from shards.manifest import Plan, bind
from shards.storage import Store
from shards.tar import Sample
from shards.writer import write_shard


def make_samples(indices: Iterable[int], frames: int = 7, bins: int = 5) -> Iterator[Sample]:
    """Samples that depend on nothing but their index."""
    for index in indices:
        rng = np.random.default_rng(index)
        arrays = {
            "stft_mixture.2048": rng.standard_normal((1, frames, bins)).astype(np.float16),
            "stft_segment.2048": rng.standard_normal((1, frames, bins)).astype(np.float16),
            "condition": rng.standard_normal(6).astype(np.float32),
        }
        yield Sample(f"{index:09d}", {"text": f"sound {index} – très", "index": index}, arrays)


def write_one(store: Store, plan: Plan, index: int) -> None:
    samples = plan.samples(index)
    name = plan.shard_name(index)
    write_shard(store, name, make_samples(samples), num_samples=len(samples), spec_digest=plan.spec_digest)


def write_set(store: Store, num_samples: int = 10, samples_per_shard: int = 4) -> Plan:
    """Every shard of a plan, ready to be sealed."""
    plan = bind(store, {"seed": 0}, num_samples, samples_per_shard)
    for index in range(plan.num_shards):
        write_one(store, plan, index)
    return plan


def tree(folder) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
