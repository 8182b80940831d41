"""Probes on the metrics port: the stages of a service's life, what it waits for, and an event loop that is stuck."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest

from perigee.errors import UnavailableError
from perigee.reward.v1.reward_pb2_grpc import RewardServiceServicer, add_RewardServiceServicer_to_server
from services.kit import health
from services.kit.config import ServerConfig
from services.kit.server import App, serving
from tests.fixtures.http_probe import ProbeConfig

NAME = "perigee.reward.v1.RewardService"


async def ask(address: str | None, path: str) -> tuple[int, str]:
    async with httpx.AsyncClient(base_url=f"http://{address}") as client:
        response = await client.get(path)
        return response.status_code, response.text.strip()


async def test_readiness_follows_what_is_required_from_start_to_stop() -> None:
    seen: list[tuple[int, str]] = []

    @asynccontextmanager
    async def lifespan(app: App[ProbeConfig]) -> AsyncIterator[None]:
        seen.append(await ask(app.metrics_address, "/healthz"))
        seen.append(await ask(app.metrics_address, "/readyz"))
        app.add(NAME, add_RewardServiceServicer_to_server, RewardServiceServicer())  # type: ignore[abstract]
        app.add("optional", lambda *_: None, None, required=False)
        yield
        seen.append(await ask(app.metrics_address, "/readyz"))

    async with serving(ProbeConfig(server=ServerConfig(metrics_port=0)), lifespan) as app:
        assert await ask(app.metrics_address, "/readyz") == (503, f"{NAME} does not serve yet.")
        app.set_ready(NAME, True)
        assert await ask(app.metrics_address, "/readyz") == (200, "ok")
        app.set_ready(NAME, False, "Redis does not answer.")
        assert await ask(app.metrics_address, "/readyz") == (503, "Redis does not answer.")
        status, metrics = await ask(app.metrics_address, "/metrics")
        assert status == 200
        assert "python_info" in metrics
        assert "_created" not in metrics
        assert (await ask(app.metrics_address, "/x"))[0] == 404
    assert seen == [(200, "ok"), (503, "The service is starting."), (503, "The service is stopping.")]


async def test_a_stuck_event_loop_is_not_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "LOOP_SILENCE_S", 0.2)
    async with health.serving_probes("127.0.0.1", 0, lambda: None) as address:
        # The one-liner of container health checks.
        code = f"import urllib.request as r; r.urlopen('http://{address}/healthz', timeout=60)"
        probe = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stderr=subprocess.PIPE)
        assert await probe.wait() == 0
        # Blocks the loop, on purpose.
        stuck = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)  # noqa: ASYNC221
    assert stuck.returncode == 1
    assert "503" in stuck.stderr


async def test_a_metrics_port_in_use_is_named() -> None:
    async with health.serving_probes("127.0.0.1", 0, lambda: None) as address:
        with pytest.raises(UnavailableError, match=r"server\.metrics_port: .* cannot be bound"):
            async with health.serving_probes("127.0.0.1", int(address.rsplit(":")[-1]), lambda: None):
                pass
