"""`perigee train`: a run from its recipe to its report, on a stack of its own or on a running one."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from perigee.cli.figures import read_evaluation
from perigee.cli.interrupt import Interrupt
from perigee.cli.prepare import open_new_run, open_old_run, prepare_data
from perigee.cli.recipe import Recipe, dump_yaml, find_recipe, load_recipe
from perigee.cli.run_folder import RunFolder, point_latest
from perigee.cli.stack import LocalStack, plan_stack
from perigee.cli.view import View
from perigee.cli.watch import RunRequest, Told, check_end, read_told, start_run, stop_run, watch_run
from perigee.coordinator.client import CoordinatorClient
from perigee.coordinator.v1 import coordinator_pb2 as pb
from perigee.errors import InvalidArgumentError, UnavailableError


@dataclass(frozen=True)
class TrainOptions:
    """What `perigee train` was asked to do; `recipe_path` or `resume` is given."""

    recipe_path: Path | None
    resume: str | None
    overrides: Sequence[str]
    runs_path: Path
    workers: int | None = None
    # host:port of a running coordinator; a stack of the run's own is started when None.
    coordinator: str | None = None


def open_run(options: TrainOptions) -> tuple[RunFolder, Recipe]:
    """The run folder, which `latest` then names, and its checked recipe. Raises InvalidArgumentError."""
    run, recipe = _open_run(options)
    point_latest(run.path)
    return run, recipe


def _open_run(options: TrainOptions) -> tuple[RunFolder, Recipe]:
    if options.resume is not None:
        return open_old_run(options.runs_path, options.resume, list(options.overrides))
    if options.recipe_path is None:
        raise InvalidArgumentError.for_field("RECIPE", "is required, unless --resume names a run")
    recipe = load_recipe(find_recipe(options.recipe_path), options.overrides)
    for section in ("run", "trainer", "rollout"):
        if section not in recipe.values:
            raise InvalidArgumentError.for_field(f"{recipe.path.name}: {section}", "is required to train")
    return open_new_run(options.runs_path, recipe)


async def train(options: TrainOptions, run: RunFolder, recipe: Recipe, view: View, interrupt: Interrupt) -> None:
    """Trains to the end of the run.

    Raises PerigeeError, with what to do, when data cannot be prepared, a service does not start or the run fails.
    """
    view.note(f"run {run.run_id} in {run.path}")
    if recipe.prepare_path is not None and not run.data_path.is_dir():
        view.note(f"preparing data with {recipe.prepare_path.name}")
    await prepare_data(run, recipe)
    request = RunRequest(run.run_id, dump_yaml(recipe.values["run"]), str(run.path))
    async with AsyncExitStack() as stack:
        local: LocalStack | None = None
        address = options.coordinator
        if address is None:
            workers = options.workers or recipe.head.local.workers
            local = LocalStack(run, plan_stack(run, recipe.values, workers), view.note)
            interrupt.end_at_once = local.kill
            view.note(f"starting {len(local.specs)} services (logs: {run.logs_path})")
            await stack.enter_async_context(local)
            stack.callback(view.stopping)
            address = local.addresses["coordinator"]
        client = CoordinatorClient.connect(address, token=os.environ.get("PERIGEE_TOKEN"))
        await stack.enter_async_context(client)
        told = read_told(run.path)
        resumed = await start_run(client, request)
        view.note(f"{'going on with' if resumed else 'training'} {run.run_id}")
        last = await _follow(client, request, told, local, view)
    check_end(last)


async def _follow(
    client: CoordinatorClient, request: RunRequest, told: Told, local: LocalStack | None, view: View
) -> pb.RunSnapshot:
    watching = asyncio.create_task(_show(client, request, told, view))
    tasks: set[asyncio.Task[pb.RunSnapshot] | asyncio.Task[None]] = {watching}
    if local is not None:
        tasks.add(asyncio.create_task(local.supervise()))
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done - {watching}:
            task.result()
        return watching.result()
    except asyncio.CancelledError:
        if not watching.done():
            view.note("stopping the run")
            try:
                await stop_run(client, request.run_id)
            except UnavailableError as error:
                view.note(error.message)
        raise
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _show(client: CoordinatorClient, request: RunRequest, told: Told, view: View) -> pb.RunSnapshot:
    last: pb.RunSnapshot | None = None
    async for response in watch_run(client, request, told, view.note):
        if response.HasField("iteration"):
            view.show_iteration(response.iteration)
        if response.HasField("evaluation"):
            view.show_evaluation(read_evaluation(response.evaluation))
        if response.HasField("run"):
            last = response.run
            view.show(last)
    assert last is not None
    return last
