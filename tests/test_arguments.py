"""What is wrong with a command line is said without its values, of which any may be a secret."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import audiosep.cli
import shards.cli
import slurm.__main__

SECRET = '{"secret_access_key": "sEcReT"}'
ROOT, TRAIN = "s3://bucket/root", ["train", "--config", "configs/train/default.yaml"]
SLURM = ["--config", "configs/slurm/demo.yaml"]

Main = Callable[[Sequence[str]], int]


def errors(main: Main, words: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command that fails prints."""
    try:
        status = main(words)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0
    assert status == 2
    return "".join(capsys.readouterr())


@pytest.mark.parametrize("words", [("--optoins", SECRET), (f"--optoins={SECRET}",), (SECRET, "x", "y", "--optoins=z")])
@pytest.mark.parametrize("command", [*shards.cli.COMMANDS, *audiosep.cli.COMMANDS])
def test_a_mistyped_option_is_named_without_its_value(
    command: str, words: Sequence[str], capsys: pytest.CaptureFixture[str]
) -> None:
    main: Main = shards.cli.main if command in shards.cli.COMMANDS else audiosep.cli.main
    needed = {"train": TRAIN[1:], "separate": ["x.wav"], "precompute": ["--config", "configs/precompute/default.yaml"]}
    needed |= {"demo": ["--config", "configs/demo.yaml"], "evaluate": [], "index": [ROOT, "-o", "x"]}
    needed |= {"copy": [ROOT, "copy"], "show": [ROOT, "1"], "cat": [ROOT, "1"], "explain": [ROOT, "1"]}
    printed = errors(main, [command, *needed.get(command, [ROOT]), *words], capsys)
    assert "sEcReT" not in printed
    assert "optoins" in printed or "nexpected argument" in printed or "unrecognized" in printed


def test_a_setting_with_spaces_is_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["separate", "--query=a saw", "x.wav", f"--checkpoint={tmp_path}/no ne", f"--output={tmp_path}/saw.wav"]
    printed = errors(audiosep.cli.main, words, capsys)
    assert f"{tmp_path}/no ne" in printed


@pytest.mark.parametrize(
    ("main", "words", "named"),
    [
        (shards.cli.main, ["seal", ROOT, "--threads", SECRET], "--threads: invalid int value"),
        (shards.cli.main, ["info", ROOT, f"--json={SECRET}"], "--json: ignored explicit argument"),
        (shards.cli.main, ["bench", ROOT, f"--s={SECRET}"], "ambiguous option: --s"),
        (shards.cli.main, ["show", ROOT, SECRET], "SAMPLE: invalid int value"),
        (shards.cli.main, ["info", ROOT, "--tokne", "--jsno", "sEcReT"], "unrecognized arguments: --tokne --jsno\n"),
        (shards.cli.main, [SECRET, ROOT], "there are seal, verify"),
        (audiosep.cli.main, [SECRET, ROOT], "there are index, check"),
        (audiosep.cli.main, ["explain", ROOT, SECRET], "argument key"),
        (audiosep.cli.main, ["explain", ROOT, "1", "--options", f'{{"endpoint": {SECRET}}}'], "endpoint: Input should"),
        (audiosep.cli.main, ["report", ROOT, "--options", f'{{"endpoint": {SECRET}}}'], "endpoint: Input should"),
        (audiosep.cli.main, ["index", ROOT, "-o", "x", "--options", f"{SECRET}}}"], "storage options are not right"),
        (audiosep.cli.main, [*TRAIN, "--data.storage", SECRET[:-1]], "value of --data.storage is not valid YAML"),
        (audiosep.cli.main, [*TRAIN, "--data.storage", "sEcReT"], "data.storage: Input should be a dictionary"),
        (audiosep.cli.main, [*TRAIN, "--data.storage.secret", SECRET], "unknown key 'data.storage.secret'"),
        (slurm.__main__.main, [SECRET, *SLURM], "argument command: invalid choice"),
        (slurm.__main__.main, ["train", *SLURM, "--watch", SECRET], "--watch: invalid float value"),
        (slurm.__main__.main, ["train", *SLURM, f"--nodse={SECRET}"], "unknown key 'train.nodse'"),
        (slurm.__main__.main, ["train", *SLURM, "--nodes", "1", SECRET], "Unexpected argument"),
        (slurm.__main__.main, ["train", *SLURM, "--extra", SECRET[:-1]], "value of --extra is not valid YAML"),
        (slurm.__main__.main, ["train", *SLURM, "--environment.variables.KEY", f"[{SECRET}]"], "variables.KEY"),
    ],
)
def test_a_value_that_cannot_be_right_is_not_repeated(
    main: Main, words: Sequence[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = errors(main, words, capsys)
    assert named in printed
    assert "sEcReT" not in printed
