"""The trainer as the service sees it: which version is held, one job at a time, results that repeat on request."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from perigee.buffer.client import BufferClient
from perigee.errors import FailedPreconditionError, InvalidArgumentError
from perigee.trainer.v1.trainer_pb2 import PushOutcome, PushTarget
from services.kit.telemetry import get_logger
from services.trainer import metrics
from services.trainer.checkpoints import Checkpoints
from services.trainer.commands import CollectCommand, Command, FineTuneCommand, LoadCommand, StopCommand, TrainCommand
from services.trainer.config import TrainerConfig
from services.trainer.engine import Engine, Sink
from services.trainer.fine_tune import FineTuneProgress, FineTuning, read_examples
from services.trainer.hf_folder import write_folder
from services.trainer.jobs import JobContext
from services.trainer.train_iteration import IterationResult, MirrorDescent
from services.trainer.trajectories import Group, read_trajectories
from services.weights.manifest import WeightImage, export_image
from services.weights.send import WeightSender

log = get_logger(__name__)
ResultT = TypeVar("ResultT")

# Reports between a job and a slow caller; older ones give way.
_PROGRESS_QUEUE = 8


@dataclass(frozen=True)
class Held:
    """The version that the engine holds. `serial` changes whenever the weights do."""

    run_id: str
    version: int
    serial: int
    # The request that made it and the result, so that the same request again is answered, not trained.
    key: bytes
    result: Any


@dataclass(frozen=True)
class Iteration:
    """The result of an iteration with what surrounds the engine's own figures."""

    policy_version: int
    groups: int
    figures: IterationResult
    read_seconds: float


@dataclass(frozen=True)
class Push:
    """Outcomes of a push by worker, seconds spent on the image (0 when it was there) and its bytes."""

    outcomes: Sequence[PushOutcome]
    export_seconds: float
    bytes: int


class Trainer:
    """Owns the engine's thread. `open` starts it, `close` ends it."""

    def __init__(self, config: TrainerConfig, buffer: BufferClient, sender: WeightSender) -> None:
        self.config = config
        self.checkpoints = Checkpoints(
            Path(config.run_path) / "checkpoints", Path(config.model), config.keep_checkpoints, config.max_shard_bytes
        )
        self.held = Held("", 0, 0, b"", None)
        self.busy = False
        self._buffer = buffer
        self._sender = sender
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="megatron")
        self._image: WeightImage | None = None
        self._image_serial = -1

    async def open(self) -> None:
        """Builds the engine and loads the base model; raises InvalidArgumentError when the model cannot be used."""
        self.checkpoints.clean()
        self.engine: Engine = await asyncio.get_running_loop().run_in_executor(self._thread, Engine, self.config)

    async def close(self) -> None:
        """Ends the other ranks and the engine's thread, and gives the image's memory back."""
        loop = asyncio.get_running_loop()
        try:
            # Ranks that are out of step answer no collective; the end of this process ends them.
            if not self.engine.broken:
                await loop.run_in_executor(self._thread, self.engine.run, StopCommand())
                await loop.run_in_executor(self._thread, self.engine.close)
        finally:
            self._thread.shutdown(wait=False)
            if self._image is not None:
                self._image.close()

    async def fine_tune(
        self, run_id: str, key: bytes, dataset: Path, settings: FineTuning, new_version: int
    ) -> AsyncIterator[FineTuneProgress]:
        """Fine-tunes the held version; the last progress is the result."""
        settings.validate()
        if self._is_repeated(run_id, key):
            yield self.held.result
            return
        self._check_new_version(run_id, new_version)
        with self._claim():
            tokenizer = Path(self.config.model) / "tokenizer.json"
            examples = await asyncio.to_thread(
                read_examples, dataset, tokenizer, self.engine.shape.eos_token_id, self.engine.max_tokens
            )
            log.info("fine-tuning", run_id=run_id, examples=len(examples), steps=settings.steps)
            take = partial(self._take, run_id, new_version, key)
            async for progress in self._stream(FineTuneCommand(examples, settings), take):
                yield progress

    async def train(
        self,
        run_id: str,
        key: bytes,
        iteration: int,
        rewards_by_group: dict[str, dict[str, float]],
        settings: MirrorDescent,
        base_version: int,
        new_version: int,
    ) -> AsyncIterator[tuple[int, int] | Iteration]:
        """One iteration on groups read from the buffer: (step, steps) as it goes, then the result."""
        settings.validate()
        if self._is_repeated(run_id, key):
            yield self.held.result
            return
        self._check_new_version(run_id, new_version)
        if base_version != self.held.version:
            raise FailedPreconditionError(
                f"base_version is {base_version}, but the trainer holds version {self.held.version}; "
                "load the checkpoint of the version that the iteration starts from"
            )
        with self._claim():
            start = time.monotonic()
            groups = await self._read_groups(run_id, rewards_by_group)
            read_seconds = time.monotonic() - start
            log.info("training", run_id=run_id, iteration=iteration, groups=len(groups), base_version=base_version)

            def take(figures: IterationResult) -> Iteration:
                result = Iteration(new_version, len(groups), figures, read_seconds)
                self._take(run_id, new_version, key, result)
                metrics.observe_iteration(result.figures)
                return result

            command = TrainCommand(groups, base_version, settings, seed=abs(self.config.seed) + iteration)
            async for progress in self._stream(command, take):
                yield progress

    async def save_checkpoint(self, run_id: str, version: int) -> tuple[Path, int]:
        """Writes the held version; returns its folder and bytes."""
        with self._claim():
            self._check_held(run_id, version)
            size = await self._collect(lambda tensors: self.checkpoints.write(run_id, version, tensors))
            return self.checkpoints.path_of(version), size

    async def load_checkpoint(self, run_id: str, version: int | None) -> int:
        """Restores a version; the newest when none is named, and version 0 is the base model."""
        with self._claim():
            self._check_run(run_id)
            found, folder = self.checkpoints.find(run_id, version)
            await self._call(LoadCommand(folder), lambda _: self._take(run_id, found, b"", None))
            log.info("loaded", run_id=run_id, policy_version=found, path=str(folder))
            return found

    async def export_model(self, run_id: str, path: Path) -> Path:
        """Writes the held version as a Hugging Face folder."""
        with self._claim():
            self._check_run(run_id)
            source, limit = Path(self.config.model), self.config.max_shard_bytes
            await self._collect(lambda tensors: write_folder(path, source, tensors, {}, limit))
            return path

    async def push_weights(self, run_id: str, version: int, targets: Sequence[PushTarget]) -> Push:
        """Pushes the held version to workers. Its image stays, so a later push may run beside a job."""
        self._check_held(run_id, version)
        start = time.monotonic()
        image = self._image
        if image is None or self._image_serial != self.held.serial:
            with self._claim():
                image = await self._replace_image(run_id, version)
        export_seconds = time.monotonic() - start
        outcomes = await self._sender.push(image, targets)
        return Push(outcomes, export_seconds, image.manifest.total_bytes)

    async def _replace_image(self, run_id: str, version: int) -> WeightImage:
        if self._image is not None:
            self._image.close()
            self._image = None
        weights = self.config.weights
        image: WeightImage = await self._collect(
            lambda tensors: export_image(run_id, version, tensors, weights.max_shard_bytes, weights.shared_memory_dir)
        )
        self._image, self._image_serial = image, self.held.serial
        return image

    async def _read_groups(self, run_id: str, rewards_by_group: dict[str, dict[str, float]]) -> list[Group]:
        ids = [trajectory_id for rewards in rewards_by_group.values() for trajectory_id in rewards]
        trajectories = await read_trajectories(self._buffer, run_id, ids, self.config.buffer_timeout_s)
        for trajectory in trajectories.values():
            length = len(trajectory.prompt_tokens) + len(trajectory.tokens_T)
            if length > self.engine.max_tokens or not len(trajectory.prompt_tokens):
                raise InvalidArgumentError.of(
                    "groups",
                    f"trajectory {trajectory.trajectory_id} has {length} tokens; 2 to {self.engine.max_tokens} fit",
                )
        return [
            Group(group_id, tuple(trajectories[i] for i in rewards), tuple(rewards.values()))
            for group_id, rewards in rewards_by_group.items()
        ]

    async def _collect(self, sink: Sink) -> Any:
        return await self._call(CollectCommand(), lambda result: result, sink)

    async def _call(self, command: Command, take: Callable[[Any], ResultT], sink: Sink | None = None) -> ResultT:
        """Runs a command to its end even when the caller leaves: until then the engine stays claimed."""
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(self._thread, lambda: take(self.engine.run(command, None, sink)))
        try:
            return await asyncio.shield(future)
        finally:
            await asyncio.wait({future})
            self._end_if_broken()

    async def _stream(self, command: Command, take: Callable[[Any], Any]) -> AsyncIterator[Any]:
        """Runs a job, yielding its reports and then the result; a caller that leaves stops it within a step."""
        loop = asyncio.get_running_loop()
        reports: asyncio.Queue[Any] = asyncio.Queue(_PROGRESS_QUEUE)
        left = threading.Event()

        def put(report: Any) -> None:
            if reports.full():
                reports.get_nowait()
            reports.put_nowait(report)

        def report_soon(report: Any) -> None:
            loop.call_soon_threadsafe(put, report)

        context = JobContext(report_soon, left.is_set)
        future = loop.run_in_executor(self._thread, lambda: take(self.engine.run(command, context)))
        future.add_done_callback(lambda _: put(None))
        try:
            while (report := await reports.get()) is not None:
                yield report
            yield future.result()
        finally:
            left.set()
            await asyncio.wait({future})
            self._end_if_broken()

    def _take(self, run_id: str, version: int, key: bytes, result: Any) -> Any:
        """Records the version that the engine holds from here on; called in its thread, before the caller may leave."""
        self.held = Held(run_id, version, self.held.serial + 1, key, result)
        metrics.POLICY_VERSION.set(version)
        return result

    def _end_if_broken(self) -> None:
        if self.engine.broken:
            log.error("the ranks are out of step; ending the trainer")
            signal.raise_signal(signal.SIGTERM)

    @contextmanager
    def _claim(self) -> Iterator[None]:
        if self.busy:
            raise FailedPreconditionError("the trainer runs another job; wait for its end")
        self.busy = True
        try:
            yield
        finally:
            self.busy = False

    def _is_repeated(self, run_id: str, key: bytes) -> bool:
        return self.held.result is not None and self.held.run_id == run_id and self.held.key == key

    def _check_run(self, run_id: str) -> None:
        if not run_id:
            raise InvalidArgumentError.of("run_id", "is empty")
        if self.held.run_id and self.held.run_id != run_id:
            raise FailedPreconditionError(f"the trainer serves run {self.held.run_id}, not {run_id}")

    def _check_held(self, run_id: str, version: int) -> None:
        self._check_run(run_id)
        if version != self.held.version:
            raise FailedPreconditionError(
                f"policy_version is {version}, but the trainer holds version {self.held.version}"
            )

    def _check_new_version(self, run_id: str, new_version: int) -> None:
        self._check_run(run_id)
        if new_version <= self.held.version:
            raise FailedPreconditionError(
                f"new_version is {new_version}, but the trainer already holds version {self.held.version}"
            )
