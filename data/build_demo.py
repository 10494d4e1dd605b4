"""Makes data/demo again: clips, catalogues and LICENCES.md, from Debian packages and data/demo_clips.yaml.

    cd FOLDER && apt-get download sonic-pi-samples openttd-opensfx asterisk-core-sounds-{en,it,fr,ru}-wav
    python data/build_demo.py FOLDER

The audio is averaged to mono, resampled to 32 kHz where it is above, and written as 16-bit FLAC; a clip whose peak
would exceed full scale after that is scaled down to it. Nothing is cut, joined, filtered or made louder. Authors and
licences are read from what the packages say about each file.
"""

import gzip
import io
import json
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import soundfile
import soxr
import yaml

DEMO = Path(__file__).parent / "demo"
MAX_SAMPLE_RATE = 32_000
SPLITS = ("train", "valid", "test")
LICENCE_URLS = {
    "CC0-1.0": "https://creativecommons.org/publicdomain/zero/1.0/",
    "CC-BY-3.0": "https://creativecommons.org/licenses/by/3.0/",
    "CC-BY-SA-3.0": "https://creativecommons.org/licenses/by-sa/3.0/",
}


@dataclass(frozen=True)
class Sound:
    """One sound of a package: its encoded audio and what the package says about where it is from."""

    audio: bytes
    title: str
    source: str
    author: str
    licence: str


def main(packages: Path) -> None:
    kinds = yaml.safe_load((DEMO.parent / "demo_clips.yaml").read_text())
    (DEMO / "clips").mkdir(parents=True, exist_ok=True)
    for old in (DEMO / "clips").glob("*.flac"):
        old.unlink()
    with tempfile.TemporaryDirectory() as unpacked:
        for package in sorted(packages.glob("*.deb")):
            subprocess.run(["dpkg-deb", "-x", package, unpacked], check=True)
        catalogues = {split: list(entries(Path(unpacked), kinds, split)) for split in SPLITS}
    for split, clips in catalogues.items():
        (DEMO / f"{split}.json").write_text(json.dumps({"data": clips}, indent=1, ensure_ascii=False) + "\n")
    (DEMO / "LICENCES.md").write_text(licences([clip for clips in catalogues.values() for clip in clips]))


def entries(root: Path, kinds: dict, split: str) -> Iterator[dict]:
    """The catalogue entries of one split; writes each clip's audio on the way."""
    for kind, listed in kinds.items():
        for clip in listed[split]:
            package, _, name = clip["sound"].partition("/")
            sound = read_sound(root, package, name)
            wav = f"clips/{package}-{name}.flac"
            write_clip(DEMO / wav, sound.audio)
            yield {
                "wav": wav,
                "caption": clip["captions"][0],
                "captions": clip["captions"] + listed["phrasings"],
                "kind": kind,
                "recording": clip.get("recording", clip["sound"]),
                "title": sound.title,
                "source": sound.source,
                "author": sound.author,
                "licence": sound.licence,
            }


def read_sound(root: Path, package: str, name: str) -> Sound:
    if package == "sonic-pi":
        return sonic_pi(root, name)
    if package == "opensfx":
        return opensfx(root)[int(name)]
    return asterisk(root, package.removeprefix("asterisk-"), name)


def sonic_pi(root: Path, name: str) -> Sound:
    """A sample of Sonic Pi: its README names the freesound page of each, and CC0 for all."""
    folder = root / "usr/share/sonic-pi/samples"
    links = re.findall(r"^\* `:(\w+)`\s*- (\S+)", (folder / "README.md").read_text(), re.MULTILINE)
    [link] = [link for listed, link in links if listed.replace("_", "") == name.replace("_", "")]
    author = unquote(link.split("/people/")[1].split("/")[0])
    return Sound((folder / f"{name}.flac").read_bytes(), name, link, author, "CC0-1.0")


@cache
def opensfx(root: Path) -> list[Sound]:
    """The sounds of OpenSFX in the order of its .cat file: a table of offsets, then for each sound a credit (length
    byte, text) and a WAV file. The addresses of the originals are in the package's readme."""
    data = (root / "usr/share/games/openttd/baseset/opensfx/opensfx.cat").read_bytes()
    readme = gzip.decompress((root / "usr/share/doc/openttd-opensfx/readme.txt.gz").read_bytes()).decode()
    addresses = dict(re.findall(r'^ +\* "?(.+?)"?\n +(https?://\S+)$', readme, re.MULTILINE))
    num_sounds = (struct.unpack_from("<I", data)[0] & 0x7FFFFFFF) // 8
    sounds = []
    for index in range(num_sounds):
        start = struct.unpack_from("<I", data, 8 * index)[0] & 0x7FFFFFFF
        wav = start + 1 + data[start]
        credit = data[start + 1 : wav].rstrip(b"\0").decode("latin-1")
        wav_size = 8 + struct.unpack_from("<I", data, wav + 4)[0]
        title, author, licence = re.fullmatch(r'"(.+?)"\. (.*) ?License: (.*?)\.?(?: Original .*)?', credit).groups()
        originals = [addresses[original] for original in re.findall(r'"([^"]+)"', author) if original in addresses]
        source = " ".join(originals) or "https://github.com/OpenTTD/OpenSFX"
        sounds.append(Sound(data[wav : wav + wav_size], title, source, author.strip().rstrip("."), spdx(licence)))
    return sounds


def asterisk(root: Path, language: str, name: str) -> Sound:
    """A telephone prompt; the package's copyright file credits one speaker for each language."""
    text = (root / f"usr/share/doc/asterisk-core-sounds-{language}-wav/copyright").read_text()
    files = "*" if language == "en" else f"{language}-*"
    stanza = re.search(rf"^Files: {re.escape(files)}\n.*?^License: \S+$", text, re.MULTILINE | re.DOTALL)[0]
    author = re.search(r"^Copyright: \S+ (.*)$", stanza, re.MULTILINE)[1].split(",")[0]
    [file] = root.glob(f"usr/share/asterisk/sounds/{language}_*/{name}.wav")
    source = f"https://downloads.asterisk.org/pub/telephony/sounds/ asterisk-core-sounds-{language}"
    return Sound(file.read_bytes(), f"{language}/{name}", source, author, spdx(stanza.split()[-1]))


def spdx(licence: str) -> str:
    """The short name of a licence in the words of the packages."""
    words = licence.lower().replace("-", " ")
    if "zero" in words:
        return "CC0-1.0"
    if "attribution sharealike" in words or "by sa" in words:
        return "CC-BY-SA-3.0"
    assert "attribution" in words or "by" in words, licence
    return "CC-BY-3.0"


def write_clip(path: Path, audio: bytes) -> None:
    waveform, sample_rate = soundfile.read(io.BytesIO(audio), always_2d=True)
    waveform = waveform.mean(axis=1)
    if sample_rate > MAX_SAMPLE_RATE:
        waveform = soxr.resample(waveform, sample_rate, MAX_SAMPLE_RATE, quality="VHQ")
        sample_rate = MAX_SAMPLE_RATE
    waveform /= max(1.0, np.abs(waveform).max() * 32768 / 32767)
    soundfile.write(path, waveform, sample_rate, format="FLAC", subtype="PCM_16", compression_level=1.0)


def licences(clips: list[dict]) -> str:
    lines = [
        "# Sources, authors and licences of the bundled audio",
        "",
        "Every clip was averaged to mono, resampled to at most 32 kHz, scaled down where its peak then exceeded full",
        "scale, and stored as 16-bit FLAC; nothing else was changed. The audio keeps the licence named beside it,",
        "whatever the licence of the code around it. `sonic-pi` clips come from Sonic Pi's samples, `opensfx` clips",
        "from OpenSFX 1.0.3 (as a collection CC-BY-SA-3.0), `asterisk` clips from the Asterisk core sounds 1.6.1.",
        "Addresses are as the packages give them; some have moved since. The captions, made for this set, are CC0-1.0.",
        "",
        *(f"- {name}: <{url}>" for name, url in LICENCE_URLS.items()),
        "",
        "| clip | title | author | licence | source |",
        "|---|---|---|---|---|",
    ]
    for clip in clips:
        cells = [clip[key].replace("|", "/") for key in ("title", "author", "licence", "source")]
        lines.append(f"| {Path(clip['wav']).stem} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
