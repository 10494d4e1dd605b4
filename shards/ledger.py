"""What each rank was served, on record, and the proof from all ranks' records that every sample came exactly once."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from shards.arguments import Parser


class Ledger:
    """Appends what one rank is served to `<folder>/rank-00000.jsonl`, over all restarts. The folder is a local one.

    Each iteration begins with a line that says where it takes up the order: the loader's state with "rank",
    "world_size", "batch_size" and "time". Then comes a line for each batch: {"positions", "sources", "cycles", "keys"},
    with null for the key of a damaged sample."""

    def __init__(self, folder: str | os.PathLike[str], rank: int) -> None:
        if "://" in os.fspath(folder):
            raise ValueError(f"The ledger {folder} is to be in a bucket, where nothing can be appended: name a folder.")
        Path(folder).mkdir(parents=True, exist_ok=True)
        path = Path(folder, f"rank-{rank:05d}.jsonl")
        self._file = open(path, "ab+", buffering=0)  # noqa: SIM115  # one write for each line, for as long as we live
        end = self._file.tell()
        self._file.seek(max(0, end - 1))
        if end and self._file.read(1) != b"\n":
            self._file.write(b"\n")  # a killed process left half a line, which the audit passes over

    def write(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry, separators=(",", ":")).encode() + b"\n")


@dataclass(frozen=True)
class Iteration:
    """One rank's way through an epoch or the rest of one. Arrays have one item for each sample that was served."""

    place: str  # file and line, for people
    epoch: int
    samples: int
    epoch_samples: int
    rank: int
    world_size: int
    batch_size: int
    drop_last: bool
    shuffle: bool
    time: float
    positions: NDArray[np.int64]
    cycles: NDArray[np.int64]  # [n, 2]: data set and pass over it
    keys: NDArray[np.uint64]  # hashes; 0 for a damaged sample

    @property
    def global_batch_size(self) -> int:
        return self.world_size * self.batch_size

    def part(self, chosen: NDArray[np.bool_]) -> "Iteration":
        return replace(self, positions=self.positions[chosen], cycles=self.cycles[chosen], keys=self.keys[chosen])


_HEADER = {item.name for item in fields(Iteration)} - {"positions", "cycles", "keys"}


def read_ledgers(paths: Sequence[str | os.PathLike[str]]) -> dict[str, list[Iteration]]:
    """The iterations in ledger files, or folders of them, by the digest of the data set.

    Raises ValueError if there are none, and for a line that is broken, unless it is where a process was killed."""
    found: dict[str, list[Iteration]] = {}
    for path in map(Path, paths):
        files = sorted(path.glob("rank-*.jsonl")) if path.is_dir() else [path]
        if not files:
            raise ValueError(f"{path} holds no ledgers (rank-*.jsonl).")
        for file in files:
            for digest, iteration in _read_ledger(file):
                found.setdefault(digest, []).append(iteration)
    if not found:
        raise ValueError(f"{', '.join(map(str, paths))}: nothing was served yet, so there is nothing to prove.")
    return found


def _read_ledger(file: Path) -> Iterator[tuple[str, Iteration]]:
    header: dict[str, Any] | None = None
    entries: list[dict[str, Any]] = []
    broken = 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
            except ValueError:
                broken = number
                continue
            if "manifest_digest" in entry:
                if header:
                    yield header["manifest_digest"], _iteration(header, entries)
                header, entries = {**entry, "place": f"{file} line {number}"}, []
            elif broken or header is None:
                raise ValueError(f"{file} line {broken or number} is broken: nothing can be proved from it.")
            else:
                entries.append(entry)
            broken = 0
    if header:
        yield header["manifest_digest"], _iteration(header, entries)


def _iteration(header: dict[str, Any], entries: Sequence[dict[str, Any]]) -> Iteration:
    def column(name: str) -> list[Any]:
        return [item for entry in entries for item in entry[name]]

    if missing := _HEADER - header.keys():
        raise ValueError(f"{header['place']} is no loader's: it has no {', '.join(sorted(missing))}.")
    keys = [0 if key is None else xxhash.xxh3_64_intdigest(key.encode()) for key in column("keys")]
    return Iteration(
        positions=np.array(column("positions"), np.int64),
        cycles=np.array([column("sources"), column("cycles")], np.int64).T,
        keys=np.array(keys, np.uint64),
        **{name: header[name] for name in _HEADER},
    )


@dataclass
class EpochAudit:
    """What one epoch comes to when all restarts are accounted for."""

    epoch: int
    epoch_samples: int
    standing: list[Iteration] = field(default_factory=list)  # what the training is built on
    lost: list[Iteration] = field(default_factory=list)  # what was served to processes whose progress was lost
    problems: list[str] = field(default_factory=list)

    @property
    def served(self) -> int:
        """Places from the first on that were served without a gap."""
        places = np.unique(np.concatenate([np.zeros(0, np.int64), *(part.positions for part in self.standing)]))
        return int((places == np.arange(len(places))).sum())

    @property
    def is_over(self) -> bool:
        last = max(self.standing, key=lambda part: part.time)
        left = self.epoch_samples - self.served
        return left < last.global_batch_size if last.drop_last else left == 0

    def __str__(self) -> str:
        beyond = sum(len(part.positions) for part in self.standing) - self.served
        left = f"{self.epoch_samples - self.served} left out at the end" if self.is_over else "not over yet"
        if beyond:
            left += f" ({beyond} more came behind places that were not served)"
        in_vain = sum(len(part.positions) for part in self.lost)
        damaged = sum(int((part.keys == 0).sum()) for part in self.standing)
        return (
            f"epoch {self.epoch}: {self.served} of {self.epoch_samples} samples served exactly once, {left}; "
            f"{damaged} damaged, {in_vain} more served in vain before restarts"
        ) + "".join(f"\n  PROBLEM: {problem}" for problem in self.problems)


def audit(iterations: Sequence[Iteration]) -> list[EpochAudit]:
    """Whether every place of every epoch was served exactly once, over all ranks and restarts of one training.

    A restart takes up the order at its state; what earlier processes were served from there on is lost with their
    progress. Of what stands, no place may be missing or double, and no sample come twice in a pass over the data; each
    rank must have been served its share, and a place that was served again the same sample."""
    epochs: dict[int, EpochAudit] = {}
    attempts = _attempts(iterations)
    for attempt in attempts:
        first = attempt[0]
        for audit in epochs.values():
            if audit.epoch >= first.epoch:
                _roll_back(audit, first.samples if audit.epoch == first.epoch else 0)
        now = epochs.setdefault(first.epoch, EpochAudit(first.epoch, first.epoch_samples))
        if now.served < first.samples:
            now.problems.append(f"{first.place} goes on from place {first.samples}, but only {now.served} were served")
        now.problems += [problem for iteration in attempt for problem in _not_its_share(iteration)]
        now.standing += attempt
    audits = [epochs[epoch] for epoch in sorted(epochs)]
    for audit in audits:
        if audit.epoch < attempts[-1][0].epoch and not audit.is_over:
            audit.problems.append("the next epoch began although this one was not over")
        audit.problems += _double(audit)
    audits[-1].problems += [*_twice_in_a_pass(audits), *_without_record(attempts[-1])]
    return audits


def _roll_back(audit: EpochAudit, place: int) -> None:
    """Training goes on from `place` once more: what was served from there on does not stand any longer."""
    before = [iteration.positions < place for iteration in audit.standing]
    audit.lost += [iteration.part(~kept) for iteration, kept in zip(audit.standing, before)]
    audit.standing = [iteration.part(kept) for iteration, kept in zip(audit.standing, before)]


def _not_its_share(iteration: Iteration) -> Iterator[str]:
    """Global batch k is world_size * batch_size places, of which each rank has its contiguous part."""
    steps = np.arange(len(iteration.positions) // iteration.batch_size + 1)[:, None]
    first = iteration.samples + steps * iteration.global_batch_size + iteration.rank * iteration.batch_size
    share = (first + np.arange(iteration.batch_size)).ravel()
    share = share[share < iteration.epoch_samples][: len(iteration.positions)]
    if not np.array_equal(share, iteration.positions):
        yield f"{iteration.place}: rank {iteration.rank} was not served its share of each global batch"


def _without_record(attempt: Sequence[Iteration]) -> Iterator[str]:
    """A step needs all ranks, so none is two batches ahead of one that has not begun."""
    unknown = sorted(set(range(attempt[0].world_size)) - {iteration.rank for iteration in attempt})
    most = max(len(iteration.positions) for iteration in attempt)
    if unknown and most > 2 * attempt[0].batch_size:
        yield f"nothing is on record of rank {', '.join(map(str, unknown))} where others were served {most} samples"


def _double(audit: EpochAudit) -> Iterator[str]:
    positions, keys = (
        np.concatenate([getattr(part, name) for part in audit.standing]) for name in ("positions", "keys")
    )
    places, first = np.unique(positions, return_index=True)
    if len(places) < len(positions):
        yield f"{len(positions) - len(places)} places were served twice"
    for part in audit.lost:
        again = np.isin(part.positions, places)
        now = keys[first[np.searchsorted(places, part.positions[again])]]
        changed = (now != part.keys[again]) & (now != 0) & (part.keys[again] != 0)
        if changed.any():
            yield f"{changed.sum()} places held other samples when they were served again, after {part.place}"


def _twice_in_a_pass(audits: Sequence[EpochAudit]) -> Iterator[str]:
    """A pass may take several epochs, or an epoch several passes; unshuffled epochs all make the same pass."""
    parts = [part for audit in audits for part in audit.standing]
    scopes = [np.full(len(part.keys), 0 if part.shuffle else part.epoch) for part in parts]
    known = np.concatenate([np.column_stack([s, p.cycles, p.keys.view(np.int64)]) for s, p in zip(scopes, parts)])
    known = known[known[:, 3] != 0]
    num_twice = len(known) - len(np.unique(known, axis=0))
    if num_twice:
        yield f"{num_twice} samples came twice in one pass over their data set"


def _attempts(iterations: Sequence[Iteration]) -> list[list[Iteration]]:
    """The iterations of all ranks that belong together, in the order in which they began.

    Ranks that take up the same place are together. From the last to the first: of an attempt that died before all of
    its ranks had begun nothing stands, so it does no harm that ranks of it may be put together with another's."""
    attempts: list[list[Iteration]] = []
    for iteration in sorted(iterations, key=lambda item: item.time, reverse=True):
        own = (iteration.epoch, iteration.samples, iteration.world_size, iteration.batch_size)
        for attempt in reversed(attempts):
            first = attempt[0]
            same = own == (first.epoch, first.samples, first.world_size, first.batch_size)
            if same and all(iteration.rank != other.rank for other in attempt):
                attempt.append(iteration)
                break
        else:
            attempts.append([iteration])
    return sorted(attempts, key=lambda attempt: max(iteration.time for iteration in attempt))


def audit_command(arguments: Sequence[str]) -> int:
    parser = Parser(prog="shards audit", description=audit.__doc__)
    parser.add_argument("ledgers", nargs="+", help="ledger folders, or single rank-*.jsonl files of one training")
    options = parser.parse_args(arguments)
    exact = over = True
    for digest, iterations in read_ledgers(options.ledgers).items():
        sizes = sorted({iteration.world_size for iteration in iterations})
        print(f"data set {digest}: {len(_attempts(iterations))} iterations on {', '.join(map(str, sizes))} ranks")
        for result in audit(iterations):
            print(result)
            exact = exact and not result.problems
        over = over and result.is_over
    if exact:
        print("Every sample was served exactly once" + ("." if over else ", so far: the last epoch is not over."))
    else:
        print("NOT every sample was served exactly once.")
    return 0 if exact else 3
