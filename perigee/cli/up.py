"""`perigee up`: the local stack, until it is told to end."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from perigee.cli.interrupt import Interrupt
from perigee.cli.prepare import prepare_data
from perigee.cli.recipe import RECIPE_FILE, SERVICES, Recipe, build_recipe, find_recipe, load_recipe
from perigee.cli.run_folder import RunFolder
from perigee.cli.stack import LocalStack, plan_stack
from perigee.cli.view import View
from perigee.errors import InvalidArgumentError

# What runs without a recipe: these need no model.
MODEL_FREE = ("buffer", "sandbox", "reward")


def choose_services(recipe: Recipe | None, only: Sequence[str]) -> list[str]:
    """The services to start: those asked for, else all with a recipe, else those that need no model.

    Raises InvalidArgumentError when one is unknown or needs a recipe.
    """
    for name in only:
        if name not in SERVICES:
            raise InvalidArgumentError.for_field("--only", f"{name} is no service; choose from {', '.join(SERVICES)}")
    chosen = only or (SERVICES if recipe else MODEL_FREE)
    if recipe is None and (needy := [name for name in chosen if name not in MODEL_FREE]):
        raise InvalidArgumentError.for_field("RECIPE", f"is required to start {', '.join(needy)}")
    return [name for name in SERVICES if name in chosen]


def find_up_recipe(path: Path | None, overrides: Sequence[str]) -> Recipe | None:
    """The recipe named, else the one in the working folder, else none."""
    if path is not None or Path(RECIPE_FILE).is_file():
        return load_recipe(find_recipe(path or Path(RECIPE_FILE)), overrides)
    return None


def empty_recipe(overrides: Sequence[str]) -> Recipe:
    """A recipe with nothing but overrides, for services that need none."""
    return build_recipe(Path("--set"), {"name": "up"}, overrides)


async def up(
    run: RunFolder, recipe: Recipe, services: Sequence[str], workers: int, view: View, interrupt: Interrupt
) -> None:
    """Starts the services and keeps them up; raises UnavailableError when one cannot be kept."""
    await prepare_data(run, recipe)
    local = LocalStack(run, plan_stack(run, recipe.values, workers, services), view.note)
    interrupt.end_at_once = local.kill
    view.note(f"starting {', '.join(spec.name for spec in local.specs)} (logs: {run.logs_path})")
    try:
        async with local:
            view.note("all services are ready; Ctrl-C ends them")
            await local.supervise()
    except asyncio.CancelledError:
        view.note("all services have ended")
        raise
