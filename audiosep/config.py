"""YAML files and `--section.key VALUE` overrides into frozen dataclasses, and back.

Each component declares its own dataclass beside its code, with a pydantic `Field(description=...)` for meaning, unit
and range; this module only reads, checks and explains them."""

import argparse
import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from shards.arguments import Parser

T = TypeVar("T")


def load_config(cls: type[T], file: str | Path | None, overrides: Sequence[str] = ()) -> T:
    """The config of type `cls` (a dataclass) in a YAML file, with `--section.key VALUE` pairs laid over it.

    A VALUE is YAML, but for a key that takes strings it is taken as it stands: a query may have a colon or a #.

    Raises ValueError naming the file, the key and what is wrong; for an unknown key also the nearest valid one."""
    where = str(file) if file else "command line"
    data: Any = {}
    if file:
        try:
            data = yaml.load(Path(file).read_text(encoding="utf-8"), _Loader) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} is not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{file} holds a {type(data).__name__}; a config is a mapping of sections and keys.")
    types_of = {".".join(path): kind for path, kind, *_ in _keys(cls, ())}
    for key, text in _pairs(overrides):
        _set(data, key.split("."), _value(key, text, types_of.get(key, "")))
    return build_config(cls, data, where)


def build_config(cls: type[T], data: Mapping[str, Any], where: str) -> T:
    """The dataclass `cls` from plain data (parsed YAML or JSON). Raises ValueError like `load_config`."""
    problems = [_unknown(cls, path) for path in _unknown_keys(cls, data, ())]
    try:
        if not problems:
            return TypeAdapter(cls).validate_python(data)
    except ValidationError as error:
        problems = list(map(_problem, error.errors()))
    raise ValueError(f"{where}: " + "; ".join(problems))


def _problem(error: Any) -> str:
    key, message = ".".join(map(str, error["loc"])), error["msg"].removeprefix("Value error, ")
    # A message of our own has the values, a missing key has none, and some may put secrets under `storage`.
    is_told = error["type"] in ("value_error", "missing") or "storage" in error["loc"]
    return f"{key}: {message}".removeprefix(": ") + ("" if is_told else f" (got {error['input']!r})")


class _Loader(yaml.SafeLoader):
    """YAML, but a key that stands twice is an error: YAML itself lets the last one win, and the rest is lost."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := {name for name in names if names.count(name) > 1}:
            message = f"{', '.join(sorted(twice))} stands twice"
            raise yaml.composer.ComposerError(None, None, message, node.start_mark)
        return node


def plain(config: Any) -> Any:
    """A config as plain data (dicts, lists, strings, numbers), fit for YAML and JSON and for `build_config`."""
    return TypeAdapter(type(config)).dump_python(config, mode="json")


def command_parser(command: str, description: str | None, cls: type) -> Parser:
    """The parser of an `audiosep` command: its help ends with every key of its config, `cls`."""
    return Parser(
        prog=f"audiosep {command}",
        description=description,
        epilog="config keys, each also an option --section.key VALUE:\n" + describe(cls),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def describe(cls: type) -> str:
    """Every key of a config with its default and meaning, one line each, for `--help`."""
    lines = []
    for path, annotation, default, description in _keys(cls, ()):
        shown = "required" if default is MISSING else f"default {default!r}"
        lines.append(f"  --{'.'.join(path)}  ({annotation}, {shown})\n        {description}")
    return "\n".join(lines)


def _pairs(overrides: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Keys and values. Raises ValueError that repeats no value: it may be a secret behind a mistyped key."""
    key, words = "", list(overrides)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            place = f" behind the value of --{key}" if key else ""
            raise ValueError(f"Unexpected argument{place}; a config key is set with --section.key VALUE.")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not words:
                raise ValueError(f"--{key} needs a value.")
            value = words.pop(0)
        yield key, value


def _value(key: str, text: str, type_name: str) -> Any:
    """What an option's text stands for: for a key that takes strings the text itself, whatever YAML makes of it."""
    kinds = type_name.split(" | ")
    is_mapping = text.startswith("{") and any(kind.startswith("dict") for kind in kinds)
    if "str" in kinds and not is_mapping and not (text in ("null", "~", "") and "None" in kinds):
        return text
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise ValueError(f"The value of --{key} is not valid YAML; put it in quotes of its own.") from None


def _set(data: dict[str, Any], path: list[str], value: Any) -> None:
    for name in path[:-1]:
        child = data.get(name)
        data[name] = child if isinstance(child, dict) else {}
        data = data[name]
    data[path[-1]] = value


def _dataclasses_in(annotation: Any) -> list[type]:
    """The dataclasses that a value of this annotation may be, looking through Annotated and unions."""
    if typing.get_origin(annotation) is Annotated:
        return _dataclasses_in(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [found for part in typing.get_args(annotation) for found in _dataclasses_in(part)]
    return [annotation] if is_dataclass(annotation) and isinstance(annotation, type) else []


def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def _unknown_keys(cls: type, data: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[type, tuple[str, ...]]]:
    hints = _hints(cls)
    for key, value in data.items():
        if key not in hints:
            yield cls, (*path, str(key))
        elif isinstance(value, Mapping):
            for nested in _dataclasses_in(hints[key])[:1]:
                yield from _unknown_keys(nested, value, (*path, key))


def _unknown(cls: type, found: tuple[type, tuple[str, ...]]) -> str:
    owner, path = found
    everywhere = [".".join(key) for key, *_ in _keys(cls, ())]
    here = [".".join((*path[:-1], name)) for name in _hints(owner)]
    name = ".".join(path)
    elsewhere = [key for key in everywhere if key.rpartition(".")[2] == path[-1]]
    nearest = difflib.get_close_matches(name, here, 1, 0.5) or elsewhere
    nearest = nearest or difflib.get_close_matches(name, everywhere, 1, 0)
    return f"unknown key {name!r}; the nearest valid one is {nearest[0]!r}"


def _keys(cls: type, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str, Any, str]]:
    hints = _hints(cls)
    for field in fields(cls):
        annotation, here = hints[field.name], (*path, field.name)
        nested = _dataclasses_in(annotation)
        if nested:
            yield from _keys(nested[0], here)
            continue
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        yield here, _type_name(annotation), default, _description(annotation)


def _type_name(annotation: Any) -> str:
    """The type as one writes it, without what `Annotated` adds."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _type_name(parts[0])
    if origin is typing.Literal:
        return " | ".join(map(repr, parts))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(_type_name, parts))
    if annotation in (None, types.NoneType, ...):
        return "..." if annotation is ... else "None"
    return annotation.__name__ + (f"[{', '.join(map(_type_name, parts))}]" if parts else "")


def _description(annotation: Any) -> str:
    metadata = typing.get_args(annotation)[1:] if typing.get_origin(annotation) is Annotated else ()
    return next((item.description for item in metadata if getattr(item, "description", None)), "")
