"""The command: the same bytes whoever makes them, in whatever order, however often interrupted."""

import errno
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import soundfile
from audio import open_dataset, small_config, waveform, write_bad, write_catalogue, write_config
from shard_data import tree

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
    assert main(["--config", config, "--plan"]) == 0
    assert json.loads(capsys.readouterr().out)["unfinished"] == [0, 1, 2, 3, 4, 5]
    assert not (tmp_path / "root").exists()
    assert main(["--config", config, "--shards", "1,4"]) == 0
    before = tree(tmp_path / "root")
    assert main(["--config", config, "--plan"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan == {
        "root": str(tmp_path / "root"),
        "num_shards": 6,
        "unfinished": [0, 2, 3, 5],
        "spec_digest": plan["spec_digest"],
        "storage": plan["storage"],
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
    assert main(["--config", config, "--plan", "--begin"]) == 0
    for words in ([], ["--plan"]):
        with pytest.raises(ValueError, match=message):
            main(["--config", config, *words, *override])


def test_segments_too_short_for_a_window_bind_no_root(tmp_path, catalogue):
    config = configure(tmp_path, catalogue)
    with pytest.raises(ValueError, match="samples are too few for a window of"):
        main(["--config", config, "--clips.segment_seconds", "0.001"])
    assert not (tmp_path / "root").exists()


def test_a_changed_catalogue_is_refused(tmp_path):
    catalogue = write_catalogue(tmp_path)
    config = configure(tmp_path, catalogue)
    assert main(["--config", config, "--plan", "--begin"]) == 0
    catalogue.write_text(catalogue.read_text().replace("number 3", "number three"))
    with pytest.raises(ValueError, match=r"spec\.catalogue\.digest"):
        main(["--config", config])


def test_ctrl_c_while_processes_start_is_one_line(tmp_path, catalogue):
    command = [sys.executable, "-m", "audiosep.cli", "precompute", "--config", configure(tmp_path, catalogue)]
    process = subprocess.Popen(
        [*command, "--num_processes", "2"], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while len(children.read_text().split()) < 3:  # the two and multiprocessing's own
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 75, errors
    assert errors.splitlines()[-1] == "Stopped by a signal; the same command goes on from here."
    assert "Traceback" not in errors


def test_a_killed_run_leaves_nothing_in_the_temporary_folder(tmp_path, catalogue):
    config = write_config(tmp_path / "config.yaml", tmp_path / "root", catalogue, shards={"passes": 100})
    command = [sys.executable, "-m", "audiosep.cli", "precompute", "--config", config, "--num_processes", "2"]
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    process = subprocess.Popen(command, env=os.environ | {"TMPDIR": str(temporary)})
    while any(temporary.iterdir()) or not any((tmp_path / "root").glob("shard-*.json")):
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not any(temporary.iterdir())
    assert len(list((tmp_path / "root").glob("shard-*.json"))) < 300  # there would have been more to do


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


def write_bad_catalogue(folder):
    """Eight good clips, of odd rates and channels, under odd names; and one of each kind of bad ones."""
    catalogue = write_catalogue(folder)
    entries = json.loads(catalogue.read_text())["data"]
    for sample_rate, channels in ((8000, 1), (96000, 1), (32000, 6)):
        name = f"clips/ünï cödé {sample_rate} {channels}.wav"
        soundfile.write(folder / name, waveform(sample_rate, sample_rate, sample_rate, channels), sample_rate)
        entries.append({"wav": name, "caption": f"odd {sample_rate}"})
    for name in ("missing", "text", "empty", "header", "nan", "silence", "0.3 s"):
        write_bad(folder / f"clips/{name}.wav", name)
        entries.append({"wav": f"clips/{name}.wav", "caption": f"bad {name}"})
    catalogue.write_text(json.dumps({"data": entries}))
    return catalogue


def test_bad_clips_are_replaced_the_same_way_by_everyone_and_recorded(tmp_path, capsys):
    catalogue = write_bad_catalogue(tmp_path / "audio")
    config = configure(tmp_path, catalogue, max_rejected_fraction=1, check_files=False)
    assert main(["--config", config]) == 0
    assert "times for 36 samples: clips/" in capsys.readouterr().err
    assert main(["--config", config, "--root", str(tmp_path / "other"), "--num_processes", "2"]) == 0
    assert tree(tmp_path / "root") == tree(tmp_path / "other")
    manifest = seal(open_store(tmp_path / "root"))
    assert manifest.num_samples == 36
    assert set(manifest.rejected) == {"missing", "undecodable", "not finite", "silent", "short"}
    records = [json.loads(file.read_text()) for file in sorted((tmp_path / "root").glob("shard-*.json"))]
    rejected = [entry for record in records for entry in record["rejected"]]
    assert {entry["clip"] for entry in rejected if entry["source"] == 0} == {
        f"clips/{name}.wav" for name in ("missing", "text", "empty", "header", "nan", "silence", "0.3 s")
    }
    for entry in rejected:
        with tarfile.open(tmp_path / f"root/shard-{int(entry['sample']) // 4:06d}.tar") as tar:
            text = json.load(tar.extractfile(f"{entry['sample']}.json"))
        used = {source["clip"] for source in (text["target"], *text["interferers"])}
        assert entry["clip"] not in used
        others = [
            other for other in rejected if other["sample"] == entry["sample"] and other["source"] == entry["source"]
        ]
        assert others[-1]["replaced_by"] in used


def test_too_many_rejections_fail_the_task_every_time_and_name_the_files(tmp_path):
    config = configure(tmp_path, write_bad_catalogue(tmp_path / "audio"), check_files=False)
    for _ in range(2):
        with pytest.raises(
            ValueError,
            match=r"rejected \d+ times for 36 samples: .*clips/.*\.wav \((missing|short).* than the 0\.36 that max_rej",
        ):
            main(["--config", config])


def test_audio_that_is_elsewhere_commits_nothing(tmp_path, capsys):
    catalogue = write_catalogue(tmp_path / "audio")
    config = configure(tmp_path, catalogue, check_files=False)
    shutil.rmtree(tmp_path / "audio" / "clips")
    assert main(["--config", config]) == 3
    assert "clips in a row were rejected" in capsys.readouterr().err
    assert [path.name for path in sorted((tmp_path / "root").iterdir())] == ["origin.json", "spec.json"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EIO])
def test_a_failing_disk_fails_the_shard_and_leaves_nothing(tmp_path, catalogue, expected, monkeypatch, capsys, number):
    """The 30th write of the run fails, once."""
    config, writes, writev = configure(tmp_path, catalogue), iter(range(10**6)), os.writev

    def failing(*arguments):
        if next(writes) == 30:
            raise OSError(number, os.strerror(number))
        return writev(*arguments)

    monkeypatch.setattr(os, "writev", failing)
    assert main(["--config", config]) == 3
    assert os.strerror(number) in capsys.readouterr().err
    assert not list((tmp_path / "root").glob(".tmp*"))
    assert main(["--config", config]) == 0
    assert tree(tmp_path / "root") == expected


def test_two_workers_on_one_shard_do_no_harm(tmp_path, catalogue, expected):
    config = small_config(tmp_path / "root", catalogue, shards={"passes": 2})
    inner, outer = open_dataset(config), open_dataset(config)
    calls = iter(range(10**6))

    def whole_shard_meanwhile():
        if next(calls) == 2:
            inner.render_shard(0, lambda: None)

    outer.render_shard(0, whole_shard_meanwhile)
    for index in range(1, 6):
        outer.render_shard(index, lambda: None)
    assert tree(tmp_path / "root") == expected


def test_a_folder_deleted_under_a_worker_is_an_error_and_not_a_shard(tmp_path, catalogue, expected):
    config = small_config(tmp_path / "root", catalogue, shards={"passes": 2})
    dataset = open_dataset(config)
    with pytest.raises(OSError, match="root"):
        dataset.render_shard(0, lambda: shutil.rmtree(tmp_path / "root", ignore_errors=True))
    assert main(["--config", configure(tmp_path, catalogue)]) == 0
    assert tree(tmp_path / "root") == expected


def test_what_was_made_seals_and_verifies(tmp_path, catalogue):
    assert main(["--config", configure(tmp_path, catalogue)]) == 0
    store = open_store(tmp_path / "root")
    manifest = seal(store)
    assert manifest.num_samples == 24
    assert not verify(store).bad


def test_kill_minus_nine_at_random_moments_leaves_nothing_wrong(tmp_path, catalogue, expected, longer):
    """120 workers, forked from one process that has everything imported, each killed at a random moment."""
    config = small_config(tmp_path / "root", catalogue, shards={"passes": 2})
    dataset = open_dataset(config)
    rng, kills = random.Random(0), 0
    start = time.monotonic()
    dataset.render_shard(0, lambda: None)
    seconds_per_shard = time.monotonic() - start
    while kills < 120 * longer:
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
            complete_and_compare(dataset, expected)
            for file in rng.sample(sorted((tmp_path / "root").glob("shard-*.json")), 4):
                file.unlink()


def complete_and_compare(dataset, expected):
    for index in dataset.survey(range(6))[0]:
        dataset.render_shard(index, lambda: None)
    assert tree(Path(dataset.config.root)) == expected


def test_a_crash_at_every_single_step_of_writing(tmp_path, catalogue, expected):
    """A shard is written by a process that ends right before its first, second, ... call into the file system."""
    config = small_config(tmp_path / "root", catalogue, shards={"passes": 2})
    dataset = open_dataset(config)
    for step in itertools.count():
        pid = os.fork()
        if pid == 0:
            calls = itertools.count()
            for name in ("open", "writev", "fsync", "replace", "close"):
                crash_at(step, calls, name)
            dataset.render_shard(3, lambda: None)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        unfinished, _ = dataset.survey([3])
        for file in (tmp_path / "root").glob("shard-*"):
            assert file.read_bytes() == expected[file.name]
        assert (tmp_path / "root/shard-000003.json").exists() is not bool(unfinished)
        if os.WEXITSTATUS(status) == 0:
            break
        for file in (tmp_path / "root").glob("shard-*"):
            file.unlink()
    assert step > 25
    complete_and_compare(dataset, expected)


def crash_at(step, calls, name):
    call = getattr(os, name)

    def counted(*arguments, **named):
        if next(calls) == step:
            os._exit(9)
        return call(*arguments, **named)

    setattr(os, name, counted)
