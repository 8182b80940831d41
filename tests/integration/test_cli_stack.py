"""The local stack's supervision: who is restarted, who is given up, and when that ends the run."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from perigee.cli import stack as stack_module
from perigee.cli.run_folder import RunFolder
from perigee.cli.stack import HOST, LocalStack, ServiceSpec, pick_ports, plan_stack
from perigee.errors import UnavailableError

# Answers health checks until it is killed; ends at once where the file `broken` exists.
SERVICE = """
import os, sys
if os.path.exists(sys.argv[2]):
    sys.exit("ValueError: broken")
from concurrent.futures import ThreadPoolExecutor
import grpc
from grpc_health.v1 import health, health_pb2_grpc
server = grpc.server(ThreadPoolExecutor(1))
health_pb2_grpc.add_HealthServicer_to_server(health.HealthServicer(), server)
server.add_insecure_port(sys.argv[1])
server.start()
server.wait_for_termination()
"""
HEALTHY_S = 0.3


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack_module, "RESTART_DELAYS_S", (0.01, 0.01, 0.01))
    monkeypatch.setattr(stack_module, "HEALTHY_S", HEALTHY_S, raising=False)


def test_workers_take_ports_in_a_row(tmp_path: Path) -> None:
    values = {"rollout": {"server": {"metrics_port": 9100}, "http": {"port": 8080}}}
    for index, spec in enumerate(plan_stack(RunFolder(tmp_path), values, 2, ["rollout"])):
        assert {f"server.metrics_port={9100 + index}", f"http.port={8080 + index}"} <= {*spec.command}


class Workers:
    """Rollout workers of a stack that is supervised, and what the stack reports."""

    def __init__(self, folder: Path, count: int) -> None:
        run = RunFolder(folder / "run")
        run.create()
        self.notes: list[str] = []
        self.broken = folder / "broken"
        addresses = [f"{HOST}:{port}" for port in pick_ports(count)]
        self.specs = [
            ServiceSpec(
                name=f"rollout-{index}",
                service="rollout",
                command=[sys.executable, "-c", SERVICE, address, str(self.broken)],
                log_path=run.logs_path / f"rollout-{index}.log",
                address=address,
            )
            for index, address in enumerate(addresses)
        ]
        self.stack = LocalStack(run, self.specs, self.notes.append)

    def count(self, text: str) -> int:
        return sum(text in note for note in self.notes)

    def kill(self, index: int) -> None:
        for process in psutil.process_iter(["cmdline"]):  # of one that has ended, it is None or empty
            line = process.info["cmdline"] or []
            if self.specs[index].address in line and "-c" in line[:2]:
                process.send_signal(signal.SIGKILL)

    async def wait_for(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not condition():  # noqa: ASYNC110, the stack reports to a list
                await asyncio.sleep(0.02)


async def test_a_worker_may_die_as_often_as_it_was_healthy_before(tmp_path: Path) -> None:
    workers = Workers(tmp_path, 1)
    async with workers.stack:
        supervising = asyncio.create_task(workers.stack.supervise())
        for death in range(1, 6):
            await asyncio.sleep(2 * HEALTHY_S)
            workers.kill(0)
            await workers.wait_for(lambda death=death: supervising.done() or workers.count("ready at") > death)  # type: ignore[misc]
            assert not supervising.done(), supervising.exception()
        assert workers.count("restart 1 of 3") == 5
        supervising.cancel()
        await asyncio.gather(supervising, return_exceptions=True)


async def test_a_lost_worker_is_only_lost_until_it_was_the_last(tmp_path: Path) -> None:
    workers = Workers(tmp_path, 2)
    async with workers.stack:
        supervising = asyncio.create_task(workers.stack.supervise())
        workers.broken.touch()
        workers.kill(0)
        await workers.wait_for(lambda: supervising.done() or bool(workers.count("goes on without it")))
        assert not supervising.done(), supervising.exception()
        assert workers.count("rollout-0 ended with exit code 1: ValueError: broken") > 1
        assert workers.count("it was restarted 3 times; the stack goes on without it") == 1
        workers.kill(1)
        async with asyncio.timeout(60):
            with pytest.raises(UnavailableError, match="rollout-1 ended with exit code 1: ValueError: broken"):
                await supervising
