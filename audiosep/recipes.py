"""Recipes: every number that makes a sample, drawn from (seed, index) alone and printable before anything is decoded.

A data set is therefore a function of config and catalogue: no rank, worker, order or run changes a byte of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from audiosep.catalogue import Catalogue, Clip
from audiosep.mixing import MixingConfig
from shards.order import Permutation

GROUP_TARGETS = 32  # consecutive targets that are one another's interferers
MAX_GROUP_DRAWS = 100  # until an interferer is sought in the whole catalogue
MAX_DRAWS = 10_000  # until one that fits must have come


class Source(NamedTuple):
    """One source of a mixture."""

    clip: Clip
    caption: str  # the phrasing that was chosen
    fraction: float  # in [0, 1): where in the clip the crop starts


@dataclass(frozen=True)
class Recipe:
    """One sample: source `target` of a mixture whose first source the others were scaled to."""

    index: int
    mixture: int  # samples with the same number have the same mixture
    sources: tuple[Source, ...]
    gains_db: tuple[int, ...]  # of each source but the first
    noise_gain_db: int  # of the sum of these
    target: int = 0  # the source that the query asks for
    query: Literal["caption", "audio"] = "caption"  # how it asks: by the target's caption or by its sound


class Draws:
    """Uniform numbers from Philox, a counter-based generator: (seed, number, stream) name a sequence of its own.

    Only raw 64-bit words are taken from numpy, so the numbers stay the same in all its versions."""

    def __init__(self, seed: int, number: int, stream: int) -> None:
        self._words = np.random.Philox(key=[seed, number], counter=[0, 0, 0, stream]).random_raw

    def below(self, size: int) -> int:
        """An integer of range(size)."""
        return int(self._words()) * size >> 64

    def fraction(self) -> float:
        """A number in [0, 1)."""
        return (int(self._words()) >> 11) * 2.0**-53


TARGET, MIXTURE, REPLACEMENT = 0, 1, 2  # streams of draws; replacement n of a mixture uses REPLACEMENT + n


class Recipes:
    """The recipes of a data set.

    A pass visits each clip of a catalogue file `weight` times as a target, all files shuffled into one another: one
    permutation of each file's clips for each of their rounds, one of the pass's places for each pass. As in upstream's
    batches, interferers are crops that other targets are made of: the targets of a group, which are a random choice
    from the catalogue. So a crop is decoded once and used twice."""

    def __init__(
        self,
        catalogue: Catalogue,
        config: MixingConfig,
        seed: int,
        *,
        mixtures_per_target: int = 1,
        each_source: bool = False,
        use_text_ratio: float = 1.0,
    ) -> None:
        """`each_source`: every source of a mixture is the target of one sample, and each mixture has `max_mix_num`.
        `use_text_ratio`: share of the mixtures that are asked for by caption, the others by the target's sound."""
        self._catalogue, self._config, self._seed = catalogue, config, seed
        self._mixtures_per_target = mixtures_per_target
        self._sources_asked = config.max_mix_num if each_source else 1
        self._use_text_ratio = use_text_ratio
        sizes = np.diff(catalogue.starts)
        places = [max(round(weight * size), 1) for weight, size in zip(catalogue.weights, sizes, strict=True)]
        self._place_starts = np.concatenate([[0], np.cumsum(places)])
        self._group, self._group_sources = -1, list[Source]()

    @property
    def targets_per_pass(self) -> int:
        return int(self._place_starts[-1])

    @property
    def samples_per_pass(self) -> int:
        return self.targets_per_pass * self._mixtures_per_target * self._sources_asked

    def __getitem__(self, index: int) -> Recipe:
        mixture, asked = divmod(index, self._sources_asked)
        target = mixture // self._mixtures_per_target
        sources = [self._target(target)]
        draws = Draws(self._seed, mixture, MIXTURE)
        most = self._config.max_mix_num
        mix_num = most if self._sources_asked > 1 else 2 + draws.below(most - 1)
        while len(sources) < mix_num:
            sources.append(self._interferer(target // GROUP_TARGETS, sources, draws))
        gains = [
            self._config.lower_db + draws.below(self._config.higher_db - self._config.lower_db + 1) for _ in sources
        ]
        query: Literal["caption", "audio"] = "caption" if draws.fraction() < self._use_text_ratio else "audio"
        return Recipe(index, mixture, tuple(sources), tuple(gains[1:]), gains[0], asked, query)

    def replacement(self, recipe: Recipe, slot: int, others: Sequence[Source], attempt: int) -> Source:
        """What stands in for a rejected source `slot`, `attempt` = 0, 1, ...: any clip that fits beside the others."""
        draws = Draws(self._seed, recipe.mixture, REPLACEMENT + attempt * self._config.max_mix_num + slot)
        return self._fitting_source(others, draws)

    def _target(self, place: int) -> Source:
        """The target at a place of the endless sequence of passes."""
        group, row = divmod(place, GROUP_TARGETS)
        if group != self._group:
            places = np.arange(group * GROUP_TARGETS, (group + 1) * GROUP_TARGETS)
            draws = [Draws(self._seed, int(place), TARGET) for place in places]
            self._group_sources = [self._source(int(c), d) for c, d in zip(self._target_clips(places), draws)]
            self._group = group
        return self._group_sources[row]

    def _target_clips(self, targets: np.ndarray) -> np.ndarray:
        pass_numbers, positions = np.divmod(targets, self.targets_per_pass)
        places = np.empty_like(targets)
        for number in np.unique(pass_numbers):
            rows = pass_numbers == number
            places[rows] = Permutation(self.targets_per_pass, (self._seed, 0, number))(positions[rows])
        files = np.searchsorted(self._place_starts, places, side="right") - 1
        # A file with p places in a pass has its clips come round every len(file) / p passes, each time reshuffled.
        visits = pass_numbers * np.diff(self._place_starts)[files] + places - self._place_starts[files]
        rounds, positions = np.divmod(visits, np.diff(self._catalogue.starts)[files])
        clips = self._catalogue.starts[files]
        for file, number in {*zip(files.tolist(), rounds.tolist())}:
            rows = (files == file) & (rounds == number)
            size = int(self._catalogue.starts[file + 1] - self._catalogue.starts[file])
            clips[rows] += Permutation(size, (self._seed, 1, file, number))(positions[rows])
        return clips

    def _interferer(self, group: int, others: Sequence[Source], draws: Draws) -> Source:
        """A target of the same group, its crop included, if one fits; else any clip that does."""
        for _ in range(MAX_GROUP_DRAWS):
            source = self._target(group * GROUP_TARGETS + draws.below(GROUP_TARGETS))
            if self._fits(source, others):
                return source
        return self._fitting_source(others, draws)

    def _fitting_source(self, others: Sequence[Source], draws: Draws) -> Source:
        """A new crop of any clip, files by weight, that fits beside the others."""
        for _ in range(MAX_DRAWS):
            place = draws.below(self.targets_per_pass)
            file = int(np.searchsorted(self._place_starts, place, side="right")) - 1
            first, last = map(int, self._catalogue.starts[file : file + 2])
            source = self._source(first + draws.below(last - first), draws)
            if self._fits(source, others):
                return source
        raise ValueError(
            f"{MAX_DRAWS} clips drawn and none fits beside {', '.join(repr(other.caption) for other in others)}: the "
            "sources of a mixture differ in captions and kinds. Lower mixing.max_mix_num, set mixing.distinct_kinds to "
            "false, or add clips."
        )

    def _fits(self, source: Source, others: Sequence[Source]) -> bool:
        """Whether it differs from all others in clip, captions and (`distinct_kinds`) kind."""
        return not any(self._clash(source.clip, other.clip) for other in others)

    def _clash(self, one: Clip, other: Clip) -> bool:
        return (
            one.number == other.number
            or not {normalised(c) for c in one.captions}.isdisjoint(normalised(c) for c in other.captions)
            or (self._config.distinct_kinds and one.kind == other.kind != "")
        )

    def _source(self, number: int, draws: Draws) -> Source:
        clip = self._catalogue.clip(number)
        return Source(clip, clip.captions[draws.below(len(clip.captions))], draws.fraction())


def normalised(caption: str) -> str:
    """Captions that differ in case, spaces or a final stop only are the same."""
    return " ".join(caption.casefold().split()).rstrip(".")
