"""Readiness of services by the gRPC health protocol."""

from __future__ import annotations

import asyncio

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

POLL_S = 0.2
# A check that takes longer than this counts as not ready.
CHECK_TIMEOUT_S = 2.0


async def check(address: str, service: str, token: str | None = None) -> str:
    """The health of `service` at `address`: SERVING, NOT_SERVING, UNKNOWN, or the gRPC code that the check ended with.

    An empty `service` asks whether the process lives at all.
    """
    async with grpc.aio.insecure_channel(address) as channel:
        return await _check(channel, service, token)


async def wait_serving(address: str, service: str, token: str | None = None) -> None:
    """Returns when `service` at `address` is SERVING; waits as long as it is let."""
    # A channel of its own per attempt: no back-off of a channel that was refused delays the next one.
    while await check(address, service, token) != "SERVING":  # noqa: ASYNC110 (another process knows)
        await asyncio.sleep(POLL_S)


async def _check(channel: grpc.aio.Channel, service: str, token: str | None) -> str:
    stub: health_pb2_grpc.HealthAsyncStub = health_pb2_grpc.HealthStub(channel)
    metadata = (("authorization", f"Bearer {token}"),) if token else None
    request = health_pb2.HealthCheckRequest(service=service)
    try:
        response = await stub.Check(request, timeout=CHECK_TIMEOUT_S, metadata=metadata)
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(response.status))
