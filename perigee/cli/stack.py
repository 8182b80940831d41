"""The local stack: every service as a process below a guard, started, watched, restarted, and ended together."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from perigee.cli.health import wait_serving
from perigee.cli.ports import HOST, pick_ports
from perigee.cli.process import Command, GuardedProcess
from perigee.cli.recipe import SERVICES
from perigee.cli.run_folder import RunFolder, StackFile
from perigee.errors import UnavailableError

# Importing the engines takes a minute on a busy machine of two cores.
START_TIMEOUT_S = 300.0
MAX_RESTARTS = 3
RESTART_DELAYS_S = (1.0, 2.0, 4.0)
# The services that each one dials; `<peer>_address` is the field that takes the address.
PEERS: Mapping[str, Sequence[str]] = {
    "reward": ("sandbox",),
    "trainer": ("buffer",),
    "coordinator": ("buffer", "trainer", "reward"),
    "rollout": ("buffer", "coordinator"),
}
# A worker is ready once the first weights were pushed, which takes a run: its process being alive is enough.
HEALTH_NAMES: Mapping[str, str] = {
    **{name: f"perigee.{name}.v1.{name.capitalize()}Service" for name in SERVICES},
    "rollout": "",
}
# Ended in this order: no work is handed out, then none is done, then what holds the results goes.
STOP_ORDER = (("coordinator",), ("rollout", "trainer", "reward"), ("sandbox", "buffer"))

Report = Callable[[str], None]


@dataclass(frozen=True)
class ServiceSpec:
    """One process of the stack."""

    service: str
    command: Command
    address: str
    token: str | None = None

    @property
    def name(self) -> str:
        """Name of the process: the service's, numbered when there may be several."""
        return self.command.name


def plan_stack(
    run: RunFolder, values: Mapping[str, Any], workers: int, services: Sequence[str] = SERVICES
) -> list[ServiceSpec]:
    """The processes for `services`, each on a port of its own; `values` is the recipe of the run folder."""
    names = [name for name in services if name != "rollout"]
    names += [f"rollout-{index}" for index in range(workers)] if "rollout" in services else []
    addresses = {}
    for name, free_port in zip(names, pick_ports(len(names)), strict=True):
        server = (values.get(name) or {}).get("server") or {}
        addresses[name] = f"{HOST}:{server.get('port') or free_port}"
    specs = []
    for name in names:
        service = name.partition("-")[0]
        sets = [f"server.port={addresses[name].rpartition(':')[2]}"]
        sets += [f"{peer}_address={addresses[peer]}" for peer in PEERS.get(service, ()) if peer in addresses]
        if service == "rollout":
            sets.append(f"worker_id={name}")
        arguments = [sys.executable, "-m", f"services.{service}", "--config", str(run.recipe_path)]
        for override in sets:
            arguments += ["--set", override]
        command = Command(name=name, arguments=arguments, log_path=run.logs_path / f"{name}.log")
        server = (values.get(service) or {}).get("server") or {}
        token = server.get("token") or os.environ.get("PERIGEE_TOKEN")
        specs.append(ServiceSpec(service=service, command=command, address=addresses[name], token=token))
    return specs


class LocalStack:
    """The running processes of a run; use as an async context manager, in the main thread."""

    def __init__(self, run: RunFolder, specs: Sequence[ServiceSpec], report: Report) -> None:
        self.run = run
        self.specs = specs
        self._report = report
        self._processes: dict[str, GuardedProcess] = {}

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
        """Restarts what ends, MAX_RESTARTS times per process; raises UnavailableError when that was in vain."""
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
            raise failures.exceptions[0] from None

    async def _start(self, spec: ServiceSpec) -> None:
        process = await GuardedProcess.start(spec.command)
        self._processes[spec.name] = process
        ready = asyncio.create_task(wait_serving(spec.address, HEALTH_NAMES[spec.service], spec.token))
        ended = asyncio.create_task(process.wait())
        try:
            await asyncio.wait((ready, ended), timeout=START_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                raise UnavailableError(process.describe_end(ended.result()))
            if not ready.done():
                await process.stop()
                raise UnavailableError(
                    f"{spec.name} was not ready after {START_TIMEOUT_S:g} s (log: {spec.command.log_path})"
                )
            self._report(f"{spec.name} ready at {spec.address}")
        finally:
            ready.cancel()
            ended.cancel()
            await asyncio.gather(ready, ended, return_exceptions=True)

    async def _stop(self, process: GuardedProcess) -> None:
        was_running = process.exit_code is None
        await process.stop()
        if was_running and process.exit_code == 128 + signal.SIGKILL:
            self._report(
                f"{process.command.name} did not end by itself and was killed (log: {process.command.log_path})"
            )

    async def _supervise(self, spec: ServiceSpec) -> None:
        for restart, delay_s in enumerate(RESTART_DELAYS_S[:MAX_RESTARTS], start=1):
            process = self._processes[spec.name]
            end = process.describe_end(await process.wait())
            self._report(f"{end}; restart {restart} of {MAX_RESTARTS} in {delay_s:g} s")
            await asyncio.sleep(delay_s)
            try:
                await self._start(spec)
            except UnavailableError as error:
                self._report(error.message)
        process = self._processes[spec.name]
        end = process.describe_end(await process.wait())
        raise UnavailableError(f"{end}; it was restarted {MAX_RESTARTS} times")
