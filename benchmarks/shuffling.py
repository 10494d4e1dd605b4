"""How well each `block_samples` shuffles, as a picture and a number.

    python -m benchmarks.shuffling            writes benchmarks/results/shuffling.png and shuffling.md

The number is the spread of batch means when neighbouring samples are alike (each sample's value is its place in the
shards), as a multiple of that of a perfect shuffle: 1 is perfect, and a batch made of whole blocks of b has sqrt(b)."""

from pathlib import Path

import matplotlib
import numpy as np

from shards.order import EpochOrder

matplotlib.use("Agg")
from matplotlib import pyplot

NUM_SAMPLES, BATCH_SIZE, SHOWN = 1 << 20, 64, 1024
BLOCKS = (1, 4, 16, 64, 1024)


def main() -> None:
    figure, axes = pyplot.subplots(1, len(BLOCKS), figsize=(15, 3.2), sharey=True, layout="constrained")
    lines = [f"| block_samples | spread of the means of batches of {BATCH_SIZE} |", "|---|---|"]
    for axis, block_samples in zip(axes, BLOCKS):
        samples = EpochOrder(NUM_SAMPLES, block_samples, "digest", 0, 0)[np.arange(NUM_SAMPLES)]
        means = samples.reshape(-1, BATCH_SIZE).mean(axis=1) / NUM_SAMPLES
        spread = means.std() * np.sqrt(12 * BATCH_SIZE)
        lines.append(f"| {block_samples} | {spread:.2f} |")
        axis.plot(np.arange(SHOWN), samples[:SHOWN] / NUM_SAMPLES, ".", markersize=2)
        axis.set(title=f"block_samples {block_samples}: {spread:.2f}", xlabel="place in the epoch")
    axes[0].set_ylabel("place in the shards")
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    figure.savefig(results / "shuffling.png", dpi=80)
    (results / "shuffling.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
