"""SIGKILL and SIGSTOP at random over every process of a running stack, with a law that holds after each of them.

    python -m tests.faults.soak [--faults 200] [--minutes 40] [--recipe examples/arithmetic] [--seed 0] [--set A.B=C]

Trains the recipe with two workers, `perigee worker` beside them, and no supervised stage. The law is checked on what
the buffer has committed:

- each group that was issued was trained, was dropped with a reason, or is in flight, and none that is gone comes back;
- each token that was counted was trained on, or is in flight, and no trajectory in flight has fewer than before;
- iterations are 1, 2, 3 and so on, each once.

Ends with exit status 1, and the first violation, when the law breaks, nothing is committed for STALL_S, or a process is
left over. A run of 200 faults takes 40 minutes; `make test` does not run it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from perigee.buffer.client import BufferClient
from perigee.buffer.v1 import buffer_pb2
from perigee.cli.run_folder import find_stack
from perigee.errors import PerigeeError
from services.kit.process import ChildProcess

# A supervisor that never gives up: here, processes die more often than anywhere.
PERIGEE = "from perigee.cli import stack; stack.HEALTHY_S = 0.0; from perigee.cli.main import app; app()"
SETTINGS = (
    "run.sft=[]",
    "run.iterations=100000",
    "run.drop_uniform_groups=false",
    "run.max_live_groups=48",
    "run.evaluation={every: 0, samples: 1, problems: 8}",
    "coordinator.recoveries=100000",
    "rollout.max_num_seqs=64",
    "rollout.chunk_tokens=8",
)
START_S = 600.0
STALL_S = 600.0
STOPPED_S = (1.0, 20.0)
# What dies together: all that a run's state is in, but the disk.
TOGETHER = ("trainer", "coordinator", "buffer")


class LawBroken(Exception):
    """Raised with the first sentence that does not hold."""


@dataclass
class Law:
    """What was seen of the run so far, and what must follow from it."""

    run_path: Path
    run_id: str
    tokens: dict[str, int] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)
    commits: int = 0
    committed_at: float = field(default_factory=time.monotonic)

    async def check(self, buffer: BufferClient) -> None:
        """Reads the buffer between two looks at its commit, and raises LawBroken; a run that moves on is read again."""
        while True:
            run = (await buffer.get_run(buffer_pb2.GetRunRequest(run_id=self.run_id), timeout_s=10)).run
            live = {
                member.trajectory_id: member.tokens
                async for page in buffer.list_groups(buffer_pb2.ListGroupsRequest(run_id=self.run_id), timeout_s=10)
                for group in page.groups
                for member in group.trajectories
            }
            again = (await buffer.get_run(buffer_pb2.GetRunRequest(run_id=self.run_id), timeout_s=10)).run
            if again.iteration == run.iteration:
                break
        self._check_trajectories(live)
        if run.iteration > self.commits:
            self.commits, self.committed_at = run.iteration, time.monotonic()
        demand(time.monotonic() - self.committed_at < STALL_S, f"no commit for {STALL_S:g} s after {self.commits}")
        if run.iteration:
            self._check_commit(json.loads(run.coordinator_state), run.iteration)

    def _check_trajectories(self, live: dict[str, int]) -> None:
        demand(not self.gone & {*live}, f"consumed before, and back: {sorted(self.gone & {*live})[:3]}")
        fewer = [key for key, tokens in live.items() if tokens < self.tokens.get(key, 0)]
        demand(not fewer, f"durable tokens are lost: {fewer[:3]}")
        self.gone |= {*self.tokens} - {*live}
        self.tokens = live

    def _check_commit(self, state: dict[str, Any], iteration: int) -> None:
        path = self.run_path / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        by_iteration = {line["iteration"]: line for line in lines if line["iteration"] < iteration}
        by_iteration[iteration] = state["last_line"]
        demand(sorted(by_iteration) == list(range(1, iteration + 1)), f"iterations are {sorted(by_iteration)[-5:]}")
        numbers = Counter(line["iteration"] for line in lines)
        demand(max(numbers.values(), default=1) == 1, f"a line stands twice: {numbers.most_common(1)}")
        consumed = sum(line["reward/groups"] for line in by_iteration.values())
        accounted = sum(
            line["train/groups"] + line["train/groups_uniform"] + line["train/groups_failed"]
            for line in by_iteration.values()
        )
        in_flight = state["last_line"]["rollout/live_groups"]
        demand(consumed == accounted, f"{consumed} groups consumed, {accounted} trained or dropped with a reason")
        demand(
            state["next_group"] == consumed + in_flight,
            f"{state['next_group']} groups issued, {consumed} consumed, {in_flight} in flight",
        )
        if any(line["train/groups_failed"] for line in by_iteration.values()):
            return  # the tokens of a group without verdicts are in no line
        counted = sum(line["rollout/tokens"] for line in by_iteration.values())
        trained = sum(
            tokens
            for line in by_iteration.values()
            for key, tokens in line.items()
            if key.startswith("train/tokens_by_version/")
        )
        held = sum(sum(tokens) for tokens in state["starts"].values())
        demand(counted == trained + held, f"{counted} tokens counted, {trained} trained, {held} in flight")


def demand(holds: bool, sentence: str) -> None:
    """Raises LawBroken unless the condition holds."""
    if not holds:
        raise LawBroken(sentence)


def find_targets(*roots: int) -> dict[str, psutil.Process]:
    """Returns the processes below `roots` that do the work: services, engines, trainer ranks, Valkey."""
    found: dict[str, psutil.Process] = {}
    for process in descend(roots):
        with suppress(psutil.Error):
            line = process.cmdline()
            if line[1:2] == ["-m"] and line[2].startswith("services."):
                found[f"{line[2].removeprefix('services.')} {process.pid}"] = process
            elif line and line[0].startswith("VLLM::"):
                found[f"engine {process.pid}"] = process
            elif line and "valkey-server" in line[0]:
                found[f"valkey {process.pid}"] = process
    return found


def descend(roots: tuple[int, ...]) -> Iterator[psutil.Process]:
    """Yields all processes below `roots`."""
    for root in roots:
        with suppress(psutil.NoSuchProcess):
            yield from psutil.Process(root).children(recursive=True)


async def hurt(targets: dict[str, psutil.Process], chance: random.Random) -> str:
    """Kills or stops one of the processes, or kills several together; returns what it did."""
    kind = chance.choices(("SIGKILL", "SIGSTOP", "together"), (10, 5, 1))[0]
    if kind == "together":
        victims = [process for name, process in targets.items() if name.split()[0] in TOGETHER]
        for process in victims:
            process.kill()
        return f"SIGKILL to {', '.join(TOGETHER)} at once"
    services = sorted({name.split()[0] for name in targets})
    service = chance.choice(services)  # each kind of process as often as the others
    name = chance.choice(sorted(name for name in targets if name.split()[0] == service))
    if kind == "SIGKILL":
        targets[name].kill()
        return f"SIGKILL to {name}"
    seconds = chance.uniform(*STOPPED_S)
    targets[name].suspend()
    await asyncio.sleep(seconds)
    targets[name].resume()
    return f"SIGSTOP to {name} for {seconds:.0f} s"


@asynccontextmanager
async def command(name: str, log: Path, *arguments: str) -> Any:
    """Runs a command of `perigee`, which is asked to end with the block."""
    process = await ChildProcess.start(name, [sys.executable, "-c", PERIGEE, *arguments], log_path=log, grace_s=120.0)
    try:
        yield process
    finally:
        await process.stop()


async def keep_worker(runs: Path, pids: set[int]) -> None:
    """Keeps one `perigee worker` running, its process id among `pids`."""
    while True:
        async with command("worker", runs / "worker.log", "worker", "--runs-dir", str(runs)) as process:
            pids.add(process.pid)
            await process.wait()
            pids.discard(process.pid)
        await asyncio.sleep(1.0)


async def soak(options: argparse.Namespace, runs: Path) -> Counter[str]:
    """Runs the stack and hurts it; returns how often what was done."""
    chance, done, pids = random.Random(options.seed), Counter[str](), set[int]()
    sets = [word for value in (*SETTINGS, *options.sets) for word in ("--set", value)]
    train = ("train", options.recipe, "--plain", "--workers", "2", "--runs-dir", str(runs), *sets)
    async with command("train", runs / "train.log", *train) as training:
        async with asyncio.timeout(START_S):
            while (found := find_stack(runs)) is None:
                demand(training.exit_code is None, f"perigee train did not start, see {runs}/train.log")
                await asyncio.sleep(0.5)
        run, stack = found
        law = Law(run.path, run.run_id)
        worker = asyncio.create_task(keep_worker(runs, pids))
        interval_s = options.minutes * 60 / options.faults
        try:
            async with BufferClient.connect(stack.addresses["buffer"]) as buffer:
                await commit_twice(law, buffer, training, runs)
                began = time.monotonic()
                while done.total() < options.faults and time.monotonic() - began < options.minutes * 60:
                    due = began + (done.total() + chance.random()) * interval_s
                    await asyncio.sleep(max(0.0, due - time.monotonic()))
                    demand(training.exit_code is None, f"perigee train has ended, see {runs}/train.log")
                    text = "lost its target"
                    with suppress(psutil.NoSuchProcess):
                        text = await hurt(find_targets(training.pid, *pids), chance)
                    done[" ".join(word for word in text.split() if not word.isdigit())] += 1
                    with suppress(PerigeeError):  # a buffer that was hurt answers the next check
                        await law.check(buffer)
                    print(
                        f"{time.monotonic() - began:6.0f} s  {done.total():3}  {law.commits} commits  {text}",
                        flush=True,
                    )
                await commit_twice(law, buffer, training, runs)
        finally:
            worker.cancel()
            await asyncio.gather(worker, return_exceptions=True)
        mine = [*descend((training.pid, *pids))]
    left = [process for process in mine if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    demand(not left, f"left over: {left[:3]}")
    return done


async def commit_twice(law: Law, buffer: BufferClient, training: ChildProcess, runs: Path) -> None:
    """Returns when the run has committed two more iterations, under the law."""
    commits = law.commits
    while law.commits < commits + 2:
        demand(training.exit_code is None, f"perigee train has ended, see {runs}/train.log")
        with suppress(PerigeeError):
            await law.check(buffer)
        await asyncio.sleep(1.0)


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
    runs = Path(tempfile.mkdtemp(prefix="perigee-soak-"))
    print(f"logs and records: {runs}")
    try:
        done = asyncio.run(soak(options, runs))
    except LawBroken as broken:
        print(f"the law is broken: {broken}")
        return 1
    for text, count in sorted(done.items()):
        print(f"{count:4}  {text}")
    print(f"{done.total()} faults, and the law holds")
    return 0


if __name__ == "__main__":
    sys.exit(main())
