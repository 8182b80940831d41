"""Receives policy versions into a spare buffer, verifies them and hands them to the engine; the old one serves on."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from perigee.errors import AbortedError, FailedPreconditionError, InvalidArgumentError
from services.kit.telemetry import get_logger
from services.weights.buffer import remove_leftovers
from services.weights.config import WeightsConfig
from services.weights.image import WeightImage
from services.weights.manifest import Manifest, verify_shards
from services.weights.metrics import COMMIT_SECONDS, VERIFY_SECONDS
from services.weights.mooncake_transport import MooncakeTransport
from services.weights.spares import BufferPool
from services.weights.transport import Transport

log = get_logger(__name__)


@dataclass(frozen=True)
class Preparation:
    """Where a sender may write, and the id under which it commits."""

    session: str
    receiver_id: str
    address: int
    transfer_id: str


@dataclass(frozen=True)
class CommitReport:
    """A committed version, and the seconds that checksums and engine took."""

    policy_version: int
    verify_seconds: float
    commit_seconds: float


@dataclass
class _Committing:
    transfer_id: str
    task: asyncio.Task[CommitReport]


class WeightReceiver:
    """Takes weights in; `commit` is awaited with each verified image and loads it into the engine.

    `current` is the last image that `commit` took without an error; it stays in shared memory so that a restarted
    engine can be filled from it. When `commit` raises, the image is dropped and `current` stays.
    """

    def __init__(
        self,
        config: WeightsConfig,
        commit: Callable[[WeightImage], Awaitable[None]],
        open_transport: Callable[[], Transport] | None = None,
    ) -> None:
        self.current: WeightImage | None = None
        self._config = config
        self._receiver_id = uuid.uuid4().hex
        self._commit = commit
        self._open_transport = open_transport or (lambda: MooncakeTransport(config))
        self._transport: Transport | None = None
        self._pool: BufferPool | None = None
        self._pending: tuple[str, WeightImage] | None = None
        self._committing: _Committing | None = None
        # Preparations come one at a time and wait for a commit under way: its buffer is not theirs to take.
        self._lock = asyncio.Lock()

    async def start(self) -> None:
        """Opens the transport; FailedPreconditionError when it cannot start."""
        for path in remove_leftovers(self._config.shared_memory_dir):
            log.info("removed leftover weight image", path=str(path))
        self._transport = await asyncio.to_thread(self._open_transport)
        self._pool = BufferPool(self._config, self._transport)

    async def close(self) -> None:
        """Waits for a commit under way, then unregisters and removes all buffers."""
        if self._committing is not None:
            await asyncio.wait({self._committing.task})
        async with self._lock:
            self._pending = None
            self.current = None
            if self._pool is not None and self._transport is not None:
                await self._pool.close()
                await asyncio.to_thread(self._transport.close)
            self._pool = self._transport = None

    async def prepare(self, manifest: Manifest) -> Preparation:
        """Reserves a spare buffer for the manifest; voids a preparation that is not committed.

        Raises InvalidArgumentError for an image above `max_image_bytes`, ResourceExhaustedError without memory.
        """
        if manifest.total_bytes > self._config.max_image_bytes:
            raise InvalidArgumentError.of(
                "manifest.total_bytes",
                f"{manifest.total_bytes} is above this worker's weights.max_image_bytes {self._config.max_image_bytes}",
            )
        preparing = asyncio.create_task(self._prepare(manifest))
        try:
            return await asyncio.shield(preparing)
        except asyncio.CancelledError:
            preparing.add_done_callback(self._drop_unanswered)
            raise

    async def _prepare(self, manifest: Manifest) -> Preparation:
        async with self._lock:
            if self._pool is None or self._transport is None:
                raise FailedPreconditionError("the weight receiver is not running")
            if self._committing is not None:
                await asyncio.wait({self._committing.task})
            if self._pending is not None:
                transfer_id, image = self._pending
                self._pending = None
                self._pool.quarantine(transfer_id, image.buffer)
                log.info("preparation voided by a newer one", transfer_id=transfer_id)
            buffer = await self._pool.take(manifest.total_bytes)
            transfer_id = uuid.uuid4().hex
            self._pending = transfer_id, WeightImage(manifest, buffer)
            return Preparation(self._transport.session, self._receiver_id, buffer.address, transfer_id)

    async def commit(self, transfer_id: str) -> CommitReport:
        """Verifies what was written and commits it; asked again with the same id it tells the same.

        It goes on to its end when the caller goes away: an engine must not stay half loaded.

        Raises AbortedError when the preparation is voided, DataLossError for a damaged shard, and whatever the engine
        raises.
        """
        if self._committing is None or self._committing.transfer_id != transfer_id:
            image = self._claim(transfer_id)
            self._committing = _Committing(transfer_id, asyncio.create_task(self._verify_and_commit(image)))
        return await asyncio.shield(self._committing.task)

    def abort(self, transfer_id: str) -> None:
        """Drops a preparation whose write has ended; an unknown id is no error, a commit under way is not stopped."""
        if self._pool is None:
            return
        if self._pending is not None and self._pending[0] == transfer_id:
            self._pool.give_back(self._pending[1].buffer)
            self._pending = None
        self._pool.release(transfer_id)

    def _drop_unanswered(self, preparing: asyncio.Task[Preparation]) -> None:
        """The caller went away before it learned where to write, so nothing can be under way."""
        if not preparing.cancelled() and preparing.exception() is None:
            self.abort(preparing.result().transfer_id)

    def _claim(self, transfer_id: str) -> WeightImage:
        if self._pending is None or self._pending[0] != transfer_id:
            raise AbortedError(
                f"transfer {transfer_id} is not prepared here: a newer push voided it, or the worker restarted; "
                "push again"
            )
        image = self._pending[1]
        self._pending = None
        return image

    async def _verify_and_commit(self, image: WeightImage) -> CommitReport:
        assert self._pool is not None
        begin = time.monotonic()
        try:
            await asyncio.to_thread(_verify, image)
            verified = time.monotonic()
            await self._commit(image)
        except BaseException as error:
            self._pool.give_back(image.buffer)
            log.error("weights not committed", policy_version=image.policy_version, reason=str(error))
            raise
        previous, self.current = self.current, image
        if previous is not None:
            self._pool.give_back(previous.buffer)
        report = CommitReport(image.policy_version, verified - begin, time.monotonic() - verified)
        VERIFY_SECONDS.observe(report.verify_seconds)
        COMMIT_SECONDS.observe(report.commit_seconds)
        log.info(
            "weights committed",
            run_id=image.run_id,
            policy_version=image.policy_version,
            bytes=image.total_bytes,
            verify_seconds=report.verify_seconds,
            commit_seconds=report.commit_seconds,
        )
        return report


def _verify(image: WeightImage) -> None:
    with image.buffer.view() as view:
        verify_shards(view, image.manifest)
