"""`audiosep check`: the same recording, or the same sound under another name, in the catalogues of several splits.

A model that heard a test clip in training is not tested by it. Sounds are compared by fingerprints that survive another
format, sample rate or gain; exit status 3 says that splits share something."""

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import soundfile
import soxr

from audiosep.catalogue import Catalogue, read_catalogue
from audiosep.clips import Rejection, open_clip
from audiosep.stft import hann_window
from shards.arguments import Parser
from shards.progress import progress

FINE, LEAKS = 0, 3
SAMPLE_RATE = 8000
MAX_SECONDS = 60.0  # of a clip that are looked at
SLICES, BANDS = 33, 32  # fingerprints: signs of differences between neighbours in time and frequency
SAME_SHARE = 0.85  # of equal signs, from which two clips are the same; unrelated ones have about half, rarely 0.7
MIN_RANGE = 2e-3  # between a clip's samples; all that is quieter, -60 dBFS, would sound the same
BLOCK = 4096  # clips compared with as many others at a time


def main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="audiosep check", description=__doc__)
    parser.add_argument("catalogues", nargs="+", help="one for each split")
    options = parser.parse_args(arguments)
    splits = {name: read_catalogue(name, check_files=False) for name in options.catalogues}
    num_leaks = 0
    for one, other, recording in shared_recordings(splits):
        num_leaks += 1
        print(f"LEAK: recording {recording!r} is in {one} and in {other}")
    clips = [(split, number) for split, catalogue in splits.items() for number in range(len(catalogue))]
    prints = [fingerprint(splits[split], number) for split, number in progress(clips, unit="clip", desc="fingerprints")]
    for first, second in same_sounds(prints):
        (split, number), (other_split, other_number) = clips[first], clips[second]
        num_leaks += split != other_split
        word = "LEAK" if split != other_split else "twice"
        print(f"{word}: {_name(splits, split, number)} sounds like {_name(splits, other_split, other_number)}")
    left_out = [(clip, reason) for clip, reason in zip(clips, prints) if isinstance(reason, str)]
    for (split, number), reason in left_out:
        print(f"not compared: {_name(splits, split, number)} ({reason})")
    print(f"{len(clips)} clips, {len(left_out)} of them not compared; {num_leaks} leaks between splits")
    return LEAKS if num_leaks else FINE


def _name(splits: dict[str, Catalogue], split: str, number: int) -> str:
    return f"{splits[split].clip(number).path} of {split}"


def shared_recordings(splits: dict[str, Catalogue]) -> Iterator[tuple[str, str, str]]:
    """Recordings that two splits have clips of."""
    homes: dict[str, list[str]] = defaultdict(list)
    for split, catalogue in splits.items():
        column = catalogue.texts["recording"]
        for recording in {column[number] for number in range(len(catalogue))} - {""}:
            homes[recording].append(split)
    for recording, found in sorted(homes.items()):
        for one, other in itertools.pairwise(found):
            yield one, other, recording


def fingerprint(catalogue: Catalogue, number: int) -> np.ndarray | str:
    """Signs, int8 [SLICES - 1, BANDS - 1] flattened, of how band energies change; or why the clip has none.

    Slices divide the clip evenly, so clips of a different extent are different sounds."""
    try:
        with open_clip(catalogue.clip(number)) as file:
            sample_rate = file.samplerate
            waveform = file.read(int(MAX_SECONDS * sample_rate), dtype="float32", always_2d=True).mean(axis=1)
    except (Rejection, soundfile.LibsndfileError) as error:
        return str(error)
    if not len(waveform) or not np.ptp(waveform) > MIN_RANGE:
        return "silent, or not finite"
    waveform = soxr.resample(waveform, sample_rate, SAMPLE_RATE)
    size = max(512, 2 * len(waveform) // (SLICES + 1) // 2 * 2)  # slices overlap by a half
    starts = np.linspace(0, max(len(waveform) - size, 0), SLICES).astype(int)
    padded = np.pad(waveform, (0, max(size - len(waveform), 0)))
    spectra = np.abs(np.fft.rfft([padded[start : start + size] * hann_window(size) for start in starts])) ** 2
    edges = np.geomspace(100, SAMPLE_RATE / 2 - 200, BANDS + 1) / SAMPLE_RATE * size
    powers = np.add.reduceat(spectra, np.maximum.accumulate(edges.astype(int))[:-1], axis=1)
    levels = np.log(powers + 1e-9 * powers.max() + 1e-20)
    return np.where(np.diff(np.diff(levels, axis=0), axis=1) > 0, 1, -1).astype(np.int8).ravel()


def same_sounds(prints: Sequence[np.ndarray | str]) -> Iterator[tuple[int, int]]:
    """Pairs of clips with the same fingerprint but for a few signs. All are compared with all: n^2 in time."""
    places = [place for place, each in enumerate(prints) if isinstance(each, np.ndarray)]
    signs = np.array([prints[place] for place in places], np.float32)
    for first in range(0, len(places), BLOCK):
        for second in range(first, len(places), BLOCK):
            agreement = signs[first : first + BLOCK] @ signs[second : second + BLOCK].T / signs.shape[1]
            for row, column in zip(*np.nonzero(agreement > 2 * SAME_SHARE - 1)):
                if first + row < second + column:
                    yield places[first + row], places[second + column]
