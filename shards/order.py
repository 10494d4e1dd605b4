"""Which sample stands at which place of an epoch: pure functions of a few integers, for any place, in no memory.

Nothing here is stored or advanced: the order of 10^9 samples is a formula, so every rank, every restart and every
audit computes the same one, from any position on."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Integers = NDArray[np.int64]
Words = NDArray[np.uint64]

ROUNDS = 24  # large domains need 6 or so; all 720 orders of 6 elements come equally often from about 24 on


class Permutation:
    """A keyed pseudo-random bijection of range(size), computed for any elements, in either direction.

    A generalised Feistel network on pairs (left, right) of range(a) x range(b) with a * b just above `size`, whose
    few surplus values are walked over (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). The round
    function is the 64-bit finaliser of splitmix64 (Steele, Lea and Flood 2014) over keyed input: it shuffles well and
    is no cipher."""

    def __init__(self, size: int, key: bytes | Sequence[int]) -> None:
        """`key`: bytes, or a tuple of integers such as (seed, pass); different keys give unrelated permutations."""
        if not 0 < size < 2**62:
            raise ValueError(f"A permutation of {size} elements is not possible; the size must be in 1..2**62 - 1.")
        self.size = size
        left = int(np.ceil(np.sqrt(size)))
        self._sizes = (np.uint64(left), np.uint64(-(-size // left)))
        material = key if isinstance(key, bytes) else repr([int(part) for part in key]).encode()
        self._round_keys = np.frombuffer(hashlib.shake_128(material).digest(8 * ROUNDS), "<u8")

    def __call__(self, elements: ArrayLike) -> Integers:
        """Where each element goes; `elements`: integers of range(size), any shape. Raises IndexError outside."""
        return self._walk(elements, self._encrypt)

    def inverse(self, images: ArrayLike) -> Integers:
        """The elements that go to `images`: inverse(p(i)) == i."""
        return self._walk(images, self._decrypt)

    def _walk(self, elements: ArrayLike, step: Callable[[Words], Words]) -> Integers:
        values = _within(elements, self.size)
        walked = step(values.astype(np.uint64).reshape(-1))
        outside = np.flatnonzero(walked >= self.size)
        while outside.size:
            walked[outside] = step(walked[outside])
            outside = outside[walked[outside] >= self.size]
        return walked.astype(np.int64).reshape(values.shape)

    def _encrypt(self, values: Words) -> Words:
        halves = [values // self._sizes[1], values % self._sizes[1]]
        for i, round_key in enumerate(self._round_keys):
            size = self._sizes[i % 2]
            halves[i % 2] = (halves[i % 2] + _mix(halves[1 - i % 2] ^ round_key) % size) % size
        return halves[0] * self._sizes[1] + halves[1]

    def _decrypt(self, values: Words) -> Words:
        halves = [values // self._sizes[1], values % self._sizes[1]]
        for i, round_key in reversed(list(enumerate(self._round_keys))):
            size = self._sizes[i % 2]
            halves[i % 2] = (halves[i % 2] + size - _mix(halves[1 - i % 2] ^ round_key) % size) % size
        return halves[0] * self._sizes[1] + halves[1]


def _within(values: ArrayLike, size: int) -> Integers:
    integers = np.asarray(values, np.int64)
    if integers.size and (integers.min() < 0 or integers.max() >= size):
        raise IndexError(f"{integers.min()}..{integers.max()} does not lie in range({size}).")
    return integers


def _mix(values: Any) -> Any:
    """splitmix64's finaliser, on a uint64 or an array of them, modulo 2^64."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))


class EpochOrder:
    """The order in which an epoch visits `num_samples` samples: blocks of `block_samples` neighbours, permuted.

    With 1 it is a uniform shuffle; larger blocks make longer reads. Any position is looked up by itself."""

    def __init__(self, num_samples: int, block_samples: int, digest: str, seed: int, epoch: int) -> None:
        """`digest`: the manifest's; another data set, seed or epoch gives an unrelated order."""
        self.num_samples = num_samples
        self.block_samples = block_samples
        key = f"{digest} {seed} {epoch}".encode()
        self._blocks = Permutation(-(-num_samples // block_samples), key)
        # The last block may be short; behind its place in the order everything stands that much earlier.
        self._missing = -num_samples % block_samples
        self._short = int(self._blocks.inverse(self._blocks.size - 1))

    def __getitem__(self, positions: ArrayLike) -> Integers:
        """The sample numbers at these positions of the epoch. Raises IndexError outside of range(num_samples)."""
        places = _within(positions, self.num_samples)
        behind_short = places >= (self._short + 1) * self.block_samples - self._missing
        places = places + behind_short * self._missing
        return self._blocks(places // self.block_samples) * self.block_samples + places % self.block_samples


MIXING_PERIOD = 10_000  # blocks over which weights are kept exactly, up to 1 / MIXING_PERIOD each
COUNTED_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Draws:
    """What stands at some places of a stream, all int64 and of one shape: data set, pass over it, sample in it."""

    source: Integers
    cycle: Integers
    sample: Integers

    def __getitem__(self, index: int) -> "Draws":
        return Draws(self.source[index], self.cycle[index], self.sample[index])


class StreamOrder:
    """The endless order of one or several data sets, pass after pass, in which blocks of neighbours stay together.

    Without weights all of them are one: each pass takes every sample of each once. With weights each data set makes
    passes of its own, and has its share of the blocks in every MIXING_PERIOD, shuffled among the others'."""

    def __init__(
        self,
        sources: Sequence[tuple[str, int]],
        weights: Sequence[float] | None = None,
        *,
        seed: int,
        block_samples: int = 1,
        shuffle: bool = True,
    ) -> None:
        """`sources`: digest and number of samples of each. `shuffle` False: every pass in the order of the shards.

        Raises ValueError for weights that cannot be kept."""
        self.seed, self.block_samples, self.shuffle = seed, block_samples, shuffle
        self._sources = sources
        self._starts = np.cumsum([0, *(size for _, size in sources)])
        self.shares: Integers | None = None  # of MIXING_PERIOD, of each data set
        if weights is None:
            return
        if len(weights) != len(sources) or not all(0 < weight < np.inf for weight in weights):
            raise ValueError(f"{len(sources)} data sets need as many positive weights, not {list(weights)}.")
        if not shuffle:
            raise ValueError(f"Weights {list(weights)} mix in random order: shuffle, or give the data sets as a list.")
        self._bounds = np.round(np.cumsum([0.0, *weights]) / sum(weights) * MIXING_PERIOD).astype(np.int64)
        self.shares = np.diff(self._bounds)
        if self.shares.min() == 0:
            raise ValueError(f"Weights {list(weights)}: the smallest is under 1/{MIXING_PERIOD} of the sum.")

    def __getitem__(self, places: ArrayLike) -> Draws:
        """What stands at these places of the stream, any integers from 0 on."""
        places = np.asarray(places, np.int64)
        if self.shares is None:
            digest = " ".join(digest for digest, _ in self._sources)
            cycle, number = self._passes(digest, int(self._starts[-1]), places)
            source = np.searchsorted(self._starts, number, side="right") - 1
            return Draws(source, cycle, number - self._starts[source])
        source, turn = self._interleave(places, self.shares)
        cycle, sample = np.empty_like(turn), np.empty_like(turn)
        for index, (digest, size) in enumerate(self._sources):
            own = source == index
            cycle[own], sample[own] = self._passes(digest, size, turn[own])
        return Draws(source, cycle, sample)

    def _passes(self, digest: str, size: int, turns: Integers) -> tuple[Integers, Integers]:
        """Of a data set's own places: the pass over it, and the sample in it."""
        cycle, sample = np.divmod(turns, size)
        if self.shuffle:
            for number in np.unique(cycle).tolist():
                own = cycle == number
                sample[own] = EpochOrder(size, self.block_samples, digest, self.seed, number)[sample[own]]
        return cycle, sample

    def _interleave(self, places: Integers, shares: Integers) -> tuple[Integers, Integers]:
        """Whose place it is, and how many that data set had before."""
        block, inside = np.divmod(places, self.block_samples)
        period, slot = np.divmod(block, MIXING_PERIOD)
        for number in np.unique(period):
            mixing = Permutation(MIXING_PERIOD, (self.seed, int(number)))
            slot[period == number] = mixing(slot[period == number])
        source = np.searchsorted(self._bounds, slot, side="right") - 1
        turn = period * shares[source] + slot - self._bounds[source]
        return source, turn * self.block_samples + inside

    def counts(self, place: int) -> list[int]:
        """How many of the places before this one were each data set's. Looks up those behind the last whole pass, or
        MIXING_PERIOD: a third of a microsecond each."""
        if len(self._sources) == 1:
            return [place]
        if self.shares is None:
            round_places, each = int(self._starts[-1]), np.diff(self._starts)
        else:
            round_places, each = MIXING_PERIOD * self.block_samples, self.shares * self.block_samples
        first = place - place % round_places
        counts = first // round_places * each
        for start in range(first, place, COUNTED_AT_ONCE):
            draws = self[np.arange(start, min(start + COUNTED_AT_ONCE, place))]
            counts = counts + np.bincount(draws.source, minlength=len(self._sources))
        return counts.tolist()
