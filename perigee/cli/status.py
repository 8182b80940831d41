"""`perigee status`: services, workers and the state of the run, asked from the services themselves."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import dataclass

from perigee.cli.figures import figures, format_seconds, phase_name, progress_line
from perigee.cli.stack import HEALTH_NAMES, check_health
from perigee.coordinator.client import CoordinatorClient
from perigee.coordinator.v1 import coordinator_pb2 as pb

CALL_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class ServiceStatus:
    """One service's address and what its health check said."""

    name: str
    address: str
    health: str


async def read_services(addresses: Mapping[str, str]) -> list[ServiceStatus]:
    """The health of every process, asked at once."""
    token = os.environ.get("PERIGEE_TOKEN")
    checks = [check_health(address, HEALTH_NAMES[name.partition("-")[0]], token) for name, address in addresses.items()]
    healths = await asyncio.gather(*checks)
    return [
        ServiceStatus(name, address, health) for (name, address), health in zip(addresses.items(), healths, strict=True)
    ]


async def read_coordinator(address: str) -> pb.GetStatusResponse:
    """The coordinator's answer. Raises UnavailableError when it cannot be reached."""
    async with CoordinatorClient.connect(address, token=os.environ.get("PERIGEE_TOKEN")) as client:
        return await client.get_status(pb.GetStatusRequest(), timeout_s=CALL_TIMEOUT_S)


def status_lines(services: list[ServiceStatus], status: pb.GetStatusResponse | None) -> list[str]:
    """What there is to tell, a line each."""
    lines = [f"{service.name:<12} {service.address:<22} {service.health}" for service in services]
    if status is None:
        return lines
    for worker in status.workers:
        state = "ready" if worker.ready else "not ready"
        lines.append(
            f"worker {worker.worker_id} at {worker.address}: {state}, {worker.running} running, "
            f"policy version {worker.policy_version}, lease {format_seconds(worker.lease_remaining_seconds)}"
        )
    if not status.workers:
        lines.append("no rollout worker is registered")
    if not status.HasField("run"):
        lines.append("no run")
        return lines
    run = status.run
    lines.append(f"run {run.run_id}: {phase_name(run.phase)}, {progress_line(run)}")
    if found := figures(run.metrics):
        lines.append("latest iteration: " + ", ".join(f"{figure.label} {figure.text}" for figure in found))
    if run.error:
        lines.append(f"error: {run.error}")
    return lines
