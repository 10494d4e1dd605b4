"""The YAML file behind every `python -m slurm` command: what to render and train, and what to ask the cluster for."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from slurm.job import Environment, Resources


@dataclass(frozen=True, kw_only=True)
class PrecomputeJob(Resources):
    """The arrays that render shards."""

    configs: Annotated[tuple[str, ...], Field(description="configs of audiosep precompute, one for each split")] = ()
    max_tasks: Annotated[int, Field(ge=1, description="array tasks of one round, at most")] = 100
    max_running: Annotated[int, Field(ge=0, description="array tasks running at once, at most; 0: no limit")] = 0
    max_rounds: Annotated[int, Field(ge=1, description="arrays submitted for what is missing, before giving up")] = 3


@dataclass(frozen=True, kw_only=True)
class SealJob(Resources):
    """The job after each array: seals, or submits the next round."""

    warn_seconds: Annotated[int, Field(ge=0, description="as above; sealing has nothing to save")] = 0
    verify: Annotated[bool, Field(description="also read every byte and check it; bad shards are rendered again")] = (
        True
    )


@dataclass(frozen=True, kw_only=True)
class TrainJob(Resources):
    """The training job."""

    config: Annotated[str, Field(description="config of audiosep train")] = ""


@dataclass(frozen=True, kw_only=True)
class SlurmConfig:
    """All sections; a command uses those it needs."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    folder: Annotated[str, Field(description="run folder: scripts, configs, job ids, logs; seen by every node")]
    audiosep: Annotated[str, Field(description="how the audiosep command is called")] = "audiosep"
    shards: Annotated[str, Field(description="how the shards command is called")] = "shards"
    environment: Environment = field(default_factory=Environment)
    precompute: PrecomputeJob = field(default_factory=PrecomputeJob)
    seal: SealJob = field(default_factory=SealJob)
    train: TrainJob = field(default_factory=TrainJob)


def load_config(file: str | Path, overrides: Sequence[str] = (), section: str = "") -> SlurmConfig:
    """The config in a YAML file with `--section.key VALUE` pairs laid over it; `--key` means the key of `section`.

    Raises ValueError naming the file, the key and what is wrong; for an unknown key also the nearest valid one."""
    try:
        data = yaml.safe_load(Path(file).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{file} holds a {type(data).__name__}; a config is a mapping of sections and keys.")
    words = list(overrides)
    while words:
        name, equals, value = words.pop(0).partition("=")
        if not name.startswith("--"):  # and may be a secret behind a mistyped key
            raise ValueError("Unexpected argument; a config key is set with --section.key VALUE.")
        if not equals:
            if not words:
                raise ValueError(f"{name} needs a value.")
            value = words.pop(0)
        *path, last = name[2:].split(".") if "." in name or name[2:] in known_keys() else [section, name[2:]]
        where = data
        for part in path:
            where[part] = where = where.get(part) or {}
        try:
            where[last] = yaml.safe_load(value) if value[:1] in "[{" else value  # a time stays a string
        except yaml.YAMLError:
            raise ValueError(f"The value of {name} is not valid YAML; put it in quotes of its own.") from None
    try:
        config = TypeAdapter(SlurmConfig).validate_python(data)
        return replace(config, folder=str(Path(config.folder).resolve()))
    except ValidationError as error:
        raise ValueError(f"{file}: " + "; ".join(map(_problem, error.errors()))) from None


def known_keys(cls: Any = SlurmConfig, prefix: str = "") -> dict[str, str]:
    """Every key, dotted, with its meaning."""
    keys: dict[str, str] = {}
    for entry in fields(cls):
        annotation: Any = entry.type
        if is_dataclass(annotation):
            keys |= known_keys(annotation, f"{prefix}{entry.name}.")
        else:
            keys[prefix + entry.name] = annotation.__metadata__[0].description
    return keys


def as_yaml(config: SlurmConfig) -> str:
    """The config as `load_config` reads it."""
    return yaml.safe_dump(TypeAdapter(SlurmConfig).dump_python(config, mode="json"), sort_keys=False)


def _problem(error: Any) -> str:
    key = ".".join(map(str, error["loc"]))
    if error["type"] == "unexpected_keyword_argument":
        nearest = difflib.get_close_matches(key, known_keys(), 1, 0)[0]
        return f"unknown key {key!r}; the nearest valid one is {nearest!r}"
    hint = "; put it in quotes" if error["type"] == "string_type" else ""
    got = "" if "variables" in error["loc"] else f" (got {error['input']!r})"  # among which may be secrets
    return f"{key}: {error['msg']}{got}{hint}"
