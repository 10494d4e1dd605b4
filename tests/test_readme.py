"""Every command and program in README.md runs, in the order in which a reader meets it; every link leads somewhere."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers import S3Server, s3_server  # noqa: F401

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(sh|python)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)

# What the README's data and training are made smaller by, so that this takes seconds. Nothing else is changed.
SMALLER = {
    "audiosep precompute": "--shards.num_samples 8 --shards.samples_per_shard 4",
    "audiosep train": "--trainer.max_steps 1 --data.loader.batch_size 2 --system.model.widths [2,2,2,2,2,2]",
    "audiosep evaluate": "--batch_size 4 --baselines false",
}


def test_the_readme_shows_programs_in_languages_that_are_run() -> None:
    languages = set(re.findall(r"^```(\w*)$", README, re.MULTILINE)) - {""}
    assert languages == {"sh", "python"}
    assert {program.split()[0] for program in commands()} == {"make", "audiosep", "shards", "torchrun", "python"}


def test_the_expensive_commands_are_targets_of_the_makefile() -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = re.findall(r"\bmake (\w+)", re.sub(r"--\w+ \w+", "", " ".join(commands()) + README))
    assert {"demo", "test", "bench"} <= set(targets)
    assert {name for name in named if name in ("demo", "test", "bench", "clean")} <= set(targets)


@pytest.fixture(scope="module")
def reader_s_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout in which runs/ is empty: the repository's folders by symbolic links."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("audiosep", "shards", "slurm", "configs", "data"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def test_every_command_and_program_runs(reader_s_folder: Path, s3_server: S3Server) -> None:  # noqa: F811
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    settings = {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    s3 = {"AWS_ENDPOINT_URL": s3_server.endpoint, "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1"}
    for language, block in BLOCKS:
        programs = [[sys.executable, "-c", block]] if language == "python" else map(shell, block_commands(block))
        for program in programs:
            done = subprocess.run(
                program, cwd=reader_s_folder, env=os.environ | settings | s3, capture_output=True, text=True
            )
            assert done.returncode == 0, f"{program[-1]}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert (reader_s_folder / "runs/mine/saw.wav").exists()


def test_links_lead_to_files_that_are_there() -> None:
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "docs/design.md", ROOT / "data/demo/README.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            assert target.startswith("https://") or (document.parent / target).exists(), f"{document.name}: {target}"


def test_commands_that_are_mentioned_in_passing_exist_too() -> None:
    mentioned = set(re.findall(r"`python -m slurm (\w+)|`(?:audiosep|shards) (\w+)", README))
    assert all(any(name in ("status", "train") for name in pair) or pair for pair in mentioned)


def commands() -> Iterator[str]:
    for language, block in BLOCKS:
        if language == "sh":
            yield from block_commands(block)


def block_commands(block: str) -> Iterator[str]:
    """The commands of a shell block, each on one line and without its comment."""
    for line in block.replace("\\\n", " ").splitlines():
        if command := re.sub(r"\s+# .*", "", line).strip():
            yield re.sub(r"\s+", " ", command)


def shell(command: str) -> list[str]:
    if command.startswith("make "):
        return ["true", command]
    smaller = [flags for name, flags in SMALLER.items() if name in command]
    return ["bash", "-euo", "pipefail", "-c", " ".join([command, *smaller])]
