"""What a data set is bound to before its first shard (spec.json), and what it holds once sealed (manifest.json)."""

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, TypeAdapter, ValidationError

from shards.progress import progress
from shards.record import FORMAT_VERSION, Record, examine, explain_invalid, read_index
from shards.storage import open_store
from shards.store import Store
from shards.tar import Field, canonical_json

SPEC, MANIFEST = "spec.json", "manifest.json"
MAX_SHARDS = 10**7  # have names of seven digits
SHARDS_PER_FOLDER = 1000  # and their 3,000 files, once a data set has more than ten folders' worth


def shard_name(index: int, num_shards: int) -> str:
    """The name of a shard: "shard-000012", or in folders for data sets of many shards: "0012/shard-0012345"."""
    if num_shards <= 10 * SHARDS_PER_FOLDER:
        return f"shard-{index:06d}"
    return f"{index // SHARDS_PER_FOLDER:04d}/shard-{index:07d}"


@dataclass(frozen=True)
class Plan:
    """Which samples stand in which shard, and the spec: everything else that decides over their bytes."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    format_version: int
    spec: dict[str, Any]
    num_samples: int
    samples_per_shard: int

    def __post_init__(self) -> None:
        if self.num_samples < 1 or self.samples_per_shard < 1:
            raise ValueError(f"{self.num_samples} samples, {self.samples_per_shard} to a shard: both must be positive.")
        if self.num_shards > MAX_SHARDS:
            raise ValueError(
                f"{self.num_samples} samples, {self.samples_per_shard} to a shard, would be {self.num_shards} shards; "
                f"{MAX_SHARDS} are possible. Put more into each, or make fewer samples."
            )

    @cached_property
    def spec_digest(self) -> str:
        """128 bits over the whole plan; every record and the manifest carry it."""
        return sha256(canonical_json(asdict(self))).hexdigest()[:32]

    @property
    def num_shards(self) -> int:
        return -(-self.num_samples // self.samples_per_shard)

    def shard_name(self, index: int) -> str:
        return shard_name(index, self.num_shards)

    def samples(self, index: int) -> range:
        """The sample indices of shard `index`."""
        start = index * self.samples_per_shard
        return range(start, min(start + self.samples_per_shard, self.num_samples))


_PLAN = TypeAdapter(Plan)


def bind(
    store: Store, spec: Mapping[str, Any], num_samples: int, samples_per_shard: int, dry_run: bool = False
) -> Plan:
    """Bind a root to a spec before its first shard, or find it bound to just that one; a dry run leaves it unbound.

    `spec` is plain JSON data. Raises ValueError that names what differs if the root is bound to another."""
    plan = Plan(FORMAT_VERSION, dict(spec), num_samples, samples_per_shard)
    begun = store.size(SPEC) is not None if dry_run else not store.create(SPEC, canonical_json(asdict(plan)))
    if begun:
        bound = read_plan(store)
        if bound.spec_digest != plan.spec_digest:
            changes = "; ".join(_changes(asdict(bound), asdict(plan), ""))
            raise ValueError(
                f"{store.url} was begun with another configuration; shards of the two must not be mixed: {changes}. "
                "Use another root, change the configuration back, or delete this root."
            )
    return plan


def read_plan(store: Store) -> Plan:
    """What a root is bound to. Raises ValueError if nothing is, or if its spec.json is broken."""
    try:
        return _PLAN.validate_json(store.read(SPEC))
    except FileNotFoundError:
        raise ValueError(f"{store.url} holds no {SPEC}: no data set was begun there.") from None
    except ValidationError as error:
        raise ValueError(f"{store.url}/{SPEC} is broken: {explain_invalid(error)}.") from None


def _changes(old: Any, new: Any, path: str) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _changes(old.get(key, "absent"), new.get(key, "absent"), f"{path}.{key}" if path else key)
    elif old != new:
        yield f"{path} was {old!r} and is now {new!r}"


def survey(store: Store, plan: Plan, num_threads: int | None = None) -> Iterator[Record | str]:
    """For each shard in order: its record if it is complete, otherwise what is wrong, for people.

    Lists and reads with `num_threads` threads (the default hides the latency of shared file systems and buckets), a
    hundred shards at a time. Raises ValueError for a shard that was made to another spec."""
    with (
        ThreadPoolExecutor(num_threads or max(16, store.concurrency)) as pool,
        progress(total=plan.num_shards, desc="records", unit="shard") as bar,
    ):
        for found in pool.map(lambda hundred: _survey_hundred(store, plan, hundred), _hundreds(plan)):
            yield from found
            bar.update(len(found))


def _hundreds(plan: Plan) -> list[range]:
    return [range(start, min(start + 100, plan.num_shards)) for start in range(0, plan.num_shards, 100)]


def _survey_hundred(store: Store, plan: Plan, hundred: range) -> list[Record | str]:
    sizes = _list_hundred(store, plan, hundred)
    return [_survey_shard(store, plan, index, sizes) for index in hundred]


def _list_hundred(store: Store, plan: Plan, hundred: range) -> dict[str, int]:
    """Names and sizes of all files of a hundred shards, whose names differ in two digits."""
    return dict(store.list(plan.shard_name(hundred[0])[:-2]))


def _survey_shard(store: Store, plan: Plan, index: int, sizes: Mapping[str, int]) -> Record | str:
    name = plan.shard_name(index)
    if f"{name}.json" not in sizes:
        return "not there"
    record = examine(store, name, plan.spec_digest, sizes.get)
    if isinstance(record, str):
        return record
    if record.num_samples != len(plan.samples(index)):
        return f"it has {record.num_samples} samples and not {len(plan.samples(index))}"
    return record


def unrecorded(store: Store, plan: Plan) -> Iterator[int]:
    """The shards without a record, by listings alone.

    Nothing is read, so it is the cheap way to watch a run; `survey` tells whether the others are complete."""
    hundreds = _hundreds(plan)
    with ThreadPoolExecutor(max(16, store.concurrency)) as pool:
        for hundred, names in zip(hundreds, pool.map(lambda hundred: _list_hundred(store, plan, hundred), hundreds)):
            yield from (index for index in hundred if f"{plan.shard_name(index)}.json" not in names)


class IncompleteError(ValueError):
    """Shards are missing or broken; `shards` are their indices."""

    def __init__(self, message: str, shards: Sequence[int]) -> None:
        super().__init__(message)
        self.shards = shards


def seal(store: Store, num_threads: int | None = None) -> "Manifest":
    """Write manifest.json, which makes the root a data set, from the records of all its shards.

    Raises IncompleteError unless every shard is there, complete, of one spec, with the same fields and keys of its own.
    """
    plan = read_plan(store)
    missing: dict[int, str] = {}
    num_bytes = np.zeros(plan.num_shards, np.int64)
    checksums = [np.zeros(plan.num_shards, ">u8") for _ in range(2)]
    fields: tuple[Field, ...] | None = None
    rejected: Counter[str] = Counter()
    owners: dict[str, int] = {}
    for index, record in enumerate(survey(store, plan, num_threads)):
        if isinstance(record, str):
            missing[index] = record
            continue
        fields = fields or record.fields
        twin = owners.setdefault(record.key_digest, index)
        if record.fields != fields:
            missing[index] = f"its fields are {record.fields} and not {fields}"
        elif twin != index:
            missing[index] = f"it holds the keys of {plan.shard_name(twin)}"
        num_bytes[index] = record.num_bytes
        checksums[0][index] = int(record.checksum, 16)
        checksums[1][index] = int(record.index_checksum, 16)
        rejected.update(str(entry.get("reason", "unknown")) for entry in record.rejected)
    if missing or fields is None:
        shown = "; ".join(f"{plan.shard_name(index)}: {reason}" for index, reason in list(missing.items())[:5])
        raise IncompleteError(
            f"{store.url} can't be sealed: {len(missing)} of {plan.num_shards} shards are not complete ({shown}"
            f"{'; ...' if len(missing) > 5 else ''}). Make them: --shards {format_ranges(list(missing))}",
            list(missing),
        )
    columns = _Columns(num_bytes.tolist(), *(column.tobytes().hex() for column in checksums))
    counts = plan.num_shards, int(num_bytes.sum()), rejected.total()
    data = canonical_json(asdict(_Document(plan, plan.spec_digest, fields, *counts, dict(rejected), columns)))
    store.write(MANIFEST, data)
    return parse_manifest(data, store.url)


def format_ranges(indices: Sequence[int]) -> str:
    """[3, 40, 41, 42] as "3,40-42"."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(f"{first}-{last}" if last > first else f"{first}" for first, last in runs)


def parse_ranges(text: str) -> list[int]:
    """The inverse of `format_ranges`. Raises ValueError for anything else."""
    indices: set[int] = set()
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if not found or int(found[2] or found[1]) < int(found[1]):
            raise ValueError(f"{part!r} in {text!r} is no shard number or range; write them as 3,17,40-52.")
        indices.update(range(int(found[1]), int(found[2] or found[1]) + 1))
    return sorted(indices)


@dataclass(frozen=True)
class _Columns:
    """One value for each shard: a list, or 16 hex digits each, run together."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    num_bytes: list[int]
    checksums: str
    index_checksums: str


@dataclass(frozen=True)
class _Document:
    """manifest.json."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    plan: Plan
    spec_digest: str
    fields: tuple[Field, ...]
    num_shards: int
    num_bytes: int
    num_rejected: int
    rejected: dict[str, int]
    shards: _Columns


_DOCUMENT = TypeAdapter(_Document)


@dataclass(frozen=True, eq=False)
class Manifest:
    """A sealed data set. Sample i is row i % samples_per_shard of shard i // samples_per_shard."""

    url: str
    digest: str  # 128 bits of SHA-256 over the manifest's bytes: the identity of the data set
    plan: Plan
    fields: tuple[Field, ...]
    rejected: dict[str, int]  # how many inputs were not used, by reason
    tar_bytes: NDArray[np.int64]  # [num_shards]
    checksums: NDArray[np.uint64]  # [num_shards], xxh3-64 of each tar
    index_checksums: NDArray[np.uint64]  # [num_shards], and of each index file

    @property
    def spec(self) -> dict[str, Any]:
        return self.plan.spec

    @property
    def num_samples(self) -> int:
        return self.plan.num_samples

    @property
    def num_shards(self) -> int:
        return self.plan.num_shards

    def locate(self, sample: int) -> tuple[int, int]:
        """Shard and row of a sample. Raises ValueError for one that is not there."""
        if not 0 <= sample < self.num_samples:
            raise ValueError(f"{self.url} has samples 0 to {self.num_samples - 1}, not {sample}.")
        return divmod(sample, self.plan.samples_per_shard)

    def shard_name(self, index: int) -> str:
        return self.plan.shard_name(index)

    def num_bytes(self, index: int) -> int:
        return int(self.tar_bytes[index])

    def checksum(self, index: int) -> str:
        """xxh3-64 of the shard's tar, as in its record."""
        return f"{self.checksums[index]:016x}"

    def index_checksum(self, index: int) -> str:
        """xxh3-64 of the shard's index file, as in its record."""
        return f"{self.index_checksums[index]:016x}"

    def read_index(self, store: Store, index: int) -> NDArray[np.uint64]:
        """The index of a shard, if it is the one that was sealed; see `record.read_index`."""
        return read_index(
            store,
            self.shard_name(index),
            num_samples=len(self.plan.samples(index)),
            num_bytes=self.num_bytes(index),
            checksum=self.index_checksum(index),
            fields=self.fields,
        )


def load_manifest(source: str | os.PathLike[str] | Store) -> Manifest:
    """The manifest of a sealed root, given as path, URL (of the root or of its manifest.json) or store.

    Raises FileNotFoundError if the root is not sealed, ValueError if the manifest is broken."""
    store = source if isinstance(source, Store) else open_store(source)
    try:
        data = store.read(MANIFEST)
    except FileNotFoundError:
        raise FileNotFoundError(f"{store.url} holds no {MANIFEST}: seal it first (shards seal {store.url}).") from None
    return parse_manifest(confirmed(store, MANIFEST, data), store.url)


def confirmed(source: Store, name: str, data: bytes) -> bytes:
    """What was read of an object that no checksum covers; over a network another reading must agree, or ValueError."""
    if source.request_bytes and source.read(name) != data:
        raise ValueError(f"{source.url}/{name} was read twice, not as the same bytes: something on the way flips bits.")
    return data


def parse_manifest(data: bytes, url: str) -> Manifest:
    """The manifest of the root at `url` from its bytes."""
    try:
        document = _DOCUMENT.validate_json(data)
        tar_bytes = np.array(document.shards.num_bytes, np.int64)
        checksums, index_checksums = (
            np.frombuffer(bytes.fromhex(digits), ">u8").astype(np.uint64)
            for digits in (document.shards.checksums, document.shards.index_checksums)
        )
    except (ValueError, OverflowError) as error:
        reason = explain_invalid(error) if isinstance(error, ValidationError) else error
        raise ValueError(f"{url}/{MANIFEST} is broken: {reason}.") from None
    plan = document.plan
    if plan.format_version != FORMAT_VERSION:
        raise ValueError(f"{url}/{MANIFEST} has format {plan.format_version}; this program reads {FORMAT_VERSION}.")
    lengths = {document.num_shards, plan.num_shards, len(tar_bytes), len(checksums), len(index_checksums)}
    if len(lengths) > 1 or document.spec_digest != plan.spec_digest:
        raise ValueError(
            f"{url}/{MANIFEST} is broken: it speaks of {sorted(lengths)} shards and of spec {document.spec_digest} "
            f"where its own has the digest {plan.spec_digest}."
        )
    digest = sha256(data).hexdigest()[:32]
    return Manifest(url, digest, plan, document.fields, document.rejected, tar_bytes, checksums, index_checksums)
