"""The local stack: every service as a process below a guard, started, watched, restarted, and ended together."""

from __future__ import annotations

import asyncio
import math
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from perigee.cli.guard import GRACE_S, GUARD_MARGIN_S, launcher
from perigee.cli.recipe import SERVICES
from perigee.cli.run_folder import RunFolder, StackFile
from perigee.errors import UnavailableError, first_error
from perigee.rpc import VARIABLES, ChannelOptions, open_channel
from services.kit.process import ChildProcess

# Importing the engines takes a minute on a busy machine of two cores.
START_TIMEOUT_S = 300.0
HOST = "127.0.0.1"
# Below the kernel's ephemeral range, so that no outgoing connection takes a port between choice and use.
PORT_RANGE = range(20_000, 32_000)
HEALTH_POLL_S = 0.2
# A check that takes longer than this counts as not ready.
HEALTH_TIMEOUT_S = 2.0
# A process that ends is restarted after these delays, then given up.
RESTART_DELAYS_S = (1.0, 2.0, 4.0)
# A process that was ready for so long, longer than an engine takes to start, gets all its restarts again.
HEALTHY_S = 300.0
# The services that each one dials; `<peer>_address` is the field that takes the address.
PEERS: Mapping[str, Sequence[str]] = {
    "reward": ("sandbox",),
    "trainer": ("buffer",),
    "coordinator": ("buffer", "trainer", "reward"),
    "rollout": ("buffer", "coordinator", "trainer"),
}
# A worker is ready once the first weights were pushed, which takes a run: its process being alive is enough.
HEALTH_NAMES: Mapping[str, str] = {
    **{name: f"perigee.{name}.v1.{name.capitalize()}Service" for name in SERVICES},
    "rollout": "",
}
# Ports of a worker besides its own; in a recipe they are those of the first worker, and the others take the next ones.
WORKER_PORTS = (("server", "metrics_port"), ("http", "port"))
# Ended in this order: no work is handed out, then none is done, then what holds the results goes.
STOP_ORDER = (("coordinator",), ("rollout", "trainer", "reward"), ("sandbox", "buffer"))

Report = Callable[[str], None]


@dataclass(frozen=True)
class ServiceSpec:
    """One process of the stack; `name` is the service's, numbered when there may be several."""

    name: str
    service: str
    command: Sequence[str]
    log_path: Path
    address: str
    channel: ChannelOptions = field(default_factory=ChannelOptions)


def plan_stack(
    run: RunFolder, values: Mapping[str, Any], workers: int, services: Sequence[str] = SERVICES
) -> list[ServiceSpec]:
    """Returns the processes for `services`, each on a port of its own; `values` is the recipe of the run folder."""
    names = [name for name in services if name != "rollout"]
    names += [f"rollout-{index}" for index in range(workers)] if "rollout" in services else []
    addresses = {}
    for name, free_port in zip(names, pick_ports(len(names)), strict=True):
        server = (values.get(name) or {}).get("server") or {}
        addresses[name] = f"{HOST}:{server.get('port') or free_port}"
    specs = []
    for name in names:
        service = name.partition("-")[0]
        section = values.get(service) or {}
        server = section.get("server") or {}
        sets = [f"server.port={addresses[name].rpartition(':')[2]}"]
        sets += [f"{peer}_address={addresses[peer]}" for peer in PEERS.get(service, ()) if peer in addresses]
        if service == "rollout":
            sets.append(f"worker_id={name}")
            for part, key in WORKER_PORTS:
                if first := (section.get(part) or {}).get(key):
                    sets.append(f"{part}.{key}={first + int(name.partition('-')[2])}")
        arguments = [sys.executable, "-m", f"services.{service}", "--config", str(run.recipe_path)]
        for override in sets:
            arguments += ["--set", override]
        log_path = run.logs_path / f"{name}.log"
        specs.append(ServiceSpec(name, service, arguments, log_path, addresses[name], local_channel(server)))
    return specs


def local_channel(server: Mapping[str, Any]) -> ChannelOptions:
    """Returns how a service with this `server` section is reached from here: as its peers reach it."""
    token, token_file = server.get("token"), server.get("token_file")
    if token is None and token_file is None:
        token, token_file = (os.environ.get(VARIABLES[name]) or None for name in ("token", "token_file"))
    if not server.get("tls_cert_file"):
        return ChannelOptions(token, token_file)
    return ChannelOptions(
        token=token,
        token_file=token_file,
        ca_file=server.get("tls_ca_file"),
        cert_file=server.get("tls_cert_file"),
        key_file=server.get("tls_key_file"),
        server_name=server.get("tls_server_name"),
    )


class LocalStack:
    """Running processes of a run; use as an async context manager, in the main thread."""

    def __init__(self, run: RunFolder, specs: Sequence[ServiceSpec], report: Report) -> None:
        self.run = run
        self.specs = specs
        self._report = report
        self._processes: dict[str, ChildProcess] = {}
        self._ready_at: dict[str, float] = {}
        self._lost: set[str] = set()

    @property
    def addresses(self) -> dict[str, str]:
        """host:port of each process by its name."""
        return {spec.name: spec.address for spec in self.specs}

    async def __aenter__(self) -> Self:
        """Starts every process and waits until all are ready.

        Raises UnavailableError, with the last error of its log, when one ends or stays unready; then all are ended.
        """
        try:
            await self._for_each(self._start)
        except BaseException:
            await self.stop()
            raise
        self.run.write_stack(StackFile(pid=os.getpid(), addresses=self.addresses))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def supervise(self) -> None:
        """Restarts what ends; a process that keeps ending is given up.

        Raises UnavailableError when no process of a service is left.
        """
        await self._for_each(self._supervise)

    async def stop(self) -> None:
        """Ends all processes; returns when every process tree has ended."""
        for services in STOP_ORDER:
            names = [spec.name for spec in self.specs if spec.service in services and spec.name in self._processes]
            await asyncio.gather(*(self._stop(self._processes[name]) for name in names))
        self.run.stack_path.unlink(missing_ok=True)

    def kill(self) -> None:
        """Ends all processes at once, without waiting for them to finish anything."""
        for process in self._processes.values():
            process.kill()

    async def _for_each(self, work: Callable[[ServiceSpec], Coroutine[Any, Any, None]]) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for spec in self.specs:
                    group.create_task(work(spec))
        except ExceptionGroup as failures:
            raise first_error(failures) from None

    async def _start(self, spec: ServiceSpec) -> None:
        process = await start_guarded(spec.name, spec.command, spec.log_path)
        self._processes[spec.name] = process
        self._ready_at.pop(spec.name, None)
        try:
            await wait_ready(process, spec.address, HEALTH_NAMES[spec.service], spec.channel)
        except UnavailableError:
            await process.stop()
            raise
        self._ready_at[spec.name] = time.monotonic()
        self._report(f"{spec.name} ready at {spec.address}")

    async def _stop(self, process: ChildProcess) -> None:
        was_running = process.exit_code is None
        await process.stop()
        if was_running and process.exit_code == 128 + signal.SIGKILL:
            self._report(f"{process.name} did not end by itself and was killed (log: {process.log_path})")

    async def _supervise(self, spec: ServiceSpec) -> None:
        restarts = 0
        while True:
            process = self._processes[spec.name]
            end = process.describe_end(await process.wait())
            if time.monotonic() - self._ready_at.get(spec.name, math.inf) >= HEALTHY_S:
                restarts = 0
            if restarts == len(RESTART_DELAYS_S):
                self._give_up(spec, f"{end}; it was restarted {restarts} times")
                return
            delay_s = RESTART_DELAYS_S[restarts]
            restarts += 1
            self._report(f"{end}; restart {restarts} of {len(RESTART_DELAYS_S)} in {delay_s:g} s")
            await asyncio.sleep(delay_s)
            try:
                await self._start(spec)
            except UnavailableError as error:
                self._report(error.message)

    def _give_up(self, spec: ServiceSpec, end: str) -> None:
        self._lost.add(spec.name)
        if all(other.name in self._lost for other in self.specs if other.service == spec.service):
            raise UnavailableError(end)
        self._report(f"{end}; the stack goes on without it")


async def start_guarded(
    name: str, command: Sequence[str], log_path: Path, environment: Mapping[str, str] | None = None
) -> ChildProcess:
    """Starts a command below a guard, so that its whole process tree ends with it, and with this process."""
    grace_s = GRACE_S + GUARD_MARGIN_S
    return await ChildProcess.start(
        name, command, log_path=log_path, launcher=launcher(log_path), grace_s=grace_s, environment=environment
    )


async def wait_ready(
    process: ChildProcess,
    address: str,
    service: str,
    channel: ChannelOptions = ChannelOptions(),
    timeout_s: float = START_TIMEOUT_S,
) -> None:
    """Returns when the process serves `service` at `address`.

    Raises UnavailableError, with the last error of its log, when it ends before or takes longer.
    """
    ready = asyncio.create_task(wait_serving(address, service, channel))
    ended = asyncio.create_task(process.wait())
    try:
        await asyncio.wait((ready, ended), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if ended.done():
            raise UnavailableError(process.describe_end(ended.result()))
        if not ready.done():
            raise UnavailableError(f"{process.name} was not ready after {timeout_s:g} s (log: {process.log_path})")
    finally:
        ready.cancel()
        ended.cancel()
        await asyncio.gather(ready, ended, return_exceptions=True)


async def check_health(address: str, service: str, channel: ChannelOptions = ChannelOptions()) -> str:
    """Returns the health of `service` at `address`: SERVING, NOT_SERVING, UNKNOWN, or the gRPC code of a failed check.

    An empty `service` asks whether the process lives at all.
    """
    request = health_pb2.HealthCheckRequest(service=service)
    connection = open_channel(address, channel)
    try:
        stub: health_pb2_grpc.HealthAsyncStub = health_pb2_grpc.HealthStub(connection)
        response = await stub.Check(request, timeout=HEALTH_TIMEOUT_S)
    except grpc.aio.AioRpcError as error:
        return error.code().name
    finally:
        await connection.close()
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(response.status))


async def wait_serving(address: str, service: str, channel: ChannelOptions) -> None:
    """Returns when `service` at `address` is SERVING; waits without a deadline."""
    # A channel of its own per attempt: no back-off of a channel that was refused delays the next one.
    while await check_health(address, service, channel) != "SERVING":  # noqa: ASYNC110 (another process knows)
        await asyncio.sleep(HEALTH_POLL_S)


async def health_lines(addresses: Mapping[str, str], channel: ChannelOptions) -> list[str]:
    """Returns a line of name, address and health for every process, all asked at once."""
    checks = (
        check_health(address, HEALTH_NAMES[name.partition("-")[0]], channel) for name, address in addresses.items()
    )
    healths = await asyncio.gather(*checks)
    return [f"{name:<12} {addresses[name]:<22} {health}" for name, health in zip(addresses, healths, strict=True)]


def pick_ports(count: int) -> list[int]:
    """Returns distinct ports that nothing listens on. Raises OSError when there are not enough."""
    ports: list[int] = []
    candidates = random.SystemRandom().sample(PORT_RANGE, len(PORT_RANGE))
    for port in candidates:
        if len(ports) == count:
            return ports
        if _is_free(port):
            ports.append(port)
    raise OSError(f"no {count} free ports on {HOST} between {PORT_RANGE.start} and {PORT_RANGE.stop}")


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True
