"""Pushes weight images to rollout workers: prepare, write, commit; each worker succeeds or fails by itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import partial

from prometheus_client import Counter, Histogram

from perigee.errors import DeadlineExceededError, PerigeeError, UnavailableError
from perigee.trainer.v1.trainer_pb2 import PushOutcome, PushTarget
from perigee.weights.client import WeightReceiverClient
from perigee.weights.v1 import weights_pb2 as pb
from services.kit.telemetry import get_logger
from services.kit.tracing import span
from services.weights.config import WeightsConfig
from services.weights.manifest import WeightImage
from services.weights.shared_memory import SharedBuffer, remove_leftovers
from services.weights.transport import (
    BUCKETS,
    EndpointPool,
    MooncakeTransport,
    Transport,
    run_in_daemon,
    wait_for_transfers,
)

log = get_logger(__name__)

PUSHES = Counter("perigee_weights_pushes_total", "Pushes to one receiver", ["result"])
PUSHES.labels("failed")  # a rate over a counter that appears with its first failure misses that one
TRANSFER_SECONDS = Histogram("perigee_weights_transfer_seconds", "Bytes to one receiver", buckets=BUCKETS)


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

    async def push(self, image: WeightImage, targets: Sequence[PushTarget]) -> list[PushOutcome]:
        """Writes the image to every target and commits it where it arrived; returns outcomes in the order of `targets`.

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

    async def _push_to(self, image: WeightImage, target: PushTarget) -> PushOutcome:
        """Pushes to one target; every failure is an outcome."""
        outcome = PushOutcome(worker_id=target.worker_id)
        async with self._slots, self._connect(target.address) as client:
            try:
                # The answer also shows that the receiver is alive, before an engine dials it.
                prepared = await client.prepare(
                    pb.PrepareRequest(manifest=image.manifest), timeout_s=self._config.prepare_timeout_s
                )
                outcome.transfer_seconds = await self._write(image, target, prepared)
                begin = time.monotonic()
                report = await client.commit(
                    pb.CommitRequest(transfer_id=prepared.transfer_id), timeout_s=self._config.commit_timeout_s
                )
                outcome.commit_seconds = time.monotonic() - begin
                outcome.stall_seconds = report.stall_seconds
            except PerigeeError as error:
                log.warning(
                    "weights not committed",
                    worker_id=target.worker_id,
                    policy_version=image.manifest.policy_version,
                    reason=error.message,
                )
                PUSHES.labels("failed").inc()
                outcome.reason = error.message
                return outcome
        PUSHES.labels("committed").inc()
        TRANSFER_SECONDS.observe(outcome.transfer_seconds)
        outcome.committed = True
        return outcome

    async def _write(self, image: WeightImage, target: PushTarget, prepared: pb.PrepareResponse) -> float:
        """Writes the image; returns the seconds. A write that outlives this call is aborted when it has ended."""
        write = start_write(self._endpoints, image.buffer, image.manifest.total_bytes, prepared)
        try:
            with span("transfer weights", worker=target.worker_id, bytes=image.manifest.total_bytes):
                async with asyncio.timeout(self._config.transfer_timeout_s):
                    return await asyncio.shield(write)
        except TimeoutError as error:
            raise DeadlineExceededError(
                f"{image.manifest.total_bytes} bytes did not reach {target.address} within "
                f"weights.transfer_timeout_s = {self._config.transfer_timeout_s:g} s"
            ) from error
        finally:
            if not write.done() or write.cancelled() or write.exception() is not None:
                task = asyncio.create_task(self._abort_when_ended(write, target, prepared.transfer_id))
                self._lingering.add(task)
                task.add_done_callback(self._lingering.discard)

    async def _abort_when_ended(self, write: asyncio.Future[float], target: PushTarget, transfer_id: str) -> None:
        """Gives the receiver its buffer back, which is safe only after the write has ended."""
        await asyncio.wait({write})
        if (failure := write.exception()) is not None:
            log.info("write ended", worker_id=target.worker_id, reason=str(failure))
        async with self._connect(target.address) as client:
            try:
                await client.abort(pb.AbortRequest(transfer_id=transfer_id), timeout_s=self._config.prepare_timeout_s)
            except PerigeeError as error:  # the receiver takes the buffer back by itself after a while
                log.info("transfer not aborted", worker_id=target.worker_id, reason=error.message)


def start_write(
    endpoints: EndpointPool, source: SharedBuffer, size: int, destination: pb.PrepareResponse
) -> asyncio.Future[float]:
    """Writes the first `size` bytes of `source`; the future is done when the write has ended, one way or the other.

    Its result is the seconds of the transfer, its exception a PerigeeError. The source stays pinned until then.
    """
    source.pin()
    written = run_in_daemon(partial(_write, endpoints, source, size, destination), f"weights-to-{destination.session}")
    written.add_done_callback(lambda _: source.unpin())
    return written


def _write(endpoints: EndpointPool, source: SharedBuffer, size: int, destination: pb.PrepareResponse) -> float:
    """Writes in this thread; returns the seconds of the transfer."""
    endpoint = endpoints.borrow(destination.session, destination.receiver_id)
    try:
        return _transfer(endpoint.transport, source, size, destination)
    finally:
        endpoints.give_back(endpoint)


def _transfer(transport: Transport, source: SharedBuffer, size: int, destination: pb.PrepareResponse) -> float:
    transport.register(source.address, size)
    begin = time.monotonic()
    try:
        write = transport.submit_write(destination.session, source.address, destination.address, size)
        arrived = wait_for_transfers(transport, [write])
    finally:
        transport.unregister(source.address)
    if not arrived:
        raise UnavailableError(f"the write to {destination.session} broke off: the receiver died or made no progress")
    return time.monotonic() - begin
