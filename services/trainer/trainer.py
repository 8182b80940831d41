"""The trainer as its service sees it: the loaded version, one job at a time, checkpoints, pushes, repeated requests."""

from __future__ import annotations

import asyncio
import concurrent.futures
import signal
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar

import torch
from prometheus_client import Counter, Gauge

from perigee.buffer.client import BufferClient
from perigee.errors import CancelledError, FailedPreconditionError, InvalidArgumentError, UnavailableError
from perigee.trainer.v1 import trainer_pb2 as pb
from services.kit import storage
from services.kit.hf import open_model_folder
from services.kit.telemetry import get_logger
from services.kit.vision import open_vision
from services.trainer.checkpoints import Checkpoints, run_name
from services.trainer.config import TrainerConfig
from services.trainer.data import Trajectory, read_examples, read_trajectories
from services.trainer.engine import (
    CollectCommand,
    Command,
    Engine,
    ExportCommand,
    FineTuneCommand,
    LoadCommand,
    OffloadCommand,
    OnloadCommand,
    Sink,
    StopCommand,
)
from services.trainer.fine_tuning import Example, check_fine_tuning, count_tokens, stage_rope
from services.trainer.hf import write_folder
from services.trainer.training import check_training
from services.weights.lend import LentImage, WeightSource
from services.weights.manifest import WeightImage, export_image
from services.weights.pieces import join_exports
from services.weights.send import WeightSender

log = get_logger(__name__)

# Cap of the importance weights where rounding sets rollout and trainer apart, unless the recipe has one.
BFLOAT16_TIS_CAP = 2.0
ResultT = TypeVar("ResultT")

POLICY_VERSION = Gauge("perigee_trainer_policy_version", "Version of the policy that the trainer has loaded.")
TOKENS = Counter("perigee_trainer_trained_tokens", "Response tokens that took part in a loss.")
TRAJECTORIES = Counter("perigee_trainer_trajectories", "Trajectories trained on.")
UPLOAD_FAILURES = Counter(
    "perigee_trainer_checkpoint_upload_failures", "Checkpoints that stayed on this machine because an upload failed."
)
METRIC = Gauge(
    "perigee_trainer_iteration_metric", "Metrics of the last iteration by name, as in TrainResult.", ["name"]
)

# Reports between a job and a slow caller; older ones give way.
_PROGRESS_QUEUE = 8


@dataclass(frozen=True, eq=False)
class LoadedPolicy:
    """The version in the engine; another object whenever the weights change.

    `request` is the one that trained it and `result` its last response, so that the same request again is answered and
    not trained; None for a version that was loaded.
    """

    run_id: str
    version: int
    request: pb.TrainRequest | pb.FineTuneRequest | None = None
    result: Any = None


class Trainer:
    """Owns the engine's thread. `open` starts it, `close` ends it."""

    def __init__(self, config: TrainerConfig, buffer: BufferClient, sender: WeightSender) -> None:
        self.config = config
        self.checkpoints = Checkpoints.of(config)
        self.loaded = LoadedPolicy("", 0)
        self.busy = False
        self._buffer = buffer
        self._sender = sender
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="megatron")
        self._image: WeightImage | None = None
        # The run and the weights that the image is of.
        self._image_key: tuple[str, LoadedPolicy] | None = None
        self.source = WeightSource(config.weights.transfer_timeout_s)
        self._published: pb.PublishWeightsResponse | None = None
        # The run, the version and the weights that are published.
        self._published_key: tuple[str, int, LoadedPolicy] | None = None
        self._reading: concurrent.futures.Future[dict[str, Trajectory]] | None = None
        # The iteration of a run that the last Offload or Onload named.
        self._iteration = ("", 0)

    async def open(self) -> None:
        """Builds the engine and loads the base model; raises InvalidArgumentError when the model cannot be used."""
        self.checkpoints.clean()
        loop = asyncio.get_running_loop()
        self._vision = open_vision(open_model_folder(self.config.model, "trainer.model"))
        read = partial(self._read_trajectories, loop)
        self.engine: Engine = await loop.run_in_executor(self._thread, Engine, self.config, read)

    async def close(self) -> None:
        """Ends the other ranks and the engine's thread, and gives the image's memory back.

        Raises UnavailableError when the ranks are out of step: they answer no collective, and end with this process,
        which has to fail for other machines to notice.
        """
        loop = asyncio.get_running_loop()
        try:
            if self.engine.broken:
                raise UnavailableError("the trainer cannot go on: start all of its processes again")
            await loop.run_in_executor(self._thread, self.engine.run, StopCommand())
            await loop.run_in_executor(self._thread, self.engine.close)
        finally:
            self._thread.shutdown(wait=False)
            if self._image is not None:
                self._image.close()

    async def fine_tune(self, request: pb.FineTuneRequest) -> AsyncIterator[pb.FineTuneResponse]:
        """Fine-tunes the loaded version, reporting as it goes."""
        check_fine_tuning(request)
        if request == self.loaded.request:
            yield self.loaded.result
            return
        self._check_new_version(request.run_id, request.new_version)
        model, rope = open_model_folder(self.config.model, "trainer.model"), stage_rope(request)
        model = model if rope is None else model.with_rope(rope, "rope")
        with self._claim():
            examples = await asyncio.to_thread(
                read_examples,
                request.dataset_path,
                model,
                request.chat,
                min(request.max_sequence_length or model.context_tokens, model.context_tokens, self.engine.max_tokens),
                request.algorithm.name or "sft",
            )
            log.info("fine-tuning", run_id=request.run_id, examples=len(examples), steps=request.steps)
            counts = count_tokens(examples)
            self.engine.check_examples(counts)
            finish = partial(self._set_loaded, request.run_id, request.new_version, request)
            async for response in self._stream(FineTuneCommand(request, counts), finish, examples):
                yield response

    async def train(self, request: pb.TrainRequest) -> AsyncIterator[pb.TrainResponse]:
        """Trains one iteration on groups read from the buffer, reporting as it goes."""
        if request.update.default_tis_cap and self.config.dtype == "bfloat16":
            request.update.tis_cap = BFLOAT16_TIS_CAP
        check_training(request.algorithm, request.update, request.optimizer)
        if request == self.loaded.request:
            yield self.loaded.result
            return
        self._check_new_version(request.run_id, request.new_version)
        if request.base_version != self.loaded.version:
            raise FailedPreconditionError(
                f"base_version is {request.base_version}, but the trainer has version {self.loaded.version} loaded; "
                "load the checkpoint of the version that the iteration starts from"
            )
        with self._claim():
            log.info("training", run_id=request.run_id, iteration=request.iteration, groups=len(request.groups))

            def finish(result: pb.TrainResult) -> pb.TrainResponse:
                image = self._image
                result.metrics["train/push_image_bytes"] = 0 if image is None else image.manifest.total_bytes
                steps = min(request.update.minibatches, len(request.groups))
                response = pb.TrainResponse(step=steps, steps=steps, result=result)
                self._set_loaded(request.run_id, request.new_version, request, response)
                observe_iteration(result)
                return response

            async for response in self._stream(request, finish):
                yield response

    async def save_checkpoint(self, run_id: str, version: int, pinned: bool = False) -> pb.SaveCheckpointResponse:
        """Writes the loaded version here, then where the run folder is; one that is here already is only pinned."""
        with self._claim():
            self._check_loaded(run_id, version)
            if pinned and self.engine.saved == self.checkpoints.path_of(run_id, version):
                size = await asyncio.to_thread(self.checkpoints.pin, run_id, version)
            else:
                size = await self._collect(lambda tensors: self._write_checkpoint(run_id, version, tensors, pinned))
            problem = await asyncio.to_thread(self.checkpoints.publish, run_id, version)
        if problem:
            UPLOAD_FAILURES.inc()
            log.warning("the checkpoint is on this machine only", run_id=run_id, policy_version=version, error=problem)
        return pb.SaveCheckpointResponse(
            path=self.checkpoints.name_of(run_id, version), bytes=size, upload_error=problem
        )

    def _write_checkpoint(
        self, run_id: str, version: int, tensors: Iterable[tuple[str, torch.Tensor]], pinned: bool
    ) -> int:
        """Writes the loaded version here, where a failed job then finds the weights; called in the engine's thread."""
        request = self.loaded.request
        rope = stage_rope(request) if isinstance(request, pb.FineTuneRequest) else None
        size = self.checkpoints.write(run_id, version, tensors, pinned, rope)
        self.engine.saved = self.checkpoints.path_of(run_id, version)
        return size

    async def load_checkpoint(self, run_id: str, version: int | None) -> int:
        """Loads a version of a run: its newest when none is named; version 0 is the base model.

        The trainer serves that run from then on, whichever it served before.
        """
        with self._claim():
            found = await asyncio.to_thread(self.checkpoints.find, run_id, version)
            await self._call(LoadCommand(run_id, found), lambda _: self._set_loaded(run_id, found, None, None))
            log.info("loaded", run_id=run_id, policy_version=found)
            return found

    async def export_model(self, run_id: str, path: str) -> str:
        """Writes the loaded version as a Hugging Face folder, a path or a URL.

        The folder is `models/<run id>` when none is named, or one within a folder that this machine does not have.
        """
        with self._claim():
            self._check_run(run_id)
            source, limit = Path(self.config.model), self.config.max_shard_bytes
            if not path or not (storage.is_url(path) or await asyncio.to_thread(Path(path).parent.is_dir)):
                path = storage.join(self.config.run_path, "models", run_name(run_id))
            await self._collect(lambda tensors: write_folder(path, source, tensors, {}, limit))
            return path

    def check_iteration(self, run_id: str, iteration: int) -> None:
        """Raises FailedPreconditionError when a call is of an iteration before the last one that was named."""
        if self._iteration[0] == run_id and iteration < self._iteration[1]:
            raise FailedPreconditionError(f"run {run_id} is in iteration {self._iteration[1]}, not {iteration}")
        self._iteration = (run_id, iteration)

    @property
    def offloaded(self) -> bool:
        """Whether the weights are out of memory."""
        return self.engine.shelf is not None

    async def offload(self) -> pb.OffloadResponse:
        """Moves the weights out of memory; the image of a push stays."""
        start = monotonic()
        with self._claim():
            dropped, shelved = await self._call(OffloadCommand(), lambda result: result)
        return pb.OffloadResponse(seconds=monotonic() - start, dropped_bytes=dropped, shelved_bytes=shelved)

    async def onload(self) -> pb.OnloadResponse:
        """Brings the weights back."""
        start = monotonic()
        with self._claim():
            await self._call(OnloadCommand(), lambda result: result)
        return pb.OnloadResponse(seconds=monotonic() - start)

    async def push_weights(self, run_id: str, version: int, targets: Sequence[pb.PushTarget]) -> pb.PushWeightsResponse:
        """Pushes the loaded version to workers. Its image stays, so a later push may run beside a job."""
        self._check_loaded(run_id, version)
        start = monotonic()
        image = self._image
        if image is None or self._image_key != (run_id, self.loaded):
            with self._claim():
                image = await self._replace_image(run_id, version)
        export_seconds = monotonic() - start
        outcomes = await self._sender.push(image, targets)
        size = image.manifest.total_bytes
        return pb.PushWeightsResponse(outcomes=outcomes, export_seconds=export_seconds, bytes=size)

    async def publish_weights(self, run_id: str, version: int) -> pb.PublishWeightsResponse:
        """Lends the loaded version, which each rank converts in place of the version before once nobody reads that."""
        self._check_loaded(run_id, version)
        key = (run_id, version, self.loaded)
        if self._published is None or self._published_key != key:
            with self._claim():
                start = monotonic()
                if self._published is not None:
                    await self.source.withdraw(self._published.image_id)
                    self._published = None
                exports, fingerprint = await self._call(ExportCommand(), lambda result: result)
                manifest, holdings = join_exports(run_id, version, exports)
                manifest.fingerprint.CopyFrom(fingerprint)
                image_id = uuid.uuid4().hex
                self.source.lend(image_id, LentImage(manifest, holdings))
                self._published = pb.PublishWeightsResponse(
                    image_id=image_id, export_seconds=monotonic() - start, bytes=manifest.total_bytes
                )
                self._published_key = key
        return self._published

    async def _replace_image(self, run_id: str, version: int) -> WeightImage:
        if self._image is not None:
            self._image.close()
            self._image = None
        weights = self.config.weights
        image: WeightImage = await self._collect(
            lambda tensors: export_image(run_id, version, tensors, weights.max_shard_bytes, weights.shared_memory_dir)
        )
        self._image, self._image_key = image, (run_id, self.loaded)
        return image

    def _read_trajectories(
        self, loop: asyncio.AbstractEventLoop, run_id: str, ids: Sequence[str], tokens: int
    ) -> Mapping[str, Trajectory]:
        """Reads from the buffer in the server's loop; called in the engine's thread."""
        reading = read_trajectories(self._buffer, run_id, ids, self.config.buffer_timeout_s, self._vision, tokens)
        self._reading = asyncio.run_coroutine_threadsafe(reading, loop)
        try:
            return self._reading.result()
        except concurrent.futures.CancelledError as error:
            raise CancelledError("the caller left") from error

    async def _collect(self, sink: Sink) -> Any:
        return await self._call(CollectCommand(), lambda result: result, sink)

    async def _call(self, command: Command, finish: Callable[[Any], ResultT], sink: Sink | None = None) -> ResultT:
        """Runs a command to its end even when the caller leaves: until then the engine stays claimed."""
        loop = asyncio.get_running_loop()
        run = copy_context().run
        future = loop.run_in_executor(self._thread, run, lambda: finish(self.engine.run(command, sink=sink)))
        try:
            return await asyncio.shield(future)
        finally:
            await asyncio.wait({future})
            self._end_if_broken()

    async def _stream(
        self, command: Command, finish: Callable[[Any], Any], examples: Sequence[Example] | None = None
    ) -> AsyncIterator[Any]:
        """Runs a job, yielding its reports and then the result; a caller that leaves stops it within a step."""
        loop = asyncio.get_running_loop()
        reports: asyncio.Queue[Any] = asyncio.Queue(_PROGRESS_QUEUE)
        left = threading.Event()

        def put(report: Any) -> None:
            if reports.full():
                reports.get_nowait()
            reports.put_nowait(report)

        context = self.engine.job_context(
            report=lambda report: loop.call_soon_threadsafe(put, report), is_cancelled=left.is_set
        )
        run = copy_context().run
        future = loop.run_in_executor(self._thread, run, lambda: finish(self.engine.run(command, context, examples)))
        future.add_done_callback(lambda _: put(None))
        try:
            while (report := await reports.get()) is not None:
                yield report
            yield future.result()
        finally:
            left.set()
            if self._reading is not None:
                self._reading.cancel()
            await asyncio.wait({future})
            self._end_if_broken()

    def _set_loaded(
        self, run_id: str, version: int, request: pb.TrainRequest | pb.FineTuneRequest | None, result: Any
    ) -> Any:
        """Records what the engine has loaded; called in its thread, before the caller may leave."""
        self.loaded = LoadedPolicy(run_id, version, request, result)
        POLICY_VERSION.set(version)
        return result

    def _end_if_broken(self) -> None:
        if self.engine.broken:
            log.error("the ranks are out of step; ending the trainer")
            signal.raise_signal(signal.SIGTERM)

    @contextmanager
    def _claim(self) -> Iterator[None]:
        """Marks the trainer as busy, or raises FailedPreconditionError when it is."""
        if self.busy:
            raise FailedPreconditionError("the trainer runs another job; wait for its end")
        self.busy = True
        try:
            yield
        finally:
            self.busy = False

    def _check_run(self, run_id: str) -> None:
        if not run_id:
            raise InvalidArgumentError.for_field("run_id", "is empty")
        if self.loaded.run_id and self.loaded.run_id != run_id:
            raise FailedPreconditionError(
                f"the trainer has run {self.loaded.run_id} loaded, not {run_id}; load a checkpoint of {run_id} first"
            )

    def _check_loaded(self, run_id: str, version: int) -> None:
        self._check_run(run_id)
        if version != self.loaded.version:
            raise FailedPreconditionError(
                f"policy_version is {version}, but the trainer has version {self.loaded.version} loaded"
            )

    def _check_new_version(self, run_id: str, new_version: int) -> None:
        self._check_run(run_id)
        if new_version <= self.loaded.version:
            raise FailedPreconditionError(
                f"new_version is {new_version}, but the trainer already has version {self.loaded.version} loaded"
            )


def observe_iteration(result: pb.TrainResult) -> None:
    """Sets the Prometheus metrics of an iteration."""
    TOKENS.inc(result.trained_tokens)
    TRAJECTORIES.inc(result.trajectories)
    for name, value in result.metrics.items():
        METRIC.labels(name).set(value)
