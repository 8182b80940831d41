"""Recipes: one YAML file that configures a run and every service, read, overridden, expanded and checked as a whole."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field

from perigee.cli.long2short.config import Long2ShortConfig
from perigee.cli.run_folder import RunFolder, find_run, new_run
from perigee.cli.trackers import TrackersConfig
from perigee.config import Model, ModelT, key_paths, merge, parse_override, read_yaml, validate
from perigee.errors import InvalidArgumentError
from perigee.files import write_atomically
from services.kit.rope import RopeConfig

RECIPE_FILE = "recipe.yaml"
# Begins the path of a source that is a suite of `perigee eval`.
SUITE_PREFIX = "suite:"
# The services in the order in which they are started.
SERVICES = ("buffer", "sandbox", "reward", "trainer", "coordinator", "rollout")
_CONFIG_CLASSES = {
    "run": "services.coordinator.run_config:RunConfig",
    **{name: f"services.{name}.config:{name.capitalize()}Config" for name in SERVICES},
}
# What the folder of a run gives to the services when the recipe does not say otherwise.
RUN_FOLDER_VALUES: Mapping[str, Mapping[str, str]] = {
    "buffer": {"data_path": "{run}/buffer"},
    "trainer": {"run_path": "{run}"},
    # A restarted coordinator resumes the run by itself.
    "coordinator": {"run_path": "{run}"},
}


# What the top-level `model` and `rope` are for, where a section names none.
MODEL_SECTIONS = ("run", "rollout", "trainer")
# Keys of other trainers, each with the key here or a sentence.
FOREIGN_KEYS: Mapping[str, str] = {
    "lr": "did you mean run.optimizer.learning_rate?",
    "num_generations": "did you mean run.group_size?",
    "max_completion_length": "did you mean run.rollout.max_response_tokens?",
    "max_tokens": "did you mean run.rollout.max_response_tokens?",
    "max_steps": "did you mean run.iterations?",
    "kl_coef": "did you mean run.algorithm.tau?",
    "beta": "did you mean run.algorithm.tau?",
    "stop": "responses end with the eos_token_id of the model's generation_config.json; name further tokens there",
    **dict.fromkeys(
        ("top_p", "top_k", "min_p"),
        "responses are sampled from the whole distribution, whose log-probabilities training needs; leave it out",
    ),
}


class LocalConfig(Model):
    """Processes of the local stack."""

    workers: int = Field(1, ge=1, le=64)
    """Rollout workers to start."""


class RecipeHead(Model):
    """Top level of a recipe beside the sections of the run and the services."""

    name: str = Field("run", pattern=r"^[a-z0-9][a-z0-9_.-]*$")
    """Begins the ids of the recipe's runs."""
    description: str = ""
    """What the recipe is about, for readers and the report."""
    model: str | None = None
    """Hugging Face folder of the model, a path or a URL: `model` of run, rollout and trainer where these name none."""
    rope: RopeConfig | None = None
    """Rotary embedding in the place of the model's own: `rope` of run, rollout and trainer where these name none."""
    deployment: Literal["separate", "hybrid"] | None = None
    """Short for `run.deployment`, where it is kept."""
    prepare: str | None = None
    """A Python script beside the recipe, run once as `python SCRIPT --out DIR --seed N` to fill `{data}`."""
    local: LocalConfig = LocalConfig()
    """How the local stack is made up."""
    trackers: TrackersConfig = TrackersConfig()
    """Experiment trackers that `perigee train` sends the run's records to."""
    long2short: Long2ShortConfig | None = None
    """Four ways from a long model to short responses, and their comparison: `perigee long2short`."""


@dataclass(frozen=True)
class Recipe:
    """Checked recipe; `values` is all that it holds, with overrides and without expansion."""

    path: Path
    head: RecipeHead
    values: Mapping[str, Any]

    @property
    def seed(self) -> int:
        """The seed of the run, 0 when the recipe names none."""
        return int(self.values.get("run", {}).get("seed", 0))

    @property
    def prepare_path(self) -> Path | None:
        """The script that makes the run's data, if any."""
        return None if self.head.prepare is None else self.path.parent / self.head.prepare

    def expand(self, run: RunFolder, others: Mapping[str, str] | None = None) -> Recipe:
        """Returns the run's recipe: `{data}`, `{run}` and `{recipe}` are replaced by the folders they stand for.

        `others` are further words with what they stand for, before those of the run. Of sources `suite:NAME`, the
        suites are written into the run's folder. Raises what `write_prompt_file` raises.
        """
        folders = {
            "{data}": str(run.data_path),
            "{run}": str(run.path),
            "{recipe}": str(self.path.parent.absolute()),
            **(others or {}),
        }
        expanded = map_strings(self.values, lambda text: replace_all(text, folders))
        for key in expanded.get("run", {}).keys() & {"prompts", "heldout"}:
            expanded["run"][key] = map_strings(expanded["run"][key], lambda text: _place_suite(text, run.path))
        head = self.head
        if self.prepare_path is not None:
            expanded["prepare"] = str(self.prepare_path.absolute())
            head = head.model_copy(update={"prepare": expanded["prepare"]})
        return Recipe(run.recipe_path, head, expanded)


def find_recipe(path: Path) -> Path:
    """Returns the recipe file at `path`, a file or a folder. Raises InvalidArgumentError when there is none."""
    file = path / RECIPE_FILE if path.is_dir() else path
    if not file.is_file():
        hint = f"no {RECIPE_FILE} in this folder" if path.is_dir() else "no such file"
        raise InvalidArgumentError.for_field(
            str(path), f"{hint}; name a recipe file or a folder that holds {RECIPE_FILE}"
        )
    return file


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe, lays `a.b=c` overrides over it and checks all of it.

    Raises InvalidArgumentError whose one-line message names the file, the field and what to do.
    """
    return build_recipe(path, read_yaml(path), overrides)


def build_recipe(path: Path, values: dict[str, Any], overrides: Sequence[str]) -> Recipe:
    """Returns the values with overrides, and with the model and the folders that sections lack, as a checked recipe.

    Raises InvalidArgumentError whose one-line message names the file, the field and what to do.
    """
    move_deployment(values)
    for override in overrides:
        merge(values, parse_override(override))
        # After each, so that the last one holds, whichever of the two keys it names.
        move_deployment(values)
    for key in ("model", "rope"):
        if values.get(key) is not None:
            for section in MODEL_SECTIONS:
                given = values.get(section) or {}
                if isinstance(given, dict) and (given or (key == "model" and section != "run")):
                    values[section] = {key: values[key], **given}
    for section, defaults in RUN_FOLDER_VALUES.items():
        # A trainer cannot do with these values alone: without a section of its own there is none.
        given = values.get(section, None if section == "trainer" else {})
        if isinstance(given, dict):
            values[section] = {**defaults, **given}
    return check_recipe(path, values)


def move_deployment(values: dict[str, Any]) -> None:
    """Moves `deployment` to `run.deployment`, where the values have a run."""
    if values.get("deployment") is not None and isinstance(values.get("run"), dict):
        values["run"]["deployment"] = values.pop("deployment")


def check_recipe(path: Path, values: Mapping[str, Any]) -> Recipe:
    """Returns the values as a recipe, each section checked against its service's configuration class.

    Prints a line on standard error for each key under an old name. Raises InvalidArgumentError whose one-line message
    names the file, the field and what to do.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", FutureWarning)
        recipe = _check_recipe(path, values)
    for message in dict.fromkeys(str(warning.message) for warning in caught):
        print(f"perigee: {path.name}: {message}", file=sys.stderr)
    return recipe


def _check_recipe(path: Path, values: Mapping[str, Any]) -> Recipe:
    source = path.name
    known = [*RecipeHead.model_fields, *_CONFIG_CLASSES]
    for section in values:
        if section not in known:
            near = difflib.get_close_matches(str(section), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"the sections are {', '.join(known)}"
            hint = hint if near else _find_key(str(section), "") or hint
            raise InvalidArgumentError.for_field(f"{source}: {section}", f"unknown key; {hint}")
    head = _validate(
        RecipeHead, {key: value for key, value in values.items() if key not in _CONFIG_CLASSES}, source, ""
    )
    for section in _CONFIG_CLASSES:
        if section not in values:
            continue
        section_values = {} if values[section] is None else values[section]
        if not isinstance(section_values, dict):
            raise InvalidArgumentError.for_field(f"{source}: {section}", "must be a mapping of keys to values")
        checked = _validate(config_class(section), section_values, source, section)
        if section == "run":
            _check_algorithm(checked, source)
    return Recipe(path=path, head=head, values=values)


def _validate(model: type[ModelT], values: Mapping[str, Any], source: str, section: str) -> ModelT:
    """Returns the values as `model`; the error of a key that belongs elsewhere in a recipe says where.

    Raises InvalidArgumentError.
    """
    try:
        return validate(model, values, source, section)
    except InvalidArgumentError as error:
        first = error.violations[0]
        hint = first.description.startswith("unknown key") and _find_key(first.field.rpartition(".")[2], section)
        if not hint:
            raise
        raise InvalidArgumentError.for_field(f"{source}: {first.field}", f"unknown key; {hint}") from error


def _find_key(name: str, section: str) -> str:
    """Returns where in a recipe a key of this name stands, those of `section` and the outermost first; "" for none."""
    models: dict[str, type[BaseModel]] = {"": RecipeHead, **{each: config_class(each) for each in _CONFIG_CLASSES}}
    paths = [path for each, model in models.items() for path in key_paths(model, each)]
    found = [path for path in paths if path.rpartition(".")[2] == name]
    if not found:
        return FOREIGN_KEYS.get(name, "")
    ranks = {path: (path.partition(".")[0] not in (section, "run"), path.count("."), "[]" in path) for path in found}
    return f"did you mean {min(found, key=ranks.__getitem__)}?"


def _check_algorithm(run: Any, source: str) -> None:
    """Raises InvalidArgumentError for an algorithm or a setting that the trainer would refuse.

    Without what the trainer's files need, the trainer alone checks them, when the run starts.
    """
    try:
        registry = importlib.import_module("services.trainer.algorithms")
    except ImportError:
        return
    name = run.algorithm.name
    if name not in registry.ALGORITHMS:
        known = ", ".join(sorted(registry.ALGORITHMS))
        why = f"{name!r} is unknown; known are {known}"
        if name in registry.SUPERVISED:
            why = f"{name} trains on a file: write it as the algorithm of a stage of run.sft"
        raise InvalidArgumentError.for_field(f"{source}: run.algorithm.name", why)
    validate(registry.ALGORITHMS[name].Settings, run.algorithm.settings, source, "run.algorithm")
    for number, stage in enumerate(run.sft):
        settings = registry.SUPERVISED[stage.algorithm.name].Settings
        validate(settings, stage.algorithm.settings, source, f"run.sft.{number}.algorithm")


def check_script(recipe: Recipe) -> None:
    """Raises InvalidArgumentError when the recipe's script is missing."""
    script = recipe.prepare_path
    if script is not None and not script.is_file():
        raise InvalidArgumentError.for_field(f"{recipe.path.name}: prepare", f"{script} is no file")


def open_new_run(runs_path: Path, recipe: Recipe) -> tuple[RunFolder, Recipe]:
    """Makes a run folder that holds the expanded recipe; returns both.

    Raises InvalidArgumentError when the folder cannot be made or the recipe's script is missing.
    """
    check_script(recipe)
    run = new_run(runs_path, recipe.head.name)
    run.create()
    return run, _write_recipe(run, recipe.expand(run))


def open_old_run(runs_path: Path, name: str, overrides: list[str]) -> tuple[RunFolder, Recipe]:
    """Returns the run folder that `name` stands for and its recipe, with further overrides.

    Raises InvalidArgumentError when there is no such run, when its stack runs already, or when an override is wrong.
    """
    run = find_run(runs_path, name)
    if (stack := run.read_stack()) is not None:
        raise InvalidArgumentError.for_field(run.run_id, f"is running already, in process {stack.pid}")
    return run, _write_recipe(run, load_recipe(run.recipe_path, overrides))


def _write_recipe(run: RunFolder, recipe: Recipe) -> Recipe:
    write_atomically(run.recipe_path, dump_yaml(recipe.values).encode())
    return recipe


def config_class(section: str) -> type[Model]:
    """Returns the configuration class of a section, imported when it is asked for."""
    module_name, _, class_name = _CONFIG_CLASSES[section].partition(":")
    found = getattr(importlib.import_module(module_name), class_name)
    assert issubclass(found, Model)
    return found  # type: ignore[no-any-return]


def dump_yaml(values: Mapping[str, Any]) -> str:
    """Returns YAML in the order of the keys; what is not ASCII is escaped, since not all of it reads back otherwise."""
    return yaml.safe_dump(dict(values), sort_keys=False)


def map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """Returns a copy of nested mappings and lists with `change` applied to every string value."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: map_strings(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [map_strings(item, change) for item in value]
    return value


def _place_suite(text: str, folder: Path) -> str:
    """Returns the prompt file that a suite is written to, for `suite:NAME`; another text as it is."""
    if not text.startswith(SUITE_PREFIX):
        return text
    suites = importlib.import_module("perigee.cli.eval.suites")
    data_path = Path(os.environ.get(suites.DATA_VARIABLE) or suites.DEFAULT_DATA)
    return str(suites.write_prompt_file(text.removeprefix(SUITE_PREFIX), data_path, folder / "suites"))


def replace_all(text: str, replacements: Mapping[str, str]) -> str:
    """Returns the text with each key of `replacements` replaced by its value."""
    for old, new in replacements.items():
        text = text.replace(old, new)
    return text
