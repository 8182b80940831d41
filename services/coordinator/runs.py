"""Runs of this process: one at a time, started by request or found unfinished in its folder."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shutil
import time
from collections.abc import AsyncGenerator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from perigee.coordinator.v1 import coordinator_pb2 as pb
from perigee.errors import (
    UNAVAILABLE,
    AbortedError,
    DataLossError,
    FailedPreconditionError,
    FieldViolation,
    InvalidArgumentError,
    NotFoundError,
    PerigeeError,
)
from perigee.files import write_atomically
from perigee.image_sources import IMAGES_FOLDER, ImageStore
from perigee.trainer.v1 import trainer_pb2
from services.coordinator.config import CoordinatorConfig
from services.coordinator.context import Peers, RunContext, RunInputs
from services.coordinator.directory import Directory
from services.coordinator.prompts import make_image_reader, read_problems
from services.coordinator.run import Run
from services.coordinator.run_config import (
    CHANGEABLE_KEYS,
    RunConfig,
    SftStage,
    config_digest,
    parse_run_config,
    to_message,
)
from services.coordinator.run_log import RunLog
from services.coordinator.run_status import Cursor, RunStatus, stream_events
from services.coordinator.workers import WorkerRegistry
from services.kit.chat import encode_examples, open_encoder
from services.kit.hf import ModelFolder, fetch_model, open_model_folder, receive_model_files
from services.kit.storage import Mirror, is_url, join, receive_piece
from services.kit.tasks import finish
from services.kit.telemetry import get_logger
from services.kit.tracing import detached_span

log = get_logger(__name__)

RUN_FILE = "run.json"
# Beside the coordinator's own `run_path`: the run that it served last, whose folder may be elsewhere.
LAST_RUN_FILE = "last_run.json"
TRAINER_POLL_SECONDS = 1.0
# Of a supervised set, within the deadline of a call; the trainer checks the rest when the stage begins.
CHECKED_EXAMPLES = 1000


@dataclass(frozen=True)
class RunFile:
    """Contents of run.json; `status` is `running`, `finished`, `failed` or `stopped`."""

    run_id: str
    config_yaml: str
    config_digest: str
    run_path: str
    status: str


@dataclass
class ActiveRun:
    """Run of this process; its task is done when the run has ended."""

    file: RunFile
    status: RunStatus
    log: RunLog
    task: asyncio.Task[None]


class Runs:
    """Starts, stops and finds runs."""

    def __init__(
        self, settings: CoordinatorConfig, peers: Peers, registry: WorkerRegistry, directory: Directory
    ) -> None:
        self._settings = settings
        self._peers = peers
        self._registry = registry
        self._directory = directory
        self._run: ActiveRun | None = None
        self._starting = asyncio.Lock()
        # By request.
        self._starts: dict[tuple[str, str, str], asyncio.Task[bool]] = {}
        # The coordinator's own folder.
        self._own = None if settings.run_path is None else Mirror(settings.run_path, "coordinator.run_path")

    async def start(self, run_id: str, config_yaml: str, run_path: str) -> bool:
        """Starts or resumes a run; returns whether its folder had it. Asking again for a run under way is harmless.

        Large prompt files take longer to read than a caller may wait: the start goes on without it, and who asks again
        joins it. Raises InvalidArgumentError for a wrong configuration, model folder or prompt file,
        FailedPreconditionError when another run is under way or the run was started with another configuration,
        AbortedError when the run is stopped meanwhile.
        """
        request = (run_id, config_yaml, run_path)
        if request not in self._starts:
            self._starts[request] = asyncio.create_task(self._start(*request))
            self._starts[request].add_done_callback(lambda _: self._starts.pop(request))
        start = self._starts[request]
        await asyncio.wait((start,))
        if start.cancelled():
            raise AbortedError(f"Run {run_id} was stopped while it started.")
        return start.result()

    async def _start(self, run_id: str, config_yaml: str, run_path: str) -> bool:
        folder = self._find_folder(run_id, run_path, config_yaml)
        config = parse_run_config(config_yaml)
        async with self._starting:
            if self._own is not None:
                await asyncio.to_thread(self._own.pull, f"runs/{run_id}")
            known = await asyncio.to_thread(read_run_file, folder / RUN_FILE)
            if self._run is not None and not self._run.task.done():
                if self._run.file.run_id == run_id:
                    return True
                raise FailedPreconditionError(f"Run {self._run.file.run_id} is under way: stop it first.")
            if known is not None:
                check_same_run(known, run_id, config)
            model = await self._find_model(config, folder)
            inputs = await asyncio.to_thread(read_inputs, run_id, config, folder, model, self._export_path(folder))
            await self._check_algorithm(inputs)
            file = RunFile(run_id, config_yaml, config_digest(config), str(inputs.run_path), "running")
            # Cut between the two, run.json would tell of a run that nobody runs, nor can stop.
            await finish(self._begin(file, inputs))
        return known is not None

    async def _begin(self, file: RunFile, inputs: RunInputs) -> None:
        await asyncio.to_thread(self._save, file)
        self._launch(file, inputs)

    async def put_file(self, run_id: str, run_path: str, piece: trainer_pb2.FilePiece) -> str:
        """Takes a piece of a file of a run; returns its path when the file is whole, empty before."""
        return await asyncio.to_thread(receive_piece, self._find_folder(run_id, run_path) / "inputs", piece)

    def _find_folder(self, run_id: str, run_path: str, config_yaml: str | None = None) -> Path:
        """Returns the folder of a run: the caller's where this machine sees it, else one in the coordinator's own.

        Raises InvalidArgumentError with a violation per wrong field.
        """
        own = self._own
        check_request(run_id, config_yaml, run_path if own is None else run_path or str(own.path))
        if own is None or (own.url is None and (Path(run_path) == own.path or (run_path and Path(run_path).is_dir()))):
            return Path(run_path)
        return own.path / "runs" / run_id

    def _export_path(self, folder: Path) -> str:
        """Returns where the trainer exports to: into the folder that a caller shares, else wherever it keeps models."""
        if self._own is None or folder.parent != self._own.path / "runs":
            return str(folder / "model")
        return join(self._own.url, "runs", folder.name, "model") if self._own.url else ""

    async def resume(self) -> None:
        """Resumes the run of the coordinator's own folder, or the one that it served last, unless it ended."""
        own = self._own
        if own is None:
            return
        for name in (LAST_RUN_FILE, RUN_FILE):
            await asyncio.to_thread(own.pull, name)
            file = await asyncio.to_thread(read_run_file, own.path / name)
            if file is not None and file.status == "running":
                await self.start(file.run_id, file.config_yaml, file.run_path)
                return

    async def stop(self, run_id: str) -> None:
        """Ends a run or its start at once; the buffer keeps what is needed to resume it.

        Stopping an ended run changes nothing. Raises NotFoundError for one that is not here.
        """
        was_starting = await self._end_starts(run_id)
        if was_starting and (self._run is None or self._run.file.run_id != run_id):
            return
        run = self._find(run_id)
        if run.task.done():
            return
        run.task.cancel()
        await asyncio.wait([run.task])
        await asyncio.to_thread(self._save, replace(run.file, status="stopped"))
        run.status.enter(pb.RUN_PHASE_STOPPED)

    async def end_watches(self) -> None:
        """Ends the watches with UnavailableError: their calls would last as long as the run."""
        if self._run is not None:
            self._run.status.close()

    async def close(self) -> None:
        """Ends the run under way without calling it stopped, so that the next process resumes it."""
        await self._end_starts()
        if self._run is not None:
            self._run.task.cancel()
            await asyncio.wait([self._run.task])

    async def _end_starts(self, run_id: str | None = None) -> bool:
        """Ends the starts under way, those of one run when it is named; returns whether there were any."""
        starts = [start for (name, *_), start in self._starts.items() if run_id in (None, name)]
        for start in starts:
            start.cancel()
        if starts:
            await asyncio.wait(starts)
        return bool(starts)

    def watch(self, run_id: str, cursor: Cursor, events: bool) -> AsyncGenerator[pb.WatchRunResponse, None]:
        """Streams the events of a run after the cursor; of the newest run when no id is given. Raises NotFoundError."""
        run = self._find(run_id)
        return stream_events(run.status, run.log, cursor, events)

    def status(self, run_id: str) -> RunStatus | None:
        """Returns the status of a run; of the newest run, if any, when no id is given. Raises NotFoundError."""
        return self._find(run_id).status if run_id or self._run is not None else None

    def _find(self, run_id: str) -> ActiveRun:
        if self._run is None or (run_id and self._run.file.run_id != run_id):
            raise NotFoundError(f"This coordinator has no run {run_id}." if run_id else "This coordinator has no run.")
        return self._run

    def _save(self, file: RunFile) -> None:
        """Writes run.json atomically, and the same into the coordinator's own folder where that is another."""
        data = f"{json.dumps(asdict(file), indent=2)}\n".encode()
        write_atomically(Path(file.run_path) / RUN_FILE, data)
        if self._own is not None and self._own.path != Path(file.run_path):
            write_atomically(self._own.path / LAST_RUN_FILE, data)
        self._publish(Path(file.run_path))

    def _publish(self, folder: Path) -> None:
        """Publishes what changed in a run's folder; a failure is told, and made good with the next change."""
        try:
            if self._own is not None and folder.is_relative_to(self._own.path):
                self._own.push(folder)
        except PerigeeError as error:
            log.warning("the run's folder is on this machine only", path=str(folder), error=error.message)

    def _launch(self, file: RunFile, inputs: RunInputs) -> None:
        status = RunStatus(inputs.run_id, inputs.config.iterations, self._registry)
        self._registry.report = status.report
        run_log = RunLog(inputs.run_path, lambda: self._publish(inputs.run_path))
        context = RunContext(inputs, self._settings, self._peers, self._registry, self._directory, status, run_log)
        self._run = ActiveRun(file, status, run_log, asyncio.create_task(self._execute(file, context)))

    async def _find_model(self, config: RunConfig, folder: Path) -> str:
        """Returns a folder with configuration and tokenizer of the base model.

        It is the trainer's unless one is named that this machine has.
        """
        if config.model is not None and is_in_reach(config.model):
            return await asyncio.to_thread(fetch_model, config.model, "run.model", config.rope)
        target = folder / "base_model"
        if not target.is_dir():
            await self._receive_model(target)
        open_model_folder(target, "run.model").require_rope(config.rope, "run.rope")
        return str(target)

    async def _receive_model(self, target: Path) -> None:
        """Takes the trainer's model; waits for a trainer that is not there yet for `recovery_wait_s` at most."""
        deadline = time.monotonic() + self._settings.recovery_wait_s
        while True:
            files = self._peers.trainer.read_model_files(trainer_pb2.ReadModelFilesRequest())
            try:
                return await receive_model_files(files, target)
            except UNAVAILABLE as error:
                if time.monotonic() > deadline:
                    raise
                log.warning("waiting for the trainer, which has the model", error=error.message)
            await asyncio.sleep(TRAINER_POLL_SECONDS)

    async def _check_algorithm(self, inputs: RunInputs) -> None:
        """Has the trainer check the settings that only it knows; one that is away checks them with its first job."""
        config = inputs.config
        prompt_tokens = max(prompt.tokens for prompt in inputs.prompts.values())
        requests = {"run": config.algorithm_request(prompt_tokens + config.rollout.max_response_tokens)}
        for number, stage in enumerate(config.sft):
            requests[f"run.sft.{number}"] = trainer_pb2.CheckAlgorithmRequest(
                algorithm=stage.algorithm.message(),
                optimizer=to_message(stage.optimizer, trainer_pb2.Optimizer()),
                supervised=True,
            )
        timeout_s = self._settings.control_timeout_s
        for section, request in requests.items():
            try:
                response = await self._peers.trainer.check_algorithm(request, timeout_s=timeout_s)
                log.info("algorithm", name=response.algorithm.name, settings=dict(response.algorithm.settings))
            except UNAVAILABLE as error:
                log.warning("the algorithm's settings were not checked", error=error.message)
                return
            except InvalidArgumentError as error:
                violations = [recipe_violation(section, each) for each in error.violations]
                raise InvalidArgumentError.for_fields(violations) from error

    async def _execute(self, file: RunFile, context: RunContext) -> None:
        """Runs to the end. Errors do not leave this task: they are shown in the status and in run.json."""
        try:
            with detached_span("run", run=file.run_id):
                await Run(context).execute()
            await asyncio.to_thread(self._save, replace(file, status="finished"))
            context.status.enter(pb.RUN_PHASE_FINISHED)
        except Exception as error:
            expected = isinstance(error, PerigeeError)
            message = error.message if isinstance(error, PerigeeError) else f"{type(error).__name__}: {error}"
            log.error("run failed", run=file.run_id, error=message, exc_info=None if expected else error)
            with contextlib.suppress(OSError):
                # A full disk must not hide why the run failed.
                await asyncio.to_thread(self._save, replace(file, status="failed"))
            context.status.fail(message)
        finally:
            context.log.close()


def check_request(run_id: str, config_yaml: str | None, run_path: str) -> None:
    """Raises InvalidArgumentError with a violation per wrong field; None is a request without configuration."""
    violations = []
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", run_id):
        violations.append(FieldViolation("run_id", "must be 1 to 128 letters, digits, dots, dashes and underscores"))
    if config_yaml is not None and not config_yaml.strip():
        violations.append(FieldViolation("config_yaml", "is required"))
    if not Path(run_path).is_absolute():
        violations.append(FieldViolation("run_path", f"must be an absolute path, got {run_path!r}"))
    if violations:
        raise InvalidArgumentError.for_fields(violations)


def check_same_run(known: RunFile, run_id: str, config: RunConfig) -> None:
    """Raises FailedPreconditionError when the folder has another run, or the run another configuration."""
    if known.run_id != run_id:
        raise FailedPreconditionError(f"{known.run_path} is the folder of run {known.run_id}: choose another run_path.")
    if known.config_digest != config_digest(config):
        raise FailedPreconditionError(
            f"Run {run_id} was started with another configuration, see {known.run_path}/{RUN_FILE}: "
            f"only {', '.join(CHANGEABLE_KEYS)} may change."
        )


def recipe_violation(section: str, violation: FieldViolation) -> FieldViolation:
    """Returns a violation of the trainer under the key that the field has in a section of the recipe."""
    key = violation.field.replace("algorithm.settings.", "algorithm.", 1)
    return FieldViolation(f"{section}.{key}", violation.description)


def is_in_reach(folder: str) -> bool:
    """Returns whether a folder is a URL or on this machine."""
    return is_url(folder) or Path(folder).is_dir()


def read_inputs(
    run_id: str,
    config: RunConfig,
    run_path: Path,
    model_path: str,
    export_path: str,
    examples: int | None = CHECKED_EXAMPLES,
    keep_images: bool = True,
) -> RunInputs:
    """Checks and reads the files of a run, before anything is started; of supervised sets the first `examples`. The
    images of prompts are kept in the run's folder, or only checked.
    """
    model = open_model_folder(model_path, "run.model")
    encoder = open_encoder(model, config.chat_message())
    for number, stage in enumerate(config.sft):
        if not is_url(stage.dataset):
            encode_examples(
                Path(stage.dataset),
                f"run.sft.{number}.dataset",
                encoder,
                stage_limit(stage, model, f"run.sft.{number}"),
                examples,
                stage.algorithm.name,
                make_image_reader(stage.dataset, config.images),
            )
    images = ImageStore(run_path / IMAGES_FOLDER)
    was_there = images.folder.exists()
    try:
        prompts, heldout = read_problems(config, encoder, images if keep_images else None)
    except BaseException:
        if not was_there and images.folder.exists():
            # A run that does not start leaves nothing.
            shutil.rmtree(images.folder)
            with contextlib.suppress(OSError):
                run_path.rmdir()
        raise
    return RunInputs(run_id, run_path, export_path, config, encoder.tokenizer, prompts, heldout, images)


def stage_limit(stage: SftStage, model: ModelFolder, field: str) -> int:
    """Returns the tokens that an example of a supervised stage may have; raises InvalidArgumentError for too many."""
    context = (model if stage.rope is None else model.with_rope(stage.rope, f"{field}.rope")).context_tokens
    limit = stage.max_sequence_length or context
    if limit > context:
        raise InvalidArgumentError.for_field(
            f"{field}.max_sequence_length", f"{limit} is more than the {context} positions of the stage's model"
        )
    return limit


def read_run_file(path: Path) -> RunFile | None:
    """Reads run.json; None when there is none. Raises DataLossError when it cannot be read."""
    if not path.exists():
        return None
    try:
        return RunFile(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise DataLossError(f"{path} cannot be read: {error}") from error
