"""What each rank was served, on record, and the proof from all ranks' records that every sample came exactly once."""

import json
import os
from pathlib import Path
from typing import Any


class Ledger:
    """Appends what one rank is served to `<folder>/rank-00000.jsonl`, over all restarts.

    Each iteration begins with a line that says where it takes up the order: the loader's state with "rank",
    "world_size", "batch_size" and "time". Then comes a line for each batch: {"positions", "sources", "cycles", "keys"},
    with null for the key of a damaged sample."""

    def __init__(self, folder: str | os.PathLike[str], rank: int) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        path = Path(folder, f"rank-{rank:05d}.jsonl")
        self._file = open(path, "ab+", buffering=0)  # noqa: SIM115  # one write for each line, for as long as we live
        end = self._file.tell()
        self._file.seek(max(0, end - 1))
        if end and self._file.read(1) != b"\n":
            self._file.write(b"\n")  # a killed process left half a line, which the audit passes over

    def write(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry, separators=(",", ":")).encode() + b"\n")
