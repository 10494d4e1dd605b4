"""Pictures: spectrograms side by side, and a training run's loss curve."""

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure

from audiosep.stft import stft

DYNAMIC_RANGE_DB = 80.0
MAX_TITLE = 120  # characters, or the spectrograms would have no room
WINDOW_LENGTH, HOP_LENGTH = 1024, 256


def spectrogram_figure(waveforms: Mapping[str, np.ndarray], sample_rate: int, title: str) -> Figure:
    """The spectrograms of waveforms [L] side by side under their names, on one scale in dB below the loudest bin."""
    figure = Figure(figsize=(4 * len(waveforms) + 1, 3.6), layout="constrained")
    levels = {name: _level_db(waveform) for name, waveform in waveforms.items()}
    loudest = max(level.max() for level in levels.values())
    for axes, (name, level) in zip(np.atleast_1d(figure.subplots(1, len(levels), sharey=True)), levels.items()):
        seconds = len(waveforms[name]) / sample_rate
        image = axes.imshow(
            level.T - loudest,
            origin="lower",
            aspect="auto",
            extent=(0, seconds, 0, sample_rate / 2000),
            vmin=-DYNAMIC_RANGE_DB,
            vmax=0,
            cmap="magma",
        )
        axes.set(title=name, xlabel="time (s)")
    figure.axes[0].set_ylabel("frequency (kHz)")
    figure.colorbar(image, ax=figure.axes, label="level (dB)")
    # Captions are no formulas: matplotlib would read "$...$" as one, and fail where it is none.
    figure.suptitle(textwrap.shorten(title, MAX_TITLE, placeholder=" ..."), parse_math=False)
    return figure


def _level_db(waveform: np.ndarray) -> np.ndarray:
    """[T, F]"""
    spectrogram = stft(torch.from_numpy(np.ascontiguousarray(waveform, np.float32)), WINDOW_LENGTH, HOP_LENGTH)
    return 20 * np.log10(np.maximum(spectrogram.abs().numpy(), 1e-5))


def loss_figure(curves: Mapping[str, tuple[Sequence[int], Sequence[float]]]) -> Figure:
    """Loss curves by name, each as steps and values."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, (steps, values) in curves.items():
        axes.plot(steps, values, label=name, marker="o" if len(steps) < 20 else None, markersize=3)
    axes.set(xlabel="step", ylabel="loss", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
