"""Makes the folder of a run ready: folder, expanded recipe, and the data that the recipe's script makes."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perigee.cli.recipe import Recipe, check_recipe, dump_yaml, load_recipe
from perigee.cli.run_folder import RunFolder, find_run, new_run, write_atomic
from perigee.cli.stack import start_guarded
from perigee.errors import FailedPreconditionError, InvalidArgumentError


def open_new_run(runs_path: Path, recipe: Recipe) -> tuple[RunFolder, Recipe]:
    """A new run folder that holds the expanded recipe; returns both.

    Raises InvalidArgumentError when the folder cannot be made or the recipe's script is missing.
    """
    script = recipe.prepare_path
    if script is not None and not script.is_file():
        raise InvalidArgumentError.for_field(f"{recipe.path.name}: prepare", f"{script} is no file")
    run = new_run(runs_path, recipe.head.name)
    run.create()
    return run, _write_recipe(run, recipe.expand(run.path))


def open_old_run(runs_path: Path, name: str, overrides: list[str]) -> tuple[RunFolder, Recipe]:
    """The run folder that `name` stands for and its recipe, with further overrides laid over it.

    Raises InvalidArgumentError when there is no such run, when its stack runs already, or when an override is wrong.
    """
    run = find_run(runs_path, name)
    if (stack := run.read_stack()) is not None:
        raise InvalidArgumentError.for_field(run.run_id, f"is running already, in process {stack.pid}")
    return run, _write_recipe(run, load_recipe(run.recipe_path, overrides).values)


async def prepare_data(run: RunFolder, recipe: Recipe) -> None:
    """Runs the recipe's script once per run; the data folder appears when the script has succeeded.

    Raises FailedPreconditionError with the last error of the script's log.
    """
    if run.data_path.is_dir():
        return
    staging = run.path / ".data.partial"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    if recipe.prepare_path is not None:
        arguments = [sys.executable, str(recipe.prepare_path), "--out", str(staging), "--seed", str(recipe.seed)]
        process = await start_guarded("prepare", arguments, run.logs_path / "prepare.log")
        try:
            code = await process.wait()
        finally:
            await process.stop()
        if code != 0:
            raise FailedPreconditionError(process.describe_end(code))
    staging.rename(run.data_path)


def _write_recipe(run: RunFolder, values: Mapping[str, Any]) -> Recipe:
    recipe = check_recipe(run.recipe_path, values)
    write_atomic(run.recipe_path, dump_yaml(values))
    return recipe
