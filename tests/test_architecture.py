"""What keeps the three packages apart and the repository portable, held by reading the source."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("audiosep", "shards", "slurm")
SOURCES = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
AUDIO_AND_TRAINING = {"soundfile", "soxr", "torchaudio", "librosa", "pytorch_lightning", "lightning", "transformers"}
FORBIDDEN = {
    "shards": AUDIO_AND_TRAINING | {"audiosep", "slurm"},
    "slurm": AUDIO_AND_TRAINING | {"audiosep", "shards", "torch"},
    "audiosep": {"slurm"},
}

each_source = pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))


def imported_packages(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute, so that these rules can be read off them"
            yield str(node.module).partition(".")[0]


@each_source
def test_packages_import_only_what_they_may(file: Path) -> None:
    package = file.relative_to(ROOT).parts[0]
    assert not set(imported_packages(ast.parse(file.read_text()))) & FORBIDDEN[package]


@each_source
def test_modules_hold_constants_but_no_state(file: Path) -> None:
    """Names bound at module level are constants, types or a logger; nothing rebinds them later."""
    tree = ast.parse(file.read_text())
    assert not [node.names for node in ast.walk(tree) if isinstance(node, ast.Global)]
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if _assigns(node) else []
        for name in (name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)):
            is_constant, is_type = re.fullmatch(r"_?[A-Z][A-Z0-9_]*", name), re.fullmatch(r"_?[A-Z]\w*", name)
            assert is_constant or is_type or name in {"log", "__all__"}, f"{file.name}:{node.lineno} {name}"


def _assigns(node: ast.stmt) -> bool:
    return isinstance(node, ast.AnnAssign | ast.AugAssign)


def test_writing_and_verifying_shards_need_no_torch() -> None:
    reading = {"batches", "readahead", "loader", "pipeline", "bench"}  # these make tensors
    light = modules("shards") - {f"shards.{name}" for name in reading} - {"shards.object_store"}
    assert not loaded_by(sorted(light)) & {"torch", "pytorch_lightning", "webdataset", "obstore"}


def test_submitting_jobs_needs_nothing_of_the_numeric_stack() -> None:
    assert not loaded_by(sorted(modules("slurm"))) & {"torch", "numpy", "pytorch_lightning"}


def modules(package: str) -> set[str]:
    names = (file.relative_to(ROOT).with_suffix("").parts for file in SOURCES if file.is_relative_to(ROOT / package))
    return {".".join(parts).removesuffix(".__init__") for parts in names}


def loaded_by(names: list[str]) -> set[str]:
    """Everything that a fresh interpreter has loaded after importing these modules."""
    program = f"import sys, {', '.join(names)}; print(*sys.modules)"
    return set(subprocess.check_output([sys.executable, "-c", program], cwd=ROOT, text=True).split())


def test_tracked_text_names_no_machine_of_ours() -> None:
    """No absolute path of a developer's machine and no package index other than pip's own settings."""
    listed = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0")
    found = []
    for name in filter(None, listed):
        file = ROOT / name
        if not file.is_file() or file == Path(__file__) or file.suffix in {".flac", ".png", ".ckpt", ".pt", ".npz"}:
            continue
        for number, line in enumerate(file.read_text().splitlines(), 1):
            if re.search(r"(?<![\w.:/-])/(work|home|root|Users)/\w|index-url|/simple\b|trusted-host", line):
                found.append(f"{name}:{number}: {line.strip()}")
    assert not found
