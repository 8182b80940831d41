"""The chassis, with a real server and client: errors, token, limits, health, drain."""

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, ClassVar

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from perigee.errors import (
    FieldViolation,
    InternalError,
    InvalidArgumentError,
    ResourceExhaustedError,
    UnauthenticatedError,
    UnavailableError,
    UnimplementedError,
    from_rpc_error,
)
from perigee.reward.client import RewardClient
from perigee.reward.v1 import reward_pb2 as pb
from perigee.reward.v1.reward_pb2_grpc import (
    RewardServiceServicer,
    RewardServiceStub,
    add_RewardServiceServicer_to_server,
)
from services.kit.config import ServerConfig, ServiceConfig
from services.kit.server import App, end_tasks, serving

FULL_NAME = "perigee.reward.v1.RewardService"


class ProbeConfig(ServiceConfig):
    section: ClassVar[str] = "probe"


class Probe(RewardServiceServicer):
    """Answers with what the first item's id asks for."""

    def __init__(self) -> None:
        self.release = asyncio.Event()
        self.peers: list[str] = []

    async def ListVerifiers(self, request: pb.ListVerifiersRequest, context: Any) -> pb.ListVerifiersResponse:
        self.peers.append(context.peer())
        return pb.ListVerifiersResponse()

    async def Score(self, request: pb.ScoreRequest, context: Any) -> AsyncIterator[pb.ScoreResponse]:
        match request.items[0].id:
            case "invalid":
                raise InvalidArgumentError.for_field("items[0].id", "must be a number")
            case "all invalid":
                raise InvalidArgumentError.for_fields([FieldViolation(f"items[{n}]", "is wrong") for n in range(9999)])
            case "full":
                raise ResourceExhaustedError("The queue is full.", retry_after_s=2.5)
            case "bug":
                raise ZeroDivisionError("division by zero")
            case "not implemented":
                raise NotImplementedError("no kernel for this type")
            case "wait":
                yield pb.ScoreResponse(id="started")
                await self.release.wait()
        yield pb.ScoreResponse(id="done")


@asynccontextmanager
async def probe_server(**server: Any) -> AsyncIterator[tuple[App[ProbeConfig], Probe]]:
    probe = Probe()

    @asynccontextmanager
    async def lifespan(app: App[ProbeConfig]) -> AsyncIterator[None]:
        app.add(FULL_NAME, add_RewardServiceServicer_to_server, probe)
        app.set_ready(FULL_NAME, True)
        yield

    async with serving(ProbeConfig(server=ServerConfig(**server)), lifespan) as app:
        yield app, probe


async def score(client: RewardClient, item_id: str) -> list[str]:
    request = pb.ScoreRequest(items=[pb.ScoreItem(id=item_id)])
    return [response.id async for response in client.score(request, timeout_s=60)]


async def test_a_connection_of_age_takes_no_new_calls_and_breaks_no_stream_off() -> None:
    async with (
        probe_server(max_connection_age_seconds=0.1) as (app, probe),
        RewardClient.connect(app.address) as client,
        asyncio.timeout(60),
    ):
        stream = client.score(pb.ScoreRequest(items=[pb.ScoreItem(id="wait")]), timeout_s=60)
        assert (await anext(stream)).id == "started"
        while len(set(probe.peers)) < 3:
            await client.list_verifiers(pb.ListVerifiersRequest())
        probe.release.set()
        assert [response.id async for response in stream] == ["done"]


async def test_domain_errors_arrive_as_the_classes_that_were_raised() -> None:
    async with probe_server() as (app, _), RewardClient.connect(app.address) as client:
        with pytest.raises(InvalidArgumentError) as invalid:
            await score(client, "invalid")
        assert invalid.value.violations == (FieldViolation("items[0].id", "must be a number"),)
        with pytest.raises(InvalidArgumentError, match=r"items\[0\]: is wrong; items\[1\]: is wrong") as all_invalid:
            await score(client, "all invalid")
        assert 100 < len(all_invalid.value.violations) < 9999
        with pytest.raises(ResourceExhaustedError) as full:
            await score(client, "full")
        assert full.value.retry_after_s == 2.5
        with pytest.raises(InternalError, match="ZeroDivisionError"):
            await score(client, "bug")
        # Libraries raise it, too, for what they cannot do; the method is there.
        with pytest.raises(InternalError, match="NotImplementedError"):
            await score(client, "not implemented")


@pytest.mark.parametrize(
    ("data", "reason"), [(b"\x0a\x04\x0a\x02\xff\xff", "bad UTF-8"), (b"\x0a\x7f", "Wire format was corrupt")]
)
async def test_a_request_that_is_no_message_is_an_invalid_argument(data: bytes, reason: str) -> None:
    async with probe_server() as (app, _), grpc.aio.insecure_channel(app.address) as channel:
        for call in (
            channel.unary_stream(f"/{FULL_NAME}/Score")(data, timeout=60).read(),
            channel.unary_unary(f"/{FULL_NAME}/ListVerifiers")(b"\xff", timeout=60),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            error = from_rpc_error(caught.value, "probe")
            assert isinstance(error, InvalidArgumentError)
            [violation] = error.violations
            assert violation.field == "request"
            assert violation.description.startswith("is not of the method's message: Error parsing message")
        with pytest.raises(grpc.aio.AioRpcError, match=reason):
            await channel.unary_stream(f"/{FULL_NAME}/Score")(data, timeout=60).read()


async def test_a_method_that_the_contract_lacks_is_unimplemented() -> None:
    async with probe_server() as (app, _), grpc.aio.insecure_channel(app.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary(f"/{FULL_NAME}/Guess")(b"", timeout=60)
    assert isinstance(from_rpc_error(caught.value, "probe"), UnimplementedError)


async def test_a_call_without_the_token_is_refused_but_health_answers() -> None:
    async with probe_server(token="right") as (app, _):
        for token in (None, "wrong"):
            async with RewardClient.connect(app.address, token=token) as client:
                with pytest.raises(UnauthenticatedError):
                    await client.list_verifiers(pb.ListVerifiersRequest())
        async with RewardClient.connect(app.address, token="right") as client:
            await client.list_verifiers(pb.ListVerifiersRequest())
        async with grpc.aio.insecure_channel(app.address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            answer = await health.Check(health_pb2.HealthCheckRequest(service=FULL_NAME), timeout=60)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_off_loopback_a_server_without_a_token_does_not_start() -> None:
    with pytest.raises(InvalidArgumentError, match=r"server\.token"):
        async with probe_server(host="0.0.0.0"):
            pass


async def test_a_port_in_use_is_named() -> None:
    async with probe_server() as (app, _):
        port = int(app.address.rsplit(":", 1)[1])
        with pytest.raises(UnavailableError, match=f"{port} cannot be bound"):
            async with probe_server(port=port):
                pass


async def test_calls_beyond_the_limit_are_refused_with_a_hint() -> None:
    async with probe_server(max_concurrent_rpcs=1) as (app, probe), RewardClient.connect(app.address) as client:
        waiting = client.score(pb.ScoreRequest(items=[pb.ScoreItem(id="wait")]), timeout_s=60)
        assert (await anext(waiting)).id == "started"
        with pytest.raises(ResourceExhaustedError) as refused:
            await client.list_verifiers(pb.ListVerifiersRequest())
        assert refused.value.retry_after_s == 1.0
        probe.release.set()
        assert [response.id async for response in waiting] == ["done"]
        await client.list_verifiers(pb.ListVerifiersRequest())


async def test_a_burst_is_served_or_refused_and_never_broken_off() -> None:
    async with probe_server(max_concurrent_rpcs=2000) as (app, _), RewardClient.connect(app.address) as client:
        calls = (client.list_verifiers(pb.ListVerifiersRequest()) for _ in range(1500))
        results = await asyncio.gather(*calls, return_exceptions=True)
    assert {type(result) for result in results} == {pb.ListVerifiersResponse}


async def test_a_compressed_request_is_bounded() -> None:
    async with (
        probe_server() as (app, _),
        grpc.aio.insecure_channel(app.address, compression=grpc.Compression.Gzip) as channel,
    ):
        stub = RewardServiceStub(channel)
        item = pb.ScoreItem(id="x" * 1000)
        assert [each.id async for each in stub.Score(pb.ScoreRequest(items=[item]), timeout=60)] == ["done"]
        bomb = pb.ScoreItem(id="x" * (5 << 20))
        with pytest.raises(grpc.aio.AioRpcError, match="a compressed message may hold 4194304 bytes"):
            await stub.Score(pb.ScoreRequest(items=[bomb]), timeout=60).read()


async def test_a_request_that_is_compressed_otherwise_is_refused_by_name() -> None:
    async with (
        probe_server() as (app, _),
        grpc.aio.insecure_channel(app.address, compression=grpc.Compression.Deflate) as channel,
    ):
        item = pb.ScoreItem(id="x" * 1000)
        with pytest.raises(grpc.aio.AioRpcError, match="deflate") as refused:
            await RewardServiceStub(channel).Score(pb.ScoreRequest(items=[item]), timeout=60).read()
        assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED


async def test_the_bytes_of_requests_in_flight_are_bounded() -> None:
    async with (
        probe_server(max_request_bytes_in_flight=5000) as (app, probe),
        RewardClient.connect(app.address) as client,
    ):
        items = [pb.ScoreItem(id="wait"), pb.ScoreItem(id="x" * 3000)]
        waiting = client.score(pb.ScoreRequest(items=items), timeout_s=60)
        assert (await anext(waiting)).id == "started"
        with pytest.raises(ResourceExhaustedError, match="have 3014 bytes, and the server's limit is 5000") as refused:
            await anext(client.score(pb.ScoreRequest(items=items), timeout_s=60))
        assert refused.value.retry_after_s == 1.0
        probe.release.set()
        assert [response.id async for response in waiting] == ["done"]
        assert await score(client, "x" * 3000) == ["done"]


async def test_calls_in_flight_finish_while_the_server_drains() -> None:
    async with probe_server(drain_seconds=60) as (app, probe), RewardClient.connect(app.address) as client:
        waiting = client.score(pb.ScoreRequest(items=[pb.ScoreItem(id="wait")]), timeout_s=60)
        assert (await anext(waiting)).id == "started"
        draining = asyncio.create_task(app.drain())
        await asyncio.sleep(0)
        probe.release.set()
        assert [response.id async for response in waiting] == ["done"]
        await draining


async def test_a_call_that_outlasts_the_drain_finds_the_service_unavailable() -> None:
    async with probe_server(drain_seconds=0) as (app, _), RewardClient.connect(app.address) as client:
        waiting = client.score(pb.ScoreRequest(items=[pb.ScoreItem(id="wait")]), timeout_s=60)
        assert (await anext(waiting)).id == "started"
        await app.drain()
        with pytest.raises(UnavailableError):
            await anext(waiting)


async def test_an_unreachable_service_is_named() -> None:
    async with RewardClient.connect("127.0.0.1:1") as client:
        with pytest.raises(UnavailableError, match=r"RewardService at 127\.0\.0\.1:1 cannot be reached"):
            await client.list_verifiers(pb.ListVerifiersRequest(), timeout_s=5)


NEVER_READY = """
import asyncio
from contextlib import asynccontextmanager

from services.kit.config import ServiceConfig
from services.kit.server import run


class Waiting(ServiceConfig):
    section = "waiting"


@asynccontextmanager
async def lifespan(app):
    try:
        print("waits for a peer", flush=True)
        await asyncio.sleep(3600)
        yield
    finally:
        print("cleaned up", flush=True)


run(Waiting(), lifespan)
"""


async def test_sigterm_ends_a_start_that_waits() -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", NEVER_READY), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"waits for a peer\n"
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(60):
            rest, log = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert (process.returncode, rest) == (0, b"cleaned up\n"), log
    assert b"ended before it was ready" in log
    assert b"Traceback" not in log


async def test_who_is_cancelled_while_tasks_end_is_cancelled() -> None:
    closing = asyncio.Event()

    async def close_slowly() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            closing.set()
            await asyncio.Event().wait()

    async def fail() -> None:
        raise ValueError("failed")

    task = asyncio.create_task(close_slowly())
    await asyncio.sleep(0)
    ending = asyncio.create_task(end_tasks(task))
    await closing.wait()
    ending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await ending
    task.cancel()
    await asyncio.wait({task})
    failing = asyncio.create_task(fail())
    await asyncio.sleep(0)
    with pytest.raises(ValueError, match="failed"):
        await end_tasks(failing)
    await end_tasks()
