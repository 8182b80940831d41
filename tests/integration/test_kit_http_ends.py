"""How HTTP requests end: a caller that goes away, a deadline, a service that stops."""

import asyncio
import json

import httpx
import pytest

from services.kit.config import HttpConfig
from tests.fixtures.http_probe import FULL_NAME, connect, execute, probe_server


async def test_a_caller_that_goes_away_ends_its_call() -> None:
    async with probe_server(max_concurrent_rpcs=1) as (app, probe), connect(app) as client:
        calling = asyncio.create_task(execute(client, "wait"))
        await probe.started.wait()
        calling.cancel()
        await probe.cancelled.wait()
        assert (await execute(client, "ok")).status_code == 200


async def test_a_caller_that_leaves_a_stream_ends_it() -> None:
    async with probe_server() as (app, probe), connect(app) as client:
        for language in ("wait", "flood"):
            probe.closed.clear()
            async with client.stream(
                "POST", "/v1/execute/stream", json={"execute": {"language": language}}
            ) as response:
                await anext(response.aiter_lines())
            await probe.closed.wait()
        assert probe.cancelled.is_set()


async def test_a_deadline_ends_the_call() -> None:
    async with probe_server() as (app, probe), connect(app) as client:
        late = await execute(client, "wait", **{"X-Timeout-Seconds": "1"})
        assert (late.status_code, late.json()["error"]["code"]) == (504, "DEADLINE_EXCEEDED")
        assert probe.cancelled.is_set()
        stream = await client.post(
            "/v1/execute/stream", json={"execute": {"language": "wait"}}, headers={"X-Timeout-Seconds": "1"}
        )
        assert json.loads(stream.text.splitlines()[-1])["error"]["code"] == "DEADLINE_EXCEEDED"


async def test_a_call_without_a_deadline_has_the_service_s() -> None:
    async with probe_server(HttpConfig(port=0, timeout_seconds=1.0)) as (app, probe), connect(app) as client:
        assert (await execute(client, "wait")).status_code == 504
        assert probe.cancelled.is_set()
        assert 1 < float((await execute(client, "time", **{"X-Timeout-Seconds": "60"})).json()["reason"]) <= 60


async def test_the_servicer_knows_the_time_that_is_left() -> None:
    async with probe_server() as (app, _), connect(app) as client:
        assert (await execute(client, "time")).json()["reason"] == "None"
        assert 0 < float((await execute(client, "time", **{"X-Timeout-Seconds": "60"})).json()["reason"]) <= 60


async def test_requests_under_way_finish_while_the_service_drains() -> None:
    async with probe_server(drain_seconds=30) as (app, probe), connect(app) as client:
        waiting = asyncio.create_task(execute(client, "wait"))
        await probe.started.wait()
        draining = asyncio.create_task(app.drain())
        await asyncio.sleep(0)
        assert app.readiness() == {FULL_NAME: False}
        probe.release.set()
        assert (await waiting).status_code == 200
        await draining
        with pytest.raises(httpx.ConnectError):
            await execute(client, "ok")


async def test_a_request_that_outlasts_the_drain_finds_the_service_unavailable() -> None:
    async with probe_server(drain_seconds=0.1) as (app, probe), connect(app) as client:
        waiting = asyncio.create_task(execute(client, "wait"))
        await probe.started.wait()
        await app.drain()
        response = await waiting
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
        assert probe.cancelled.is_set()


async def test_a_caller_that_does_not_read_does_not_hold_up_the_end() -> None:
    async with probe_server(drain_seconds=0) as (app, probe):
        host, port = str(app.http_address).split(":")
        reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
        body = b'{"execute":{"language":"flood"}}'
        head = "POST /v1/execute/stream HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert b"200" in await reader.readline()
        await app.drain()
        await probe.closed.wait()
        writer.close()
