"""Pushes a weight image to rollout workers: prepare, write, commit; each worker succeeds or fails by itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from perigee.errors import DeadlineExceededError, PerigeeError
from perigee.weights.client import WeightReceiverClient
from perigee.weights.v1 import weights_pb2 as pb
from services.kit.telemetry import get_logger
from services.weights.buffer import remove_leftovers
from services.weights.config import WeightsConfig
from services.weights.image import WeightImage
from services.weights.manifest import manifest_to_proto
from services.weights.metrics import PUSHES, TRANSFER_SECONDS
from services.weights.mooncake_transport import MooncakeTransport
from services.weights.pool import Destination, EndpointPool
from services.weights.transport import Transport
from services.weights.writing import start_write

log = get_logger(__name__)


@dataclass(frozen=True)
class Target:
    """A worker and the host:port of its WeightReceiverService."""

    worker_id: str
    address: str


@dataclass(frozen=True)
class PushOutcome:
    """What became of one target; `reason` says why when it is not `committed`.

    `transfer_seconds` is the write alone, `commit_seconds` the whole Commit call (checksums and swap).
    """

    worker_id: str
    committed: bool
    reason: str
    transfer_seconds: float
    commit_seconds: float


class WeightSender:
    """Pushes images. `connect` makes a client of a receiver's address; the sender closes it after the push."""

    def __init__(
        self,
        config: WeightsConfig,
        connect: Callable[[str], WeightReceiverClient] = WeightReceiverClient.connect,
        open_transport: Callable[[], Transport] | None = None,
    ) -> None:
        self._config = config
        self._connect = connect
        self._endpoints = EndpointPool(open_transport or (lambda: MooncakeTransport(config)))
        self._slots = asyncio.Semaphore(config.max_parallel_targets)
        # Writes that outlived the deadline or the caller of their push, each with its clean-up.
        self._lingering: set[asyncio.Task[None]] = set()
        for path in remove_leftovers(config.shared_memory_dir):
            log.info("removed leftover weight image", path=str(path))

    async def push(self, image: WeightImage, targets: Sequence[Target]) -> list[PushOutcome]:
        """Brings the image to every target and commits it where it arrived; outcomes in the order of `targets`.

        Never raises for a target. The image may be closed as soon as this returns: its memory stays until the
        last write from it has ended.
        """
        image.buffer.pin()
        try:
            return await asyncio.gather(*(self._push_to(image, target) for target in targets))
        finally:
            image.buffer.unpin()

    async def close(self, timeout_s: float = 5.0) -> None:
        """Waits for lingering writes; those to silent peers are left to end with the process. Closes the endpoints."""
        if self._lingering:
            _, pending = await asyncio.wait(self._lingering, timeout=timeout_s)
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)
        await asyncio.to_thread(self._endpoints.close)

    async def _push_to(self, image: WeightImage, target: Target) -> PushOutcome:
        transfer_seconds = commit_seconds = 0.0
        async with self._slots, self._connect(target.address) as client:
            try:
                # The answer also shows that the receiver is alive, before an engine dials it.
                prepared = await client.prepare(
                    pb.PrepareRequest(manifest=manifest_to_proto(image.manifest)),
                    timeout_s=self._config.prepare_timeout_s,
                )
                transfer_seconds = await self._write(image, target, prepared)
                begin = time.monotonic()
                await client.commit(
                    pb.CommitRequest(transfer_id=prepared.transfer_id), timeout_s=self._config.commit_timeout_s
                )
                commit_seconds = time.monotonic() - begin
            except PerigeeError as error:
                log.warning(
                    "weights not committed",
                    worker_id=target.worker_id,
                    policy_version=image.policy_version,
                    reason=error.message,
                )
                PUSHES.labels("failed").inc()
                return PushOutcome(target.worker_id, False, error.message, transfer_seconds, commit_seconds)
        PUSHES.labels("committed").inc()
        TRANSFER_SECONDS.observe(transfer_seconds)
        return PushOutcome(target.worker_id, True, "", transfer_seconds, commit_seconds)

    async def _write(self, image: WeightImage, target: Target, prepared: pb.PrepareResponse) -> float:
        destination = Destination(prepared.session, prepared.receiver_id, prepared.address)
        write = start_write(self._endpoints, image.buffer, image.total_bytes, destination)
        try:
            return await asyncio.wait_for(asyncio.shield(write), self._config.transfer_timeout_s)
        except TimeoutError as error:
            raise DeadlineExceededError(
                f"{image.total_bytes} bytes did not reach {target.address} within "
                f"weights.transfer_timeout_s = {self._config.transfer_timeout_s:g} s"
            ) from error
        finally:
            if not write.done() or write.cancelled() or write.exception() is not None:
                task = asyncio.create_task(self._abort_when_ended(write, target, prepared.transfer_id))
                self._lingering.add(task)
                task.add_done_callback(self._lingering.discard)

    async def _abort_when_ended(self, write: asyncio.Future[float], target: Target, transfer_id: str) -> None:
        """Gives the receiver its buffer back, which is safe only after the write has ended."""
        await asyncio.wait({write})
        if (failure := write.exception()) is not None:
            log.info("write ended", worker_id=target.worker_id, reason=str(failure))
        async with self._connect(target.address) as client:
            try:
                await client.abort(pb.AbortRequest(transfer_id=transfer_id), timeout_s=self._config.prepare_timeout_s)
            except PerigeeError as error:  # the receiver takes the buffer back by itself after a while
                log.info("transfer not aborted", worker_id=target.worker_id, reason=error.message)
