"""The `audiosep` command: help without work, and one message for what a user can mend."""

import re
import sys
from itertools import pairwise
from types import ModuleType

import pytest

from audiosep import cli


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A stand-in for `audiosep train`, so that the dispatcher is tested without what it dispatches to."""
    module = ModuleType("audiosep.train")
    monkeypatch.setitem(sys.modules, "audiosep.train", module)
    return module


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_help_lists_every_command_and_loads_none(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    before = set(sys.modules)
    assert cli.main(words) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in cli.COMMANDS)
    assert not {f"audiosep.{name}" for name in cli.COMMANDS} & (set(sys.modules) - before)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_explains_itself_and_each_of_its_keys(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([name, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: audiosep {name}")
    lines = text.splitlines()
    for key, meaning in pairwise(lines):
        if re.match(r"  --[\w.]+  \(", key):
            assert re.match(r" {8}\w", meaning), key


def test_a_command_gets_its_arguments_and_its_status_is_returned(command: ModuleType) -> None:
    received: list[str] = []
    command.main = lambda words: received.extend(words) or 75  # type: ignore[attr-defined]
    assert cli.main(["train", "--config", "x.yaml"]) == 75
    assert received == ["--config", "x.yaml"]


def test_an_unknown_command_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trian"]) == 2
    message = capsys.readouterr().err
    assert "train" in message


@pytest.mark.parametrize("error", [ValueError("seven is no rate"), FileNotFoundError(2, "No such file", "x.wav")])
def test_what_a_user_can_mend_is_one_message(
    command: ModuleType, error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(words: list[str]) -> int:
        raise error

    command.main = fail  # type: ignore[attr-defined]
    assert cli.main(["train"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("audiosep train: ")
    assert len(message.splitlines()) == 1


def test_ctrl_c_is_one_line(command: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(words: list[str]) -> int:
        raise KeyboardInterrupt

    command.main = fail  # type: ignore[attr-defined]
    assert cli.main(["train"]) == 130
    assert capsys.readouterr().err == "audiosep train: interrupted\n"


def test_our_own_mistakes_keep_their_traceback(command: ModuleType) -> None:
    def fail(words: list[str]) -> int:
        raise KeyError("ours")

    command.main = fail  # type: ignore[attr-defined]
    with pytest.raises(KeyError):
        cli.main(["train"])
