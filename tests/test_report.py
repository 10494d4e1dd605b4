"""The page holds everything itself, tells what is in the data, and its numbers are those of the data."""

import html.parser
import re

import numpy as np
import pytest
from audio import open_dataset, small_config, write_bad, write_catalogue

from audiosep.dataset import Renderer
from audiosep.report import look, main
from shards.manifest import load_manifest, seal
from shards.store import StorageConfig


def make(folder, representation="magnitude"):
    catalogue = write_catalogue(folder / "audio", num_clips=10)
    write_bad(folder / "audio/clips/3.flac", "silence")
    shards = {"representation": representation, "passes": 3}
    dataset = open_dataset(small_config(folder / "root", catalogue, shards=shards, max_rejected_fraction=1.0))
    for index in range(dataset.plan.num_shards):
        dataset.render_shard(index, lambda: None)
    seal(dataset.store)
    return dataset


class Page(html.parser.HTMLParser):
    """All tags' attributes, and whether every tag that opens closes."""

    def __init__(self, text):
        super().__init__()
        self.open, self.attributes = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.attributes.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "rect", "line"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("rect", "line"):
            assert self.open.pop() == tag


@pytest.mark.parametrize("representation", ["magnitude", "complex"])
def test_the_page_is_whole_and_alone(tmp_path, representation):
    make(tmp_path, representation)
    assert main([str(tmp_path / "root"), "-o", str(tmp_path / "report.html")]) == 0
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    sources = [attributes["src"] for _, attributes in page.attributes if "src" in attributes]
    assert len(sources) == 6 * 4  # two pictures and two players for each example
    assert all(source.startswith("data:") for source in sources)
    assert not re.search(r"https?://", text)
    for expected in ("sound number", "silent", "clips/3.flac", load_manifest(tmp_path / "root").digest):
        assert expected in text


def test_without_the_clips_there_are_pictures_and_no_players(tmp_path):
    make(tmp_path)
    page = tmp_path / "new" / "r.html"
    assert main([str(tmp_path / "root"), "-o", str(page), "--clips", str(tmp_path / "nowhere")]) == 0
    text = page.read_text()
    assert "<audio" not in text
    assert text.count("No players: missing: ") == 6
    assert text.count("<img") == 12


@pytest.mark.parametrize("option", ["--samples=0", "--examples=-1"])
def test_numbers_out_of_range_are_named(tmp_path, option):
    make(tmp_path)
    with pytest.raises(ValueError, match=r"--samples .* must be positive"):
        main([str(tmp_path / "root"), option])


def test_levels_are_those_of_the_waveforms(tmp_path):
    dataset = make(tmp_path)
    survey, _ = look(load_manifest(tmp_path / "root"), StorageConfig(), 30, 6)
    assert survey.num_samples == sum(survey.captions.values()) == 30
    renderer = Renderer(dataset.recipes, dataset.config, [])
    rendered = [renderer.render(index) for index in range(30)]
    levels = [10 * np.log10(np.mean(each.mixed.mixture**2)) for each in rendered]
    np.testing.assert_allclose(sorted(survey.level_db), sorted(levels), atol=0.3)
    peaks = [20 * np.log10(each.mixed.peak) for each in rendered]
    np.testing.assert_allclose(sorted(survey.peak_db), sorted(peaks), atol=1e-3)
    ratios = [10 * np.log10(np.mean(e.segment**2) / np.mean((e.mixed.mixture - e.segment) ** 2)) for e in rendered]
    np.testing.assert_allclose(np.sort(survey.snr_db)[8:-8], np.sort(ratios)[8:-8], atol=1.5)
