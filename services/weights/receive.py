"""Receives policy versions: into a spare buffer, verified, then into the engine; the old version serves meanwhile.

A version is pushed by the trainer, or pulled from the trainer and from workers that pull it, too.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from prometheus_client import Histogram

from perigee.errors import (
    AbortedError,
    DeadlineExceededError,
    FailedPreconditionError,
    FieldViolation,
    InvalidArgumentError,
    ResourceExhaustedError,
)
from perigee.weights.client import WeightSourceClient
from perigee.weights.v1 import weights_pb2 as pb
from perigee.weights.v1.weights_pb2_grpc import WeightReceiverServiceServicer
from services.kit.server import end_tasks
from services.kit.telemetry import get_logger
from services.weights.config import WeightsConfig
from services.weights.lend import LentImage, WeightSource
from services.weights.manifest import WeightImage, check_manifest, verify_shards
from services.weights.pieces import Slices, place_pieces
from services.weights.pull import Connect, ImagePull, Target
from services.weights.shared_memory import SharedBuffer, remove_leftovers
from services.weights.transport import BUCKETS, EndpointPool, MooncakeTransport, Transport

log = get_logger(__name__)

VERIFY_SECONDS = Histogram("perigee_weights_verify_seconds", "Checksums in a receiver", buckets=BUCKETS)
COMMIT_SECONDS = Histogram("perigee_weights_commit_seconds", "Swap into a receiver's engine", buckets=BUCKETS)
# The current version, the spare, and one that an abandoned write may still reach.
MAX_BUFFERS = 3


class BufferPool:
    """Hands out at most three buffers, registered with the transport.

    A write cannot be called back, and one that arrives in unmapped memory ends the process. So the buffer of a voided
    preparation is kept apart until its sender says that the write has ended, or until no write could still be alive.
    """

    def __init__(self, config: WeightsConfig, transport: Transport) -> None:
        self._directory = config.shared_memory_dir
        self._transport = transport
        self._quarantine_s = config.transfer_timeout_s + config.progress_timeout_s
        self._free: list[SharedBuffer] = []
        self._all: list[SharedBuffer] = []
        # A caller that was cancelled may have left a take under way.
        self._taking = asyncio.Lock()
        # transfer id -> buffer and the monotonic time after which it may be used again
        self._quarantined: dict[str, tuple[SharedBuffer, float]] = {}

    async def take(self, size: int, *, leaves_spares: bool = True) -> SharedBuffer:
        """Takes a registered buffer of at least `size` bytes that nobody else writes to; may free the spares.

        A caller that is cancelled leaves it as the spare. Raises ResourceExhaustedError when all are taken, with the
        time to wait, or when memory is short.
        """
        taking = asyncio.create_task(self._take(size, leaves_spares))
        try:
            return await asyncio.shield(taking)
        except asyncio.CancelledError:
            taking.add_done_callback(self._give_back_taken)
            raise

    def _give_back_taken(self, taking: asyncio.Task[SharedBuffer]) -> None:
        if not taking.cancelled() and taking.exception() is None:
            self.give_back(taking.result())

    async def _take(self, size: int, leaves_spares: bool) -> SharedBuffer:
        async with self._taking:
            while not leaves_spares and len(self._free) > 1:
                await self._drop(self._free.pop(0))
            return await self._take_alone(size)

    async def _take_alone(self, size: int) -> SharedBuffer:
        now = time.monotonic()
        for transfer_id in [key for key, (_, until) in self._quarantined.items() if until <= now]:
            self.release(transfer_id)
        for buffer in self._free:
            if buffer.size >= size:
                self._free.remove(buffer)
                return buffer
        # Too small for this model: make room before asking for more.
        while self._free:
            await self._drop(self._free.pop())
        if len(self._all) >= MAX_BUFFERS:
            wait_s = min((until for _, until in self._quarantined.values()), default=now + 1.0) - now
            raise ResourceExhaustedError(
                f"all {MAX_BUFFERS} weight buffers are taken by transfers that have not ended; "
                f"try again in {wait_s:.0f} s",
                retry_after_s=wait_s,
            )
        buffer = await asyncio.to_thread(SharedBuffer.allocate, self._directory, size)
        self._all.append(buffer)
        try:
            await asyncio.to_thread(self._transport.register, buffer.address, buffer.size)
        except BaseException:
            self._all.remove(buffer)
            buffer.close()
            raise
        return buffer

    def give_back(self, buffer: SharedBuffer) -> None:
        """Makes a buffer that no write can reach any more the spare."""
        self._free.append(buffer)

    def quarantine(self, transfer_id: str, buffer: SharedBuffer) -> None:
        """Keeps a buffer apart that the write of `transfer_id` may still reach."""
        self._quarantined[transfer_id] = buffer, time.monotonic() + self._quarantine_s

    def release(self, transfer_id: str) -> None:
        """Ends the quarantine of a transfer; an unknown id is no error."""
        if (entry := self._quarantined.pop(transfer_id, None)) is not None:
            self.give_back(entry[0])

    async def close(self) -> None:
        """Closes the transport, so that nobody reaches the buffers any more, and removes them."""
        for buffer in self._all:
            await asyncio.to_thread(self._transport.unregister, buffer.address)
        await asyncio.to_thread(self._transport.close)
        for buffer in self._all:
            buffer.close()
        self._all.clear()
        self._free.clear()
        self._quarantined.clear()

    async def _drop(self, buffer: SharedBuffer) -> None:
        self._all.remove(buffer)
        await asyncio.to_thread(self._transport.unregister, buffer.address)
        buffer.close()


class WeightReceiver(WeightReceiverServiceServicer):
    """Receives weights as perigee.weights.v1.WeightReceiverService, which the rollout service hosts.

    `commit` is awaited with each verified image and loads it into the engine; what it returns may say how long that
    stopped the engine, and what is wrong. `find_slices` returns what the engine takes of a manifest's tensors, None for
    all of it, and nothing else is pulled; it raises FailedPreconditionError for an image that is refused.

    What is pulled is lent through `source` to other receivers, piece by piece as it arrives.

    `current` is the last image that `commit` took without an error; it stays in shared memory so that a restarted
    engine can be filled from it. When `commit` raises, the image is dropped and `current` stays. `is_loaded` tells
    whether the engine still has it; one that has not gets it again when it is pulled again. `is_away` tells whether the
    engine has left its memory: what comes then takes the place of `current`, so that there is one image.
    """

    def __init__(
        self,
        config: WeightsConfig,
        commit: Callable[[WeightImage], Awaitable[pb.CommitResponse | None]],
        open_transport: Callable[[], Transport] | None = None,
        connect: Connect = WeightSourceClient.connect,
        is_loaded: Callable[[], bool] = lambda: True,
        is_away: Callable[[], bool] = lambda: False,
        find_slices: Callable[[pb.Manifest], Awaitable[Slices | None]] | None = None,
    ) -> None:
        self.current: WeightImage | None = None
        self.source = WeightSource(config.transfer_timeout_s)
        self._config = config
        self._receiver_id = uuid.uuid4().hex
        self._commit = commit
        self._is_loaded = is_loaded
        self._is_away = is_away
        self._find_slices = find_slices
        self._open_transport = open_transport or (lambda: MooncakeTransport(config))
        self._transport: Transport | None = None
        self._pool: BufferPool | None = None
        self._pending: tuple[str, WeightImage] | None = None
        # The latest commit and the transfer that it is of.
        self._committing: asyncio.Task[pb.CommitResponse] | None = None
        self._committing_id = ""
        self._connect = connect
        self._endpoints = EndpointPool(self._open_transport)
        # The latest pull with the id of its image, and the image that is current and lent.
        self._pulling: asyncio.Task[pb.PullResponse] | None = None
        self._pulling_id = ""
        self._current_id = ""
        # Buffers that others still read, each with what gives it back.
        self._retiring: set[asyncio.Task[None]] = set()
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
        if self._pulling is not None:
            self._pulling.cancel()
            await asyncio.wait({self._pulling})
        if self._committing is not None:
            await asyncio.wait({self._committing})
        await end_tasks(*self._retiring)
        async with self._lock:
            self._pending = None
            self.current = None
            if self._pool is not None:
                await self._pool.close()
            self._pool = self._transport = None
        await asyncio.to_thread(self._endpoints.close)

    async def Prepare(self, request: pb.PrepareRequest, context: Any) -> pb.PrepareResponse:
        """Reserves a spare buffer for the manifest; voids a preparation that is not committed.

        Raises InvalidArgumentError for a manifest of no image or of one above `max_image_bytes`, ResourceExhaustedError
        without memory.
        """
        manifest = request.manifest
        check_manifest(manifest)
        if manifest.total_bytes > self._config.max_image_bytes:
            raise InvalidArgumentError.for_field(
                "manifest.total_bytes",
                f"{manifest.total_bytes} is above this worker's weights.max_image_bytes {self._config.max_image_bytes}",
            )
        preparing = asyncio.create_task(self._prepare(manifest))
        try:
            return await asyncio.shield(preparing)
        except asyncio.CancelledError:
            preparing.add_done_callback(self._drop_unanswered)
            raise

    async def _prepare(self, manifest: pb.Manifest) -> pb.PrepareResponse:
        """Prepares after the preparation or commit under way."""
        async with self._lock:
            if self._pool is None or self._transport is None:
                raise FailedPreconditionError("the weight receiver is not running")
            if self._committing is not None:
                await asyncio.wait({self._committing})
            if self._pending is not None:
                transfer_id, image = self._pending
                self._pending = None
                self._pool.quarantine(transfer_id, image.buffer)
                log.info("preparation voided by a newer one", transfer_id=transfer_id)
            buffer = await self._pool.take(manifest.total_bytes, leaves_spares=not self._drop_if_away())
            transfer_id = uuid.uuid4().hex
            self._pending = transfer_id, WeightImage(manifest, buffer)
            return pb.PrepareResponse(
                session=self._transport.session,
                receiver_id=self._receiver_id,
                address=buffer.address,
                transfer_id=transfer_id,
            )

    async def Commit(self, request: pb.CommitRequest, context: Any) -> pb.CommitResponse:
        """Verifies what was written and commits it; a second call with the same id gets the same response.

        It runs to its end when the caller goes away: an engine must not stay half loaded.

        Raises AbortedError when the preparation is voided, DataLossError for a damaged shard, and whatever the engine
        raises.
        """
        if self._committing is None or self._committing_id != request.transfer_id:
            image = self._claim(request.transfer_id)
            self._committing = asyncio.create_task(self._verify_and_commit(image))
            self._committing_id = request.transfer_id
        return await asyncio.shield(self._committing)

    async def Abort(self, request: pb.AbortRequest, context: Any) -> pb.AbortResponse:
        """Drops a preparation whose write has ended; an unknown id is no error, a commit under way is not stopped."""
        self._abort(request.transfer_id)
        return pb.AbortResponse()

    def _drop_if_away(self) -> bool:
        """Drops the current image where no engine has any use for it, as another one comes; returns whether it is so.

        Without readers its buffer is given back before the next one is taken.
        """
        if not self._is_away():
            return False
        if self.current is not None:
            self._retire(self._current_id, self.current.buffer)
            self.current, self._current_id = None, ""
        return True

    def _abort(self, transfer_id: str) -> None:
        if self._pool is None:
            return
        if self._pending is not None and self._pending[0] == transfer_id:
            self._pool.give_back(self._pending[1].buffer)
            self._pending = None
        self._pool.release(transfer_id)

    def _drop_unanswered(self, preparing: asyncio.Task[pb.PrepareResponse]) -> None:
        """Drops a preparation whose caller went away before it learned where to write, so nothing can be under way."""
        if not preparing.cancelled() and preparing.exception() is None:
            self._abort(preparing.result().transfer_id)

    def _claim(self, transfer_id: str) -> WeightImage:
        """Returns the prepared image of a transfer, which is prepared no longer."""
        if self._pending is None or self._pending[0] != transfer_id:
            raise AbortedError(
                f"transfer {transfer_id} is not prepared here: a newer push voided it, or the worker restarted; "
                "push again"
            )
        image = self._pending[1]
        self._pending = None
        return image

    async def Pull(self, request: pb.PullRequest, context: Any) -> pb.PullResponse:
        """Pulls an image and commits it, beside what the engine does; it runs to its end when the caller goes away.

        Raises InvalidArgumentError for an image above `max_image_bytes`, UnavailableError when no source has all that
        the engine takes, AbortedError when another pull began meanwhile, and whatever the engine raises.
        """
        missing = [name for name in ("image_id", "sources") if not getattr(request, name)]
        if missing:
            raise InvalidArgumentError.for_fields([FieldViolation(name, "is required") for name in missing])
        if self._pulling is None or self._pulling_id != request.image_id or self._has_ended_without(request.image_id):
            previous, self._pulling_id = self._pulling, request.image_id
            self._pulling = asyncio.create_task(self._pull_after(previous, request))
        assert self._pulling is not None
        try:
            return await asyncio.shield(self._pulling)
        except asyncio.CancelledError as error:
            if self._pulling_id == request.image_id:
                raise
            raise AbortedError("another pull began meanwhile") from error

    def _has_ended_without(self, image_id: str) -> bool:
        """Returns whether no pull is under way and the image is not the one in the engine."""
        is_there = self._current_id == image_id and self._is_loaded()
        return self._pulling is not None and self._pulling.done() and not is_there

    async def _pull_after(
        self, previous: asyncio.Task[pb.PullResponse] | None, request: pb.PullRequest
    ) -> pb.PullResponse:
        """Pulls and commits after the end of the pull before, which is cancelled unless it commits."""
        if previous is not None:
            previous.cancel()
            await asyncio.wait({previous})
        begin = time.monotonic()
        async with self._lock:
            if self._committing is not None:
                await asyncio.wait({self._committing})
            sources: list[str] = []
            if self.current is not None and self._current_id == request.image_id:
                image = self.current
                commit = self._load(image, time.monotonic())
            else:
                target, sources = await self._pull(request)
                image, commit = target.image, self._commit_pulled(request.image_id, target)
            transferred = time.monotonic()
            self._committing_id = ""
            self._committing = asyncio.create_task(commit)
        report = await asyncio.shield(self._committing)
        return pb.PullResponse(
            policy_version=report.policy_version,
            bytes=image.manifest.total_bytes,
            transfer_seconds=transferred - begin,
            commit_seconds=report.commit_seconds,
            sources=sources,
            stall_seconds=report.stall_seconds,
            warning=report.warning,
        )

    async def _pull(self, request: pb.PullRequest) -> tuple[Target, list[str]]:
        """Returns a whole image, which is lent, and the sources that gave it."""
        if self._pool is None or self._transport is None:
            raise FailedPreconditionError("the weight receiver is not running")
        begin = partial(self._begin_pull, request.image_id, self._pool, self._transport.session)
        pull = ImagePull(self._config, self._endpoints, self._connect, begin)
        try:
            async with asyncio.timeout(self._config.transfer_timeout_s):
                target = await pull.run(request.image_id, request.sources)
            target.lent.complete()
            return target, pull.sources
        except BaseException as error:
            if pull.target is not None:
                self._withdraw(request.image_id, pull.target.lent, pull.target.image.buffer)
            if isinstance(error, TimeoutError):
                raise DeadlineExceededError(
                    f"the image did not arrive within weights.transfer_timeout_s = {self._config.transfer_timeout_s:g}"
                ) from error
            raise

    async def _begin_pull(self, image_id: str, pool: BufferPool, session: str, manifest: pb.Manifest) -> Target:
        """Makes room for what the engine takes of an image, and lends what will be there of it."""
        lent = LentImage(manifest, is_complete=False)
        # Before there is room for it: the next ones in a chain make theirs meanwhile.
        self.source.lend(image_id, lent)
        try:
            wanted = await self._find_slices(manifest) if self._find_slices is not None else None
            # Seconds of an image with many pieces, in which leases are to be renewed and pieces to be lent.
            placed = await asyncio.to_thread(place_pieces, manifest, wanted)
            size = placed.total_bytes
            if size > self._config.max_image_bytes:
                reason = f"{size} is above this worker's weights.max_image_bytes {self._config.max_image_bytes}"
                raise InvalidArgumentError.for_field("manifest.total_bytes", reason)
            buffer = await pool.take(size, leaves_spares=not self._drop_if_away())
        except BaseException:
            self._withdraw(image_id, lent, None)
            raise
        return Target(WeightImage(placed, buffer), lent, session, self._receiver_id)

    async def _commit_pulled(self, image_id: str, target: Target) -> pb.CommitResponse:
        """Commits an image that was verified as it arrived."""
        image = target.image
        try:
            report = await self._load(image, time.monotonic())
        except BaseException as error:
            log.error("weights not committed", policy_version=image.manifest.policy_version, reason=str(error))
            self._withdraw(image_id, target.lent, image.buffer)
            raise
        self._current_id = image_id
        return report

    def _withdraw(self, image_id: str, lent: LentImage, buffer: SharedBuffer | None) -> None:
        """Ends the calls of those who read an image that was pulled in vain, and gives its buffer back."""
        lent.give_up()
        self._retire(image_id, buffer)

    def _retire(self, image_id: str, buffer: SharedBuffer | None) -> None:
        """Gives a buffer back once nobody reads it any more; what was pushed is not lent and has no image id."""
        assert self._pool is not None
        if not image_id:
            assert buffer is not None
            self._pool.give_back(buffer)
            return

        async def give_back() -> None:
            await self.source.withdraw(image_id)
            if self._pool is not None and buffer is not None:
                self._pool.give_back(buffer)

        task = asyncio.create_task(give_back())
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def _verify_and_commit(self, image: WeightImage) -> pb.CommitResponse:
        """Verifies the image and makes it the current one; an image that fails becomes the spare buffer."""
        assert self._pool is not None
        begin = time.monotonic()
        try:
            await asyncio.to_thread(_verify, image)
            report = await self._load(image, begin)
        except BaseException:
            self._pool.give_back(image.buffer)
            raise
        self._current_id = ""
        return report

    async def _load(self, image: WeightImage, begin: float) -> pb.CommitResponse:
        """Loads a verified image into the engine and makes it the current one."""
        verified = time.monotonic()
        report = await self._commit(image) or pb.CommitResponse()
        previous, self.current = self.current, image
        if previous is not None and previous is not image:
            self._retire(self._current_id, previous.buffer)
        report.policy_version = image.manifest.policy_version
        report.verify_seconds = verified - begin
        report.commit_seconds = time.monotonic() - verified
        VERIFY_SECONDS.observe(report.verify_seconds)
        COMMIT_SECONDS.observe(report.commit_seconds)
        log.info(
            "weights committed",
            run_id=image.manifest.run_id,
            policy_version=image.manifest.policy_version,
            bytes=image.manifest.total_bytes,
            verify_seconds=report.verify_seconds,
            commit_seconds=report.commit_seconds,
            stall_seconds=report.stall_seconds,
        )
        return report


def _verify(image: WeightImage) -> None:
    with image.buffer.view() as view:
        verify_shards(view, image.manifest)
