"""The audit believes exact histories, over any restarts, and sees through every other one."""

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
from shard_data import make_data_set

from shards.ledger import audit, audit_command, read_ledgers
from shards.loader import ShardLoader

NUM_SAMPLES = 400


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "train"
    make_data_set(folder, NUM_SAMPLES, samples_per_shard=25, shapes={"condition": (4,)})
    return folder


def test_training_killed_fifty_times_on_changing_ranks_is_served_exactly_once(root, tmp_path, capsys):
    """Real processes in step with one another, killed with SIGKILL, resumed with other ranks, batches and threads."""
    draw = random.Random(1)
    context = multiprocessing.get_context("fork")
    for kill in range(51):
        world_size, batch_size, last = draw.randint(1, 4), draw.choice([1, 3, 4]), kill == 50
        together = context.Barrier(world_size)
        options = {"world_size": world_size, "batch_size": batch_size, "num_threads": draw.randint(1, 3)}
        ranks = [
            context.Process(target=_train, args=(root, tmp_path, together, last, {"rank": rank, **options}))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        ranks[0].join(None if last else draw.uniform(0.02, 0.35))
        for process in draw.sample(ranks, 0 if last else world_size):
            os.kill(process.pid, signal.SIGKILL)
        for process in ranks:
            process.join()
            assert process.exitcode == (0 if last else -signal.SIGKILL)
    results = audit([part for parts in read_ledgers([tmp_path / "ledger"]).values() for part in parts])
    assert [result.problems for result in results] == [[]] * len(results)
    assert all(result.is_over and result.served > NUM_SAMPLES - 16 for result in results)
    assert len(results) >= 2
    assert sum(len(part.positions) for result in results for part in result.lost) > 50
    assert audit_command([str(tmp_path / "ledger")]) == 0
    assert "exactly once" in capsys.readouterr().out


def _train(root: Path, folder: Path, together, last: bool, options: dict) -> None:
    """Stands for a training: every step waits for all ranks, every other one leaves a checkpoint."""
    loader = ShardLoader(root, ledger=folder / "ledger", prefetch_bytes=1, **options)
    if state := _checkpoint(folder):
        loader.load_state_dict(state)
    step = 0
    for _ in range(2 if last else 1000):  # the checkpoint may be of the epoch before the last one that was begun
        for _ in loader:
            together.wait()
            step += 1
            if step % 2 == 0 and options["rank"] == 0:
                (folder / "new").write_text(json.dumps(loader.state_dict()))
                os.replace(folder / "new", folder / "checkpoint")
            together.wait()
            time.sleep(0.002)


def _checkpoint(folder: Path) -> dict:
    return json.loads((folder / "checkpoint").read_text()) if (folder / "checkpoint").exists() else {}


@pytest.fixture
def ledger(root, tmp_path):
    """Two epochs on two ranks, with a restart in the middle of the second one."""
    state = None
    for stop in (9, 30):
        for rank in range(2):
            loader = ShardLoader(root, batch_size=16, rank=rank, world_size=2, ledger=tmp_path)
            loader.set_epoch(4)
            if state:
                loader.load_state_dict(state)
            batches = iter(loader)
            for _ in zip(range(stop), batches):
                pass
            batches.close()
        state = {**loader.state_dict(), "samples": 6 * 32} if stop == 9 else None
    return tmp_path


def _edit(ledger: Path, rank: int, change) -> None:
    path = ledger / f"rank-{rank:05d}.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    change(lines)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _problems(ledger: Path) -> str:
    [iterations] = read_ledgers([ledger]).values()
    return " ".join(problem for result in audit(iterations) for problem in result.problems)


def test_replay_after_a_restart_is_accounted_for(ledger):
    [iterations] = read_ledgers([ledger]).values()
    [result] = audit(iterations)
    assert (result.served, result.is_over, result.problems) == (384, True, [])
    assert sum(len(part.positions) for part in result.lost) == 3 * 32
    assert "16 left out" in str(result)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda lines: lines.pop(3), "not served its share"),
        (lambda lines: lines.insert(3, lines[3]), "not served its share"),
        (lambda lines: lines[3]["keys"].__setitem__(0, lines[4]["keys"][0]), "samples came twice"),
        (lambda lines: lines[8]["keys"].reverse(), "held other samples"),
        (lambda lines: lines.__delitem__(slice(4, 10)), "but only 112 were served"),
    ],
)
def test_whatever_is_not_exactly_once_is_named(ledger, change, complaint):
    _edit(ledger, 1, change)
    assert complaint in _problems(ledger)
    assert audit_command([str(ledger)]) == 3


def test_what_is_not_on_record_is_not_proved(ledger, capsys):
    """A rank's ledger is lost, the last epoch is not over, nothing was served at all, or the file is something else."""
    (ledger / "rank-00001.jsonl").rename(ledger / "kept")
    assert "nothing is on record of rank 1 where others were served" in _problems(ledger)
    assert audit_command([str(ledger)]) == 3
    (ledger / "kept").rename(ledger / "rank-00001.jsonl")
    _edit(ledger, 1, lambda lines: lines.__delitem__(slice(-3, None)))
    capsys.readouterr()
    assert audit_command([str(ledger)]) == 0
    printed = capsys.readouterr().out
    assert "not over yet (32 more came behind places that were not served)" in printed
    assert printed.endswith("Every sample was served exactly once, so far: the last epoch is not over.\n")
    for content, complaint in (("", "nothing to prove"), ('{"manifest_digest": "x"}\n', "line 1 is no loader's")):
        for path in ledger.glob("rank-*"):
            path.write_text(content)
        with pytest.raises(ValueError, match=complaint):
            audit_command([str(ledger)])


def test_an_epoch_that_was_left_early_is_named(root, tmp_path):
    loader = ShardLoader(root, batch_size=16, ledger=tmp_path)
    next(iter(loader))
    loader.set_epoch(1)
    next(iter(loader))
    assert "the next epoch began although this one was not over" in _problems(tmp_path)


def test_an_epoch_may_be_lost_whole(root, tmp_path):
    """A process dies early in an epoch, and its last checkpoint is of the epoch before."""
    loader = ShardLoader(root, batch_size=16, ledger=tmp_path)
    batches = iter(loader)
    for _ in range(20):
        next(batches)
    state = loader.state_dict()
    list(batches)
    next(iter(loader))
    resumed = ShardLoader(root, batch_size=16, ledger=tmp_path)
    resumed.load_state_dict(state)
    list(resumed)
    [iterations] = read_ledgers([tmp_path]).values()
    before, lost = audit(iterations)
    assert (before.is_over, before.problems, len(before.lost)) == (True, [], 1)
    assert (lost.is_over, lost.problems, lost.served) == (False, [], 0)
    assert "0 of 400 samples served exactly once, not over yet; 0 damaged, 16 more served in vain" in str(lost)


def test_half_a_line_is_passed_over_only_where_a_process_was_killed(ledger):
    path = ledger / "rank-00000.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    assert _problems(ledger) == ""
    path.write_bytes(whole[:2000] + b"\n" + whole[2000:])
    with pytest.raises(ValueError, match=r"rank-00000.jsonl line \d+ is broken"):
        read_ledgers([ledger])
