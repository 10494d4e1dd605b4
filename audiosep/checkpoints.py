"""Checkpoints in folders and buckets; the released AudioSep one in and out: the same tensors under the same names,
loaded strictly.

Upstream's file is a Lightning checkpoint whose `state_dict` holds the separation model under `ss_model.` and all of the
query encoder under `query_encoder.`."""

import importlib.metadata
import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from audiosep.resunet import ResUNet30
from audiosep.stft import hann_window
from shards.storage import open_object
from shards.store import StorageConfig

MODEL_PREFIX = "ss_model."


def write_checkpoint(content: Mapping[str, Any], path: str | Path, storage: StorageConfig | None = None) -> None:
    """torch.save to a path or URL: whole under its name or not there, whatever dies meanwhile."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    store, name = open_object(path, storage)
    store.write(name, buffer.getbuffer())


def read_checkpoint(path: str | Path, storage: StorageConfig | None = None) -> dict[str, Any]:
    """What torch.save wrote to a path or URL, without running code from it: tensors, plain data and numpy scalars only.

    Raises ValueError for a file that torch.save did not write, and for one that holds anything else."""
    store, name = open_object(path, storage)
    file = io.BytesIO(store.read(name))
    scalar = np.float64(0).__reduce__()[0]  # older trainers kept their scores as numpy scalars
    allowed: list[Any] = [scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype]
    allowed += [type(np.dtype(name)) for name in ("float64", "float32", "int64", "bool")]
    try:
        if zipfile.is_zipfile(file) and (damaged := zipfile.ZipFile(file).testzip()):
            raise ValueError(f"{damaged} has another checksum")  # torch.load compares none
        file.seek(0)
        with torch.serialization.safe_globals(allowed):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise all kinds
        raise ValueError(
            f"{path} cannot be read as a checkpoint of tensors and plain data: it is damaged, or something else, or "
            f"carries objects whose code would have to run. ({type(error).__name__}: {str(error).partition('. ')[0]})"
        ) from error


def load_released(path: str | Path, model: ResUNet30, storage: StorageConfig | None = None) -> None:
    """Put a released checkpoint's weights into a model of the same widths, to use or to fine-tune it.

    Raises ValueError naming every tensor that is missing, left over or of another shape."""
    content = read_checkpoint(path, storage)
    tensors = from_released(content.get("state_dict", {}), model)
    try:
        model.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise ValueError(f"{path} is not the checkpoint of a model like this one. {error}") from None


def from_released(state: Mapping[str, Tensor], model: ResUNet30) -> dict[str, Tensor]:
    """A released `state_dict` as the model names it. All the known differences are here:

    - names carry the prefix `ss_model.`, and the query encoder is in the file too (queries.py reads it);
    - `base.stft.*` and `base.istft.*`, the kernels of upstream's transforms, have no use here (see stft.py);
    - upstream has one window length. A model with more starts their input normalisation from the released one:
      the same frequencies, and for stationary sound magnitudes grow as the square root of the window."""
    tensors = {name.removeprefix(MODEL_PREFIX): x for name, x in state.items() if name.startswith(MODEL_PREFIX)}
    tensors = {name: x for name, x in tensors.items() if not name.startswith(("base.stft.", "base.istft."))}
    first, *others = model.config.window_lengths
    norm = {name.removeprefix("base.bn0."): x for name, x in tensors.items() if name.startswith("base.bn0.")}
    for window_length in others:
        gains = {"running_mean": (window_length / first) ** 0.5, "running_var": window_length / first}
        for name, x in norm.items():
            stretched = _stretch(x, window_length // 2 + 1) if x.ndim else x
            tensors[f"base.{model.base.input_norm_name(window_length)}.{name}"] = stretched * gains.get(name, 1)
    return tensors


def _stretch(values: Tensor, num_bins: int) -> Tensor:
    return F.interpolate(values[None, None], num_bins, mode="linear", align_corners=True)[0, 0]


def export(model: ResUNet30, path: str | Path) -> None:
    """Write a checkpoint that upstream's code loads (without its query encoder, which it loads from its own file)."""
    version = importlib.metadata.version("pytorch-lightning")
    write_checkpoint({"state_dict": to_released(model), "pytorch-lightning_version": version}, path)


def to_released(model: ResUNet30) -> dict[str, Tensor]:
    """The model's tensors in the released layout, transform kernels included: `from_released` backwards. The input
    normalisations of window lengths after the first have no place in it and are left out."""
    window_length = model.config.window_lengths[0]
    extra = tuple(f"base.{model.base.input_norm_name(other)}." for other in model.config.window_lengths[1:])
    tensors = {name: x for name, x in model.state_dict().items() if not (extra and name.startswith(extra))}
    tensors = {**transform_kernels(window_length), **tensors}
    return {MODEL_PREFIX + name: x.detach().cpu() for name, x in tensors.items()}


def transform_kernels(window_length: int) -> dict[str, Tensor]:
    """The fixed convolution kernels of upstream's STFT and inverse STFT (torchlibrosa's layout), N = window length."""
    window = hann_window(window_length).astype(np.float64)
    angle = np.outer(np.arange(window_length), np.arange(window_length)) % window_length * (2 * np.pi / window_length)
    cosine, sine, num_bins = np.cos(angle), np.sin(angle), window_length // 2 + 1
    kernels = {
        "base.stft.conv_real.weight": (cosine * window)[:num_bins, None, :],
        "base.stft.conv_imag.weight": (-sine * window)[:num_bins, None, :],
        "base.istft.ola_window": window**2,
        "base.istft.conv_real.weight": (cosine * window / window_length).T[:, :, None],
        "base.istft.conv_imag.weight": (sine * window / window_length).T[:, :, None],
    }
    return {name: torch.from_numpy(kernel.astype(np.float32)) for name, kernel in kernels.items()}
