"""`shards bench` says what it measured and whether it suffices."""

import re

from shard_data import make_data_set

from shards.bench import bench_command


def test_bench_measures_each_number_of_threads_and_judges(tmp_path, capsys):
    make_data_set(tmp_path, 50)
    arguments = [str(tmp_path), "--batch-size", "8", "--seconds", "0.2", "--threads", "1", "2"]
    assert bench_command([*arguments, "--samples-per-second", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [int(line.split()[0]) for line in lines[:2]] == [1, 2]
    assert all(float(re.search(r"(\d+) samples/s", line)[1]) > 1 for line in lines[:2])
    assert re.fullmatch(r"A GPU that trains on 1 samples/s is kept busy with num_threads = [12]\.", lines[2])
    bench_command([*arguments, "--samples-per-second", "1e9", "--fields", "condition", "--no-checksums"])
    assert re.search(r"would wait \d+% of its time", capsys.readouterr().out)
