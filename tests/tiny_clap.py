"""A CLAP model with random weights and two megabytes, in a folder as transformers keeps them."""

import json
from pathlib import Path
from typing import Any

import torch

TEXT_SIZES = {
    "vocab_size": 261,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
}
AUDIO_SIZES = {"depths": [1] * 4, "num_attention_heads": [1] * 4, "patch_embeds_hidden_size": 8, "hidden_size": 64}


def save_tokenizer(transformers: Any, folder: Path) -> Any:
    """A byte-level tokenizer without merges, of RoBERTa's kind."""
    from tokenizers.pre_tokenizers import ByteLevel

    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *sorted(ByteLevel.alphabet())]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.RobertaTokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_clap(transformers: Any, folder: Path) -> Any:
    """The model, with its tokenizer and feature extractor in the same folder."""
    torch.manual_seed(0)
    text = transformers.ClapTextConfig(**TEXT_SIZES, projection_dim=16).to_dict()
    audio = AUDIO_SIZES | {"projection_dim": 16}
    config = transformers.ClapConfig(text_config=text, audio_config=audio, projection_dim=16)
    clap = transformers.ClapModel(config).eval()
    clap.save_pretrained(folder)
    save_tokenizer(transformers, folder)
    transformers.ClapFeatureExtractor(truncation="rand_trunc", padding="repeatpad").save_pretrained(folder)
    return clap
