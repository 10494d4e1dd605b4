"""Evaluation: a trained model between baselines with known results, and files that agree with each other."""

import csv
import json
from pathlib import Path

import pytest
from training_data import config_of, make_shards, settings

from audiosep.evaluate import main
from audiosep.train import train


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned to tell tones apart, with `test` shards beside it."""
    root = tmp_path_factory.mktemp("run")
    make_shards(root / "train", 100)
    make_shards(root / "test", 22, "complex")
    assert train(config_of(settings(root, root / "train", max_steps=250))) == 0
    return root


def arguments(root: Path, **changes: str) -> list[str]:
    options = {"checkpoint": f"{root}/checkpoints/last.ckpt", "shards": f"{root}/test", "output": f"{root}/metrics"}
    options |= {"batch_size": "4", "accelerator": "cpu"} | changes
    return [word for name, value in options.items() for word in (f"--{name}", value)]


def test_a_trained_model_against_baselines_with_known_results(trained: Path, capsys: pytest.CaptureFixture[str]):
    assert main(arguments(trained)) == 0
    results = json.loads((trained / "metrics/metrics.json").read_text())
    overall = {name: result["overall"] for name, result in results.items()}
    assert overall["model"]["si_sdri"]["mean"] > 6
    assert overall["model"]["query_following"] == 1
    assert overall["half mask"]["si_sdri"]["mean"] == pytest.approx(0, abs=1e-3)
    assert overall["half mask"]["query_following"] == 0.5  # both of a mixture's sounds are asked for
    assert overall["ideal ratio mask"]["si_sdri"]["mean"] > overall["model"]["si_sdri"]["mean"]
    assert overall["untrained"]["si_sdri"]["mean"] < 1
    for figures in overall.values():
        assert figures["num_samples"] == 22
        assert figures["si_sdri"]["low"] <= figures["si_sdri"]["mean"] <= figures["si_sdri"]["high"]

    with (trained / "metrics/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["key"] for row in rows] == [f"{index:09d}" for index in range(22)]
    for kind in ("low", "high"):
        values = [float(row["sdri"]) for row in rows if row["kind"] == kind]
        assert results["model"][kind]["sdri"]["mean"] == pytest.approx(sum(values) / len(values))
    printed = capsys.readouterr().out
    assert "ideal ratio mask" in printed
    assert f"{overall['model']['si_sdri']['mean']:.2f} [" in printed


def test_what_cannot_be_evaluated_is_refused(trained: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="stores magnitudes"):
        main(arguments(trained, shards=f"{trained}/train"))
    with pytest.raises(ValueError, match=r"No window of 32: .* holds \[64\], and the model takes \(64,\)"):
        main([*arguments(trained), "--windows", "[32]"])
    with pytest.raises(ValueError, match=r"accelerator is 'nope': "):
        main([*arguments(trained), "--accelerator", "nope"])
    make_shards(tmp_path / "bare", 20, "complex", encoder=None)
    with pytest.raises(ValueError, match=r"stores no conditions: set queries\.encoder"):
        main(arguments(trained, shards=f"{tmp_path}/bare"))
    make_shards(tmp_path / "other", 20, "complex", encoder="test:other")
    with pytest.raises(ValueError, match=r"test:other.*was trained for"):
        main(arguments(trained, shards=f"{tmp_path}/other"))
