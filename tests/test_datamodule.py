"""Loaders over sealed shards: what fits together, and what is left of a run."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from training_data import KINDS, make_shards

from audiosep import datamodule
from audiosep.config import build_config
from audiosep.datamodule import DataConfig, ShardDataModule


def data_of(
    train: Path | dict[str, float], valid: Path | str = "", *, trainer: dict[str, Any] | None = None, **changes
):
    config = {"train": train if isinstance(train, dict) else str(train), "valid": str(valid)}
    config |= {"loader": {"batch_size": 8, "pin_memory": False}, **changes}
    module = ShardDataModule(build_config(DataConfig, config, "test"), (64,), num_epochs=3)
    facts = {"global_rank": 0, "world_size": 1, "max_steps": -1, "global_step": 0, "accumulate_grad_batches": 1}
    module.trainer = SimpleNamespace(**facts | (trainer or {}))  # type: ignore[assignment]
    return module


def test_all_passes_in_one_stream_that_knows_what_is_left(tmp_path: Path):
    data = data_of(make_shards(tmp_path / "train", 50))
    batches = data.train_dataloader()
    assert len(batches) == 3 * 6
    stream, left = iter(batches), 18
    for _ in range(7):
        keys = next(stream).keys
        left -= 1
        assert len(batches) == left
    state = data.state_dict()
    assert (state["epoch"], state["samples"]) == (1, 8)

    resumed = data_of(tmp_path / "train")
    resumed.load_state_dict(state)
    again = resumed.train_dataloader()
    assert len(again) == 11
    rest = [batch.keys for batch in stream]
    assert [batch.keys for batch in again] == rest
    assert keys not in rest[:5]
    assert len(again) == 0


def test_the_stream_ends_with_the_steps(tmp_path: Path):
    limits = {"max_steps": 9, "global_step": 4, "accumulate_grad_batches": 2}
    assert len(data_of(make_shards(tmp_path / "train", 50), trainer=limits).train_dataloader()) == 10


def test_batches_are_what_the_model_takes(tmp_path: Path):
    batch = next(iter(data_of(make_shards(tmp_path / "train", 20, windows=(64, 128))).train_dataloader()))
    assert set(batch.mixture) == set(batch.segment) == {64}  # what the model does not train on is not read
    assert batch.mixture[64].dtype == torch.float16
    assert batch.text == [f"a {kind} tone" for kind in batch.kinds]
    assert [KINDS[int(i)] for i in batch.condition.argmax(1)] == batch.kinds


def test_validation_gives_each_sample_once_on_any_number_of_ranks(tmp_path: Path):
    make_shards(tmp_path / "valid", 10, "complex")
    for world_size in (1, 2, 3):
        keys = []
        for rank in range(world_size):
            facts = {"global_rank": rank, "world_size": world_size}
            data = data_of(tmp_path / "valid", tmp_path / "valid", trainer=facts, valid_batch_size=4)
            for batch in data.val_dataloader():
                assert batch.valid.all() or not batch.valid.any()
                keys += batch.keys if batch.valid.all() else []
        assert sorted(keys) == [f"{index:09d}" for index in range(10)]


def test_captions_are_encoded_where_shards_store_no_conditions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make_shards(tmp_path / "train", 20, encoder=None)
    with pytest.raises(ValueError, match=r"stores no conditions: set data\.queries\.encoder"):
        data_of(tmp_path / "train")
    encoder = SimpleNamespace(identity="fake:1", encode=lambda texts: np.ones((len(texts), 3), np.float32))
    monkeypatch.setattr(datamodule, "make_encoder", lambda *_, **__: encoder)
    assert data_of(tmp_path / "train", queries={"encoder": "minilm"}).audio.query_encoder == "fake:1"


def test_data_sets_that_do_not_fit_are_refused(tmp_path: Path):
    make_shards(tmp_path / "one", 20)
    make_shards(tmp_path / "two", 20, encoder="test:other")
    make_shards(tmp_path / "wide", 20, windows=(128,))
    with pytest.raises(ValueError, match=r"do not fit together.*test:other"):
        data_of(tmp_path / "one", tmp_path / "two")
    with pytest.raises(ValueError, match=r"window lengths \[128\], but the model trains on \(64,\)"):
        data_of(tmp_path / "wide")


def test_several_data_sets_are_mixed(tmp_path: Path):
    make_shards(tmp_path / "one", 20)
    make_shards(tmp_path / "two", 40)
    data = data_of({str(tmp_path / "one"): 1.0, str(tmp_path / "two"): 1.0})
    assert len(data.train_dataloader()) == 3 * 7
