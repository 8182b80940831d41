"""A real sandbox service in a process of its own, and how to ask it."""

from __future__ import annotations

import http.client
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from perigee.cli.stack import HOST, pick_ports, start_guarded, wait_ready
from perigee.sandbox.client import SandboxClient
from perigee.sandbox.v1 import sandbox_pb2 as pb

FULL_NAME = "perigee.sandbox.v1.SandboxService"
START_S = 120.0
CALL_S = 120.0
PROBES = 5
# Programs that do nothing.
EMPTY = {
    "python": b"pass",
    "c": b"int main(void) { return 0; }",
    "bash": b":",
    "perl": b";",
    "lua": b"--",
}


@dataclass(frozen=True)
class Service:
    """A running sandbox; `pid` is the service's own process, `http_port` is None where it was not asked for."""

    isolation: str
    client: SandboxClient
    pid: int
    runtimes: Mapping[str, pb.Runtime]
    http_port: int | None = None

    async def run_empty(self, language: str) -> None:
        """Runs a program that does nothing. Raises RuntimeError when it does not end well."""
        await self.run(pb.ExecuteRequest(language=language, source=EMPTY[language]))

    async def run(self, request: pb.ExecuteRequest) -> pb.ExecuteResponse:
        """Runs a program that is to end well. Raises RuntimeError when it does not."""
        response = await self.client.execute(request, timeout_s=CALL_S)
        if response.status != pb.STATUS_OK:
            raise RuntimeError(
                f"{self.isolation}: {pb.Status.Name(response.status)} {response.reason} {response.stderr!r}"
            )
        return response

    async def leanest(self, languages: Iterable[str]) -> str:
        """The one of `languages` whose empty program takes the least time in a container here."""
        medians = {}
        for language in languages:
            if language not in self.runtimes or self.runtimes[language].isolation != "crun":
                continue
            times = []
            await self.run_empty(language)
            for _ in range(PROBES):
                begin = time.perf_counter()
                await self.run_empty(language)
                times.append(time.perf_counter() - begin)
            medians[language] = statistics.median(times)
        return min(medians, key=lambda language: medians[language])


@asynccontextmanager
async def sandbox_service(
    folder: Path, isolation: str, *, http: bool = False, slots: int | None = None
) -> AsyncIterator[Service]:
    """Starts a service with state and log below `folder`, and ends it with the block.

    Raises UnavailableError with the last error of its log when it ends or does not get ready.
    """
    port, http_port = pick_ports(2)
    settings: dict[str, object] = {
        "isolation": isolation,
        "server.host": HOST,
        "server.port": port,
        "state_path": folder / isolation / "state",
    }
    if slots is not None:
        settings["slots"] = slots
    if http:
        settings["http.port"] = http_port
    overrides = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    command = [sys.executable, "-m", "services.sandbox", *overrides]
    process = await start_guarded(f"sandbox-{isolation}", command, folder / f"{isolation}.log")
    try:
        await wait_ready(process, f"{HOST}:{port}", FULL_NAME, timeout_s=START_S)
        async with SandboxClient.connect(f"{HOST}:{port}") as client:
            runtimes = (await client.list_runtimes(pb.ListRuntimesRequest())).runtimes
            [served] = psutil.Process(process.pid).children()
            by_name = {runtime.language: runtime for runtime in runtimes}
            yield Service(isolation, client, served.pid, by_name, http_port if http else None)
    finally:
        await process.stop()


@asynccontextmanager
async def sandbox_client(address: str, slots: int) -> AsyncIterator[SandboxClient]:
    """Yields a client of the sandbox at an address, or of one that is started where that is empty."""
    if address:
        async with SandboxClient.connect(address) as client:
            yield client
        return
    with tempfile.TemporaryDirectory(prefix="sandbox-") as folder:
        async with sandbox_service(Path(folder), "auto", slots=slots) as service:
            yield service.client


def open_http(port: int) -> http.client.HTTPConnection:
    """A connection that is kept alive from request to request."""
    return http.client.HTTPConnection(HOST, port, timeout=CALL_S)
