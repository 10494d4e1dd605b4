"""Recipes are functions of (seed, index), visit every target once a pass, and never mix a sound with its like."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from audiosep.catalogue import read_catalogue
from audiosep.mixing import MixingConfig
from audiosep.recipes import Draws, Recipes, normalised


def catalogue_of(folder, rows, name="a.csv", weights=None):
    (folder / name).write_text("\n".join(["wav,caption,kind", *(",".join(row) for row in rows)]))
    return read_catalogue({str(folder / name): weights or 1.0}, check_files=False)


@pytest.fixture
def clips(tmp_path):
    return catalogue_of(tmp_path, [(f"{i}.wav", f"caption {i % 17}", f"kind {i % 5}") for i in range(50)])


def test_a_recipe_depends_on_seed_and_index_alone(clips):
    forward = [Recipes(clips, MixingConfig(max_mix_num=4), 7)[i] for i in range(60)]
    recipes = Recipes(clips, MixingConfig(max_mix_num=4), 7)
    assert [recipes[i] for i in reversed(range(60))] == forward[::-1]
    assert [Recipes(clips, MixingConfig(max_mix_num=4), 8)[i] for i in range(60)] != forward


def test_every_clip_is_the_target_once_in_every_pass(clips):
    recipes = Recipes(clips, MixingConfig(), 0)
    orders = [[recipes[i].sources[0].clip.number for i in range(50 * p, 50 * p + 50)] for p in range(3)]
    for order in orders:
        assert sorted(order) == list(range(50))
    assert orders[0] != orders[1] != orders[2]


def test_sources_of_a_mixture_differ_in_clip_caption_and_kind(clips):
    recipes = Recipes(clips, MixingConfig(max_mix_num=4), 0)
    sizes = Counter()
    for i in range(500):
        sources = recipes[i].sources
        sizes[len(sources)] += 1
        for attribute in ("number", "captions", "kind"):
            values = [getattr(source.clip, attribute) for source in sources]
            assert len(set(values)) == len(values)
    assert min(sizes[n] for n in (2, 3, 4)) > 120


def test_kinds_may_meet_where_that_is_asked_for_but_captions_never(clips):
    recipes = Recipes(clips, MixingConfig(distinct_kinds=False), 0)
    pairs = [recipes[i].sources for i in range(300)]
    assert any(a.clip.kind == b.clip.kind for a, b in pairs)
    assert not any(a.caption == b.caption for a, b in pairs)


def test_draws_are_uniform_and_within_their_ranges(clips):
    recipes = Recipes(clips, MixingConfig(lower_db=-3, higher_db=3), 0)
    gains = Counter(gain for i in range(2100) for gain in (*recipes[i].gains_db, recipes[i].noise_gain_db))
    assert sorted(gains) == list(range(-3, 4))
    assert max(gains.values()) - min(gains.values()) < 200  # 600 each, standard deviation 23
    fractions = np.array([source.fraction for i in range(500) for source in recipes[i].sources])
    assert 0 <= fractions.min() < 0.01 < 0.99 < fractions.max() < 1
    assert abs(fractions.mean() - 0.5) < 0.04


def test_a_share_of_the_queries_is_audio_and_nothing_else_changes(clips):
    by_text, mixed = Recipes(clips, MixingConfig(), 0), Recipes(clips, MixingConfig(), 0, use_text_ratio=0.7)
    assert {by_text[i].query for i in range(300)} == {"caption"}
    assert 180 < sum(mixed[i].query == "caption" for i in range(300)) < 240
    assert all(replace(mixed[i], query="caption") == by_text[i] for i in range(300))


def test_the_draws_are_those_of_philox(clips):
    """Words of Philox4x64-10 that numpy's own test data begin with: the stream must never change."""
    draws = Draws(0, 0, 0)
    words = np.random.Philox(key=[0, 0], counter=[0, 0, 0, 0]).random_raw(2)
    assert draws.below(1 << 64) == int(words[0])
    assert draws.fraction() == (int(words[1]) >> 11) / 2**53


def test_several_mixtures_share_a_targets_crop(clips):
    recipes = Recipes(clips, MixingConfig(), 0, mixtures_per_target=3)
    assert recipes.samples_per_pass == 150
    for i in range(0, 150, 3):
        trio = [recipes[j] for j in range(i, i + 3)]
        assert len({recipe.sources[0] for recipe in trio}) == 1
        assert len({recipe.sources[1] for recipe in trio}) > 1
    assert sorted(recipes[i].sources[0].clip.number for i in range(0, 150, 3)) == list(range(50))


def test_each_source_of_a_mixture_gets_its_sample(clips):
    recipes = Recipes(clips, MixingConfig(max_mix_num=3), 0, each_source=True)
    assert recipes.samples_per_pass == 150
    trio = [recipes[i] for i in (6, 7, 8)]
    assert [recipe.target for recipe in trio] == [0, 1, 2]
    assert len({recipe.sources for recipe in trio}) == len({recipe.mixture for recipe in trio}) == 1


def test_weights_say_how_often_a_files_clips_are_targets(tmp_path):
    files = {}
    for name, size, weight in (("a", 40, 1.0), ("b", 10, 3.0), ("c", 20, 0.5)):
        rows = [(f"{name}{i}.wav", f"{name} {i}", "") for i in range(size)]
        catalogue_of(tmp_path, rows, f"{name}.csv")
        files[str(tmp_path / f"{name}.csv")] = weight
    recipes = Recipes(read_catalogue(files, check_files=False), MixingConfig(), 0)
    assert recipes.targets_per_pass == 40 + 30 + 10
    targets = Counter(recipes[i].sources[0].clip.path for i in range(160))
    assert {count for path, count in targets.items() if path.startswith("a")} == {2}
    assert {count for path, count in targets.items() if path.startswith("b")} == {6}
    assert {count for path, count in targets.items() if path.startswith("c")} == {1}
    assert len(targets) == 70
    interferers = Counter(recipes[i].sources[1].clip.path[0] for i in range(4000))
    assert [interferers[name] / 4000 for name in "abc"] == pytest.approx([0.5, 0.375, 0.125], abs=0.03)


def test_replacements_fit_beside_the_others_and_come_again_the_same(clips):
    recipes = Recipes(clips, MixingConfig(max_mix_num=3), 0)
    recipe = next(recipes[i] for i in range(50) if len(recipes[i].sources) == 3)
    for slot in range(3):
        others = [*recipe.sources[:slot], *recipe.sources[slot + 1 :]]
        found = [recipes.replacement(recipe, slot, others, attempt) for attempt in range(20)]
        assert found == [recipes.replacement(recipe, slot, others, attempt) for attempt in range(20)]
        assert len({source.clip.number for source in found}) > 5
        assert not {s.clip.kind for s in found} & {s.clip.kind for s in others}


def test_a_catalogue_without_enough_different_sounds_is_refused(tmp_path):
    clips = catalogue_of(tmp_path, [("a.wav", "A dog", ""), ("b.wav", "a  dog.", "")])
    with pytest.raises(ValueError, match=r"none fits beside .[Aa] +dog"):
        Recipes(clips, MixingConfig(), 0)[0]


def test_captions_are_compared_without_case_spaces_and_stop():
    assert normalised(" A  Dog barks. ") == normalised("a dog barks")
