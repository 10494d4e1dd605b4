"""Configs: what is read is what was written, and what is wrong is named."""

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

import audiosep
import shards
import slurm.config
from audiosep.config import build_config, describe, load_config, plain
from audiosep.dataset import PrecomputeConfig
from audiosep.demo import DemoConfig
from audiosep.train import TrainConfig


@dataclass(frozen=True)
class Optics:
    """A section, as components declare them."""

    focal_length: Annotated[float, Field(gt=0, description="focal length, mm")] = 50.0
    shutter: Annotated[Literal["leaf", "curtain"], Field(description="kind of shutter")] = "leaf"
    filters: Annotated[
        tuple[Annotated[str, Field(min_length=0)], ...], Field(description="names of filters, front first")
    ] = ()
    serial: Annotated[int | None, Field(description="serial number, if known")] = None


@dataclass(frozen=True)
class Camera:
    name: Annotated[str, Field(description="engraved name")]
    exposures: Annotated[int, Field(ge=1, description="exposures on a roll")] = 36
    optics: Optics = field(default_factory=Optics)


def test_a_file_and_overrides_become_a_config(tmp_path: Path) -> None:
    file = tmp_path / "camera.yaml"
    file.write_text("name: box\noptics:\n  focal_length: 35\n  filters: [red]\n")
    assert load_config(Camera, file) == Camera("box", 36, Optics(35.0, "leaf", ("red",)))
    overridden = load_config(Camera, file, ["--optics.shutter", "curtain", "--exposures=12", "--optics.serial", "7"])
    assert overridden == Camera("box", 12, Optics(35.0, "curtain", ("red",), 7))
    assert load_config(Camera, None, ["--name", "box", "--optics.filters", "[red, blue]"]).optics.filters == (
        "red",
        "blue",
    )


@given(
    st.builds(
        Camera,
        name=st.text(),
        exposures=st.integers(1, 10**9),
        optics=st.builds(
            Optics,
            focal_length=st.floats(min_value=1e-300, allow_infinity=False, exclude_min=True),
            shutter=st.sampled_from(["leaf", "curtain"]),
            filters=st.lists(st.text()).map(tuple),
            serial=st.none() | st.integers(),
        ),
    )
)
def test_plain_data_and_yaml_bring_every_config_back(camera: Camera) -> None:
    assert build_config(Camera, plain(camera), "plain") == camera
    assert build_config(Camera, yaml.safe_load(yaml.safe_dump(plain(camera))), "yaml") == camera


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["--exposure", "12"], "unknown key 'exposure'; the nearest valid one is 'exposures'"),
        (["--optics.focal_lenght", "12"], "unknown key 'optics.focal_lenght'; the nearest valid one is"),
        (["--shutter", "leaf"], "the nearest valid one is 'optics.shutter'"),
        (["--exposures", "many"], "exposures"),
        (["--exposures", "0"], "exposures"),
        (["--exposures", "1.5"], "exposures"),
        (["--optics.shutter", "sector"], "optics.shutter"),
        (["--optics", "wide"], "optics"),
        (["--exposures"], "--exposures needs a value"),
        (["exposures", "12"], "Unexpected argument behind the value of --name"),
        (["--exposures", "[1"], "The value of --exposures is not valid YAML"),
    ],
)
def test_what_is_wrong_is_named(overrides: list[str], named: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        load_config(Camera, None, ["--name", "box", *overrides])
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wrong_value_is_shown_with_its_file_and_key(tmp_path: Path) -> None:
    file = tmp_path / "camera.yaml"
    file.write_text("name: box\noptics: {focal_length: -35}\n")
    with pytest.raises(ValueError, match=r"camera\.yaml: optics\.focal_length: .*greater than 0.*-35"):
        load_config(Camera, file)
    with pytest.raises(ValueError, match=r"name: Field required$"):
        load_config(Camera, None)


@pytest.mark.parametrize("text", ["a dog: barking", "dog #1", "yes", "007", "", "{", "- x", "犬"])
def test_a_string_on_the_command_line_is_taken_as_it_stands(text: str) -> None:
    assert load_config(Camera, None, ["--name", text]).name == text
    assert load_config(Camera, None, [f"--name={text}"]).name == text


def test_a_string_or_mapping_on_the_command_line_is_either() -> None:
    def catalogue(text: str) -> object:
        return load_config(PrecomputeConfig, None, ["--root", "r", "--catalogue", text]).catalogue

    assert catalogue("a: b.json") == "a: b.json"
    assert catalogue("{a.json: 1, b.json: 0.5}") == {"a.json": 1.0, "b.json": 0.5}
    assert load_config(PrecomputeConfig, None, ["--root", "r", "--catalogue", "c", "--queries", "null"]).queries is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", r"camera\.yaml is not valid YAML"),
        ("- a", r"camera\.yaml holds a list; a config is a mapping"),
        ("name: \xe9", r"camera\.yaml is not valid YAML"),  # not UTF-8
        (
            "name: a\noptics: {serial: 1}\noptics: {shutter: leaf}",
            r"camera\.yaml is not valid YAML: optics stands twice",
        ),
    ],
)
def test_files_that_are_no_configs_are_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "camera.yaml"
    file.write_text(text, encoding="latin1")
    with pytest.raises(ValueError, match=message):
        load_config(Camera, file)


def test_help_lists_every_key_with_default_and_meaning() -> None:
    text = describe(Camera)
    for key in ("--name", "--exposures", "--optics.focal_length", "--optics.shutter", "--optics.serial"):
        assert f"  {key}  (" in text
    assert "required" in text
    assert "default 36" in text
    assert "focal length, mm" in text
    assert "('leaf' | 'curtain', default 'leaf')" in text
    assert "(tuple[str, ...], default ())" in text
    assert "(int | None, default None)" in text


def test_every_key_of_every_config_is_explained_and_frozen() -> None:
    for config in config_classes():
        assert not list(keys_without_description(config)), config
        assert config.__dataclass_params__.frozen, config  # type: ignore[attr-defined]


def config_classes() -> Iterator[type]:
    for package in (audiosep, shards, slurm):
        for module_info in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            if not module_info.name.endswith("__main__"):
                for name, value in vars(importlib.import_module(module_info.name)).items():
                    if name.endswith("Config") and is_dataclass(value) and value.__module__ == module_info.name:
                        yield value


def keys_without_description(config: type) -> Iterator[str]:
    hints = get_type_hints(config, include_extras=True)
    for item in fields(config):
        hint = hints[item.name]
        described = get_origin(hint) is Annotated and any(getattr(m, "description", None) for m in get_args(hint)[1:])
        inner = get_args(hint)[0] if get_origin(hint) is Annotated else hint
        is_section = any(is_dataclass(part) for part in (inner, *get_args(inner)))
        if not described and not is_section:
            yield item.name


SHIPPED = Path(__file__).parent.parent / "configs"
EMBEDDING_SIZES = {"minilm": 384, "clap": 512}


@pytest.mark.parametrize("file", sorted(SHIPPED.rglob("*.yaml")), ids=lambda file: str(file.relative_to(SHIPPED)))
def test_shipped_configs_are_read_by_the_command_they_are_for(file: Path) -> None:
    readers: dict[str, Callable[[Path], Any]] = {
        "precompute": partial(load_config, PrecomputeConfig),
        "train": partial(load_config, TrainConfig),
        "slurm": slurm.config.load_config,
        "configs": partial(load_config, DemoConfig),
    }
    readers[file.parent.name](file)
    assert file.read_text().startswith("# "), "the first line says what the config is for"


def test_shipped_training_configs_fit_the_shards_that_they_name() -> None:
    """Each trains on what a shipped precompute config makes: with its windows, and embeddings of the model's size."""
    shards_at = {config.root: config for config in map(partial(load_config, PrecomputeConfig), precompute_configs())}
    for file in sorted((SHIPPED / "train").glob("*.yaml")):
        config = load_config(TrainConfig, file)
        model = config.system.model
        assert isinstance(config.data.train, str)
        for root in filter(None, [config.data.train, config.data.valid]):
            made = shards_at[root]
            queries = made.queries or config.data.queries
            assert queries is not None, file
            assert EMBEDDING_SIZES[queries.encoder] == model.condition_size, file
            assert set(config.system.windows) <= set(made.stft.window_lengths), file


def precompute_configs() -> list[Path]:
    return sorted((SHIPPED / "precompute").glob("*.yaml"))


def test_shipped_slurm_configs_name_configs_that_are_there() -> None:
    for file in sorted((SHIPPED / "slurm").glob("*.yaml")):
        config = slurm.config.load_config(file)
        assert all((SHIPPED.parent / name).exists() for name in (*config.precompute.configs, config.train.config))


def test_configs_are_values() -> None:
    camera = Camera("box")
    assert replace(camera, exposures=12) != camera
    with pytest.raises(AttributeError):
        setattr(camera, "name", "other")  # noqa: B010
