"""`perigee train` and `perigee up`: starts the stack, follows the run at its coordinator, ends the stack."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perigee.cli.check import check_inputs
from perigee.cli.ending import Interrupt
from perigee.cli.metrics import read_evaluation
from perigee.cli.recipe import (
    SERVICES,
    Recipe,
    check_script,
    dump_yaml,
    find_recipe,
    load_recipe,
    open_new_run,
    open_old_run,
)
from perigee.cli.run_folder import RunFolder, point_latest
from perigee.cli.stack import LocalStack, plan_stack, start_guarded
from perigee.cli.trackers import Trackers
from perigee.cli.view import View
from perigee.config import validate
from perigee.coordinator.client import CoordinatorClient
from perigee.coordinator.v1 import coordinator_pb2 as pb
from perigee.errors import (
    UNAVAILABLE,
    CancelledError,
    DeadlineExceededError,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    PerigeeError,
    UnavailableError,
)
from perigee.files import append_lines, write_atomically
from perigee.image_sources import ImageReader, embed_images
from perigee.report.records import last_recorded
from perigee.report.samples import SAMPLES_FILE
from perigee.reward.sources import image_base
from perigee.rpc import ChannelOptions
from services.coordinator.run_config import ImagesConfig

# What runs without a recipe: these need no model.
MODEL_FREE = ("buffer", "sandbox", "reward")
# A snapshot in one of these is the last.
ENDED = (pb.RUN_PHASE_FINISHED, pb.RUN_PHASE_FAILED, pb.RUN_PHASE_STOPPED)
# One stream lasts this long at most; the next one continues it.
STREAM_S = 3600.0
# A trainer that is starting is waited for.
START_S = 330.0
RECONNECT_S = 1.0
# Without a snapshot for so long the coordinator is given up.
SILENCE_S = 300.0
# Keys of a run section that name files, or hold what does.
FILE_KEYS = ("prompts", "heldout", "sources", "path", "sft", "dataset")
# What calls end with while the coordinator is away, or back without the run.
_COORDINATOR_AWAY = (*UNAVAILABLE, DeadlineExceededError, NotFoundError, CancelledError)


@dataclass
class Cursor:
    """Position in a run's event stream: numbers of the last iteration and evaluation received, 0 for none."""

    iteration: int = 0
    evaluation: int = 0


async def start_run(
    client: CoordinatorClient, request: pb.StartRunRequest, note: Callable[[str], None], away_s: float = 0.0
) -> bool:
    """Starts the run, however long its files take to read; returns whether it is resumed.

    A coordinator that is away is asked again for `away_s`.
    """
    deadline = time.monotonic() + away_s
    while True:
        try:
            return (await client.start_run(request, timeout_s=START_S)).resumed
        except DeadlineExceededError:
            note("the coordinator still reads the run's model and prompts")
        except (*UNAVAILABLE, CancelledError):
            if time.monotonic() >= deadline:
                raise
            await asyncio.sleep(RECONNECT_S)


async def watch_run(
    client: CoordinatorClient, request: pb.StartRunRequest, cursor: Cursor, note: Callable[[str], None]
) -> AsyncIterator[pb.WatchRunResponse]:
    """Yields the events of a started run: snapshots, the last of them in a phase of ENDED, and each iteration and
    evaluation after `cursor` once and in order, those that ended while the coordinator was away included.

    A coordinator that is back is asked to resume the run; raises UnavailableError when it stays away for SILENCE_S.
    """
    received_at = time.monotonic()
    while True:
        try:
            watch = pb.WatchRunRequest(
                run_id=request.run_id,
                after_iteration=cursor.iteration,
                after_evaluation=cursor.evaluation,
                events=True,
            )
            async for response in client.watch_run(watch, timeout_s=STREAM_S):
                received_at = time.monotonic()
                if response.HasField("iteration"):
                    cursor.iteration = response.iteration.iteration
                if response.HasField("evaluation"):
                    cursor.evaluation = response.evaluation.number
                yield response
                if response.run.phase in ENDED:
                    return
            error: PerigeeError = UnavailableError("the coordinator ended the stream")
        except _COORDINATOR_AWAY as away:
            error = away
        if time.monotonic() - received_at > SILENCE_S:
            raise UnavailableError(f"no event of run {request.run_id} for {SILENCE_S:g} s: {error.message}") from error
        await asyncio.sleep(RECONNECT_S)
        try:
            await start_run(client, request, note)
            note("watching the run again")
        except _COORDINATOR_AWAY as away:
            error = away


async def send_files(
    client: CoordinatorClient, request: pb.StartRunRequest, section: Mapping[str, Any]
) -> dict[str, Any]:
    """Sends the files that a run section names to the coordinator; returns the section with their paths there.

    Images that their lines name by paths are sent in them. Names that are no files of this machine stay: they are URLs,
    or the coordinator's. Raises InvalidArgumentError for a folder, which is not sent.
    """
    limits = validate(ImagesConfig, section.get("images") or {}, "run", "images").limits

    async def send(value: Any, columns: Mapping[str, str]) -> Any:
        """Returns a name, or what holds names, as the coordinator has it."""
        if isinstance(value, list):
            return [await send(each, columns) for each in value]
        if isinstance(value, Mapping):
            columns = value.get("columns") or {}
            return {key: await send(part, columns) if key in FILE_KEYS else part for key, part in value.items()}
        if not is_file_here(value):
            return value
        with tempfile.TemporaryDirectory() as folder:
            read = ImageReader(image_base(value), limits)
            path = await asyncio.to_thread(embed_images, Path(value), read, "run", Path(folder, "lines"), columns)
            return await client.put_file(path, request.run_id, request.run_path)

    sent: dict[str, Any] = await send(section, {})
    return sent


def is_file_here(name: str) -> bool:
    """Returns whether a name is that of a file of this machine; raises InvalidArgumentError for a folder."""
    if Path(name).is_dir():
        raise InvalidArgumentError.for_field(
            "run", f"{name} is a folder, and a coordinator elsewhere is sent files: name a file or a URL"
        )
    return Path(name).is_file()


@dataclass(frozen=True)
class Recorder:
    """Records of a run in its folder, from the events of its coordinator, which has the folder elsewhere."""

    path: Path

    def add(self, event: pb.WatchRunResponse) -> None:
        """Writes what an event brings."""
        samples = [*event.iteration.samples, *event.evaluation.samples]
        if samples:
            append_lines(self.path / SAMPLES_FILE, map(json.loads, samples))
        if event.iteration.record:
            append_lines(self.path / "metrics.jsonl", [json.loads(event.iteration.record)])
        if event.evaluation.record:
            append_lines(self.path / "evaluations.jsonl", [json.loads(event.evaluation.record)])
        if event.HasField("summary"):
            write_atomically(self.path / "summary.json", event.summary.encode())


def check_end(snapshot: pb.RunSnapshot) -> None:
    """Raises InternalError with the coordinator's reason unless the run has finished."""
    if snapshot.phase == pb.RUN_PHASE_FAILED:
        raise InternalError(f"run {snapshot.run_id} failed: {snapshot.error or 'the coordinator gave no reason'}")
    if snapshot.phase == pb.RUN_PHASE_STOPPED:
        raise InternalError(f"run {snapshot.run_id} was stopped at iteration {snapshot.iteration}")


@dataclass(frozen=True)
class TrainOptions:
    """Arguments of `perigee train`; `recipe_path` or `resume` is given."""

    recipe_path: Path | None
    resume: str | None
    overrides: Sequence[str]
    runs_path: Path
    workers: int | None = None
    # host:port of a running coordinator; a stack of the run's own is started when None.
    coordinator: str | None = None
    # How `coordinator` is reached.
    channel: ChannelOptions = field(default_factory=ChannelOptions)


def open_run(options: TrainOptions) -> tuple[RunFolder, Recipe]:
    """Returns the run folder, to which `latest` then points, and its checked recipe. Raises InvalidArgumentError."""
    if options.resume is not None:
        run, recipe = open_old_run(options.runs_path, options.resume, list(options.overrides))
    elif options.recipe_path is not None:
        recipe = load_recipe(find_recipe(options.recipe_path), options.overrides)
        for section in ("run", "trainer", "rollout"):
            if section not in recipe.values:
                raise InvalidArgumentError.for_field(f"{recipe.path.name}: {section}", "is required to train")
        run, recipe = open_new_run(options.runs_path, recipe)
    else:
        raise InvalidArgumentError.for_field("RECIPE", "is required, unless --resume names a run")
    point_latest(run.path)
    return run, recipe


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


async def prepare(recipe: Recipe, run: RunFolder) -> None:
    """Makes the recipe's data in a folder, and last its recipe.yaml without script and placeholders.

    Data that is there already is kept. Raises what `prepare_data` raises, and InvalidArgumentError without a script.
    """
    check_script(recipe)
    run.create()
    expanded = recipe.expand(run)
    await prepare_data(run, expanded)
    values = {key: value for key, value in expanded.values.items() if key != "prepare"}
    write_atomically(run.recipe_path, dump_yaml(values).encode())


async def train(options: TrainOptions, run: RunFolder, recipe: Recipe, view: View, interrupt: Interrupt) -> None:
    """Trains to the end of the run.

    Raises PerigeeError, with what to do, when data cannot be prepared, a service does not start or the run fails.
    """
    view.note(f"run {run.run_id} in {run.path}")
    if recipe.prepare_path is not None and not run.data_path.is_dir():
        view.note(f"preparing data with {recipe.prepare_path.name}")
    await prepare_data(run, recipe)
    if options.coordinator is None:  # elsewhere the services have files of their own, which the coordinator checks
        for line in await asyncio.to_thread(check_inputs, recipe, options.workers):
            view.note(line)
    trackers = Trackers(run.path, recipe.values, view.note)
    config_yaml = dump_yaml(recipe.values["run"])
    request = pb.StartRunRequest(run_id=run.run_id, config_yaml=config_yaml, run_path=str(run.path))
    async with AsyncExitStack() as stack:
        stack.push_async_callback(trackers.close)
        await asyncio.to_thread(trackers.open, recipe.head.trackers)
        local: LocalStack | None = None
        address, channel = options.coordinator, options.channel
        if address is None:
            workers = options.workers or recipe.head.local.workers
            local = LocalStack(run, plan_stack(run, recipe.values, workers), view.note)
            interrupt.end_at_once = local.kill
            view.note(f"starting {len(local.specs)} services (logs: {run.logs_path})")
            await stack.enter_async_context(local)
            stack.callback(view.note, "stopping the services")
            [coordinator] = [spec for spec in local.specs if spec.service == "coordinator"]
            address, channel = coordinator.address, coordinator.channel
        client = CoordinatorClient(address, channel)
        await stack.enter_async_context(client)
        # Read before the run is started, which records more: a resumed run shows nothing twice.
        cursor = Cursor(*last_recorded(run.path))
        if local is None:
            request.config_yaml = dump_yaml(await send_files(client, request, recipe.values["run"]))
        # One of this stack is started again when it dies.
        away_s = 0.0 if local is None else SILENCE_S
        show = _show(client, request, cursor, view, trackers, away_s)
        last = await _follow(show, client, request.run_id, local, view)
    check_end(last)


async def _follow(
    show: Coroutine[Any, Any, pb.RunSnapshot],
    client: CoordinatorClient,
    run_id: str,
    local: LocalStack | None,
    view: View,
) -> pb.RunSnapshot:
    events = asyncio.create_task(show)
    tasks: set[asyncio.Task[pb.RunSnapshot] | asyncio.Task[None]] = {events}
    if local is not None:
        tasks.add(asyncio.create_task(local.supervise()))
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done - {events}:
            task.result()
        return events.result()
    except asyncio.CancelledError:
        if not events.done():
            view.note("stopping the run")
            try:
                await client.stop_run(pb.StopRunRequest(run_id=run_id))
            except PerigeeError as error:
                view.note(error.message)
        raise
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _show(
    client: CoordinatorClient,
    request: pb.StartRunRequest,
    cursor: Cursor,
    view: View,
    trackers: Trackers,
    away_s: float,
) -> pb.RunSnapshot:
    resumed = await start_run(client, request, view.note, away_s)
    view.note(f"{'going on with' if resumed else 'training'} {request.run_id}")
    # A coordinator that has this folder wrote its run.json here, and writes the records.
    path = Path(request.run_path)
    recorder = None if (path / "run.json").exists() else Recorder(path)
    last: pb.RunSnapshot | None = None
    async for response in watch_run(client, request, cursor, view.note):
        if recorder is not None:
            recorder.add(response)
        if response.HasField("iteration"):
            view.show_iteration(response.iteration)
        if response.HasField("evaluation"):
            view.show_evaluation(read_evaluation(response.evaluation))
        if response.HasField("iteration") or response.HasField("evaluation"):
            trackers.update()
        if response.HasField("event"):
            view.note(response.event.text)
        if response.HasField("run"):
            last = response.run
            view.show(last)
    assert last is not None
    return last


def choose_services(has_recipe: bool, only: Sequence[str]) -> list[str]:
    """Returns the services to start: those asked for, else all with a recipe, else those that need no model.

    Raises InvalidArgumentError when one is unknown or needs a recipe.
    """
    for name in only:
        if name not in SERVICES:
            raise InvalidArgumentError.for_field("--only", f"{name} is no service; choose from {', '.join(SERVICES)}")
    chosen = only or (SERVICES if has_recipe else MODEL_FREE)
    if not has_recipe and (needy := [name for name in chosen if name not in MODEL_FREE]):
        raise InvalidArgumentError.for_field("RECIPE", f"is required to start {', '.join(needy)}")
    return [name for name in SERVICES if name in chosen]


async def up(
    run: RunFolder, recipe: Recipe, services: Sequence[str], workers: int, view: View, interrupt: Interrupt
) -> None:
    """Starts the services and keeps them up, checked as `train` checks them where the recipe has a run.

    Raises InvalidArgumentError for what is wrong, UnavailableError when a service cannot be kept.
    """
    await prepare_data(run, recipe)
    if "run" in recipe.values and {"trainer", "rollout"} <= {*services}:
        for line in await asyncio.to_thread(check_inputs, recipe, workers):
            view.note(line)
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
