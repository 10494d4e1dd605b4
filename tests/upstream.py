"""The released model's table of tensors, and figures from upstream's own code (golden/README.md says how made)."""

import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"


def figures() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "golden_seed0.npz") as archive:
        return dict(archive)


def released_table() -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the released separation model, in its order."""
    rows = (line.split("\t") for line in (GOLDEN / "resunet30_state_dict.tsv").read_text().splitlines())
    return {name: tuple(map(int, filter(None, shape.split("x")))) for name, shape, _ in rows}


def formula_weights() -> dict[str, Tensor]:
    """The released table filled by formula, without the transform kernels: the weights behind the figures."""
    names = {name: shape for name, shape in released_table().items() if "stft." not in name}
    return {name: formula_tensor(name, shape) for name, shape in names.items()}


def formula_tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    if name.endswith("num_batches_tracked"):
        return torch.tensor(0)
    z = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()))).standard_normal(math.prod(shape))
    x = torch.from_numpy(z.reshape(shape).astype(np.float32))
    if len(shape) > 1:
        return x / math.sqrt(math.prod(shape[1:]))
    return 1 + 0.1 * torch.tanh(x) if name.endswith(("running_var", "weight")) else 0.1 * x
