"""Shared devices: starts of an engine, leaving and coming back, and the memory of trainer and engine together.

    python -m bench.hybrid MODEL_FOLDER --cycles 50

Prints JSON: CPU seconds of an engine's start from the process that has imported vLLM and from a new one; for each
residence the seconds of leaving and coming back, whether greedy answers stay the same, and memory at the 5th and the
last cycle; the peak of both process trees and shared memory, sampled at 10 Hz, over iterations of a small supervised
job, with both resident and in turns.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from bench.machine import describe_machine
from bench.rollout_stack import start_service
from perigee.buffer.packing import pack_token_ids
from perigee.cli.stack import HOST, pick_ports, wait_ready
from perigee.errors import UnavailableError
from perigee.rollout.client import RolloutClient
from perigee.rollout.v1 import rollout_pb2 as pb
from perigee.trainer.client import TrainerClient
from perigee.trainer.v1 import trainer_pb2
from services.kit.server import end_tasks
from services.rollout.vllm_engine import count_own_bytes

RUN = "bench"
MIB = 1 << 20
SAMPLE_S = 0.1
PROMPTS = [[3, 4, 5], list(range(2, 30)), [7] * 16]


@dataclass
class Pair:
    """A trainer and a rollout worker in processes of their own."""

    rollout: RolloutClient
    trainer: TrainerClient
    processes: Sequence[psutil.Process]
    dataset: Path
    version: int = 0

    async def push(self, targets: bool = True) -> None:
        """Pushes the loaded version, or makes its image only."""
        target = [trainer_pb2.PushTarget(worker_id="worker", address=self.rollout.target)] if targets else []
        request = trainer_pb2.PushWeightsRequest(run_id=RUN, policy_version=self.version, targets=target)
        response = await self.trainer.push_weights(request)
        if any(not outcome.committed for outcome in response.outcomes):
            raise UnavailableError(f"the worker did not take the weights: {response.outcomes[0].reason}")

    async def answer(self) -> list[bytes]:
        """Returns the greedy answers' tokens."""
        items = [
            pb.GenerateItem(id=str(i), prompt_token_ids=pack_token_ids(prompt), max_tokens=16)
            for i, prompt in enumerate(PROMPTS)
        ]
        request = pb.GenerateRequest(items=items, sampling=pb.Sampling(temperature=0))
        tokens = dict.fromkeys(map(str, range(len(PROMPTS))), b"")
        async for response in self.rollout.generate(request):
            tokens[response.id] += response.token_ids
        return list(tokens.values())

    async def train(self) -> None:
        """Takes two supervised steps."""
        request = trainer_pb2.FineTuneRequest(
            run_id=RUN,
            dataset_path=str(self.dataset),
            steps=2,
            batch_size=4,
            max_tokens_per_microbatch=64,
            new_version=self.version + 1,
            optimizer=trainer_pb2.Optimizer(learning_rate=1e-5, beta1=0.9, beta2=0.95, min_lr_ratio=1.0),
        )
        async for _ in self.trainer.fine_tune(request):
            pass
        self.version += 1

    async def wait_status(self, *statuses: int, restarts: int = 0) -> None:
        """Returns once the worker has one of these statuses, and its engine was restarted so often."""
        while True:
            state = await self.rollout.get_state(pb.GetStateRequest())
            if state.status in statuses and state.engine_restarts >= restarts:
                return
            await asyncio.sleep(0.02)

    def engine(self) -> psutil.Process:
        """The engine's process: the only grandchild of the rollout service."""
        return next(each for child in self.processes[0].children() for each in child.children())

    def count_memory(self) -> int:
        """Bytes of both process trees, shared memory included."""
        trees = [each for process in self.processes for each in (process, *process.children(recursive=True))]
        return sum(count_own_bytes(each.pid) for each in trees)


@asynccontextmanager
async def running_pair(model: Path, dtype: str, kv_bytes: int) -> AsyncIterator[Pair]:
    """Starts both services on a model, and waits for the engine."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        dataset = folder / "sft.jsonl"
        dataset.write_text("".join(json.dumps({"prompt": f"{i}", "response": "1 2 3"}) + "\n" for i in range(16)))
        ports = pick_ports(2)
        settings: list[dict[str, Any]] = [
            {"coordinator_address": None, "kv_cache_bytes": kv_bytes},
            {"run_path": str(folder / "run"), "offload_path": str(folder), "threads": 1},
        ]
        processes = []
        for name, port, values in zip(("rollout", "trainer"), ports, settings, strict=True):
            process = await start_service(folder, name, port, values | {"model": str(model), "dtype": dtype})
            stack.push_async_callback(process.stop)
            await wait_ready(process, f"{HOST}:{port}", "")
            processes.append(psutil.Process(process.pid).children()[0])
        rollout = await stack.enter_async_context(RolloutClient.connect(f"{HOST}:{ports[0]}"))
        trainer = await stack.enter_async_context(TrainerClient.connect(f"{HOST}:{ports[1]}"))
        pair = Pair(rollout, trainer, processes, dataset)
        await pair.wait_status(pb.WORKER_STATUS_EMPTY)
        yield pair


async def measure_starts(pair: Pair) -> dict[str, float]:
    """CPU seconds of an engine's start from the fork server, and with a new one."""
    engine = pair.engine()
    restarts = (await pair.rollout.get_state(pb.GetStateRequest())).engine_restarts
    engine.kill()
    await pair.wait_status(pb.WORKER_STATUS_EMPTY, pb.WORKER_STATUS_READY, restarts=restarts + 1)
    forked = sum(pair.engine().cpu_times()[:2])
    server = pair.engine().parent()
    assert server is not None
    server.kill()
    await pair.wait_status(pb.WORKER_STATUS_EMPTY, pb.WORKER_STATUS_READY, restarts=restarts + 2)
    engine = pair.engine()
    cold = sum(sum(each.cpu_times()[:2]) for each in (engine, engine.parent()) if each is not None)
    return {"forked_cpu_s": forked, "cold_cpu_s": cold, "ratio": forked / cold}


async def measure_residence(pair: Pair, name: str, cycles: int) -> dict[str, Any]:
    """Leaves and comes back `cycles` times."""
    await pair.push()
    before = await pair.answer()
    leaves, returns, awake, away = [], [], [], []
    for iteration in range(cycles):
        left = await pair.rollout.leave(pb.LeaveRequest(run_id=name, iteration=iteration, residence=name))  # type: ignore[arg-type]
        leaves.append(left.seconds)
        away.append(pair.count_memory() // MIB)
        back = await pair.rollout.come_back(pb.ComeBackRequest(run_id=name, iteration=iteration))
        returns.append(back.seconds)
        if await pair.answer() != before:
            raise AssertionError(f"{name}: another answer after cycle {iteration}")
        awake.append(pair.count_memory() // MIB)
    fifth = min(5, cycles) - 1
    return {
        "leave_s": statistics.median(leaves),
        "come_back_s": statistics.median(returns),
        "awake_mib": [awake[fifth], awake[-1]],
        "away_mib": [away[fifth], away[-1]],
    }


async def measure_peak(pair: Pair, engine: str, trainer: str, iterations: int) -> dict[str, float]:
    """Peak memory over iterations of rollout and training."""
    peak = 0

    async def sample() -> None:
        nonlocal peak
        while True:
            peak = max(peak, await asyncio.to_thread(pair.count_memory))
            await asyncio.sleep(SAMPLE_S)

    sampling = asyncio.create_task(sample())
    start = time.monotonic()
    for iteration in range(1, iterations + 1):
        moment: dict[str, Any] = {"run_id": f"{engine}-{trainer}", "iteration": iteration}
        if trainer == "shelve":
            await pair.push(targets=False)
            await pair.trainer.offload(trainer_pb2.OffloadRequest(**moment))
        await pair.push()
        await pair.answer()
        if engine != "keep":
            residence = f"RESIDENCE_{engine.upper()}"
            await pair.rollout.leave(pb.LeaveRequest(**moment, residence=residence))
        await pair.trainer.onload(trainer_pb2.OnloadRequest(**moment))
        await pair.train()
    seconds = time.monotonic() - start
    await pair.push()
    await end_tasks(sampling)
    return {"peak_mib": peak // MIB, "iteration_s": seconds / iterations}


async def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--kv-mib", type=int, default=256)
    parser.add_argument("--cycles", type=int, default=50)
    parser.add_argument("--iterations", type=int, default=3)
    options = parser.parse_args()
    results: dict[str, Any] = {"machine": describe_machine()}
    async with running_pair(options.model, options.dtype, options.kv_mib * MIB) as pair:
        results["start"] = await measure_starts(pair)
        results["residence"] = {
            name: await measure_residence(pair, name, options.cycles) for name in pb.Residence.keys()[1:]
        }
    for engine, trainer in (("keep", "keep"), ("sleep", "shelve"), ("restart", "shelve")):
        async with running_pair(options.model, options.dtype, options.kv_mib * MIB) as pair:
            results[f"{engine}, {trainer}"] = await measure_peak(pair, engine, trainer, options.iterations)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    asyncio.run(main())
