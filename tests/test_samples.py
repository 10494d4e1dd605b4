"""What is stored equals an independent float64 computation from the clips, in every representation and precision."""

import json

import numpy as np
import pytest
import soundfile
import torch
from audio import open_dataset, small_config, write_catalogue
from tiny_clap import save_clap

from audiosep.dataset import Renderer
from audiosep.queries import QueryConfig, import_transformers, make_encoder
from audiosep.samples import decode
from audiosep.stft import istft
from shards.manifest import seal


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory):
    return write_catalogue(tmp_path_factory.mktemp("audio"), num_clips=20)


def read_samples(dataset):
    """Each sample's JSON and arrays, by the bytes of the shards and numpy alone."""
    import io
    import tarfile

    for index in range(dataset.plan.num_shards):
        with tarfile.open(f"{dataset.config.root}/{dataset.plan.shard_name(index)}.tar") as tar:
            text, arrays = {}, {}
            for member in tar:
                key, _, field = member.name.partition(".")
                data = tar.extractfile(member).read()
                if field == "json":
                    text[key], arrays[key] = json.loads(data), {}
                else:
                    arrays[key][field.removesuffix(".npy")] = np.load(io.BytesIO(data))
        for key in text:
            yield key, text[key], arrays[key]


def remix(folder, text):
    """Mixture and target segment, float64, from the clips and the numbers in a sample's JSON."""

    def crop(source):
        whole, _ = soundfile.read(folder / source["clip"])
        piece = whole[source["offset"] : source["offset"] + text["length"]]
        return np.pad(piece, (0, text["length"] - len(piece)))

    def scaled(waveform, gain_db):
        ratio = np.sqrt(np.mean(waveform**2) / max(np.mean(first**2), 1e-10))
        return waveform / np.clip(ratio, 0.02, 50) * 10 ** (gain_db / 20)

    sources = list(text["interferers"])
    sources.insert(text["target_slot"], text["target"])
    first = crop(sources[0])
    noises = [scaled(crop(source), source["gain_db"]) for source in sources[1:]]
    factor = scaled(sum(noises), text["noise_gain_db"]).std() / sum(noises).std()
    parts = [first, *(factor * noise for noise in noises)]
    mixture = sum(parts)
    peak = np.abs(mixture).max()
    declip = 0.9 / peak if peak > 1 else 1
    return declip * mixture, declip * parts[text["target_slot"]], declip


def magnitudes(waveform, window_length, hop_length):
    padded = np.pad(waveform, window_length // 2, mode="reflect")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window_length) / window_length)
    frames = [padded[i : i + window_length] * window for i in range(0, len(waveform) + 1, hop_length)]
    return np.abs(np.fft.rfft(frames))


def test_a_thousand_random_recipes_equal_a_float64_computation(tmp_path, catalogue):
    loud = {"mixing": {"max_mix_num": 4, "higher_db": 20}, "shards": {"passes": 50, "samples_per_shard": 100}}
    config = small_config(tmp_path / "root", catalogue, **loud)
    dataset = open_dataset(config)
    renderer = Renderer(dataset.recipes, config, [])
    for index in range(dataset.plan.num_shards):
        dataset.render_shard(index, lambda: None)
    declipped = checked = 0
    for key, text, arrays in read_samples(dataset):
        mixture, segment, declip_scale = remix(catalogue.parent, text)
        rendered = renderer.render(text["index"])
        np.testing.assert_allclose(rendered.mixed.mixture, mixture, rtol=1e-4, atol=2e-6)
        np.testing.assert_allclose(rendered.segment, segment, rtol=1e-4, atol=2e-6)
        assert text["declip_scale"] == pytest.approx(declip_scale, rel=1e-5)
        for name, waveform in (("mixture", mixture), ("segment", segment)):
            stored = arrays[f"stft_{name}.256"]
            assert stored.dtype == np.float16
            np.testing.assert_allclose(stored[0], magnitudes(waveform, 256, 160), rtol=1e-3, atol=3e-5)
        declipped += declip_scale < 1
        checked += key == f"{checked:09d}"
    assert checked == 1000
    assert declipped > 50


def test_each_source_can_be_asked_for(tmp_path, catalogue):
    config = small_config(tmp_path / "root", catalogue, mixing={"max_mix_num": 3}, shards={"targets": "each"})
    dataset = open_dataset(config)
    for index in range(dataset.plan.num_shards):
        dataset.render_shard(index, lambda: None)
    samples = list(read_samples(dataset))
    assert len(samples) == 60
    for first in range(0, 60, 3):
        trio = samples[first : first + 3]
        assert len({arrays["stft_mixture.256"].tobytes() for _, _, arrays in trio}) == 1
        queries = {text["text"] for _, text, _ in trio}
        assert len(queries) == 3
        for _, text, arrays in trio:
            assert {text["text"], *(source["caption"] for source in text["interferers"])} == queries
            _, segment, _ = remix(catalogue.parent, text)
            np.testing.assert_allclose(
                arrays["stft_segment.256"][0], magnitudes(segment, 256, 160), rtol=1e-3, atol=3e-5
            )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("representation", ["magnitude", "complex"])
def test_every_representation_survives_the_way_to_the_model(tmp_path, catalogue, representation, dtype):
    config = small_config(
        tmp_path / "root",
        catalogue,
        stft={"window_lengths": [256, 512]},
        shards={"representation": representation, "dtype": dtype, "num_samples": 4},
    )
    dataset = open_dataset(config)
    dataset.render_shard(0, lambda: None)
    fields = {field.name: field for field in seal(dataset.store).fields}
    samples = list(read_samples(dataset))
    arrays = {name: torch.from_numpy(np.stack([each[name] for _, _, each in samples])) for name in fields}
    batch = decode([key for key, _, _ in samples], [text for _, text, _ in samples], arrays).to("cpu")
    renderer = Renderer(dataset.recipes, config, [])
    relative = {"float16": 6e-4, "bfloat16": 5e-3, "float32": 1e-6}[dtype]
    for row, text in enumerate(batch.text):
        rendered = renderer.render(row)
        assert text == rendered.target.caption
        for window_length in (256, 512):
            assert fields[f"stft_mixture.{window_length}"].dtype == dtype
            for stored, waveform in ((batch.mixture, rendered.mixed.mixture), (batch.segment, rendered.segment)):
                spectrogram = stored[window_length][row]
                assert spectrogram.shape == (1, 26, window_length // 2 + 1)
                exact = magnitudes(waveform.astype(np.float64), window_length, 160)
                np.testing.assert_allclose(spectrogram.abs()[0], exact, rtol=relative, atol=2e-3 * relative + 2e-5)
                if representation == "complex":
                    again = istft(spectrogram, window_length, 160, batch.lengths[row].item())[0].numpy()
                    error = np.sum((again - waveform) ** 2) / np.sum(waveform**2)
                    assert -10 * np.log10(error) > {"float16": 70, "bfloat16": 45, "float32": 110}[dtype]


def test_stored_conditions_are_the_encoders(tmp_path, catalogue):
    config = small_config(tmp_path / "root", catalogue, shards={"num_samples": 4}, queries={"encoder": "minilm"})
    dataset = open_dataset(config)
    dataset.render_shard(0, lambda: None)
    encoder = make_encoder(QueryConfig())
    assert dataset.plan.spec["query_encoder"] == encoder.identity
    for _, text, arrays in read_samples(dataset):
        np.testing.assert_array_equal(arrays["condition"], encoder.encode([text["text"]])[0].astype(np.float16))


def test_audio_queries_are_of_the_sounds_asked_for(tmp_path, catalogue):
    save_clap(import_transformers(), tmp_path)
    queries = {"encoder": "clap", "checkpoint": str(tmp_path), "use_text_ratio": 0.5}
    config = small_config(
        tmp_path / "root", catalogue, shards={"num_samples": 8, "samples_per_shard": 8}, queries=queries
    )
    dataset = open_dataset(config)
    dataset.render_shard(0, lambda: None)
    renderer, encoder = Renderer(dataset.recipes, config, []), make_encoder(config.queries)
    asked = set()
    for key, text, arrays in read_samples(dataset):
        by_caption = encoder.encode([text["text"]])[0]
        by_audio = encoder.encode_audio(renderer.render(int(key)).segment, config.clips.sample_rate)
        expected = by_caption if text["query"] == "caption" else by_audio
        np.testing.assert_array_equal(arrays["condition"], expected.astype(np.float16))
        asked.add(text["query"])
    assert asked == {"caption", "audio"}


def test_shards_of_something_else_are_refused():
    with pytest.raises(ValueError, match="The shards hold image: training needs stft_mixture"):
        decode(["a"], [{}], {"image": torch.zeros(1)})
