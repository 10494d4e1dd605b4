"""The command: the same bytes whoever makes them, in whatever order, however often interrupted."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from audio import open_dataset, small_config, tree, write_catalogue, write_config

from audiosep.precompute import main
from shards.manifest import seal
from shards.storage import open_store
from shards.verify import verify


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory):
    return write_catalogue(tmp_path_factory.mktemp("audio"), num_clips=12)


@pytest.fixture(scope="module")
def expected(catalogue, tmp_path_factory):
    """The tree that one process makes in one go: 12 clips, 2 passes, 6 shards."""
    root = tmp_path_factory.mktemp("expected") / "root"
    config = write_config(root.parent / "config.yaml", root, catalogue, shards={"passes": 2})
    assert main(["--config", config]) == 0
    return tree(root)


def configure(tmp_path, catalogue, **changes):
    return write_config(tmp_path / "config.yaml", tmp_path / "root", catalogue, shards={"passes": 2}, **changes)


def test_three_processes_make_the_same_tree(tmp_path, catalogue, expected):
    assert main(["--config", configure(tmp_path, catalogue), "--num_processes", "3"]) == 0
    assert tree(tmp_path / "root") == expected


def test_ranks_in_any_order_make_the_same_tree(tmp_path, catalogue, expected):
    config = configure(tmp_path, catalogue)
    for rank in (2, 0, 1):
        assert main(["--config", config, "--rank", str(rank), "--world-size", "3"]) == 0
    assert tree(tmp_path / "root") == expected


def test_single_shards_in_any_order_make_the_same_tree(tmp_path, catalogue, expected, capsys):
    config = configure(tmp_path, catalogue)
    for shards in ("5,1-2", "4", "0,3"):
        assert main(["--config", config, "--shards", shards]) == 0
    assert tree(tmp_path / "root") == expected
    assert main(["--config", config, "--plan"]) == 0
    assert json.loads(capsys.readouterr().out)["unfinished"] == []


def test_the_plan_names_what_is_missing_and_makes_nothing(tmp_path, catalogue, capsys):
    config = configure(tmp_path, catalogue)
    assert main(["--config", config, "--shards", "1,4"]) == 0
    before = tree(tmp_path / "root")
    assert main(["--config", config, "--plan"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan == {
        "root": str(tmp_path / "root"),
        "num_shards": 6,
        "unfinished": [0, 2, 3, 5],
        "spec_digest": plan["spec_digest"],
    }
    assert tree(tmp_path / "root") == before


def test_damaged_shards_are_made_again(tmp_path, catalogue, expected):
    config = configure(tmp_path, catalogue)
    assert main(["--config", config]) == 0
    root = tmp_path / "root"
    (root / "shard-000001.tar").write_bytes(b"short")
    (root / "shard-000002.json").unlink()
    (root / "shard-000003.json").write_bytes(expected["shard-000003.json"][:50])
    (root / "shard-000004.idx.npy").unlink()
    assert main(["--config", config]) == 0
    assert tree(root) == expected


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (["--seed", "1"], "spec.seed was 0 and is now 1"),
        (["--mixing.higher_db", "3"], "spec.mixing.higher_db was 10 and is now 3"),
        (["--shards.passes", "3"], "num_samples was 24 and is now 36"),
        (["--shards.dtype", "float32"], "spec.shards.dtype was 'float16' and is now 'float32'"),
    ],
)
def test_a_root_begun_with_another_config_is_refused(tmp_path, catalogue, override, message):
    config = configure(tmp_path, catalogue)
    assert main(["--config", config, "--plan"]) == 0
    with pytest.raises(ValueError, match=message):
        main(["--config", config, *override])


def test_a_changed_catalogue_is_refused(tmp_path):
    catalogue = write_catalogue(tmp_path)
    config = configure(tmp_path, catalogue)
    assert main(["--config", config, "--plan"]) == 0
    catalogue.write_text(catalogue.read_text().replace("number 3", "number three"))
    with pytest.raises(ValueError, match=r"spec\.catalogue\.digest"):
        main(["--config", config])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("num_processes", ["1", "2"])
def test_a_signal_stops_within_seconds_and_the_next_run_completes(tmp_path, catalogue, number, num_processes):
    config = write_config(tmp_path / "config.yaml", tmp_path / "root", catalogue, shards={"passes": 1000})
    command = [sys.executable, "-m", "audiosep.cli", "precompute", "--config", config, "--num_processes", num_processes]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("root/*.tar")):
        time.sleep(0.05)
        assert process.poll() is None
    time.sleep(random.random() / 4)
    process.send_signal(number)
    start = time.monotonic()
    _, errors = process.communicate()
    assert process.returncode == 75, errors
    assert time.monotonic() - start < 5
    assert not list((tmp_path / "root").glob(".tmp-*"))
    assert "Traceback" not in errors
    done = len(list((tmp_path / "root").glob("*.tar")))
    assert main(["--config", config, "--shards", f"0-{done + 2}"]) == 0


def test_a_signal_before_the_imports_are_done_stops_too(tmp_path, catalogue):
    config = configure(tmp_path, catalogue)
    code = (
        "import os, signal, sys\n"
        "import audiosep.precompute as p\n"
        "class Request(p.StopRequest):\n"
        "    def __enter__(self):\n"
        "        super().__enter__()\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        return self\n"
        "p.StopRequest = Request\n"
        "sys.exit(p.main(sys.argv[1:]))"
    )
    process = subprocess.run([sys.executable, "-c", code, "--config", config], capture_output=True, text=True)
    assert process.returncode == 75, process.stderr
    assert not list((tmp_path / "root").glob("*.tar"))


def test_a_killed_process_fails_its_shard_and_the_others_go_on(tmp_path, catalogue, expected):
    """The first process that begins shard 2 is killed with -9 there."""
    config = configure(tmp_path, catalogue, num_processes=2)
    code = (
        "import os, sys\n"
        "import audiosep.dataset as d, audiosep.precompute as p\n"
        "flag, render = sys.argv[1], d.Dataset.render_shard\n"
        "def fatal(self, index, before_sample):\n"
        "    if index == 2 and not os.path.exists(flag):\n"
        "        open(flag, 'w').close(); os.kill(os.getpid(), 9)\n"
        "    return render(self, index, before_sample)\n"
        "d.Dataset.render_shard = fatal\n"
        "if __name__ == '__main__': sys.exit(p.main(sys.argv[2:]))\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    command = [sys.executable, str(script), str(tmp_path / "flag"), "--config", config]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 3, process.stderr
    assert "shard-000002 failed: its process died with exit code -9" in process.stderr
    assert len(list((tmp_path / "root").glob("*.tar"))) == 5
    assert subprocess.run(command).returncode == 0
    assert tree(tmp_path / "root") == expected


def test_what_was_made_seals_and_verifies(tmp_path, catalogue):
    assert main(["--config", configure(tmp_path, catalogue)]) == 0
    store = open_store(tmp_path / "root")
    manifest = seal(store)
    assert manifest.num_samples == 24
    assert not verify(store).bad


def test_kill_minus_nine_at_random_moments_leaves_nothing_wrong(tmp_path, catalogue, expected):
    """120 workers, forked from one process that has everything imported, each killed at a random moment."""
    config = small_config(tmp_path / "root", catalogue, shards={"passes": 2})
    dataset = open_dataset(config)
    rng, kills = random.Random(0), 0
    start = time.monotonic()
    dataset.render_shard(0, lambda: None)
    seconds_per_shard = time.monotonic() - start
    while kills < 120:
        pid = os.fork()
        if pid == 0:
            for index in rng.sample(range(6), 6):
                dataset.render_shard(index, lambda: None)
            os._exit(0)
        time.sleep(rng.random() * seconds_per_shard * 6)
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        kills += os.WIFSIGNALED(status)
        if kills % 10 == 0:
            for index in dataset.survey(range(6))[0]:
                dataset.render_shard(index, lambda: None)
            assert tree(tmp_path / "root") == expected
            for file in rng.sample(sorted((tmp_path / "root").glob("shard-*.json")), 4):
                file.unlink()
