"""A data set to be: its config, what binds it, and the rendering of any of its samples."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field

from audiosep.catalogue import Catalogue
from audiosep.clips import ClipConfig, Rejection, read_crop
from audiosep.config import plain
from audiosep.mixing import MixingConfig, mix
from audiosep.queries import QueryConfig, make_encoder
from audiosep.recipes import GROUP_TARGETS, Recipe, Recipes, Source
from audiosep.samples import Encoder, Rendered
from audiosep.stft import Precision, Representation, StftConfig, stored_shape
from shards.manifest import SPEC, Plan, bind, read_plan, survey
from shards.record import Record, examine
from shards.storage import open_store
from shards.store import StorageConfig, Store, anew
from shards.tar import Sample, canonical_json
from shards.writer import write_shard

ORIGIN = "origin.json"  # where the clips were when the data set was begun
MAX_REPLACEMENTS = 100  # for one source, until so many clips in a row were rejected that the audio must be elsewhere
TOLERANT_SAMPLES = 1000  # below so many, a share of rejections says little

Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class ShardConfig:
    """How many samples there are, and how they are stored."""

    passes: Annotated[int, Field(ge=1, description="times that every clip is a target, in new mixtures")] = 1
    mixtures_per_target: Annotated[
        int, Field(ge=1, description="mixtures made of one crop of a target before the next one's turn")
    ] = 1
    targets: Annotated[
        Literal["one", "each"],
        Field(description="each: a mixture gives a sample for each of its sources, of which it has max_mix_num"),
    ] = "one"
    num_samples: Annotated[int | None, Field(ge=1, description="samples in all; by default whole passes")] = None
    samples_per_shard: Annotated[int, Field(ge=1, description="2 MB each for 5 s, float16 magnitudes, window 2048")] = (
        256
    )
    representation: Annotated[
        Representation, Field(description="complex: real and imaginary planes, twice the size, keeps the phase")
    ] = "magnitude"
    dtype: Annotated[Precision, Field(description="of stored spectrograms")] = "float16"


@dataclass(frozen=True)
class PrecomputeConfig:
    """Everything that `audiosep precompute` needs to know."""

    root: Annotated[str, Field(description="folder or URL that the shards go to; one for each split")]
    catalogue: Annotated[
        str | dict[str, float], Field(description="catalogue file, or several with their weights, {file: weight}")
    ]
    seed: Annotated[int, Field(ge=0, lt=2**64, description="of all draws")] = 0
    clips: ClipConfig = field(default_factory=ClipConfig)
    mixing: MixingConfig = field(default_factory=MixingConfig)
    stft: StftConfig = field(default_factory=StftConfig)
    shards: ShardConfig = field(default_factory=ShardConfig)
    queries: Annotated[
        QueryConfig | None, Field(description="encoder whose embeddings of the captions are stored as conditions")
    ] = None
    device: Annotated[Device, Field(description="where STFTs are computed; auto: a GPU if there is one")] = "auto"
    max_rejected_fraction: Annotated[
        float, Field(ge=0, le=1, description="rejected clips for each sample above which precompute fails")
    ] = 0.01
    check_files: Annotated[bool, Field(description="look for every local clip before beginning")] = True
    num_processes: Annotated[int, Field(ge=1, description="processes of this machine that render shards")] = 1
    storage: StorageConfig = field(default_factory=StorageConfig)


@dataclass
class Tally:
    """Samples made, and clips rejected for them."""

    num_samples: int = 0
    num_rejected: int = 0
    examples: dict[str, str] = field(default_factory=dict)  # clips and why, as many as people read

    def add(self, num_samples: int, rejected: Sequence[Mapping[str, Any]]) -> "Tally":
        self.num_samples += num_samples
        self.num_rejected += len(rejected)
        for entry in rejected[: 10 - len(self.examples)]:
            self.examples[entry["clip"]] = f"{entry['reason']}: {entry['detail']}"
        return self

    def __str__(self) -> str:
        shown = [f"{clip} ({reason})" for clip, reason in self.examples.items()] + ["..."] * (len(self.examples) == 10)
        return f"clips were rejected {self.num_rejected} times for {self.num_samples} samples: {'; '.join(shown)}"

    def check(self, max_fraction: float, least_samples: int = 0) -> None:
        """Raise ValueError that names files, if there are more than `max_fraction` rejections for each sample, of which
        at least `least_samples` are reckoned with."""
        allowed = max_fraction * max(self.num_samples, least_samples)
        if self.num_rejected > allowed:
            raise ValueError(
                f"{self}. These are more than the {allowed:g} that max_rejected_fraction {max_fraction} lets pass. "
                "Mend or remove them, or raise the fraction if other clips may stand in."
            )


class Dataset:
    """The samples of a config and its catalogue, bound to the root that they are written to."""

    def __init__(self, config: PrecomputeConfig, catalogue: Catalogue, dry_run: bool = False) -> None:
        """Begins the data set unless it is a dry run, which changes nothing at the root.

        Raises ValueError, before the root is bound, for segments that are too short for a window, and one that names
        what changed, if the root was begun with another spec."""
        self.config, self.catalogue, self._dry_run = config, catalogue, dry_run
        self.store: Store = open_store(config.root, config.storage)
        for window_length in config.stft.window_lengths:
            stored_shape(config.clips.length, window_length, config.stft.hop_length, config.shards.representation)
        self.recipes = Recipes(
            catalogue,
            config.mixing,
            config.seed,
            mixtures_per_target=config.shards.mixtures_per_target,
            each_source=config.shards.targets == "each",
            use_text_ratio=config.queries.use_text_ratio if config.queries else 1.0,
        )
        self._device = self._choose_device()
        self._queries = make_encoder(config.queries, self._device, config.storage) if config.queries else None
        num_samples = config.shards.num_samples or config.shards.passes * self.recipes.samples_per_pass
        self.plan: Plan = bind(self.store, self._spec(), num_samples, config.shards.samples_per_shard, dry_run)
        if not dry_run:  # for people and for `audiosep explain`; no part of the spec, since clips may be moved
            self.store.create(ORIGIN, canonical_json({"folders": catalogue.folders}))

    def _spec(self) -> dict[str, Any]:
        """All that decides over the samples' bytes besides their number, as plain data."""
        config = plain(self.config)
        spec = {name: config[name] for name in ("seed", "clips", "mixing", "stft")}
        shards = {
            name: config["shards"][name] for name in ("mixtures_per_target", "targets", "representation", "dtype")
        }
        catalogue = {"digest": self.catalogue.digest, "num_clips": len(self.catalogue)}
        encoder = self._queries.identity if self._queries else None
        spec |= {"shards": shards, "catalogue": catalogue, "device": self._device, "query_encoder": encoder}
        return spec | ({"use_text_ratio": config["queries"]["use_text_ratio"]} if encoder else {})

    def _choose_device(self) -> str:
        """What computes the STFTs. It decides over their last bits, so "auto" means what the root was begun with."""
        if self.config.device != "auto":
            return self.config.device
        if self.store.size(SPEC) is not None:
            return read_plan(self.store).spec["device"]
        return "cuda" if torch.cuda.is_available() else "cpu"

    def survey(self, share: Sequence[int]) -> tuple[list[int], Tally]:
        """The shards of a share that are yet to be made, and what the others hold.

        If the share is everything, also remove what killed workers left."""
        if len(share) == self.plan.num_shards:
            if not self._dry_run:
                self.store.sweep()
            found: Iterator[Record | str] = survey(self.store, self.plan)
        else:
            names = map(self.plan.shard_name, share)
            found = (examine(self.store, name, self.plan.spec_digest, self.store.size) for name in names)
        unfinished, tally = [], Tally()
        for index, record in zip(share, found, strict=True):
            if isinstance(record, Record):
                tally.add(record.num_samples, record.rejected)
            else:
                unfinished.append(index)
        return unfinished, tally

    def render_shard(self, index: int, before_sample: Callable[[], None]) -> Record:
        """Write shard `index` on one thread; `before_sample` is called before each sample and may raise to stop.

        Raises ValueError, before the shard is committed, when more clips are rejected than the config allows."""
        if self._device == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"{self.store.url} is rendered with device cuda, but torch finds no GPU here.")
        name, numbers = self.plan.shard_name(index), self.plan.samples(index)
        rejected: list[dict[str, Any]] = []
        encoder = Encoder(
            self.config.clips.length,
            self.config.clips.sample_rate,
            self.config.stft,
            self.config.shards.representation,
            self.config.shards.dtype,
            self._device,
        )

        def samples() -> Iterator[Sample]:
            rejected.clear()
            renderer = Renderer(self.recipes, self.config, rejected)
            for number in numbers:
                before_sample()
                rendered = renderer.render(number)
                yield encoder(rendered, self._condition(rendered))
                Tally().add(len(numbers), rejected).check(self.config.max_rejected_fraction, TOLERANT_SAMPLES)

        self.store.sweep(f"{name}.")  # what a killed worker left of this shard
        with _one_thread():
            return anew(
                lambda: write_shard(
                    self.store,
                    name,
                    samples(),
                    num_samples=len(numbers),
                    spec_digest=self.plan.spec_digest,
                    rejected=rejected,
                    dtypes=encoder.dtypes,
                )
            )

    def _condition(self, rendered: Rendered) -> np.ndarray | None:
        """The query's embedding [D], or None if none are stored."""
        if self._queries is None:
            return None
        if rendered.recipe.query == "audio":
            return self._queries.encode_audio(rendered.segment, self.config.clips.sample_rate)
        return self._queries.encode([rendered.target.caption])[0]


@contextmanager
def _one_thread() -> Iterator[None]:
    """torch on one thread: more than one only wait for each other over pieces as small as ours."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Renderer:
    """Recipes to mixtures, in order. Crops are kept for as long as the recipes of their group need them."""

    def __init__(self, recipes: Recipes, config: PrecomputeConfig, rejected: list[dict[str, Any]]) -> None:
        """`rejected` receives an entry for each clip that could not be used: its reason, and what stood in."""
        self._recipes, self._config, self._rejected = recipes, config, rejected
        self._crops: dict[tuple[int, float], tuple[np.ndarray, int]] = {}  # by clip and fraction, the oldest first
        self._last: Rendered | None = None

    def render(self, index: int) -> Rendered:
        """Sample `index` of the data set."""
        recipe = self._recipes[index]
        if self._last is None or self._last.recipe.mixture != recipe.mixture:
            self._last = self._mix(recipe)
        return Rendered(recipe, self._last.sources, self._last.offsets, self._last.mixed)

    def _mix(self, recipe: Recipe) -> Rendered:
        read: list[tuple[Source, np.ndarray, int]] = []
        for slot in range(len(recipe.sources)):
            others = [*(source for source, _, _ in read), *recipe.sources[slot + 1 :]]
            read.append(self._read(recipe, slot, others))
        sources, crops, offsets = zip(*read, strict=True)
        mixed = mix(crops[0], crops[1:], recipe.gains_db, recipe.noise_gain_db)
        return Rendered(recipe, sources, offsets, mixed)

    def _read(self, recipe: Recipe, slot: int, others: Sequence[Source]) -> tuple[Source, np.ndarray, int]:
        """Source `slot` or, if its clip is rejected, the first of its replacements that is not."""
        source = recipe.sources[slot]
        for attempt in range(MAX_REPLACEMENTS):
            try:
                return source, *self._read_crop(source)
            except Rejection as rejection:
                bad, source = source, self._recipes.replacement(recipe, slot, others, attempt)
                self._rejected.append(
                    {
                        "reason": rejection.reason,
                        "detail": rejection.detail,
                        "clip": bad.clip.path,
                        "sample": f"{recipe.index:09d}",
                        "source": slot,
                        "replaced_by": source.clip.path,
                    }
                )
        raise ValueError(
            f"Sample {recipe.index}: {MAX_REPLACEMENTS} clips in a row were rejected, {bad.clip.location} last "
            f"({self._rejected[-1]['reason']}: {self._rejected[-1]['detail']}). Is the audio where the catalogue says?"
        )

    def _read_crop(self, source: Source) -> tuple[np.ndarray, int]:
        key = source.clip.number, source.fraction
        if key not in self._crops:
            if len(self._crops) == 2 * GROUP_TARGETS:
                del self._crops[next(iter(self._crops))]
            self._crops[key] = read_crop(source.clip, source.fraction, self._config.clips, self._config.storage)
        return self._crops[key]
