"""Configuration: precedence, unknown keys, and messages that name the field."""

from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perigee.config import Model, merge, nest, parse_override, validate
from perigee.errors import InvalidArgumentError
from services.kit.config import ServiceConfig, load_config


class Nested(Model):
    depth: int = 1


class Outer(Model):
    nested: Nested = Nested(depth=5)
    width: int = 2


class Renamed(Model):
    renamed_keys: ClassVar[dict[str, str]] = {"width": "breadth", "old.size": "new.length", "old.count": "count"}
    breadth: int = 0
    new: dict[str, int] = {}
    count: int = 0


class ExampleConfig(ServiceConfig):
    section: ClassVar[str] = "example"
    environment_aliases: ClassVar[dict[str, str]] = {"EXAMPLE_URL": "url"}
    url: str = "none"
    workers: int = 1
    nested: Nested = Nested()
    outer: Outer = Outer(nested=Nested(depth=7), width=3)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text("example: {url: from-file, workers: 2, nested: {depth: 2}}\nother: {x: 1}\n")
    return path


def test_a_section_is_read_from_the_recipe(recipe: Path) -> None:
    config = load_config(ExampleConfig, ["--config", str(recipe)])
    assert (config.url, config.workers, config.nested.depth) == ("from-file", 2, 2)


def test_what_is_not_set_of_a_part_has_the_section_s_default_not_that_of_its_class() -> None:
    config = load_config(ExampleConfig, ["--set", "outer.width=4"])
    assert (config.outer.width, config.outer.nested.depth) == (4, 7)
    config = load_config(ExampleConfig, ["--set", "outer.nested.depth=8"])
    assert (config.outer.width, config.outer.nested.depth) == (3, 8)
    assert Outer.model_validate({"nested": {}}).nested.depth == 5


def test_environment_is_above_the_file_and_set_above_both(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERIGEE_EXAMPLE__WORKERS", "3")
    monkeypatch.setenv("PERIGEE_EXAMPLE__NESTED__DEPTH", "3")
    monkeypatch.setenv("EXAMPLE_URL", "from-alias")
    config = load_config(ExampleConfig, ["--config", str(recipe), "--set", "nested.depth=4"])
    assert (config.url, config.workers, config.nested.depth) == ("from-alias", 3, 4)


def test_the_token_comes_from_the_environment_and_is_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERIGEE_TOKEN", "secret-token")
    config = load_config(ExampleConfig, [])
    assert config.server.token is not None
    assert config.server.token.get_secret_value() == "secret-token"
    assert "secret-token" not in str(config.model_dump(mode="json"))


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("workerz=3", "example.workerz: unknown key; did you mean workers?"),
        ("nested.dept=3", "example.nested.dept: unknown key; did you mean depth?"),
        ("server.prot=3", "example.server.prot: unknown key; did you mean port?"),
        ("workers=many", "example.workers: "),
        ("workers", "--set: 'workers' is not of the form a.b=c"),
        ("name={data}/x", "--set: '{data}/x' is not YAML: name='\"{data}/x\"' is text"),
    ],
)
def test_a_wrong_configuration_ends_in_one_line_that_names_the_field(
    override: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        load_config(ExampleConfig, ["--set", override])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert sentence in lines[0]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("PERIGEE_EXAMPLE__WORKERZ", "example.workerz: unknown key; did you mean workers?"),
        ("PERIGEE_EXAMPLE__NESTED__DEPT", "example.nested.dept: unknown key; did you mean depth?"),
        ("PERIGEE_EXAMPLE__WORKERS", "example.workers: "),
    ],
)
def test_a_wrong_variable_ends_in_one_line(
    name: str, sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, "x")
    with pytest.raises(SystemExit):
        load_config(ExampleConfig, [])
    (line,) = capsys.readouterr().err.splitlines()
    assert sentence in line


def test_variables_hold_json_and_null(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERIGEE_EXAMPLE__NESTED", '{"depth": 5}')
    monkeypatch.setenv("PERIGEE_EXAMPLE__SERVER__METRICS_PORT", "null")
    config = load_config(ExampleConfig, ["--set", "server.port=7"])
    assert (config.nested.depth, config.server.metrics_port, config.server.port) == (5, None, 7)


def test_a_variable_that_is_no_json_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PERIGEE_EXAMPLE__NESTED", "{")
    with pytest.raises(SystemExit):
        load_config(ExampleConfig, [])
    assert "nested" in capsys.readouterr().err


def test_a_recipe_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load_config(ExampleConfig, ["--config", str(tmp_path / "absent.yaml")])
    assert "absent.yaml: cannot be read" in capsys.readouterr().err


def test_validation_carries_every_violation() -> None:
    with pytest.raises(InvalidArgumentError) as error:
        validate(ExampleConfig, {"workers": "x", "nested": {"depth": "y"}}, "recipe.yaml", "example")
    assert [violation.field for violation in error.value.violations] == ["example.workers", "example.nested.depth"]


KEYS = st.lists(st.from_regex(r"[a-z]{1,5}", fullmatch=True), min_size=1, max_size=4)


@given(keys=KEYS, value=st.integers())
def test_an_override_is_the_nested_value(keys: list[str], value: int) -> None:
    assert parse_override(f"{'.'.join(keys)}={value}") == nest(keys, value)


@given(first=st.dictionaries(st.text(), st.integers()), second=st.dictionaries(st.text(), st.integers()))
def test_merging_flat_mappings_is_dictionary_union(first: dict[str, int], second: dict[str, int]) -> None:
    merged = dict(first)
    merge(merged, second)
    assert merged == first | second


def test_renamed_keys_are_accepted_with_a_warning_each() -> None:
    values = {"width": 1, "old": {"size": 2, "count": 3}}
    with pytest.warns(FutureWarning) as caught:
        assert validate(Renamed, values, "recipe", "") == Renamed(breadth=1, new={"length": 2}, count=3)
    assert [str(warning.message).split(" now;")[0] for warning in caught] == [
        "the key width is called breadth",
        "the key old.size is called new.length",
        "the key old.count is called count",
    ]
    assert values == {"width": 1, "old": {"size": 2, "count": 3}}


def test_a_key_under_both_of_its_names_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="width is the old name of breadth: give breadth alone"):
        validate(Renamed, {"width": 1, "breadth": 2}, "recipe", "")


def test_what_is_left_beside_a_renamed_key_is_still_checked() -> None:
    with pytest.raises(InvalidArgumentError, match="old: unknown key"), pytest.warns(FutureWarning):
        validate(Renamed, {"old": {"size": 2, "other": 3}}, "recipe", "")
