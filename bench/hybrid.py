"""Shared devices: starts of an engine, leaving and coming back, and the memory of trainer and engine together.

    python -m bench.hybrid [--models small 129M] [--cycles 50] [--turns 3] [--out bench/results/hybrid.json]

A trainer and a worker in processes of their own, on the model of examples/arithmetic (float32) and on one of 129M
parameters with random weights (bfloat16). Measured are, with medians over cycles or turns:

- CPU seconds of an engine's start from the process that has imported vLLM, and with a process that imports it
- seconds from ComeBack to a worker that serves, beside the load of the weights and the residence's own start, with the
  fresh engine's greedy answers after each cycle, and the worker's memory after the fifth and the last one
- the longest silence of a request in flight around a commit, beside the load
- seconds of each stage of an iteration in turns, and from Leave to a trainer that may train beside a plain read of the
  shelved bytes
- memory, sampled at 10 Hz over turns: both together, beside each by itself where both stay resident

Takes eight minutes on two cores that are free. Exit status 1 when an aim is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import mmap
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, TextIO

import psutil

from bench.machine import describe_machine
from bench.pair_memory import TreeMemory, read_trees, sampling
from bench.rollout_stack import fine_tune, start_service
from perigee.buffer.packing import pack_token_ids
from perigee.cli.stack import HOST, pick_ports, wait_ready
from perigee.errors import UnavailableError
from perigee.rollout.client import RolloutClient
from perigee.rollout.v1 import rollout_pb2 as pb
from perigee.trainer.client import TrainerClient
from perigee.trainer.v1 import trainer_pb2
from services.kit.server import end_tasks

RUN = "bench"
# What stays resident comes last: memory that it leaves behind would count for those who take turns.
RESIDENCES = ("sleep", "restart", "keep")
MIB = 1 << 20
PROMPTS = [[3, 4, 5], list(range(2, 30)), [7] * 16]
# A commit has the tokens so far computed again, which is no part of the load.
IN_FLIGHT_TOKENS = 64
COMMITS = 5
# Turns before those that are timed: the first ones make buffers and caches.
WARM_TURNS = 1
# Turns of the small model take half a second.
SAMPLED_TURNS = 2
SAMPLED_S = 5.0
MAX_START_RATIO = 0.25
LOAD_MARGIN = 1.05
MEMORY_MARGIN = 1.15
# Memory after the last cycle over that after the fifth.
MAX_GROWTH = 1.02


@dataclass(frozen=True)
class Model:
    """A model that is measured; `shape` is that of a Qwen2 with random weights, the arithmetic recipe's without."""

    dtype: str
    kv_mib: int
    cycles: int
    shape: Mapping[str, int] = field(default_factory=dict)


MODELS = {
    "small": Model("float32", kv_mib=256, cycles=50),
    "129M": Model(
        "bfloat16",
        kv_mib=1024,
        cycles=10,
        shape={
            "vocab_size": 10240,
            "hidden_size": 768,
            "num_hidden_layers": 14,
            "intermediate_size": 3072,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
            "head_dim": 64,
            "max_position_embeddings": 2048,
        },
    ),
}


def write_model(folder: Path, model: Model) -> None:
    """Writes the model's folder; in a process of its own, since it loads what the services load."""
    if model.shape:
        from transformers.utils.logging import disable_progress_bar

        from tests.fixtures.trainer import write_model as write_random

        disable_progress_bar()
        write_random(folder, **model.shape)
        return
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "arithmetic"))
    import tiny_model

    tiny_model.write_model(folder, seed=0)


@dataclass
class Pair:
    """A trainer and a rollout worker in processes of their own; `log` is the worker's."""

    rollout: RolloutClient
    trainer: TrainerClient
    pids: tuple[int, int]
    folder: Path
    log: TextIO
    version: int = 0
    answers: list[bytes] = field(default_factory=list)
    """Greedy answers of an engine that has never left."""

    async def push(self, targets: bool = True) -> None:
        """Pushes the loaded version, or makes its image only."""
        target = [trainer_pb2.PushTarget(worker_id="worker", address=self.rollout.target)] if targets else []
        request = trainer_pb2.PushWeightsRequest(run_id=RUN, policy_version=self.version, targets=target)
        response = await self.trainer.push_weights(request)
        if any(not outcome.committed for outcome in response.outcomes):
            raise UnavailableError(f"the worker did not take the weights: {response.outcomes[0].reason}")

    async def answer(self) -> list[bytes]:
        """Returns the tokens of greedy answers, one after another: batches may round otherwise."""
        answers = []
        for prompt in PROMPTS:
            item = pb.GenerateItem(id="a", prompt_token_ids=pack_token_ids(prompt), max_tokens=16)
            request = pb.GenerateRequest(items=[item], sampling=pb.Sampling(temperature=0))
            answers.append(b"".join([response.token_ids async for response in self.rollout.generate(request)]))
        return answers

    async def train(self) -> None:
        """Takes two supervised steps."""
        await fine_tune(self.trainer, RUN, self.folder / "sft.jsonl", self.version + 1)
        self.version += 1

    async def wait_restarted(self, restarts: int) -> None:
        """Returns once the worker's engine was restarted so often and runs."""
        while True:
            state = await self.rollout.get_state(pb.GetStateRequest())
            if state.status in (pb.WORKER_STATUS_EMPTY, pb.WORKER_STATUS_READY) and state.engine_restarts >= restarts:
                return
            await asyncio.sleep(0.02)

    def read_stages(self) -> Counter[str]:
        """Returns the seconds of the engine's stages since the last call: start, load, memory."""
        stages: Counter[str] = Counter()
        for line in self.log:
            if '"engine stage"' in line:
                record = json.loads(line)
                stages[record["stage"].partition(" ")[0]] += record["seconds"]
        return stages

    def find_engine(self) -> psutil.Process:
        """The engine's process: the only grandchild of the rollout service."""
        service = psutil.Process(self.pids[1])
        return next(each for child in service.children() for each in child.children())

    def measure(self) -> tuple[TreeMemory, TreeMemory]:
        """Memory of trainer and worker."""
        trainer, worker = read_trees(self.pids)
        return trainer, worker


@asynccontextmanager
async def running_pair(model: Model, folder: Path) -> AsyncIterator[Pair]:
    """Starts both services on the model in the folder, and waits for the engine."""
    records = ({"prompt": f"{i}", "response": "1 2 3"} for i in range(16))
    (folder / "sft.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records), encoding="utf-8")
    settings: dict[str, dict[str, Any]] = {
        "trainer": {"run_path": str(folder / "run"), "offload_path": str(folder), "threads": 1},
        "rollout": {"coordinator_address": None, "kv_cache_bytes": model.kv_mib * MIB, "chunk_tokens": 1},
    }
    async with AsyncExitStack() as stack:
        pids, addresses = [], []
        for (name, values), port in zip(settings.items(), pick_ports(2), strict=True):
            values |= {"model": str(folder / "model"), "dtype": model.dtype}
            process = await start_service(folder, name, port, values)
            stack.push_async_callback(process.stop)
            addresses.append(f"{HOST}:{port}")
            await wait_ready(process, addresses[-1], "")
            # Its parent is the guard.
            pids.append(psutil.Process(process.pid).children()[0].pid)
        trainer = await stack.enter_async_context(TrainerClient.connect(addresses[0]))
        rollout = await stack.enter_async_context(RolloutClient.connect(addresses[1]))
        log = stack.enter_context((folder / "rollout.log").open(encoding="utf-8"))
        pair = Pair(rollout, trainer, (pids[0], pids[1]), folder, log)
        await pair.wait_restarted(0)
        yield pair


class Stopwatch(defaultdict[str, list[float]]):
    """Seconds of stages, by name."""

    def __init__(self) -> None:
        super().__init__(list)

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Times the block."""
        begin = time.monotonic()
        yield
        self[stage].append(time.monotonic() - begin)

    def medians(self) -> dict[str, float]:
        """Returns the median of each stage."""
        return {stage: statistics.median(seconds) for stage, seconds in self.items()}


async def measure_starts(pair: Pair) -> dict[str, float]:
    """CPU and wall seconds of an engine's start from the fork server, and with a new one."""
    found = {}
    for restarts, name in enumerate(("forked", "cold"), start=1):
        pair.read_stages()
        engine = pair.find_engine()
        server = engine.parent()
        assert server is not None
        # With the fork server its engine ends, too.
        (server if name == "cold" else engine).kill()
        await pair.wait_restarted(restarts)
        engine = pair.find_engine()
        processes = [engine, engine.parent()] if name == "cold" else [engine]
        found[f"{name}_cpu_s"] = sum(sum(each.cpu_times()[:2]) for each in processes if each is not None)
        found[f"{name}_s"] = pair.read_stages()["start"]
    return found | {"cpu_ratio": found["forked_cpu_s"] / found["cold_cpu_s"]}


async def measure_residence(pair: Pair, name: str, cycles: int) -> dict[str, Any]:
    """Leaves and comes back `cycles` times."""
    watch, awake, away = Stopwatch(), [], []
    await pair.push()
    for iteration in range(cycles):
        moment: dict[str, Any] = {"run_id": name, "iteration": iteration}
        with watch.time("leave"):
            await pair.rollout.leave(pb.LeaveRequest(**moment, residence=f"RESIDENCE_{name.upper()}"))
        away.append(pair.measure()[1].own / MIB)
        pair.read_stages()
        with watch.time("come_back"):
            await pair.rollout.come_back(pb.ComeBackRequest(**moment))
        stages = pair.read_stages()
        start = stages["start"] + stages["memory"]
        watch["load"].append(stages["load"])
        watch["own_start"].append(start)
        watch["ratio"].append(watch["come_back"][-1] / (LOAD_MARGIN * stages["load"] + start))
        if await pair.answer() != pair.answers:
            raise AssertionError(f"{name}: another answer after cycle {iteration}")
        awake.append(pair.measure()[1].own / MIB)
    fifth = min(5, cycles) - 1
    memory = {
        "awake_mib": [round(awake[fifth]), round(awake[-1])],
        "away_mib": [round(away[fifth]), round(away[-1])],
        "growth": max(awake[-1] / awake[fifth], away[-1] / away[fifth]),
    }
    return {"cycles": cycles, "seconds": watch.medians()} | memory


async def measure_silence(pair: Pair) -> dict[str, float]:
    """Longest silence of a request in flight around a commit, beside the load."""
    times: list[float] = []

    async def generate() -> None:
        item = pb.GenerateItem(id="a", prompt_token_ids=pack_token_ids(PROMPTS[1]), max_tokens=IN_FLIGHT_TOKENS)
        request = pb.GenerateRequest(items=[item], sampling=pb.Sampling(temperature=1))
        while True:
            async for _ in pair.rollout.generate(request):
                times.append(time.monotonic())

    async def wait_tokens(count: int) -> None:
        enough = len(times) + count
        while len(times) < enough:  # noqa: ASYNC110 (the stream adds them)
            await asyncio.sleep(0.01)

    generating = asyncio.create_task(generate())
    watch = Stopwatch()
    for _ in range(COMMITS):
        await wait_tokens(10)
        pair.read_stages()
        begin = len(times) - 1
        await pair.push()
        await wait_tokens(5)
        watch["silence"].append(max(later - earlier for earlier, later in pairwise(times[begin:])))
        watch["load"].append(pair.read_stages()["load"])
        watch["ratio"].append(watch["silence"][-1] / watch["load"][-1])
    await end_tasks(generating)
    return watch.medians() | {"token": statistics.median(later - earlier for earlier, later in pairwise(times))}


async def take_turn(pair: Pair, engine: str, iteration: int, watch: Stopwatch) -> tuple[TreeMemory, TreeMemory]:
    """Goes through the stages of an iteration; with `keep` nobody leaves. Returns what each held while it was away."""
    moment: dict[str, Any] = {"run_id": f"turns-{engine}", "iteration": iteration}
    trainer = worker = TreeMemory()
    with watch.time("rollout"):
        await pair.answer()
    if engine != "keep":
        trainer, _ = pair.measure()
        with watch.time("leave"):
            await pair.rollout.leave(pb.LeaveRequest(**moment, residence=f"RESIDENCE_{engine.upper()}"))
        _, worker = pair.measure()
        with watch.time("onload"):
            await pair.trainer.onload(trainer_pb2.OnloadRequest(**moment))
    with watch.time("training"):
        await pair.train()
    with watch.time("checkpoint"):
        # A job that finds none makes a copy of the weights.
        await pair.trainer.save_checkpoint(trainer_pb2.SaveCheckpointRequest(run_id=RUN, policy_version=pair.version))
    if engine != "keep":
        with watch.time("convert"):
            await pair.push(targets=False)
        with watch.time("offload"):
            await pair.trainer.offload(trainer_pb2.OffloadRequest(**moment))
    with watch.time("weights"):
        await pair.push()
    return trainer, worker


async def measure_turns(pair: Pair, engine: str, turns: int) -> dict[str, Any]:
    """Seconds of the stages over turns, then memory over others."""
    watch, number = Stopwatch(), 0
    for _ in range(WARM_TURNS):
        await take_turn(pair, engine, number := number + 1, Stopwatch())
    for _ in range(turns):
        await take_turn(pair, engine, number := number + 1, watch)
    async with sampling(*pair.pids) as peaks:
        last, end = number + SAMPLED_TURNS, time.monotonic() + SAMPLED_S
        while number < last or time.monotonic() < end:
            trainer, worker = await take_turn(pair, engine, number := number + 1, Stopwatch())
    return {
        "seconds": watch.medians(),
        "samples": peaks.samples,
        "peak_mib": round(peaks.pair / MIB),
        "at_peak_mib": {
            f"{name}_{kind}": round(getattr(memory, kind) / MIB)
            for name, memory in zip(("trainer", "worker"), peaks.at_peak, strict=True)
            for kind in ("own", "shared")
        },
        "trainer_peak_mib": round(peaks.trainer / MIB),
        "worker_peak_mib": round(peaks.worker / MIB),
        "away_mib": {"trainer": round(trainer.own / MIB), "worker": round(worker.own / MIB)},
    }


def time_read(folder: Path, size: int) -> float:
    """Seconds to read a file, just written, into memory that nobody has touched."""
    with tempfile.TemporaryFile(dir=folder) as file:
        piece = os.urandom(MIB)
        for _ in range(-(-size // MIB)):
            file.write(piece)
        file.flush()
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        begin = time.monotonic()
        with mmap.mmap(-1, size) as target:
            file.readinto(target)  # type: ignore[attr-defined]
            return time.monotonic() - begin


def compare_memory(keep: Mapping[str, Any], turns: Mapping[str, Any]) -> dict[str, float]:
    """Compares the peak of a pair in turns with that of the larger one by itself and the floor of the other one."""
    alone = {name: keep[f"{name}_peak_mib"] for name in ("trainer", "worker")}
    larger = max(alone, key=lambda name: alone[name])
    other = "worker" if larger == "trainer" else "trainer"
    floor = turns["away_mib"][other]
    return {
        "larger_mib": alone[larger],
        "floor_mib": floor,
        "bound_mib": round(MEMORY_MARGIN * alone[larger] + floor),
        "of_bound": turns["peak_mib"] / (MEMORY_MARGIN * alone[larger] + floor),
        "over_larger": (turns["peak_mib"] - floor) / alone[larger],
        "of_keep": turns["peak_mib"] / keep["peak_mib"],
    }


async def measure_model(model: Model, folder: Path, cycles: int, turns: int) -> dict[str, Any]:
    """Takes all measurements of one model."""
    found: dict[str, Any] = {}
    async with running_pair(model, folder) as pair:
        await pair.push()
        pair.answers = await pair.answer()
        found["residence"] = {name: await measure_residence(pair, name, cycles) for name in RESIDENCES}
        found["commit"] = await measure_silence(pair)
        await pair.trainer.offload(trainer_pb2.OffloadRequest(run_id=RUN))
        found["turns"] = {name: await measure_turns(pair, name, turns) for name in RESIDENCES}
        shelved = (await pair.trainer.offload(trainer_pb2.OffloadRequest(run_id=RUN))).shelved_bytes
        # The next fork server shares no pages with the service.
        found["start"] = await measure_starts(pair)
    keep = found["turns"]["keep"]
    read_s = statistics.median(time_read(folder, shelved) for _ in range(3))
    for name in ("sleep", "restart"):
        seconds = found["turns"][name]["seconds"]
        found["turns"][name]["memory"] = compare_memory(keep, found["turns"][name])
        leave_s = seconds["leave"] + seconds["onload"]
        found["turns"][name]["leave_to_trainable"] = {"seconds": leave_s, "read_s": read_s, "ratio": leave_s / read_s}
    return found | {"shelved_mib": shelved // MIB}


def list_aims(name: str, found: Mapping[str, Any]) -> Iterator[tuple[str, float, float]]:
    """Yields what is aimed at, what was measured, and the most that it may be."""
    yield f"{name}: CPU seconds of a forked start / cold start", found["start"]["cpu_ratio"], MAX_START_RATIO
    for residence, each in found["residence"].items():
        if MODELS[name].shape:
            # Calls take a few milliseconds, which is more than 5% of the small model's load.
            yield f"{name}: {residence}, come back / (load + 5% + own start)", each["seconds"]["ratio"], 1.0
        yield f"{name}: {residence}, memory after the last cycle / the fifth", each["growth"], MAX_GROWTH
    for residence in ("sleep", "restart"):
        of_bound = found["turns"][residence]["memory"]["of_bound"]
        yield f"{name}: {residence}, peak of the pair / (1.15 larger + floor)", of_bound, 1.0


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--cycles", type=int, help="of each residence; 50 of the small model and 10 of the other")
    parser.add_argument("--turns", type=int, default=3, help="that are timed, of each residence")
    parser.add_argument("--out", type=Path, default=Path("bench/results/hybrid.json"), help="file for the figures")
    return parser.parse_args()


async def measure_all(options: argparse.Namespace) -> dict[str, Any]:
    """Takes the measurements of each model."""
    results: dict[str, Any] = {"machine": describe_machine(), "models": {}}
    for name in options.models:
        model, begin = MODELS[name], time.monotonic()
        with tempfile.TemporaryDirectory() as path:
            folder = Path(path)
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                pool.submit(write_model, folder / "model", model).result()
            found = await measure_model(model, folder, options.cycles or model.cycles, options.turns)
        results["models"][name] = found | {"minutes": (time.monotonic() - begin) / 60}
    return results


def report(results: dict[str, Any]) -> Sequence[str]:
    """Adds the aims to the results and returns a line of each that is missed."""
    aims = [aim for name, found in results["models"].items() for aim in list_aims(name, found)]
    results["aims"] = [{"aim": name, "measured": value, "most": most} for name, value, most in aims]
    return [f"{name}: {value:.3f}, at most {most:g}" for name, value, most in aims if value > most]


def main() -> None:
    """Measures, prints and writes."""
    options = parse()
    results = asyncio.run(measure_all(options))
    missed = report(results)
    text = json.dumps(results, indent=2)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text + "\n", encoding="utf-8")
    print(text)
    if missed:
        sys.exit("\n".join(missed))


if __name__ == "__main__":
    main()
