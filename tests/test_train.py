"""Training that starts, stops, dies and goes on: the same weights and the same samples as if nothing had happened."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from lossy_proxy import LossyProxy
from servers import HttpServer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_data import assert_equal, config_of, make_shards, served, settings

from audiosep.checkpoints import read_checkpoint
from audiosep.resunet import ResUNet30
from audiosep.system import load_system
from audiosep.train import main, train


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("shards") / "train", 100)


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("shards") / "valid", 10, "complex")


def weights(root: Path, name: str = "last.ckpt") -> dict[str, torch.Tensor]:
    return read_checkpoint(root / "checkpoints" / name)["state_dict"]


def start(file: Path, config: dict) -> subprocess.Popen[bytes]:
    file.write_text(yaml.safe_dump(config))
    return subprocess.Popen([sys.executable, "-m", "audiosep.cli", "train", "--config", str(file)])


def wait_for(condition, process: subprocess.Popen[bytes]) -> None:
    while not condition():
        assert process.poll() is None, f"it ended by itself with status {process.returncode}"
        time.sleep(0.002)


def num_served(folder: Path) -> int:
    file = folder / "rank-00000.jsonl"
    return file.read_bytes().count(b'"keys"') if file.exists() else 0


def test_killed_in_mid_epoch_ends_in_the_same_weights_with_each_sample_once(tmp_path: Path, shards: Path, valid: Path):
    # 100 samples in batches of 8 are 12 steps an epoch; validation and EMA must come through a kill, too.
    limits = {"max_epochs": 10, "checkpoint_steps": 7, "validate_steps": 40, "ema_decay": 0.9}
    whole = settings(tmp_path / "whole", shards, valid, **limits)
    assert train(config_of(whole)) == 0

    killed = settings(tmp_path / "killed", shards, valid, **limits)
    ledger = tmp_path / "ledger"
    killed["data"]["ledger"] = str(ledger)
    process = start(tmp_path / "config.yaml", killed)
    wait_for(lambda: num_served(ledger) > 40, process)
    process.kill()
    process.wait()
    at_kill = num_served(ledger)
    assert 40 < at_kill < 120
    assert train(config_of(killed)) == 0

    assert_equal(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    assert_equal(
        read_checkpoint(tmp_path / "whole/checkpoints/last.ckpt")["current_model_state"],
        read_checkpoint(tmp_path / "killed/checkpoints/last.ckpt")["current_model_state"],
    )
    assert_equal(weights(tmp_path / "whole", "best.ckpt"), weights(tmp_path / "killed", "best.ckpt"))

    epochs: dict[int, list[str]] = {}
    for place, batches in served(ledger):
        keys = epochs.setdefault(place["epoch"], [])
        replayed = len(keys) - place["samples"]
        assert 0 <= replayed <= 8 * 8  # never more than since the last checkpoint
        del keys[place["samples"] :]
        keys += [key for batch in batches for key in batch]
    assert sorted(epochs) == list(range(10))
    assert all(len(keys) == len(set(keys)) == 96 for keys in epochs.values())


def test_a_stop_signal_saves_the_step_and_says_so(tmp_path: Path, shards: Path, capfd: pytest.CaptureFixture[str]):
    config = settings(tmp_path / "run", shards, max_epochs=10_000, checkpoint_steps=10**6)
    config["data"]["ledger"] = str(tmp_path / "ledger")
    process = start(tmp_path / "config.yaml", config)
    wait_for(lambda: num_served(tmp_path / "ledger") > 10, process)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 75
    state = read_checkpoint(tmp_path / "run/checkpoints/last.ckpt")
    told = f"Stopped by a signal at step {state['global_step']}; the same command goes on from "
    assert told in capfd.readouterr().err
    place = state["ShardDataModule"]
    assert place["epoch"] * 12 * 8 + place["samples"] == state["global_step"] * 8 == num_served(tmp_path / "ledger") * 8


def test_credentials_that_expire_in_mid_training_end_it_with_a_checkpoint_to_go_on_from(
    tmp_path: Path, http_server: HttpServer, capsys: pytest.CaptureFixture[str]
):
    make_shards(http_server.files / "expiring", 100)
    answers = itertools.count()
    with LossyProxy(http_server.port) as proxy:
        proxy.draw = lambda: ("refused" if next(answers) > 60 else None, 0.0)  # 403
        config = settings(tmp_path / "run", Path("train"), max_epochs=30, checkpoint_steps=5)
        config["data"] |= {"train": f"{proxy.url}/expiring", "storage": {"backoff_seconds": 0.001}}
        config["data"]["loader"]["prefetch_bytes"] = 1  # reading is at most a batch ahead
        assert train(config_of(config)) == 75
    assert "403 Forbidden. The same command goes on from the last checkpoint" in capsys.readouterr().err
    assert read_checkpoint(tmp_path / "run/checkpoints/last.ckpt")["global_step"] > 0


@pytest.mark.parametrize(("fault", "told"), [("error", "Input/output error"), ("silence", "storage does not answer")])
def test_a_file_system_that_goes_away_ends_training_with_a_checkpoint_to_go_on_from(
    tmp_path: Path, fault: str, told: str, capfd: pytest.CaptureFixture[str]
):
    root = make_shards(tmp_path / "train", 100)
    config = settings(tmp_path / "run", root, max_epochs=10_000, checkpoint_steps=5)
    config["data"]["ledger"] = str(tmp_path / "ledger")
    config["data"]["loader"]["read_timeout_seconds"] = 0.5
    process = start(tmp_path / "config.yaml", config)
    wait_for(lambda: num_served(tmp_path / "ledger") > 10, process)
    for number, tar in enumerate(root.glob("*.tar")):
        new = tmp_path / f"{number}"
        if fault == "error":
            new.symlink_to("/proc/self/mem")  # of which no process can read the first bytes: EIO
        else:
            os.mkfifo(new)  # which waits for a writer
        new.rename(tar)
    assert process.wait(60) == 75
    error = capfd.readouterr().err
    assert told in error
    assert "shard-00000" in error
    assert read_checkpoint(tmp_path / "run/checkpoints/last.ckpt")["global_step"] >= 5


def test_goes_on_with_another_batch_size_from_the_very_next_sample(tmp_path: Path, shards: Path):
    config = settings(tmp_path / "run", shards, max_steps=5)
    config["data"]["ledger"] = str(tmp_path / "ledger")
    assert train(config_of(config)) == 0
    config["data"]["loader"]["batch_size"] = 4
    config["trainer"] |= {"max_steps": -1, "max_epochs": 1}
    assert train(config_of(config)) == 0
    (_, first), (place, second) = served(tmp_path / "ledger")
    assert place["samples"] == 5 * 8
    assert [len(first), len(second)] == [5, 15]
    assert len({key for batch in first + second for key in batch}) == 100
    config["trainer"]["max_hours"] = 1e-9  # a step, at the end of which the time is over
    config["trainer"]["max_epochs"] = 2
    assert train(config_of(config)) == 0
    before = Path(tmp_path / "run/checkpoints/last.ckpt").read_bytes()
    assert train(config_of(config)) == 0  # complete: nothing is done again
    assert Path(tmp_path / "run/checkpoints/last.ckpt").read_bytes() == before


def test_accumulated_batches_equal_one_large_batch(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch):
    freeze_norms(monkeypatch)
    large, small = settings(tmp_path / "large", shards, max_steps=8), settings(tmp_path / "small", shards, max_steps=8)
    small["data"]["loader"]["batch_size"] = 4
    small["trainer"]["accumulate_batches"] = 2
    assert train(config_of(large)) == train(config_of(small)) == 0
    one, other = weights(tmp_path / "large"), weights(tmp_path / "small")
    assert all(torch.allclose(one[name], other[name], atol=1e-5) for name in one)


def curve(root: Path, name: str) -> list[float]:
    return [event.value for event in EventAccumulator(str(root / "logs")).Reload().Scalars(name)]


def freeze_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch statistics would depend on how a global batch is cut."""
    forward = ResUNet30.forward

    def frozen(self, batch):
        for module in self.modules():
            if isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
                module.eval()
        return forward(self, batch)

    monkeypatch.setattr(ResUNet30, "forward", frozen)


TWO_RANKS = """
import sys, pytest
sys.path.insert(0, {tests!r})
from test_train import freeze_norms
from audiosep.train import main
freeze_norms(pytest.MonkeyPatch())
sys.exit(main(["--config", {config!r}]))
"""


def test_two_ranks_equal_one_with_the_same_global_batch(
    tmp_path: Path, shards: Path, valid: Path, monkeypatch: pytest.MonkeyPatch
):
    freeze_norms(monkeypatch)
    one = settings(tmp_path / "one", shards, valid, max_steps=20, validate_steps=2)
    assert train(config_of(one)) == 0
    two = settings(tmp_path / "two", shards, valid, max_steps=20, validate_steps=2)
    two["data"]["loader"]["batch_size"] = 4
    two["trainer"]["devices"] = 2
    config, script = tmp_path / "two.yaml", tmp_path / "two.py"
    config.write_text(yaml.safe_dump(two))
    script.write_text(TWO_RANKS.format(tests=str(Path(__file__).parent), config=str(config)))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "MASTER_ADDR": "127.0.0.1"}
    subprocess.run([sys.executable, str(script)], check=True, timeout=300, env=environment)
    for name in ("valid/loss", "valid/si_sdr"):  # over 10 samples: ranks have 4 and 4, then 2 and none
        ours, theirs = curve(tmp_path / "one", name), curve(tmp_path / "two", name)
        assert len(ours) == 10
        assert theirs == pytest.approx(ours, abs=1e-5 if name == "valid/loss" else 1e-3)


def test_a_gradient_that_is_not_finite_stops_with_the_keys(tmp_path: Path):
    spoiled = make_shards(tmp_path / "spoiled", 40, spoil=17)
    config = settings(tmp_path / "run", spoiled, max_epochs=1, checkpoint_steps=1)
    with pytest.raises(ValueError, match="norm is nan"):
        train(config_of(config))
    (report,) = (tmp_path / "run/logs").glob("bad-gradient-*.json")
    assert f"{17:09d}" in json.loads(report.read_text())["keys"]
    last = tmp_path / "run/checkpoints/last.ckpt"
    assert not last.exists() or all(
        x.isfinite().all() for x in weights(tmp_path / "run").values() if x.is_floating_point()
    )


def test_it_learns_logs_validates_and_stops_early(
    tmp_path: Path, shards: Path, valid: Path, capsys: pytest.CaptureFixture[str]
):
    config = settings(
        tmp_path / "run", shards, valid, max_epochs=30, validate_steps=60, monitor="valid/si_sdri", patience=100
    )
    assert train(config_of(config)) == 0
    events = EventAccumulator(str(tmp_path / "run/logs")).Reload()
    scalars = {"train/loss", "train/gradient_norm", "train/learning_rate", "train/samples_per_second"}
    scalars |= {"train/data_wait_share", "valid/loss", "valid/sdr", "valid/sdri", "valid/si_sdr", "valid/si_sdri"}
    assert scalars <= set(events.Tags()["scalars"])
    assert {"example/mixture", "example/estimate", "example/target"} == set(events.Tags()["audio"])
    assert events.Tags()["images"] == ["example"]
    assert max(event.value for event in events.Scalars("valid/si_sdri")) > 6
    assert 0 <= events.Scalars("train/data_wait_share")[-1].value <= 1
    best = load_system(tmp_path / "run/checkpoints/best.ckpt")
    assert best.audio.query_encoder == "test:tones"

    impatient = settings(tmp_path / "stopped", shards, valid, max_epochs=50, validate_steps=5, patience=1)
    impatient["system"]["optimizer"]["learning_rate"] = 1e-12
    impatient["trainer"]["checkpoint_steps"] = 5  # just before each validation
    for _ in range(2):
        assert train(config_of(impatient)) == 0
    assert "The run is complete: " in capsys.readouterr().err
    last = tmp_path / "stopped/checkpoints/last.ckpt"
    stopped = read_checkpoint(last)["global_step"]
    assert stopped < 100
    impatient["trainer"]["patience"] = 3
    assert train(config_of(impatient)) == 0
    assert read_checkpoint(last)["global_step"] >= stopped + 10  # two more validations, at least


def test_after_a_restart_best_is_replaced_by_nothing_worse(tmp_path: Path, shards: Path, valid: Path):
    # Each last.ckpt is from just before the validation of the same step, and knows nothing of it.
    config = settings(tmp_path / "run", shards, valid, max_steps=10, validate_steps=10, checkpoint_steps=10)
    assert train(config_of(config)) == 0
    best = tmp_path / "run/checkpoints/best.ckpt"
    content = read_checkpoint(best)
    (state,) = (state for name, state in content["callbacks"].items() if name.startswith("BestCheckpoint"))
    for max_steps, loss, replaced in ((20, 0.0, False), (30, 1e9, True)):
        state["best"] = -loss
        torch.save(content, best)
        before = best.read_bytes()
        config["trainer"]["max_steps"] = max_steps
        assert train(config_of(config)) == 0
        assert (best.read_bytes() != before) == replaced


def test_mistakes_are_told_before_the_first_step(tmp_path: Path, shards: Path):
    def fails(match: str, model: dict | None = None, data: dict | None = None, **trainer: object) -> None:
        config = settings(tmp_path / "run", shards, shards, max_steps=2, **trainer)
        config["system"]["model"] |= model or {}
        config["data"] |= data or {}
        with pytest.raises(ValueError, match=match):
            train(config_of(config))
        assert not list(tmp_path.glob("run/checkpoints/*"))

    fails("'valid/si_sdr', but .* stores magnitudes, .* gives valid/loss", monitor="valid/si_sdr")
    fails("trainer.monitor: Input should be 'valid/loss'", monitor="valid/los")
    fails("trainer.patience counts validations", data={"valid": ""}, patience=3)
    fails("Conditions have 4 values, those of test:tones, but the model takes 5", model={"condition_size": 5})
    fails("trainer.accelerator cpu with trainer.devices 0: ", devices=0)
    fails("data.train names no data set", data={"train": {}})
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        fails("weights of data sets must be positive", data={"train": {str(shards): weight}})


def test_a_run_goes_on_only_with_its_own_model(tmp_path: Path, shards: Path):
    config = settings(tmp_path / "run", shards, max_steps=1)
    assert train(config_of(config)) == 0
    before = weights(tmp_path / "run")
    config["trainer"]["max_steps"] = 2
    for name, value in (("widths", [4, 4]), ("condition_size", 5)):
        changed = config | {"system": config["system"] | {"model": config["system"]["model"] | {name: value}}}
        with pytest.raises(ValueError, match=rf"system\.model's {name} was .* and is now"):
            train(config_of(changed))
    other = make_shards(tmp_path / "other", 20, encoder="test:other")
    with pytest.raises(ValueError, match="data's query_encoder was 'test:tones' and is now 'test:other'"):
        train(config_of(config | {"data": config["data"] | {"train": str(other)}}))
    assert_equal(weights(tmp_path / "run"), before)
    assert train(config_of(config)) == 0


def test_dry_run_prints_the_plan_and_leaves_no_trace(tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]):
    config = settings(tmp_path / "run", shards, max_epochs=3, accumulate_batches=2)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    assert main(["--config", str(file), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "18 of 16 samples" in printed
    assert "samples/s measured here" in printed
    assert not (tmp_path / "run").exists()
