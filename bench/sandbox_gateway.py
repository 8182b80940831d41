"""The same empty job over HTTP and over gRPC, each on one connection that is kept alive, in turn.

Each by the lightest client at hand: http.client of the standard library, and the package's own gRPC client.
"""

from __future__ import annotations

import http.client
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sandbox_figures import Arm
from sandbox_service import EMPTY, open_http, sandbox_service
from sandbox_start import take_turns, time_service

TARGET_MS = 2.0
BODY = json.dumps({"language": "python", "source": EMPTY["python"].decode()})
HEADERS = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Gateway:
    """Milliseconds of both arms."""

    http: Arm
    grpc: Arm

    @property
    def difference_ms(self) -> float:
        """Median over HTTP less median over gRPC."""
        return self.http.median - self.grpc.median


async def measure_gateway(folder: Path, turns: int, block: int) -> Gateway:
    """Raises UnavailableError where the service takes no `http.port`."""
    async with sandbox_service(folder, "zygote", http=True) as service:
        assert service.http_port is not None
        connection = open_http(service.http_port)
        try:

            async def over_http(count: int) -> list[float]:
                return [_post(connection) for _ in range(count)]

            measures = {"http": over_http, "grpc": lambda count: time_service(service, "python", count)}
            arms = await take_turns(measures, turns, block)
        finally:
            connection.close()
    return Gateway(arms["http"], arms["grpc"])


def _post(connection: http.client.HTTPConnection) -> float:
    begin = time.perf_counter()
    connection.request("POST", "/v1/execute", BODY, HEADERS)
    response = connection.getresponse()
    body = response.read()
    milliseconds = (time.perf_counter() - begin) * 1000
    if response.status != 200 or json.loads(body)["status"] != "ok":
        raise RuntimeError(f"POST /v1/execute: {response.status} {body[:300]!r}")
    return milliseconds


def table_of(gateway: Gateway) -> list[tuple[str, ...]]:
    """Rows of both arms and their difference."""
    rows: list[tuple[str, ...]] = [
        (f"Execute over {name}, ms", f"{arm.median:.2f}", "", f"p95 {arm.p95:.2f}, {len(arm.samples)} calls")
        for name, arm in (("HTTP", gateway.http), ("gRPC", gateway.grpc))
    ]
    rows.append(("HTTP less gRPC, ms", f"{gateway.difference_ms:+.2f}", f"<= {TARGET_MS:.0f}", ""))
    return rows


def to_json(gateway: Gateway) -> dict[str, Any]:
    """The figures as JSON."""
    return {
        "difference_ms": gateway.difference_ms,
        "target_ms": TARGET_MS,
        "http_turns_ms": gateway.http.turns,
        "grpc_turns_ms": gateway.grpc.turns,
    }
