"""Every command and program in README.md runs, in the order in which a reader meets it; every link leads somewhere."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL))
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "data/demo/README.md"]

# Too long to be run within a test; that the Makefile has them is tested.
EXPENSIVE = {"make demo", "make test"}

# What is added to these commands so that they take seconds. Nothing else is changed.
SMALLER = {
    "audiosep precompute": "--shards.passes 1 --shards.num_samples 8 --shards.samples_per_shard 4",
    "audiosep train": "--trainer.max_steps 1 --data.loader.batch_size 2 --system.model.widths [2,2,2,2,2,2]",
    "torchrun": "--trainer.max_steps 2",
    "audiosep evaluate": "--batch_size 4 --baselines false",
}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository by symbolic links, with an empty runs/ that the sections fill one after another."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("audiosep", "shards", "slurm", "configs", "data"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.mark.parametrize("section", [name for name, text in SECTIONS.items() if "```" in text])
def test_commands_and_programs_run(section: str, checkout: Path, request: pytest.FixtureRequest) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if "Slurm" in section:
        request.getfixturevalue("cluster")
    if "bucket" in section:
        server = request.getfixturevalue("s3_server")
        environment |= {"AWS_ENDPOINT_URL": server.endpoint, "AWS_REGION": "us-east-1"}
    for program in programs(SECTIONS[section]):
        done = subprocess.run(program, cwd=checkout, env=os.environ | environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{program[-1]}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def programs(section: str) -> Iterator[list[str]]:
    """What a reader of this section runs, as argument lists."""
    for language, block in re.findall(r"^```(\w+)\n(.*?)^```$", section, re.MULTILINE | re.DOTALL):
        if language == "python":
            yield [sys.executable, "-c", block]
            continue
        assert language == "sh", f"{language} is not run by this test"
        for command in re.sub(r" *\\\n *", " ", block).splitlines():
            if command.partition("  #")[0] not in EXPENSIVE:
                smaller = [keys for name, keys in SMALLER.items() if name in command]
                yield ["bash", "-euo", "pipefail", "-c", " ".join([command, *smaller])]


def test_make_has_the_targets_that_are_shown() -> None:
    shown = set(re.findall(r"(?:^|`)make (\w+)", README, re.MULTILINE))
    assert shown >= {command.removeprefix("make ") for command in EXPENSIVE}
    assert shown <= set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT)))
def test_links_lead_to_files_that_are_there(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        assert target.startswith("https://") or (document.parent / target).exists(), target
