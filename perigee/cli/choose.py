"""`perigee choose`: the checkpoint of a run with the best balance of accuracy and length, and a recipe from there."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from perigee.cli.recipe import MODEL_SECTIONS, RUN_FOLDER_VALUES, build_recipe, config_class, dump_yaml, load_recipe
from perigee.cli.run_folder import RunFolder
from perigee.config import merge, parse_override, validate
from perigee.errors import AlreadyExistsError
from perigee.files import write_atomically
from perigee.report.choice import Choice, choose_version, read_candidates

# The weight of the length reward where neither the run nor the caller has one.
LENGTH_WEIGHT = 0.5


def choose_checkpoint(run: RunFolder, max_loss: float) -> tuple[Choice, Path]:
    """Chooses among the evaluated versions that have a checkpoint; returns the choice and the model folder of it.

    Raises InvalidArgumentError when there is none, and what `find_checkpoint` raises.
    """
    kept = {0, *_open_checkpoints(run).versions(run.run_id)}
    choice = choose_version(read_candidates(run.path), max_loss, kept)
    return choice, find_checkpoint(run, choice.chosen.policy_version)


def find_checkpoint(run: RunFolder, version: int) -> Path:
    """Returns the model folder of a policy version of a run: its checkpoint, for version 0 the model it began with.

    Raises NotFoundError when there is no such checkpoint, DataLossError for a damaged one.
    """
    from services.kit.hf import fetch_model

    checkpoints = _open_checkpoints(run)
    folder: Path = checkpoints.fetch(run.run_id, checkpoints.find(run.run_id, version))
    if folder != checkpoints.source:
        return folder
    config = _trainer_config(run)
    return Path(fetch_model(config.model, "trainer.model", config.rope, weights=True))


def make_short_recipe(run: RunFolder, model: Path, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the recipe of long2short reinforcement learning from a model that the run has trained.

    It is the run's without supervised stages and curriculum, with the length reward on and half of the cap on response
    tokens; evaluations keep the cap that they had. `changes` are keys of its `run` section that are to differ.
    """
    values: dict[str, Any] = copy.deepcopy(dict(load_recipe(run.recipe_path).values))
    begin_second_phase(values["run"], changes, run.recipe_path.name)
    values.pop("prepare", None)
    values |= {"name": f"{values.get('name', 'run')}-short", "model": str(model)}
    for part in MODEL_SECTIONS:
        values.get(part, {}).pop("model", None)
    for part, keys in RUN_FOLDER_VALUES.items():
        for key, placed in keys.items():
            if values.get(part, {}).get(key) == placed.replace("{run}", str(run.path)):
                del values[part][key]
    return values


def begin_second_phase(section: dict[str, Any], changes: Mapping[str, Any], source: str) -> None:
    """Turns the section `run` of a recipe into that of long2short reinforcement learning (k1.5 section 2.4), in place.

    Raises InvalidArgumentError when a key of it is wrong, naming `source`.
    """
    config: Any = validate(config_class("run"), section, source, "run")
    cap = config.rollout.max_response_tokens
    for key in ("sft", "warmup", "curriculum"):
        section.pop(key, None)
    evaluation_cap = config.evaluation.max_response_tokens or cap
    weight = config.length_reward.weight or LENGTH_WEIGHT
    merge(section, {"rollout": {"max_response_tokens": max(1, cap // 2)}})
    merge(section, {"evaluation": {"max_response_tokens": evaluation_cap}})
    section["length_reward"] = {"weight": weight}
    merge(section, changes)
    penalty = section.get("overlong_penalty", {})
    if (penalty.get("cap") or 0) > section["rollout"]["max_response_tokens"]:
        del penalty["cap"]


def write_short_recipe(run: RunFolder, model: Path, overrides: Sequence[str], target: Path) -> None:
    """Writes the recipe of `make_short_recipe` with `a.b=c` overrides.

    Raises InvalidArgumentError for an override that is wrong, AlreadyExistsError where another file is.
    """
    given: dict[str, Any] = {}
    for override in overrides:
        merge(given, parse_override(override))
    values = make_short_recipe(run, model, given.pop("run", {}))
    merge(values, given)
    build_recipe(target, copy.deepcopy(values), ())  # checks it; what it adds belongs to a run's own folder
    content = dump_yaml(values).encode()
    if target.exists() and target.read_bytes() != content:
        raise AlreadyExistsError(f"{target} exists with other contents: remove it, or name another --recipe")
    write_atomically(target, content)


def _trainer_config(run: RunFolder) -> Any:
    values = load_recipe(run.recipe_path).values.get("trainer") or {}
    return validate(config_class("trainer"), values, run.recipe_path.name, "trainer")


def _open_checkpoints(run: RunFolder) -> Any:
    from services.trainer.checkpoints import Checkpoints

    return Checkpoints.of(_trainer_config(run))
