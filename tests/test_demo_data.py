"""The bundled audio: small, captioned, attributed, decodable, and split so that testing means unseen recordings."""

import hashlib
import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr

DEMO = Path(__file__).parent.parent / "data" / "demo"
SPLITS = ("train", "valid", "test")
CATALOGUES = {split: json.loads((DEMO / f"{split}.json").read_text())["data"] for split in SPLITS}
CLIPS = [clip for split in SPLITS for clip in CATALOGUES[split]]


def test_the_folder_is_small_and_holds_exactly_the_catalogues_clips() -> None:
    assert sum(file.stat().st_size for file in DEMO.rglob("*")) < 9e6
    assert sorted(clip["wav"] for clip in CLIPS) == sorted(f"clips/{f.name}" for f in (DEMO / "clips").iterdir())


def test_every_kind_is_in_every_split_with_several_recordings() -> None:
    recordings = {split: Counter() for split in SPLITS}
    for split in SPLITS:
        for kind, _ in {(clip["kind"], clip["recording"]) for clip in CATALOGUES[split]}:
            recordings[split][kind] += 1
    kinds = set(recordings["train"])
    assert len(kinds) >= 8
    for kind in kinds:
        train, valid, test = (recordings[split][kind] for split in SPLITS)
        assert valid >= 1, kind
        assert test >= 2, kind
        assert train + valid + test >= 6, kind


def test_readme_counts_the_clips() -> None:
    rows = re.findall(r"^\| (\w+) \| (\d+) \| (\d+) \| (\d+) \|$", (DEMO / "README.md").read_text(), re.MULTILINE)
    counts = {split: Counter(clip["kind"] for clip in CATALOGUES[split]) for split in SPLITS}
    assert {kind: tuple(map(int, n)) for kind, *n in rows} == {
        kind: tuple(counts[split][kind] for split in SPLITS) for kind in counts["train"]
    }


@pytest.mark.parametrize("clip", CLIPS, ids=lambda clip: clip["wav"])
def test_audio_decodes_to_sound_that_is_neither_silent_nor_clipped(clip: dict) -> None:
    waveform, sample_rate = soundfile.read(DEMO / clip["wav"], always_2d=True)
    assert waveform.shape[1] == 1
    assert sample_rate <= 32_000
    assert 0.5 <= len(waveform) / sample_rate <= 12
    assert np.abs(waveform).max() > 0.1
    assert np.sqrt(np.mean(waveform**2)) > 0.01
    assert np.mean(np.abs(waveform) > 0.999) < 1e-3, "runs at full scale: the clip was clipped on the way here"


@pytest.mark.parametrize("clip", CLIPS, ids=lambda clip: clip["wav"])
def test_captions_are_sentences_in_several_phrasings(clip: dict) -> None:
    captions = clip["captions"]
    assert captions[0] == clip["caption"]
    assert len(set(captions)) == len(captions) >= 4
    for caption in captions:
        assert re.fullmatch(r"[A-Z0-9].*[a-z]\.", caption), caption
        assert len(caption.split()) >= 3, caption


def test_captions_of_unlike_kinds_differ() -> None:
    kinds: dict[str, set[str]] = {}
    for clip in CLIPS:
        for caption in clip["captions"]:
            kinds.setdefault(caption, set()).add(clip["kind"])
    assert not [caption for caption, found in kinds.items() if len(found) > 1]
    assert len({clip["caption"] for clip in CLIPS}) == len(CLIPS)


def test_every_clip_has_a_source_an_author_and_a_licence_that_allows_sharing() -> None:
    table = (DEMO / "LICENCES.md").read_text()
    for clip in CLIPS:
        assert clip["licence"] in {"CC0-1.0", "CC-BY-3.0", "CC-BY-SA-3.0"}
        assert clip["source"].startswith("http")
        assert clip["author"]
        [row] = [line for line in table.splitlines() if line.startswith(f"| {Path(clip['wav']).stem} |")]
        assert all(clip[key] in row for key in ("author", "licence", "source"))


def test_no_recording_is_in_two_splits() -> None:
    for one, other in combinations(SPLITS, 2):
        shared = {clip["recording"] for clip in CATALOGUES[one]} & {clip["recording"] for clip in CATALOGUES[other]}
        assert not shared


def test_no_audio_is_in_two_splits() -> None:
    """By content hash of the decoded samples; and by correlation, which also finds another cut of the same take."""
    hashes: dict[str, str] = {}
    spectra: dict[str, list[tuple[str, np.ndarray]]] = {split: [] for split in SPLITS}
    for split in SPLITS:
        for clip in CATALOGUES[split]:
            waveform, sample_rate = soundfile.read(DEMO / clip["wav"])
            digest = hashlib.sha256(waveform.tobytes()).hexdigest()
            assert digest not in hashes, f"{clip['wav']} is {hashes[digest]} again"
            hashes[digest] = clip["wav"]
            coarse = soxr.resample(waveform, sample_rate, 8_000)[:64_000]
            spectra[split].append((clip["wav"], np.fft.rfft(coarse / np.linalg.norm(coarse), 1 << 17)))
    for one, other in combinations(SPLITS, 2):
        for (wav, a), (other_wav, b) in ((x, y) for x in spectra[one] for y in spectra[other]):
            correlation = np.abs(np.fft.irfft(a * b.conj())).max()
            assert correlation < 0.6, f"{wav} and {other_wav} look like one recording ({correlation:.2f})"
