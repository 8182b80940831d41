"""Traces, at a real collector: where they begin, what they carry, what is left out, and how they are sent."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import httpx
import pytest
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from opentelemetry import trace

from perigee.buffer.client import BufferClient
from perigee.buffer.v1 import buffer_pb2 as pb
from perigee.buffer.v1.buffer_pb2_grpc import BufferServiceServicer, add_BufferServiceServicer_to_server
from services.kit.config import TelemetryConfig
from services.kit.server import App, serving
from services.kit.telemetry import get_logger, start_logging
from services.kit.tracing import detached_span, span, start_tracing, stop_tracing
from tests.fixtures.certificates import Certificates
from tests.fixtures.collector import Collector, collecting
from tests.fixtures.http_probe import ProbeConfig, probe_server
from tests.fixtures.judge import FakeJudge, judge_item, running_judge, verdict

NAME = "perigee.buffer.v1.BufferService"


@pytest.fixture(autouse=True)
def _end_of_tracing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    yield
    stop_tracing()


class Probe(BufferServiceServicer):
    """Logs a line in each call."""

    async def GetRun(self, request: pb.GetRunRequest, context: Any) -> pb.GetRunResponse:
        get_logger(__name__).warning("served")
        return pb.GetRunResponse()


@asynccontextmanager
async def probe_client() -> AsyncIterator[BufferClient]:
    @asynccontextmanager
    async def lifespan(app: App[ProbeConfig]) -> AsyncIterator[None]:
        app.add(NAME, add_BufferServiceServicer_to_server, Probe())
        yield

    async with serving(ProbeConfig(), lifespan) as app:
        yield app.connect(BufferClient, app.address)


@pytest.fixture
def _loggers_for_now(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Loggers of other tests in this process stay as they were, though the test starts logging."""
    configure, before = structlog.configure, structlog.get_config()

    def configure_for_now(**options: Any) -> None:
        configure(**options | {"cache_logger_on_first_use": False})

    monkeypatch.setattr(structlog, "configure", configure_for_now)
    yield
    configure(**before)


@pytest.mark.usefixtures("_loggers_for_now")
async def test_a_detached_span_begins_a_trace_that_carries_its_run(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", log := io.StringIO())
    start_logging("probe", TelemetryConfig())
    start_tracing("probe", TelemetryConfig(otlp_endpoint=collector.address))
    async with probe_client() as client:
        with detached_span("run", run="r1"), detached_span("iteration", iteration=3), span("phase", step="x"):
            await client.get_run(pb.GetRunRequest(run_id="r1"))
    stop_tracing()
    [run], [iteration], [phase] = (collector.named(name) for name in ("run", "iteration", "phase"))
    assert run.trace_id != iteration.trace_id
    assert (iteration.parent_id, iteration.links, run.links) == ("", (run.span_id,), (iteration.span_id,))
    assert phase.parent_id == iteration.span_id
    calls = collector.named(f"/{NAME}/GetRun")
    assert [(each.trace_id, each.service) for each in calls] == [(iteration.trace_id, "perigee-probe")] * 2
    for each in (iteration, phase, *calls):
        assert each.attributes["perigee.run"] == "r1"
        assert each.attributes["perigee.iteration"] == 3
    [line] = [json.loads(line) for line in log.getvalue().splitlines() if "served" in line]
    assert (line["service"], line["run"], line["iteration"]) == ("probe", "r1", 3)
    assert line["trace_id"] == iteration.trace_id


async def test_probes_and_polls_are_left_out_and_so_are_other_libraries(collector: Collector) -> None:
    start_tracing("probe", TelemetryConfig(otlp_endpoint=collector.address))
    with trace.get_tracer("vllm").start_as_current_span("load"):
        async with probe_client() as client:
            health = health_pb2_grpc.HealthStub(client.channel)
            with pytest.raises(grpc.aio.AioRpcError, match="NOT_FOUND"):
                await health.Check(health_pb2.HealthCheckRequest(service="other"), timeout=5)
            with span("seen"):
                pass
    stop_tracing()
    assert [each.name for each in collector.spans] == ["seen"]


async def test_an_http_callers_trace_is_taken_up(collector: Collector) -> None:
    start_tracing("probe", TelemetryConfig(otlp_endpoint=f"http://{collector.address}"))
    trace_id, span_id = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    async with probe_server() as (app, _), httpx.AsyncClient(base_url=f"http://{app.http_address}") as client:
        headers = {"traceparent": f"00-{trace_id}-{span_id}-01"}
        await client.get("/healthz", headers=headers)
        await client.post("/v1/execute", json={"language": "invalid"}, headers=headers)
    stop_tracing()
    [request] = collector.spans
    assert (request.name, request.trace_id, request.parent_id) == ("POST /v1/execute", trace_id, span_id)
    assert request.failed
    assert request.attributes["perigee.code"] == "INVALID_ARGUMENT"


async def test_calls_of_judges_have_spans(collector: Collector, fake_judge: FakeJudge) -> None:
    start_tracing("reward", TelemetryConfig(otlp_endpoint=collector.address))
    fake_judge.otherwise = verdict("correct")
    async with running_judge(fake_judge.url, votes=2) as verifier:
        with detached_span("score", run="r1"):
            await verifier.judge(judge_item())
    stop_tracing()
    [score], calls = collector.named("score"), collector.named("call judge")
    assert [call.parent_id for call in calls] == [score.span_id] * 2
    assert {(call.attributes["perigee.model"], call.attributes["perigee.run"]) for call in calls} == {("tiny", "r1")}


def test_the_variables_of_opentelemetry_are_honoured(
    certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = [(open(certificates.key, "rb").read(), open(certificates.certificate, "rb").read())]  # noqa: SIM115
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_CERTIFICATE", certificates.ca)
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.namespace=team")
    with collecting(grpc.ssl_server_credentials(pair)) as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"https://{collector.address}")
        for variable, value, spans in (
            ("OTEL_SERVICE_NAME", "named", 1),
            ("OTEL_TRACES_SAMPLER", "always_off", 1),
            ("OTEL_SDK_DISABLED", "true", 1),
        ):
            monkeypatch.setenv(variable, value)
            start_tracing("probe", TelemetryConfig())
            with span("any"):
                pass
            stop_tracing()
            assert [each.service for each in collector.spans] == ["named"] * spans


@pytest.mark.usefixtures("_loggers_for_now")
def test_people_may_have_lines_that_are_not_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", log := io.StringIO())
    start_logging("probe", TelemetryConfig(log_format="console"))
    with span("segment", trajectory="t1"):
        get_logger(__name__).warning("segment failed", reason="none")
    assert "segment failed" in log.getvalue()
    assert "trajectory=t1" in log.getvalue()
