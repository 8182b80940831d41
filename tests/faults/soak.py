"""SIGKILL and SIGSTOP at random over every process of a hybrid stack; the conservation law is checked after each.

    python -m tests.faults.soak [--faults 200] [--minutes 40] [--seed 0] [--recipe examples/arithmetic] [--set A.B=C]

The stack is `perigee train` with a trainer of two ranks and two rollout workers on its devices, which leave and come
back, and beside it a worker elsewhere, `perigee worker`. What dies is started again as in production: engine and fork
server by their worker, Valkey by the buffer, services by `perigee train`, and `perigee train --resume` and
`perigee worker` by this script, in the place of a service manager. Neither gives up here, however often.

The seed decides kind, signal and length of each fault; when it strikes, the run is wherever the machine has got to.
Ends with exit status 1 when the law (`tests/faults/law.py`) breaks, nothing is committed for STALL_S, `perigee train`
ends by itself or a process is left over, and says how to do it again. `make test` does not run it.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import shlex
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from perigee.buffer.client import BufferClient
from perigee.cli.run_folder import find_stack
from perigee.cli.stack import pick_ports
from perigee.coordinator.client import CoordinatorClient
from perigee.coordinator.v1 import coordinator_pb2
from perigee.errors import PerigeeError, first_error
from perigee.rollout.client import RolloutClient
from perigee.rollout.v1 import rollout_pb2
from services.kit.process import ChildProcess
from services.kit.server import end_tasks
from tests.faults.law import Law, LawBroken, Losses, demand, look

# A supervisor that does not give up: here, processes die more often than anywhere.
PERIGEE = (
    "from perigee.cli import stack; stack.RESTART_DELAYS_S = (1.0,) * 100_000; from perigee.cli.main import app; app()"
)
LOCAL_WORKERS = 2
WORKERS = LOCAL_WORKERS + 1
SEQUENCES = 32
CHUNK = 8
SETTINGS = (
    "run.deployment=hybrid",
    "run.hybrid={engine: sleep, workers: [rollout-0, rollout-1]}",
    "run.sft=[]",
    "run.iterations=100000",
    "run.drop_uniform_groups=false",
    "run.max_live_groups=48",
    "run.evaluation={every: 0, samples: 1, problems: 8}",
    "coordinator.recoveries=100000",
    "coordinator.dispatch.attempts=1000",
    "coordinator.scoring.attempts=1000",
    "trainer.data_parallel=2",
    "trainer.threads=1",
    f"rollout.max_num_seqs={SEQUENCES}",
    f"rollout.chunk_tokens={CHUNK}",
    "rollout.kv_cache_bytes=67108864",
)
# On ports of their own, so that they are found again after `perigee train` was killed.
FIXED = ("coordinator", "buffer", "trainer")
TOGETHER = "trainer, coordinator and buffer"
PARTS = ("trainer", "trainer rank", "coordinator", "buffer")
# Kinds of processes, each as likely as the others, and the workers whose sequences the loss of one may cut off.
KINDS: Mapping[str, int] = {
    "buffer": WORKERS,
    "coordinator": WORKERS,
    "engine": 1,
    "fork server": 1,
    "guard": WORKERS,
    "perigee train": WORKERS,
    "perigee worker": 1,
    "resource tracker": 0,
    "reward": 0,
    "reward helper": 0,
    "rollout": 1,
    "sandbox": 0,
    "sandbox helper": 0,
    # The worker beside the pods generates while the trainer trains.
    "trainer": 1,
    "trainer rank": 1,
    TOGETHER: WORKERS,
    "valkey": WORKERS,
}
KILLS = 2 / 3
STOPPED_S = (1.0, 20.0)
START_S = 600.0
STALL_S = 600.0
PAUSE_S = 1.0


def classify(process: psutil.Process, parent: str, service: str) -> tuple[str, str]:
    """Returns the kind of a process and its service, below a parent of this kind and service."""
    words = process.cmdline() or [""]  # of one that has ended
    line = " ".join(words)
    if "guard.py" in line:
        named = re.search(r"-m services\.(\w+)", line)
        return "guard", named[1] if named else "prepare"
    if words[0].startswith("VLLM::"):
        return "engine", service
    if "valkey-server" in words[0]:
        return "valkey", service
    if "resource_tracker" in line:
        return "resource tracker", service
    if parent == "guard" and f"services.{service}" in words:
        return service, service
    return {"trainer": "trainer rank", "rollout": "fork server"}.get(service, f"{service} helper"), service


def is_left(process: psutil.Process) -> bool:
    """Returns whether a process still runs."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@dataclass
class Command:
    """A command of `perigee` that is started again when all of it has ended, as by a service manager."""

    name: str
    log: Path
    arguments: Sequence[str]
    # Of every start but the first.
    again: Sequence[str]
    may_end: bool
    """Whether it may end by itself. One that is hurt while it starts may: then it gives up."""
    pid: int = 0
    was_hurt: bool = False
    """While it was starting."""
    tree: set[psutil.Process] = field(default_factory=set)
    """All processes that were seen of it and may still run."""

    def find_processes(self) -> dict[str, list[psutil.Process]]:
        """Returns its living processes by kind."""
        found: dict[str, list[psutil.Process]] = defaultdict(list)
        known = {self.pid: (self.name, "")}
        with suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.pid)
            found[self.name].append(root)
            for process in root.children(recursive=True):  # parents come first
                with suppress(psutil.Error, KeyError):
                    known[process.pid] = classify(process, *known[process.ppid()])
                    found[known[process.pid][0]].append(process)
        self.tree.update(process for some in found.values() for process in some)
        return found

    async def keep(self) -> None:
        """Keeps it running until cancelled; raises LawBroken when it ends by itself and may not."""
        arguments = self.arguments
        while True:
            command = [sys.executable, "-c", PERIGEE, *arguments]
            process = await ChildProcess.start(self.name, command, log_path=self.log, grace_s=120.0)
            self.pid, self.was_hurt = process.pid, False
            try:
                code = await process.wait()
            finally:
                await process.stop()
            is_due = self.may_end or self.was_hurt or code == 128 + signal.SIGKILL
            demand(is_due, process.describe_end(code))
            arguments = self.again
            await asyncio.sleep(PAUSE_S)
            while self.prune():  # noqa: ASYNC110, other processes end
                await asyncio.sleep(PAUSE_S)

    def prune(self) -> set[psutil.Process]:
        """Forgets the processes that have ended; returns the others."""
        self.tree = {process for process in self.tree if is_left(process)}
        return self.tree


@dataclass
class Stack:
    """The stack under test, the faults that it gets, and what is known of it."""

    law: Law
    run_id: str
    buffer: BufferClient
    coordinator: CoordinatorClient
    commands: Sequence[Command]
    tasks: asyncio.TaskGroup
    losses: Losses = field(default_factory=Losses)
    phase: str = "-"
    """Of the run when it was last asked for."""
    commits: int = 0
    committed_at: float = field(default_factory=time.monotonic)

    def hurt(self, chance: random.Random) -> str:
        """Kills or stops a process, or kills several together; returns what it did, nothing when none runs."""
        kind, is_kill = chance.choice([*KINDS]), chance.random() < KILLS
        place, seconds = chance.random(), chance.uniform(*STOPPED_S)
        trees = [command.find_processes() for command in self.commands]
        found = {each: [process for tree in trees for process in tree[each]] for each in (*KINDS, *PARTS)}
        if kind == TOGETHER:
            is_kill, victims = True, [process for part in PARTS for process in found[part]]
        else:
            # The next kind where none of this one runs now.
            first = [*KINDS].index(kind)
            kind = next((each for each in ([*KINDS] * 2)[first:] if found[each]), kind)
            victims = found[kind][int(place * len(found[kind])) :][:1]
        self.losses.allowed += KINDS[kind] * SEQUENCES * CHUNK if victims else 0
        train = self.commands[0]
        train.was_hurt |= find_stack(train.log.parent) is None
        for victim in victims:
            with suppress(psutil.NoSuchProcess):
                victim.send_signal(signal.SIGKILL if is_kill else signal.SIGSTOP)
                if not is_kill:
                    self.tasks.create_task(resume_later(victim, seconds))
        return f"{'SIGKILL' if is_kill else 'SIGSTOP'} to {kind}" if victims else ""

    async def count(self) -> dict[str, int]:
        """Notes the run's phase and what the workers have generated; returns it, of those that answer."""
        self.phase = "-"
        counts = {}
        with suppress(PerigeeError):
            status = await self.coordinator.get_status(coordinator_pb2.GetStatusRequest(), timeout_s=2.0)
            self.phase = coordinator_pb2.RunPhase.Name(status.run.phase).removeprefix("RUN_PHASE_").lower()
            for worker in status.workers:
                with suppress(PerigeeError):
                    async with RolloutClient.connect(worker.address) as client:
                        state = await client.get_state(rollout_pb2.GetStateRequest(), timeout_s=1.0)
                    counts[worker.worker_id] = state.generated_tokens
                    self.losses.note(worker.worker_id, state.generated_tokens)
        return counts

    async def check(self) -> None:
        """Holds the run against the law as soon as the buffer answers."""
        deadline = time.monotonic() + STALL_S
        before = await self.count()
        while True:
            try:
                seen = await look(self.buffer, self.run_id)
                break
            except PerigeeError as error:
                demand(time.monotonic() < deadline, f"the buffer gives no answer for {STALL_S:g} s: {error.message}")
                await asyncio.sleep(0.5)
        self.law.check(seen)
        if self.law.iteration > self.commits:
            self.commits, self.committed_at = self.law.iteration, time.monotonic()
        demand(time.monotonic() - self.committed_at < STALL_S, f"no commit for {STALL_S:g} s after {self.commits}")
        if len(before) == WORKERS and await self.count() == before:
            self.losses.check(self.law.durable)

    async def commit(self, iterations: int) -> None:
        """Returns when so many more iterations are committed, under the law."""
        target = self.law.iteration + iterations
        while self.law.iteration < target:
            await self.check()
            await asyncio.sleep(PAUSE_S)


async def resume_later(process: psutil.Process, seconds: float) -> None:
    """Lets a stopped process go on after a while, and at once when cancelled."""
    try:
        await asyncio.sleep(seconds)
    finally:
        with suppress(psutil.NoSuchProcess):
            process.resume()


@asynccontextmanager
async def running(options: argparse.Namespace, runs: Path) -> AsyncIterator[Stack]:
    """Runs the stack; at the end all of it has ended, or LawBroken is raised."""
    ports = [f"{name}.server.port={port}" for name, port in zip(FIXED, pick_ports(len(FIXED)), strict=True)]
    sets = [word for value in (*SETTINGS, *ports, *options.sets) for word in ("--set", value)]
    common = ("--plain", "--workers", str(LOCAL_WORKERS), "--runs-dir", str(runs))
    train = Command(
        "perigee train",
        runs / "train.log",
        ("train", options.recipe, *common, *sets),
        ("train", "--resume", "latest", *common),
        may_end=False,
    )
    joining = ("worker", "--runs-dir", str(runs))
    worker = Command("perigee worker", runs / "worker.log", joining, joining, may_end=True)
    async with AsyncExitStack() as stack, asyncio.TaskGroup() as tasks:
        training = tasks.create_task(train.keep())
        async with asyncio.timeout(START_S):
            while (found := find_stack(runs)) is None:  # noqa: ASYNC110, another process writes the file
                await asyncio.sleep(PAUSE_S)
        addresses = found[1].addresses
        under_test = Stack(
            Law(found[0].path / "metrics.jsonl"),
            found[0].run_id,
            await stack.enter_async_context(BufferClient.connect(addresses["buffer"])),
            await stack.enter_async_context(CoordinatorClient.connect(addresses["coordinator"])),
            (train, worker),
            tasks,
        )
        working = tasks.create_task(worker.keep())
        try:
            yield under_test
            for command in under_test.commands:
                command.find_processes()
        finally:
            await end_tasks(working)
            await end_tasks(training)
    left = [process for command in under_test.commands for process in command.prune()]
    demand(not left, f"left over: {left[:3]}")


async def wait_for_workers(stack: Stack) -> None:
    """Returns when every worker has registered."""
    async with asyncio.timeout(START_S):
        while True:
            with suppress(PerigeeError):
                status = await stack.coordinator.get_status(coordinator_pb2.GetStatusRequest(), timeout_s=2.0)
                if len(status.workers) == WORKERS:
                    return
            await asyncio.sleep(PAUSE_S)


async def soak(options: argparse.Namespace, runs: Path, done: Counter[str]) -> None:
    """Runs the stack and hurts it, counting in `done` what was done."""
    try:
        async with running(options, runs) as stack:
            await wait_for_workers(stack)
            await stack.commit(2)
            began = time.monotonic()
            for number in range(1, options.faults + 1):
                left_s = began + options.minutes * 60 - time.monotonic()
                if left_s <= 0:
                    break
                chance = random.Random(f"{options.seed}/{number}")
                await asyncio.sleep(left_s / (options.faults - number + 1) * chance.uniform(0.5, 1.5))
                await stack.count()
                place = f"{time.monotonic() - began:6.0f} s  {number:3}  {stack.phase:10}"
                if fault := stack.hurt(chance):
                    done[fault] += 1
                await stack.check()
                print(f"{place} {stack.commits:5} commits {stack.losses.found:5} tokens lost  {fault}", flush=True)
            await stack.commit(2)
            print(
                f"{stack.commits} iterations, {stack.law.durable} tokens, {stack.losses.found} tokens lost", flush=True
            )
    except BaseExceptionGroup as group:
        raise first_error(group) from group


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=40.0)
    parser.add_argument("--recipe", default="examples/arithmetic")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], dest="sets", metavar="A.B=C")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    runs, done = Path(tempfile.mkdtemp(prefix="perigee-soak-")), Counter[str]()
    print(f"seed {options.seed}, logs and records: {runs}", flush=True)
    try:
        asyncio.run(soak(options, runs, done))
    except LawBroken as broken:
        print(f"the law is broken after {done.total()} faults: {broken}\nsee {runs}; again:")
        print(shlex.join(["python", "-m", "tests.faults.soak", "--seed", str(options.seed), *sys.argv[1:]]))
        return 1
    for text, count in sorted(done.items()):
        print(f"{count:4}  {text}")
    print(f"{done.total()} faults, and the law holds")
    return 0


if __name__ == "__main__":
    sys.exit(main())
