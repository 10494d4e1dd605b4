"""`audiosep index`: tars of audio files with captions into a catalogue that names each by its byte range.

The tars are those of LAION-Audio, audio2dataset and other WebDataset makers: a clip's audio beside a .json or .txt of
the same name. They are read through once, here; precompute then reads just the bytes of the clips that it needs."""

import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any, BinaryIO, cast

from braceexpand import braceexpand

from shards.arguments import Parser
from shards.progress import progress
from shards.storage import open_store, storage_options
from shards.store import StorageConfig, Store
from shards.tar import Member, members

AUDIO_SUFFIXES = ("flac", "wav", "ogg", "opus", "mp3", "aiff")
CAPTION_KEYS = ("captions", "caption", "texts", "text")  # of a clip's JSON, the first that is there
READ_AHEAD_BYTES = 1 << 20


def main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="audiosep index", description=__doc__)
    parser.add_argument("tars", nargs="+", help="paths or URLs, with braces such as s3://bucket/{00000..00127}.tar")
    parser.add_argument("--output", "-o", required=True, help="the catalogue to write, .jsonl")
    parser.add_argument("--options", default="{}", help='storage options as JSON: {"endpoint": "https://..."}')
    options = parser.parse_args(arguments)
    storage = storage_options(options.options)
    tars = [tar for pattern in options.tars for tar in braceexpand(pattern)]
    num_clips = num_silent = num_soundless = 0
    partial = f"{options.output}.partial"  # no catalogue of some of the tars stands under the name
    with open(partial, "w", encoding="utf-8") as catalogue:
        for tar in progress(tars, unit="tar", desc="index"):
            path = tar if "://" in tar else os.path.relpath(tar, os.path.dirname(options.output) or ".")
            for row in index_tar(tar, storage):
                if "path" not in row:
                    num_soundless += 1
                elif row.get("captions"):
                    row["path"] = f"{path}#{row['path']}"
                    catalogue.write(json.dumps(row, ensure_ascii=False) + "\n")
                    num_clips += 1
                else:
                    num_silent += 1
    os.replace(partial, options.output)
    print(
        f"wrote {options.output}: {num_clips} clips of {len(tars)} tars; left out: {num_silent} without a caption, "
        f"{num_soundless} keys without audio ({', '.join(AUDIO_SUFFIXES)})"
    )
    return 0


def index_tar(tar: str, storage: StorageConfig) -> Iterator[dict[str, Any]]:
    """A catalogue row for each key of a tar, with the captions that stand beside its audio; without `path` if there is
    none.

    Raises ValueError for a tar that is damaged, naming it and the offset, or whose JSON or text can't be read."""
    folder, _, name = tar.rpartition("/")
    source = cast(BinaryIO, io.BufferedReader(_StoreFile(open_store(folder or ".", storage), name), READ_AHEAD_BYTES))
    row: dict[str, Any] = {}
    try:
        for member in members(source):
            stem, _, suffix = PurePosixPath(member.name).name.partition(".")
            key = str(PurePosixPath(member.name).parent / stem)
            if key != row.get("key"):
                if row:
                    yield _finished(row)
                row = {"key": key}
            if suffix.lower() in AUDIO_SUFFIXES:
                row |= {"path": member.name, "byte_offset": member.offset, "byte_size": member.size}
            elif suffix in ("json", "txt"):
                data = _read(source, member)
                try:
                    if suffix == "json":
                        row |= _facts(json.loads(data))
                    else:
                        row.setdefault("captions", [data.decode().strip()])
                except ValueError as error:
                    raise ValueError(f"{member.name}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{tar}: {error}") from None
    if row:
        yield _finished(row)


def _finished(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "key"}


def _facts(described: dict[str, Any]) -> dict[str, Any]:
    """What a clip's JSON says that catalogues know of; `original_data` is LAION's."""
    if not isinstance(described, dict):
        raise ValueError(f"its JSON is {str(described)[:60]!r}, no object")
    original = described.get("original_data")
    everything = {**(original if isinstance(original, dict) else {}), **described}
    found: Any = next((everything[name] for name in CAPTION_KEYS if everything.get(name)), [])
    captions = [found] if isinstance(found, str) else [text for text in found if isinstance(text, str) and text.strip()]
    names = {"kind": "kind", "source": "url", "author": "author", "licence": "license", "recording": "recording"}
    facts = {name: everything.get(name) or everything.get(other) for name, other in names.items()}
    return {"captions": captions, **{name: str(fact) for name, fact in facts.items() if fact}}


def _read(source: BinaryIO, member: Member) -> bytes:
    source.seek(member.offset)
    return source.read(member.size)


class _StoreFile(io.RawIOBase):
    """An object of a store as a seekable file."""

    def __init__(self, store: Store, name: str) -> None:
        size = store.size(name)
        if size is None:
            raise FileNotFoundError(f"{store.url}/{name} does not exist.")
        self._store, self._name, self._size, self._offset = store, name, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._offset = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._offset, io.SEEK_END: self._size}[whence]
        return self._offset

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), max(self._size - self._offset, 0))
        if count:
            self._store.read_range(self._name, self._offset, [memoryview(buffer)[:count]])
            self._offset += count
        return count
