"""AudioSep's benchmark folders as upstream lays them out: a list of queries, mixture and target of each as audio."""

import csv
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soxr
import torch

from audiosep.queries import Encoder
from audiosep.samples import Batch
from audiosep.separate import read_audio
from audiosep.stft import stft
from audiosep.system import AudioFormat

EXAMPLES_PER_CLASS = 10  # that upstream evaluates of each AudioSet class


@dataclass(frozen=True)
class BenchmarkItem:
    """One query of a benchmark and the files that go with it."""

    key: str
    caption: str
    kind: str  # its class where the benchmark has classes, otherwise empty
    target: Path
    mixture: Path  # with an `snr_db` the noise alone, from which the mixture is yet to be made
    snr_db: float | None = None

    def read(self, sample_rate: int) -> tuple[np.ndarray, np.ndarray]:
        """Mixture and target, float32 [L]. Raises ValueError naming the files if they do not fit each other."""
        mixture, target = (_read(path, sample_rate) for path in (self.mixture, self.target))
        if mixture.shape != target.shape:
            raise ValueError(
                f"{self.mixture} has {len(mixture)} samples at {sample_rate} Hz, {self.target} {len(target)}: "
                "a mixture and its target must be equally long."
            )
        return (mixture, target) if self.snr_db is None else _mix_at(mixture, target, self.snr_db)


def _read(path: Path, sample_rate: int) -> np.ndarray:
    """All of an audio file, mono, float32 [L]."""
    waveform, rate = read_audio(path)
    return soxr.resample(waveform.mean(axis=1), rate, sample_rate)


def _mix_at(noise: np.ndarray, target: np.ndarray, snr_db: float) -> tuple[np.ndarray, np.ndarray]:
    """Mixture and target as DCASE 2024 Task 9 makes them: noise at this ratio, both scaled to a peak of 0.9 if the
    mixture's is above 1."""
    power_ratio = np.mean(np.square(target)) / np.mean(np.square(noise))
    mixture = target + noise * np.sqrt(power_ratio / 10 ** (snr_db / 10), dtype=np.float32)
    peak = np.abs(mixture).max()
    scale = np.float32(0.9 / peak if peak > 1 else 1)
    return mixture * scale, target * scale


def read_benchmark(name: str, folder: Path) -> list[BenchmarkItem]:
    """What the benchmark asks. Raises ValueError for an unknown name, FileNotFoundError for its list or an audio file
    that is not there."""
    if name not in BENCHMARKS:
        raise ValueError(f"No benchmark {name!r}; there are {', '.join(BENCHMARKS)}.")
    items = BENCHMARKS[name](folder)
    missing = [str(path) for item in items for path in (item.mixture, item.target) if not path.exists()]
    if missing:
        raise FileNotFoundError(f"{len(missing)} files of the {name} benchmark are missing, among them {missing[:3]}.")
    return items


def _numbered(name: str, has_classes: bool = False) -> Callable[[Path], list[BenchmarkItem]]:
    """<name>_eval.csv: number, caption and more; mixture-<number>.wav and segment-<number>.wav."""

    def read(folder: Path) -> list[BenchmarkItem]:
        return [
            BenchmarkItem(
                number,
                caption,
                caption if has_classes else "",
                target=folder / f"segment-{number}.wav",
                mixture=folder / f"mixture-{number}.wav",
            )
            for number, caption, *_ in _rows(f"{name}_eval.csv", folder)
        ]

    return read


def _vggsound(folder: Path) -> list[BenchmarkItem]:
    """vggsound_eval.csv: id, mixture's file, target's file and caption, and the same of the other sound."""
    return [
        BenchmarkItem(key, caption, "", target=folder / target, mixture=folder / mixture)
        for key, mixture, target, caption, *_ in _rows("vggsound_eval.csv", folder)
    ]


def _audioset(folder: Path) -> list[BenchmarkItem]:
    """class_labels_indices.csv names the classes; class_id=<number>/ has <name>,mixture.wav and <name>,source.wav."""
    items = []
    for number, _, label in _rows("class_labels_indices.csv", folder):
        class_folder = folder / f"class_id={number}"
        names = sorted(
            path.name.removesuffix(",source.wav") for path in class_folder.iterdir() if path.match("*,source.wav")
        )
        for name in names[:EXAMPLES_PER_CLASS]:
            target, mixture = (class_folder / f"{name},{role}.wav" for role in ("source", "mixture"))
            items.append(BenchmarkItem(f"{class_folder.name}/{name}", label, label, target, mixture))
    return items


def _dcase2024(folder: Path) -> list[BenchmarkItem]:
    """lass_synthetic_validation.csv: target's and noise's file names without .wav, signal-to-noise ratio, caption."""
    return [
        BenchmarkItem(
            f"{target}+{noise}@{snr}",
            caption,
            "",
            target=folder / f"{target}.wav",
            mixture=folder / f"{noise}.wav",
            snr_db=float(snr),
        )
        for target, noise, snr, caption in _rows("lass_synthetic_validation.csv", folder)
    ]


def _rows(name: str, folder: Path) -> list[list[str]]:
    """The rows of a list below its header; it lies among the audio, one level up, or where upstream's tree has it."""
    places = [folder / name, folder.parent / name, folder.parent.parent / "metadata" / name]
    for place in places:
        if place.exists():
            with place.open(newline="") as file:
                return list(csv.reader(file))[1:]
    raise FileNotFoundError(f"{name} is not in {' nor '.join(str(place.parent) for place in places)}.")


BENCHMARKS: dict[str, Callable[[Path], list[BenchmarkItem]]] = {
    "audiocaps": _numbered("audiocaps"),
    "clotho": _numbered("clotho"),
    "esc50": _numbered("esc50"),
    "music": _numbered("music", has_classes=True),
    "vggsound": _vggsound,
    "audioset": _audioset,
    "dcase2024": _dcase2024,
}


def upstream_mean(name: str, values: Sequence[float], kinds: Sequence[str]) -> float:
    """The one figure that upstream reports: the mean over examples, for music the mean over the classes' means, for
    audioset over the classes' medians."""
    by_kind = defaultdict(list)
    for value, kind in zip(values, kinds, strict=True):
        by_kind[kind].append(value)
    average = np.median if name == "audioset" else np.mean
    return float(np.mean([average(group) for group in by_kind.values()]))


class BenchmarkBatches:
    """A benchmark's queries as batches of one: recordings whole, whatever their length, as upstream separates them."""

    def __init__(
        self, items: Sequence[BenchmarkItem], audio: AudioFormat, windows: Iterable[int], encoder: Encoder
    ) -> None:
        self._items, self._audio, self._windows, self._encoder = items, audio, tuple(windows), encoder

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Batch]:
        for item in self._items:
            mixture, target = item.read(self._audio.sample_rate)
            yield Batch(
                keys=[item.key],
                text=[item.caption],
                kinds=[item.kind],
                mixture={window: self._planes(mixture, window) for window in self._windows},
                segment={window: self._planes(target, window) for window in self._windows},
                condition=torch.from_numpy(self._encoder.encode([item.caption])),
                lengths=torch.tensor([len(mixture)]),
                info=[{"interferers": [{}]}],  # one, of which the list says nothing
            )

    def _planes(self, waveform: np.ndarray, window: int) -> torch.Tensor:
        """Real and imaginary plane [1, 2, 1, T, F], as shards store them."""
        spectrogram = stft(torch.from_numpy(waveform), window, self._audio.hop_length)
        return torch.stack((spectrogram.real, spectrogram.imag))[None, :, None]
