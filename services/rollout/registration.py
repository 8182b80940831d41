"""Lease of the worker at the coordinator: registers, renews, and registers again when the lease is lost."""

from __future__ import annotations

import asyncio

from perigee.coordinator.client import CoordinatorClient
from perigee.coordinator.v1 import coordinator_pb2 as pb
from perigee.errors import NotFoundError, PerigeeError
from services.kit.telemetry import get_logger
from services.rollout.worker import READY, STARTING, Worker

log = get_logger(__name__)

# A lease outlives two renewals that are lost.
RENEWALS_PER_LEASE = 3


async def keep_registered(worker: Worker, coordinator: CoordinatorClient, address: str) -> None:
    """Keeps the worker registered until cancelled, and gives the lease back then.

    A coordinator that cannot be reached is tried again without end: it may be starting, or starting again. One that
    starts again does not know the lease (NOT_FOUND), and is registered with anew.
    """
    settings = worker.config.registration
    while worker.status == STARTING:
        await worker.wait_change()
    epoch: int | None = None
    try:
        while True:
            try:
                if epoch is None:
                    epoch, lease_seconds = await _register(worker, coordinator, address)
                    log.info("registered", coordinator=coordinator.target, epoch=epoch, lease_seconds=lease_seconds)
                else:
                    lease_seconds = await _renew(worker, coordinator, epoch)
            except NotFoundError:
                log.warning("lease lost", coordinator=coordinator.target, epoch=epoch)
                epoch = None
            except PerigeeError as error:
                log.warning("coordinator not reached", error=error.message)
                await asyncio.sleep(settings.retry_seconds)
            else:
                await _sleep_or_change(worker, lease_seconds / RENEWALS_PER_LEASE)
    finally:
        if epoch is not None:
            await _deregister(worker, coordinator, epoch)


async def _register(worker: Worker, coordinator: CoordinatorClient, address: str) -> tuple[int, float]:
    """Registers; returns the lease's epoch and seconds."""
    request = pb.RegisterWorkerRequest(
        worker_id=worker.worker_id,
        address=address,
        capacity=worker.config.max_num_seqs,
        policy_version=worker.policy_version,
        ready=worker.status == READY,
        status=worker.status,
    )
    response = await coordinator.register_worker(request, timeout_s=worker.config.registration.timeout_seconds)
    return response.lease_epoch, response.lease_seconds


async def _renew(worker: Worker, coordinator: CoordinatorClient, epoch: int) -> float:
    """Renews the lease; returns its seconds."""
    request = pb.RenewLeaseRequest(
        worker_id=worker.worker_id,
        lease_epoch=epoch,
        running=worker.running,
        policy_version=worker.policy_version,
        ready=worker.status == READY,
        status=worker.status,
    )
    response = await coordinator.renew_lease(request, timeout_s=worker.config.registration.timeout_seconds)
    return response.lease_seconds


async def _deregister(worker: Worker, coordinator: CoordinatorClient, epoch: int) -> None:
    """Gives the lease back."""
    request = pb.DeregisterWorkerRequest(worker_id=worker.worker_id, lease_epoch=epoch)
    try:
        await coordinator.deregister_worker(request, timeout_s=worker.config.registration.timeout_seconds)
    except PerigeeError as error:
        # The lease runs out by itself.
        log.warning("lease not given back", error=error.message)


async def _sleep_or_change(worker: Worker, seconds: float) -> None:
    """Sleeps until the next renewal; a change of status or policy version ends the wait, to be reported at once."""
    try:
        async with asyncio.timeout(seconds):
            await worker.wait_change()
    except TimeoutError:
        return
