"""Long work says in a log, line by line, how far it has come; short work says nothing there."""

import time

from shards import progress


def test_a_log_gets_whole_lines_and_only_of_long_work(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.2)
    for _ in progress.progress(range(3), desc="short"):
        time.sleep(0.01)
    assert capsys.readouterr().err == ""
    with progress.progress(total=2000, desc="copy", unit="B", unit_scale=True) as bar:
        for _ in range(20):
            time.sleep(0.05)
            bar.update(100)
    lines = capsys.readouterr().err.replace("\r", "").split("\n")
    shown = [line for line in lines if line]
    assert 2 <= len(shown) <= 7
    assert all(line.startswith("copy: ") and "/2.00k [00:0" in line for line in shown)
    assert shown[-1].startswith("copy: 2.00k/2.00k")
