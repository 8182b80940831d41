"""The gateway over real HTTP, before a small servicer: streams, errors, limits, probes, metrics, TLS."""

import asyncio
import json
import shutil
import socket
import ssl
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import REGISTRY
from starlette.datastructures import Headers

from perigee.errors import CancelledError, InvalidArgumentError, ResourceExhaustedError, UnavailableError
from perigee.sandbox.client import SandboxClient
from services.kit.config import HttpConfig
from services.kit.http.middleware import read_body
from tests.fixtures.certificates import Certificates
from tests.fixtures.http_probe import FULL_NAME, connect, execute, probe_server


@pytest.mark.parametrize(
    ("language", "status", "code"),
    [
        ("invalid", 400, "INVALID_ARGUMENT"),
        ("full", 429, "RESOURCE_EXHAUSTED"),
        ("state", 412, "FAILED_PRECONDITION"),
        ("bug", 500, "INTERNAL"),
        ("cancelled", 500, "INTERNAL"),
    ],
)
async def test_errors_of_the_service_have_their_status(language: str, status: int, code: str) -> None:
    async with probe_server() as (app, _), connect(app) as client:
        response = await execute(client, language)
        assert (response.status_code, response.json()["error"]["code"]) == (status, code)
        # The connection goes on.
        assert (await execute(client, "ok")).json()["stdout"] == "text"


async def test_an_error_tells_fields_and_when_to_retry() -> None:
    async with probe_server() as (app, _), connect(app) as client:
        assert (await execute(client, "invalid")).json() == {
            "error": {
                "code": "INVALID_ARGUMENT",
                "message": "source: is wrong: \ud800",
                "field_violations": [{"field": "source", "description": "is wrong: \ud800"}],
            }
        }
        full = await execute(client, "full")
        assert full.headers["retry-after"] == "3"
        assert full.json()["error"]["retry_after_s"] == 2.5


async def test_paths_fill_fields_and_nothing_else_does() -> None:
    async with probe_server() as (app, _), connect(app) as client:
        response = await client.post("/v1/sessions/a%20b/cells", json={"code": "!"})
        assert response.json()["stdout"] == "a b!"
        both = await client.post("/v1/sessions/a/cells", json={"session_id": "b"})
        assert [each["field"] for each in both.json()["error"]["field_violations"]] == ["session_id"]
        closed = await client.delete("/v1/sessions/a")
        assert (closed.status_code, closed.json()) == (200, {})


async def test_what_is_not_served_says_so() -> None:
    async with probe_server() as (app, _), connect(app) as client:
        unknown = await client.get("/v1/nothing")
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "NOT_FOUND")
        method = await client.get("/v1/execute")
        assert (method.status_code, method.headers["allow"]) == (405, "POST")


async def test_a_stream_is_a_line_for_each_message_as_it_comes() -> None:
    async with probe_server() as (app, probe), connect(app) as client:
        body = {"execute": {"language": "wait"}}
        async with client.stream("POST", "/v1/execute/stream", json=body) as response:
            assert response.headers["content-type"] == "application/x-ndjson"
            lines = response.aiter_lines()
            assert json.loads(await anext(lines)) == {"stdout_base64": "/w=="}
            probe.release.set()
            assert json.loads(await anext(lines))["finished"]["status"] == "ok"
            assert [line async for line in lines] == []
        empty = await client.post("/v1/execute/stream", json={"execute": {"language": "nothing"}})
        assert (empty.status_code, empty.content) == (200, b"")


async def test_a_stream_s_error_is_the_response_or_its_last_line() -> None:
    async with probe_server() as (app, _), connect(app) as client:
        early = await client.post("/v1/execute/stream", json={"execute": {"language": "invalid"}})
        assert early.status_code == 400
        assert early.json()["error"]["field_violations"][0]["field"] == "execute.source"
        late = await client.post("/v1/execute/stream", json={"execute": {"language": "full"}})
        assert late.status_code == 200
        first, last = map(json.loads, late.text.splitlines())
        assert first == {"stdout_base64": "/w=="}
        assert last["error"]["code"] == "RESOURCE_EXHAUSTED"
        assert last["error"]["retry_after_s"] == 0.5


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "inf", "1e9"])
async def test_a_deadline_that_is_none_is_refused(text: str) -> None:
    async with probe_server() as (app, _), connect(app) as client:
        response = await execute(client, "ok", **{"X-Timeout-Seconds": text})
        assert response.status_code == 400
        assert response.json()["error"]["field_violations"][0]["field"] == "X-Timeout-Seconds"


async def test_requests_beyond_the_limit_are_refused_with_a_hint() -> None:
    async with probe_server(max_concurrent_rpcs=1) as (app, probe), connect(app) as client:
        waiting = asyncio.create_task(execute(client, "wait"))
        await probe.started.wait()
        refused = await execute(client, "ok")
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert (await client.get("/healthz")).status_code == 200
        probe.release.set()
        assert (await waiting).status_code == 200
        assert (await execute(client, "ok")).status_code == 200


async def test_the_token_opens_everything_but_probes() -> None:
    async with probe_server(token="right") as (app, _):
        for token in (None, "wrong"):
            async with connect(app, token) as client:
                for path in ("/v1/runtimes", "/openapi.json", "/v1/nothing"):
                    response = await client.get(path)
                    assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")
                for path in ("/healthz", "/readyz", "/metrics"):
                    assert (await client.get(path)).status_code == 200
        async with connect(app, None) as client:
            for headers, status in (
                ({"X-API-Key": "right"}, 200),
                ({"X-API-Key": "wrong"}, 401),
                ({"X-API-Key": "right", "Authorization": "Basic dTo="}, 200),
                ({"X-API-Key": "right", "Authorization": "Bearer wrong"}, 401),
                ({"X-Access-Token": "right"}, 200),
            ):
                assert (await client.get("/openapi.json", headers=headers)).status_code == status
        async with connect(app, "right") as client:
            assert (await execute(client, "ok")).status_code == 200
            assert (await client.get("/openapi.json")).json()["security"] == [{"token": []}]


async def test_off_loopback_a_gateway_without_a_token_does_not_start() -> None:
    with pytest.raises(InvalidArgumentError, match=r"server\.token"):
        async with probe_server(host="0.0.0.0"):
            pass


async def test_readiness_is_that_of_the_service() -> None:
    async with probe_server() as (app, _), connect(app) as client:
        ready = await client.get("/readyz")
        assert (ready.status_code, ready.json()) == (200, {"ready": {FULL_NAME: True}})
        app.set_ready(FULL_NAME, False)
        ready = await client.get("/readyz")
        assert (ready.status_code, ready.json()) == (503, {"ready": {FULL_NAME: False}})


@pytest.mark.parametrize(
    ("content", "headers"),
    [
        (b"\xff", {}),
        (b"{", {}),
        (b"", {}),
        (b"[]", {}),
        (b'{"language": "ok"}', {"content-type": "text/plain"}),
        (b"x" * 101, {}),
    ],
)
async def test_a_body_that_is_not_taken_is_named(content: bytes, headers: dict[str, str]) -> None:
    json_type = {"content-type": "application/json"}
    async with probe_server(HttpConfig(port=0, max_body_bytes=100)) as (app, _), connect(app) as client:
        response = await client.post("/v1/execute", content=content, headers=json_type | headers)
        assert response.status_code == 400
        [violation] = response.json()["error"]["field_violations"]
        assert violation["field"] == "body"


async def test_a_body_without_a_length_is_cut_off_at_the_limit() -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b" " * 1000

    async with probe_server(HttpConfig(port=0, max_body_bytes=10_000)) as (app, _), connect(app) as client:
        headers = {"content-type": "application/json"}
        response = await client.post("/v1/execute", content=chunks(), headers=headers)
        assert response.status_code == 400
        assert "larger than 10000 bytes" in response.json()["error"]["message"]


async def read(messages: Sequence[dict[str, Any]], limit: int, **headers: str) -> tuple[bytes, int]:
    """The body and how many messages were taken for it."""
    left = list(messages)

    async def receive() -> dict[str, Any]:
        return left.pop(0)

    try:
        body = await read_body(Headers(headers), receive, limit, lambda size: None)
    except InvalidArgumentError:
        body = b"refused"
    return body, len(messages) - len(left)


async def test_a_body_above_the_limit_is_refused_as_soon_as_it_is_known() -> None:
    part = {"type": "http.request", "body": b"12345", "more_body": True}
    end = {"type": "http.request", "body": b"", "more_body": False}
    assert await read([part, part, end], 10) == (b"1234512345", 3)
    assert await read([part, part, part, end], 9) == (b"refused", 2)
    assert await read([part, end], 9, **{"content-length": "10"}) == (b"refused", 0)
    with pytest.raises(CancelledError):
        await read([part, {"type": "http.disconnect"}], 10)


async def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UnavailableError, match=rf"http\.port: 127\.0\.0\.1:{port} cannot be bound"):
            async with probe_server(HttpConfig(port=port)):
                pass


async def test_without_a_port_there_is_no_gateway() -> None:
    async with probe_server(HttpConfig()) as (app, _):
        assert app.http_address is None


async def test_every_request_is_counted_by_route_and_code() -> None:
    def count(route: str, code: str) -> float:
        labels = {"route": route, "code": code}
        return REGISTRY.get_sample_value("perigee_http_probe_http_request_seconds_count", labels) or 0

    async with probe_server() as (app, probe), connect(app) as client:
        cases = [
            ("POST /v1/execute", "OK"),
            ("POST /v1/execute", "RESOURCE_EXHAUSTED"),
            ("POST /v1/execute/stream", "RESOURCE_EXHAUSTED"),
            ("unmatched", "NOT_FOUND"),
            ("POST /v1/execute", "CANCELLED"),
        ]
        before = [count(*case) for case in cases]
        await execute(client, "ok")
        await execute(client, "full")
        await client.post("/v1/execute/stream", json={"execute": {"language": "full"}})
        await client.get("/v1/nothing")
        leaving = asyncio.create_task(execute(client, "wait"))
        await probe.started.wait()
        leaving.cancel()
        await probe.cancelled.wait()
        assert "perigee_http_probe_http_request_seconds_bucket" in (await client.get("/metrics")).text
        assert [count(*case) for case in cases] == [value + 1 for value in before]


async def test_certificates_are_those_of_the_server(certificates: Certificates) -> None:
    files = {"tls_cert_file": certificates.certificate, "tls_key_file": certificates.key}
    context = ssl.create_default_context(cafile=certificates.ca)
    async with probe_server(**files) as (app, _):
        async with httpx.AsyncClient(base_url=f"https://{app.http_address}", verify=context) as client:
            assert (await execute(client, "ok")).status_code == 200
        async with connect(app) as client:
            with pytest.raises(httpx.HTTPError):
                await execute(client, "ok")


async def test_with_an_authority_callers_need_a_certificate(certificates: Certificates, tmp_path: Path) -> None:
    """Its files may be replaced: new connections get what they hold then, and old ones go on."""
    c = certificates
    own = {"tls_cert_file": c.certificate, "tls_key_file": c.key, "tls_ca_file": c.ca}
    files = {name: str(shutil.copy(path, tmp_path / name)) for name, path in own.items()}

    def caller(ca_file: str, cert_file: str | None) -> httpx.AsyncClient:
        context = ssl.create_default_context(cafile=ca_file)
        if cert_file is not None:
            context.load_cert_chain(cert_file, c.key)
        return httpx.AsyncClient(base_url=f"https://{app.http_address}", verify=context)

    async with probe_server(**files) as (app, _), caller(c.ca, c.certificate) as old:
        assert (await execute(old, "ok")).status_code == 200
        shutil.copy(c.foreign, files["tls_cert_file"])
        shutil.copy(c.other_ca, files["tls_ca_file"])
        async with caller(c.other_ca, c.foreign) as new:
            assert (await execute(new, "ok")).status_code == 200
        assert (await execute(old, "ok")).status_code == 200
        for refused in (caller(c.other_ca, None), caller(c.other_ca, c.certificate), caller(c.ca, c.foreign)):
            async with refused:
                with pytest.raises(httpx.HTTPError):
                    await execute(refused, "ok")


async def test_a_caller_has_one_quota_for_http_and_grpc() -> None:
    callers = {
        "team": {"tokens": ["t"], "audiences": ["control"], "quota": {"max_in_flight": 1}},
        "other": {"tokens": ["o"], "audiences": ["reward", "sandbox"]},
    }
    async with (
        probe_server(token="own", callers=callers) as (app, probe),
        connect(app, "t") as client,
        SandboxClient.connect(app.address, token="t") as sandbox,
    ):
        waiting = asyncio.create_task(execute(client, "wait"))
        await probe.started.wait()
        with pytest.raises(ResourceExhaustedError, match="team has 1 calls in flight, its quota") as refused:
            await sandbox.run("")
        assert refused.value.retry_after_s == 1.0
        over_http = await execute(client, "ok")
        assert (over_http.status_code, over_http.headers["retry-after"]) == (429, "1")
        async with connect(app, "own") as own:
            assert (await execute(own, "ok")).status_code == 200
        probe.release.set()
        assert (await waiting).status_code == 200
        async with connect(app, "o") as other:
            forbidden = await execute(other, "ok")
        assert (forbidden.status_code, forbidden.json()["error"]["code"]) == (403, "PERMISSION_DENIED")


async def test_a_request_keeps_its_id() -> None:
    async with probe_server() as (app, _), connect(app) as client:
        for language in ("ok", "full"):
            assert (await execute(client, language, **{"X-Request-Id": "a-1"})).headers["x-request-id"] == "a-1"
        assert len((await execute(client, "ok")).headers["x-request-id"]) == 32
