"""Clip catalogues: which audio there is and what it is called, compact enough for 10^7 clips.

Read are upstream's JSON ({"data": [{"wav": ..., "caption": ...}]}), JSONL, CSV and TSV. `path` may stand for `wav`;
further phrasings of the caption are in `captions`, a list (in CSV and TSV divided by "|"). `kind`, `source`, `author`,
`licence` and `recording` are optional. A path such as `a.tar#b.flac`, with `byte_offset` and `byte_size`, names a
member of a tar (`audiosep index` writes them)."""

import csv
import hashlib
import json
import math
import os
import re
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

JSON_CHUNK_CHARACTERS = 1 << 20
TEXT_COLUMNS = ("path", "kind", "source", "author", "licence", "recording")


@dataclass(frozen=True)
class Clip:
    """One clip of a catalogue."""

    number: int  # its place in the catalogue
    file: int  # which of the catalogue files lists it
    path: str  # as the catalogue has it
    location: str  # where it is: a path or URL
    captions: tuple[str, ...]  # phrasings of one description
    kind: str
    source: str
    author: str
    licence: str
    recording: str  # what it was cut from; clips of one recording belong into one split
    byte_range: tuple[int, int] | None  # offset and size inside the file, if it is only a part of it


class Texts:
    """A column of strings: their UTF-8 bytes on end, uint8, and where each ends, int64 [N]."""

    def __init__(self, data: np.ndarray, ends: np.ndarray) -> None:
        self.data, self.ends = data, ends

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        start = int(self.ends[index - 1]) if index else 0
        return self.data[start : int(self.ends[index])].tobytes().decode()


@dataclass(frozen=True)
class Catalogue:
    """All clips of one or more catalogue files, in their order.

    Saved and loaded by memory map, so that the processes of a machine share one copy."""

    texts: Mapping[str, Texts]  # TEXT_COLUMNS, each [N], and "caption" [number of captions]
    caption_ends: np.ndarray  # int64 [N]: the captions of clip i are caption_ends[i - 1] .. caption_ends[i]
    byte_ranges: np.ndarray  # int64 [N, 2]: offset and size; size -1 for a whole file
    starts: np.ndarray  # int64 [files + 1]: the clips of catalogue file k are starts[k] .. starts[k + 1]
    weights: tuple[float, ...]  # of each file: how often each of its clips is a target in one pass
    folders: tuple[str, ...]  # of each file: where its relative paths start
    digest: str  # of what is listed and of the weights, not of where it lies

    def __len__(self) -> int:
        return len(self.caption_ends)

    def clip(self, number: int) -> Clip:
        first = int(self.caption_ends[number - 1]) if number else 0
        captions = tuple(self.texts["caption"][i] for i in range(first, int(self.caption_ends[number])))
        texts = {name: self.texts[name][number] for name in TEXT_COLUMNS}
        file = int(np.searchsorted(self.starts, number, side="right")) - 1
        offset, size = map(int, self.byte_ranges[number])
        byte_range = None if size < 0 else (offset, size)
        location = resolve(texts["path"], self.folders[file])
        return Clip(number, file, location=location, captions=captions, byte_range=byte_range, **texts)

    def save(self, folder: Path) -> None:
        for name, column in self.texts.items():
            np.save(folder / f"{name}.data.npy", column.data)
            np.save(folder / f"{name}.ends.npy", column.ends)
        for name in ("caption_ends", "byte_ranges", "starts"):
            np.save(folder / f"{name}.npy", getattr(self, name))
        rest = {"weights": self.weights, "folders": self.folders, "digest": self.digest}
        (folder / "rest.json").write_text(json.dumps(rest))

    @staticmethod
    def load(folder: Path) -> "Catalogue":
        def column(name: str) -> np.ndarray:
            return np.load(folder / f"{name}.npy", mmap_mode="r")

        texts = {n: Texts(column(f"{n}.data"), column(f"{n}.ends")) for n in (*TEXT_COLUMNS, "caption")}
        rest = json.loads((folder / "rest.json").read_text())
        arrays = (column("caption_ends"), column("byte_ranges"), column("starts"))
        return Catalogue(texts, *arrays, tuple(rest["weights"]), tuple(rest["folders"]), rest["digest"])


def resolve(path: str, folder: str) -> str:
    """The path or URL of the file that holds the clip which a catalogue in `folder` names `path`."""
    path = path.partition("#")[0] if ".tar#" in path else path
    if "://" in path or os.path.isabs(path):
        return path
    return f"{folder.rstrip('/')}/{path}" if "://" in folder else os.path.join(folder, path)


def read_catalogue(files: str | Mapping[str, float], check_files: bool) -> Catalogue:
    """The catalogue in one file, or in several with their weights.

    With `check_files` every local clip must exist. Raises ValueError naming file and line of the first bad row."""
    weights = {files: 1.0} if isinstance(files, str) else dict(files)
    if not weights or not all(0 < weight < math.inf for weight in weights.values()):
        raise ValueError(f"Name one or more catalogue files with positive weights, not {weights}.")
    columns, starts, missing, num_missing = _Columns(), [0], list[str](), 0
    for file in weights:
        rows = columns.num_rows
        for line, row in read_rows(file):
            try:
                columns.append(row)
            except ValueError as error:
                raise ValueError(f"{file}:{line}: {error}") from None
            if check_files and not _exists(location := resolve(columns.last_path, os.path.dirname(file))):
                num_missing += 1
                missing += [f"{file}:{line}: {location}"] * (num_missing <= 5)
        if columns.num_rows == rows:
            raise ValueError(f"{file} lists no clips.")
        starts.append(columns.num_rows)
    if missing:
        raise ValueError(
            f"{num_missing} of {columns.num_rows} clips do not exist: {'; '.join(missing)}"
            f"{'; ...' if num_missing > 5 else ''}. Paths are relative to the catalogue file. Mend or remove these "
            "rows, or set check_files: false to have them counted as rejected clips."
        )
    return columns.catalogue(starts, tuple(weights.values()), tuple(os.path.dirname(file) or "." for file in weights))


def read_rows(file: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a catalogue file, each with the number of its line (of its entry in upstream's JSON)."""
    suffix = Path(file).suffix.lower()
    if suffix not in (".json", ".jsonl", ".csv", ".tsv"):
        raise ValueError(f"{file}: a catalogue is a .json, .jsonl, .csv or .tsv file; see `audiosep index` for tars.")
    try:
        with open(file, encoding="utf-8-sig", newline="") as stream:
            if suffix == ".json":
                yield from enumerate(_upstream_entries(file, stream), 1)
            elif suffix == ".jsonl":
                for line, text in enumerate(stream, 1):
                    if text.strip():
                        yield line, _parse(file, line, text)
            else:
                yield from _table_rows(file, stream, "," if suffix == ".csv" else "\t")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 ({error}): save it in that encoding.") from None


def _table_rows(file: str, stream: Any, delimiter: str) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(2**31 - 1)  # captions may be longer than its 128 KB
    reader = csv.DictReader(stream, delimiter=delimiter, strict=True)
    try:
        if len(set(reader.fieldnames or ())) < len(reader.fieldnames or ()):
            raise ValueError(f"{file}:1: a column stands twice in {', '.join(reader.fieldnames or ())}.")
        for row in reader:
            if any(surplus := row.pop(None, [])):  # where DictReader puts them
                raise ValueError(
                    f"{file}:{reader.line_num}: {len(row)} columns, but also the values {surplus}. "
                    f'A value with {delimiter!r} in it needs quotes: "...".'
                )
            captions = {"captions": row["captions"].split("|")} if row.get("captions") else {}
            yield reader.line_num, {key: value for key, value in row.items() if key != "captions"} | captions
    except csv.Error as error:
        raise ValueError(
            f"{file} after line {reader.line_num}: {error}. Quotes come in pairs, and one inside of quotes is doubled."
        ) from None


def _parse(file: str, line: int, text: str) -> dict[str, Any]:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}:{line}: no JSON: {error}") from None


def _upstream_entries(file: str, stream: Any) -> Iterator[dict[str, Any]]:
    """The objects of the array "data", parsed one by one: 10^7 of them at once would take 10 GB."""
    decoder, text = json.JSONDecoder(), stream.read(JSON_CHUNK_CHARACTERS)
    head, found, text = text.partition("[")
    if not found or not re.search(r'"data"\s*:\s*$', head):
        raise ValueError(f'{file}: expected {{"data": [{{"wav": ..., "caption": ...}}, ...]}}.')
    while True:
        text = text.lstrip(" \t\r\n,")
        if text.startswith("]"):
            rest = (text[1:] + stream.read()).strip()
            if rest != "}" and not rest.startswith(","):  # other keys are let pass
                raise ValueError(
                    f"{file}: after the array 'data' comes {rest[:60]!r}: it is cut, or several files in one."
                )
            return
        try:
            entry, end = decoder.raw_decode(text)
        except json.JSONDecodeError as error:
            more = stream.read(JSON_CHUNK_CHARACTERS)
            if not more:
                raise ValueError(f"{file}: no JSON: {error.msg} near {text[:60]!r}") from None
            text += more
            continue
        yield entry
        text = text[end:]


def _exists(location: str) -> bool:
    return "://" in location or os.path.exists(location)


@dataclass
class _Columns:
    """Columns that grow row by row."""

    data: dict[str, bytearray] = field(
        default_factory=lambda: {name: bytearray() for name in (*TEXT_COLUMNS, "caption")}
    )
    ends: dict[str, "array[int]"] = field(
        default_factory=lambda: {name: array("q") for name in (*TEXT_COLUMNS, "caption")}
    )
    caption_ends: "array[int]" = field(default_factory=lambda: array("q"))
    byte_ranges: "array[int]" = field(default_factory=lambda: array("q"))
    last_path: str = ""

    @property
    def num_rows(self) -> int:
        return len(self.caption_ends)

    def append(self, row: Any) -> None:
        if not isinstance(row, dict):
            raise ValueError(f"expected an object with path and caption, got {row!r}.")
        if "wav" not in row and "path" not in row:
            raise ValueError(f"no column 'wav' or 'path' (there are {', '.join(row) or 'none'}).")
        path = row.get("wav") or row.get("path")
        if not isinstance(path, str) or "\0" in path:
            raise ValueError(f"the path is {path!r}, no name of a file.")
        if "caption" not in row and "captions" not in row:
            raise ValueError(f"no column 'caption' or 'captions' (there are {', '.join(row)}).")
        phrasings = row.get("captions") or []
        if not isinstance(phrasings, list):
            raise ValueError(f"the captions of {path} are {phrasings!r}, not a list of sentences.")
        captions = [*([row["caption"]] if "caption" in row else []), *phrasings]
        if not captions or not all(isinstance(caption, str) and caption.strip() for caption in captions):
            raise ValueError(f"{path} needs captions that are sentences, not {captions}.")
        captions = [caption.strip() for caption in captions]
        try:
            byte_range = [
                unset if row.get(name) in (None, "") else int(row[name])
                for name, unset in (("byte_offset", 0), ("byte_size", -1))
            ]
            self.byte_ranges.extend(byte_range)
        except (ValueError, TypeError, OverflowError):
            byte_range = [-1]
        if byte_range[0] < 0:
            named = f"{row.get('byte_offset')!r} and {row.get('byte_size')!r}"
            raise ValueError(f"byte_offset and byte_size of {path} are {named}, not numbers of bytes.")
        self._add("path", path)
        for name in TEXT_COLUMNS[1:]:
            self._add(name, str(row.get(name) or ""))
        for caption in dict.fromkeys(captions):
            self._add("caption", caption)
        self.caption_ends.append(len(self.ends["caption"]))
        self.last_path = path

    def _add(self, column: str, text: str) -> None:
        data = self.data[column]
        data += text.encode()
        self.ends[column].append(len(data))

    def catalogue(self, starts: list[int], weights: tuple[float, ...], folders: tuple[str, ...]) -> Catalogue:
        texts = {
            n: Texts(np.frombuffer(self.data[n], np.uint8), np.frombuffer(self.ends[n], np.int64)) for n in self.data
        }
        caption_ends = np.frombuffer(self.caption_ends, np.int64)
        byte_ranges = np.frombuffer(self.byte_ranges, np.int64).reshape(-1, 2)
        digest = hashlib.sha256(json.dumps([starts, weights]).encode())
        for array_ in (*(a for text in texts.values() for a in (text.data, text.ends)), caption_ends, byte_ranges):
            digest.update(array_.data)
        return Catalogue(texts, caption_ends, byte_ranges, np.array(starts), weights, folders, digest.hexdigest()[:32])
