"""Iterations with the token budget against without it, where responses are as long-tailed as a reasoning model's.

    python -m bench.long_tail [--costs bench/costs/tiny-cpu.json] [--budgets 8192 16384 32768] [--seeds 5]

A simulation on the coordinator's own scheduling code: its budgets, its live groups, its dispatch to workers run as they
are (`services.coordinator`), on an event loop whose clock jumps from event to event. What is simulated are the engines
and the trainer, by the seconds that their tokens cost (`--costs`, a file that `bench/token_costs.py` measures), and the
lengths, which are lognormal.

An engine decodes its sequences together, step after step, and prefills a sequence as a whole when it comes to it;
its KV cache has room for all of them. The trainer has as many processes as there are workers, and the longest sequence
is on one of them. An iteration is rollout, then reference pass and update of the groups that are complete, then
`other_s` for weights and commit.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import math
import selectors
import statistics
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import structlog

from perigee.buffer.v1 import buffer_pb2
from perigee.rollout.v1 import rollout_pb2
from services.coordinator.config import CoordinatorConfig
from services.coordinator.groups import LiveGroups
from services.coordinator.prompts import Prompt
from services.coordinator.rollout_phase import RolloutPhase
from services.coordinator.run_config import RolloutSettings, TokenCosts
from services.coordinator.workers import EMPTY, WorkerRegistry

CAP = 131_072
PROMPT_TOKENS = 256
WHOLE_ITERATIONS = 5
# Iterations before those measured: of the first, in which every group begins, and until long trajectories are as usual.
RUN_IN_ITERATIONS = 10
RUN_IN_RESPONSES = 16


@dataclass(frozen=True)
class MeasuredCosts:
    """Seconds of one engine and of one process of the trainer.

    A position is the number of tokens before a token; what attention costs grows with it.
    """

    step_s: float
    """A decoding step, whatever its sequences."""
    sampled_token_s: float
    """A sequence of a step."""
    sampled_position_s: float
    """A position of a sequence of a step."""
    prefilled_token_s: float
    prefilled_position_s: float
    trained_token_s: float
    """Forward and backward pass, and the reference pass."""
    trained_position_s: float
    other_s: float
    """Seconds of an iteration that are neither rollout nor training."""

    def prefill(self, tokens: float) -> float:
        """Returns the seconds of a prefill."""
        return tokens * self.prefilled_token_s + tokens * tokens / 2 * self.prefilled_position_s

    def train(self, tokens: float) -> float:
        """Returns the seconds of training on a sequence."""
        return tokens * self.trained_token_s + tokens * tokens / 2 * self.trained_position_s

    def token_costs(self, batch: int) -> TokenCosts:
        """Returns `run.rollout.costs` of an engine that decodes so many sequences at once."""
        sampled = self.step_s / batch + self.sampled_token_s
        return TokenCosts(
            prefill=self.prefilled_token_s / sampled,
            prefill_doubles_at=self.prefilled_token_s / self.prefilled_position_s,
            sampling_doubles_at=sampled / self.sampled_position_s,
        )


@dataclass(frozen=True)
class Load:
    """What a run generates, on which workers."""

    median: float = 8_000.0
    """Of the lognormal lengths, tokens."""
    sigma: float = 1.0
    """Of their logarithms."""
    groups: int = 64
    group_size: int = 8
    speeds: tuple[float, ...] = (1.0,) * 8
    """Of the workers, in multiples of the measured one."""
    capacity: int = 64
    """Sequences that a worker decodes at once."""


@dataclass(frozen=True)
class IterationSeconds:
    """Seconds of one iteration, and what it made."""

    rollout: float
    whole: float
    even: float
    """Whole seconds if the segments were spread evenly over the workers."""
    perfect: float
    """Whole seconds if training were spread evenly as well, and every step had as many sequences as there is room for:
    what no schedule of these tokens undercuts."""
    finished: int
    """Trajectories trained."""
    finished_tokens: int
    sampled_tokens: int
    prefilled_tokens: int
    base_budget: int


@dataclass(eq=False)
class Segment:
    """Tokens that an engine is to sample after a context."""

    context: float
    left: float
    done: asyncio.Future[None]


class JumpingLoop(asyncio.SelectorEventLoop):
    """Event loop whose clock jumps to the next thing to happen."""

    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(JumpingSelector(self))

    def time(self) -> float:
        """Returns the simulated seconds."""
        return self.now


class JumpingSelector(selectors.SelectSelector):
    """Selector that moves the loop's clock in the place of waiting."""

    def __init__(self, loop: JumpingLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Returns what is ready. Raises RuntimeError when nothing will ever happen."""
        ready = super().select(0)
        if not ready:
            if timeout is None:
                raise RuntimeError("every task waits for another one")
            self._loop.now += timeout
        return ready


class Engine:
    """Engine of one worker, in simulated seconds."""

    def __init__(self, costs: MeasuredCosts, capacity: int, speed: float) -> None:
        self._costs = costs
        self._capacity = capacity
        self._speed = speed
        self._waiting: deque[Segment] = deque()
        self._running: list[Segment] = []
        self._arrival = asyncio.Event()

    def add(self, context: float, tokens: float) -> asyncio.Future[None]:
        """Queues a segment; the future has a result once it has ended."""
        segment = Segment(context, tokens, asyncio.get_running_loop().create_future())
        self._waiting.append(segment)
        self._arrival.set()
        return segment.done

    async def run(self) -> None:
        """Decodes until cancelled."""
        while True:
            self._arrival.clear()
            while self._waiting and len(self._running) < self._capacity:
                segment = self._waiting.popleft()
                await asyncio.sleep(self._costs.prefill(segment.context) / self._speed)
                self._running.append(segment)
            if not self._running:
                await self._arrival.wait()
                continue
            await self._decode()

    async def _decode(self) -> None:
        """Decodes until the first sequence ends, or one arrives that there is room for."""
        # Seconds of the first step, and by how much each one is longer than the step before it.
        batch = len(self._running)
        contexts = sum(segment.context for segment in self._running)
        first = (
            self._costs.step_s + batch * self._costs.sampled_token_s + contexts * self._costs.sampled_position_s
        ) / self._speed
        growth = batch * self._costs.sampled_position_s / self._speed
        steps = min(segment.left for segment in self._running)
        seconds = steps * first + steps * steps / 2 * growth
        loop = asyncio.get_running_loop()
        begin = loop.time()
        try:
            async with asyncio.timeout(seconds):
                if batch == self._capacity:
                    await asyncio.sleep(2 * seconds)
                await self._arrival.wait()
            elapsed = loop.time() - begin
            # The root of the quadratic in a form that stands a growth of 0.
            steps = min(steps, 2 * elapsed / (first + math.sqrt(first * first + 2 * growth * elapsed)))
        except TimeoutError:
            pass
        for segment in self._running:
            segment.context += steps
            segment.left -= steps
        for segment in self._running:
            if segment.left < 1e-6:
                segment.done.set_result(None)
        self._running = [segment for segment in self._running if not segment.done.done()]


@dataclass
class SimulatedWorker:
    """In the place of a worker's client: what the coordinator calls."""

    engine: Engine
    run: Simulation

    async def extend_trajectories(
        self, request: rollout_pb2.ExtendTrajectoriesRequest, *, timeout_s: float
    ) -> AsyncIterator[rollout_pb2.ExtendTrajectoriesResponse]:
        """Extends trajectories as a real worker does, to what is left of their lengths."""
        pending: dict[asyncio.Future[None], rollout_pb2.SegmentEnd] = {}
        for leased in request.trajectories:
            end = min(leased.tokens + leased.token_budget, self.run.lengths[leased.trajectory_id])
            ended = rollout_pb2.SegmentEnd(
                trajectory_id=leased.trajectory_id,
                end_reason=self.run.end_reason(leased.trajectory_id, end),
                tokens=end,
                new_tokens=end - leased.tokens,
            )
            context = PROMPT_TOKENS + leased.tokens
            self.run.segments.append((context, ended.new_tokens))
            pending[self.engine.add(context, ended.new_tokens)] = ended
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            yield rollout_pb2.ExtendTrajectoriesResponse(ended=[pending.pop(future) for future in done])


@dataclass
class SimulatedBuffer:
    """In the place of the buffer's client: groups are created, trajectories leased with the tokens that they have."""

    run: Simulation

    async def create_groups(self, request: buffer_pb2.CreateGroupsRequest, *, timeout_s: float) -> None:
        """Draws the lengths of the trajectories."""
        for group in request.groups:
            for trajectory_id in group.trajectory_ids:
                self.run.draw_length(trajectory_id)

    async def lease_trajectories(
        self, request: buffer_pb2.LeaseTrajectoriesRequest, *, timeout_s: float
    ) -> buffer_pb2.LeaseTrajectoriesResponse:
        """Returns leases."""
        leases = [
            buffer_pb2.Lease(trajectory_id=each, epoch=1, tokens=self.run.groups.trajectory(each).tokens)
            for each in request.trajectory_ids
        ]
        return buffer_pb2.LeaseTrajectoriesResponse(leases=leases)


class Scoring:
    """In the place of scoring: nothing is judged."""

    async def submit(self, job: object) -> None:
        """Does nothing."""

    def add(self, *sample: object) -> None:
        """Does nothing."""


class Simulation:
    """A run of iterations."""

    def __init__(self, costs: MeasuredCosts, load: Load, settings: RolloutSettings, seed: int) -> None:
        self.costs = costs
        self.load = load
        self.settings = settings
        self.lengths: dict[str, int] = {}
        self.segments: list[tuple[int, int]] = []
        self._random = np.random.default_rng(seed)
        self.registry = WorkerRegistry(lambda address: None, lease_seconds=math.inf)  # type: ignore[arg-type,return-value]
        self.engines = [Engine(costs, load.capacity, speed) for speed in load.speeds]
        for number, engine in enumerate(self.engines):
            worker = self.registry.register(f"w{number}", "simulated:0", load.capacity, 0, EMPTY)
            worker.client = SimulatedWorker(engine, self)  # type: ignore[assignment]
        buffer = SimulatedBuffer(self)
        self.groups = LiveGroups("simulated", buffer, math.inf, None)  # type: ignore[arg-type]
        line = SimpleNamespace(id="p", images=(), domain="all")
        self._prompt = Prompt(line, (0,) * PROMPT_TOKENS, 0, 0)  # type: ignore[arg-type]
        self._next_group = 0
        context = SimpleNamespace(
            run_id="simulated",
            config=SimpleNamespace(rollout=settings, group_size=load.group_size),
            settings=CoordinatorConfig(),
            registry=self.registry,
            status=SimpleNamespace(set_waiting=lambda waiting: None, done=0),
            peers=SimpleNamespace(buffer=buffer),
            inputs=SimpleNamespace(score_job=lambda *job: None),
        )
        self._phase = RolloutPhase(context, self.groups)  # type: ignore[arg-type]
        self._speed: float | None = None

    def draw_length(self, trajectory_id: str) -> None:
        """Draws the length of a response."""
        length = self._random.lognormal(math.log(self.load.median), self.load.sigma)
        self.lengths[trajectory_id] = min(CAP, max(1, round(length)))

    def end_reason(self, trajectory_id: str, tokens: int) -> int:
        """Returns why a segment ends there."""
        if tokens >= CAP:
            return buffer_pb2.END_REASON_MAX_RESPONSE_TOKENS
        return buffer_pb2.END_REASON_STOP if tokens == self.lengths[trajectory_id] else buffer_pb2.END_REASON_BUDGET

    async def run(self, iterations: int) -> list[IterationSeconds]:
        """Runs iterations from the first on."""
        running = [asyncio.create_task(engine.run()) for engine in self.engines]
        try:
            return [await self._iterate(number) for number in range(1, iterations + 1)]
        finally:
            for task in running:
                task.cancel()
            await asyncio.wait(running)

    async def _iterate(self, number: int) -> IterationSeconds:
        load, loop = self.load, asyncio.get_running_loop()
        fresh = range(self._next_group, self._next_group + load.groups - len(self.groups))
        self._next_group = fresh.stop
        await self.groups.create([(f"g{n:08d}", self._prompt) for n in fresh], number, load.group_size)
        self.segments.clear()
        begin = loop.time()
        # New weights in each iteration: no worker has the prefix of a trajectory.
        for worker in self.registry.all():
            self.registry.mark_pushed(worker, number)
        self._phase.begin(number, number, self._speed, Scoring(), Scoring())  # type: ignore[arg-type]
        await self._phase.run()
        rollout = loop.time() - begin
        counts = await self._phase.count()
        self._speed = self._phase.speed
        for trajectory in self.groups.trajectories():
            if trajectory.finished:
                trajectory.verdict = buffer_pb2.VERDICT_CORRECT
        complete = [group for group in self.groups if group.complete]
        trained = [trajectory for group in complete for trajectory in group.trajectories]
        training = [self.costs.train(PROMPT_TOKENS + trajectory.tokens) for trajectory in trained]
        # Evenly over the processes, no sequence over more than one.
        even_training = sum(training) / len(load.speeds)
        others = max(even_training, max(training, default=0.0)) + self.costs.other_s
        work, least_steps = even_seconds(self.costs, load, self.segments)
        longest_steps = max((new_tokens for _, new_tokens in self.segments), default=0) * len(load.speeds)
        step_s = self.costs.step_s / sum(load.speeds)
        self.groups.close_iteration(complete)
        return IterationSeconds(
            rollout=rollout,
            whole=rollout + others,
            even=work + max(longest_steps, least_steps) * step_s + others,
            perfect=work + least_steps * step_s + even_training + self.costs.other_s,
            finished=len(trained),
            finished_tokens=sum(trajectory.tokens for trajectory in trained),
            sampled_tokens=counts.tokens,
            prefilled_tokens=sum(context for context, _ in self.segments),
            base_budget=counts.base_budget,
        )


def even_seconds(costs: MeasuredCosts, load: Load, segments: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """Returns the rollout seconds of segments spread evenly, steps of their own left out, and the fewest steps.

    All workers take the steps of the longest segment, or more where that leaves sequences waiting, and an equal part of
    everything else: that is what the lengths allow.
    """
    work = tokens = 0.0
    for context, new_tokens in segments:
        work += costs.prefill(context) + new_tokens * costs.sampled_token_s
        work += new_tokens * (context + new_tokens / 2) * costs.sampled_position_s
        tokens += new_tokens
    return work / sum(load.speeds), tokens / load.capacity


def simulate(
    costs: MeasuredCosts, load: Load, settings: RolloutSettings, seed: int, iterations: int
) -> list[IterationSeconds]:
    """Runs a simulation and returns its iterations."""

    async def run() -> list[IterationSeconds]:
        return await Simulation(costs, load, settings, seed).run(iterations)

    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        return runner.run(run())


@dataclass(frozen=True)
class Comparison:
    """Iterations with a budget against those without one, of one seed."""

    iteration_ratio: float
    """Whole seconds of an iteration without / with the budget."""
    finished_ratio: float
    """Tokens of trained trajectories per second, with / without."""
    bound: float
    """Whole seconds with segments spread evenly / those with the budget: 1 is what the lengths allow."""
    even_gain: float
    """Whole seconds without a budget / those with its segments spread evenly."""
    perfect_gain: float
    """Whole seconds without a budget / the least that any schedule takes: no budget gains more tokens per second."""
    seconds: float
    """Of an iteration with the budget."""
    seconds_without: float
    rollout_seconds: tuple[float, float, float]
    """Of the phases with the budget: 5%, 50%, 95%."""
    trained: float
    """Trajectories trained in an iteration with the budget."""
    prefilled_per_sampled: float


def compare(
    costs: MeasuredCosts, load: Load, groups: int, settings: RolloutSettings, seed: int, iterations: int
) -> Comparison:
    """Simulates both; with a budget there are `groups` live, and ages are mixed before the iterations that count."""
    run_in = RUN_IN_ITERATIONS + round(RUN_IN_RESPONSES * load.median / settings.token_budget)
    measured = simulate(costs, replace(load, groups=groups), settings, seed, run_in + iterations)[run_in:]
    whole = settings.model_copy(update={"token_budget": 0, "target_seconds": None})
    without = simulate(costs, load, whole, seed, WHOLE_ITERATIONS)
    seconds, seconds_without = total(measured, "whole") / len(measured), total(without, "whole") / len(without)
    finished = total(measured, "finished_tokens") / total(measured, "whole")
    return Comparison(
        iteration_ratio=seconds_without / seconds,
        finished_ratio=finished / (total(without, "finished_tokens") / total(without, "whole")),
        bound=total(measured, "even") / total(measured, "whole"),
        even_gain=total(without, "whole") / total(without, "even"),
        perfect_gain=total(without, "whole") / total(without, "perfect"),
        seconds=seconds,
        seconds_without=seconds_without,
        rollout_seconds=tuple(np.percentile([each.rollout for each in measured], (5, 50, 95)).round(1).tolist()),
        trained=total(measured, "finished") / len(measured),
        prefilled_per_sampled=total(measured, "prefilled_tokens") / total(measured, "sampled_tokens"),
    )


def total(iterations: Sequence[IterationSeconds], field: str) -> float:
    """Returns a sum over iterations."""
    return float(sum(getattr(each, field) for each in iterations))


def read_costs(path: Path) -> MeasuredCosts:
    """Reads the costs that bench/token_costs.py measured."""
    return MeasuredCosts(**json.loads(path.read_text(encoding="utf-8"))["costs"])


def show(comparisons: Sequence[Comparison], field: str) -> str:
    """Returns the median over the seeds, with the least and the largest."""
    values = sorted(getattr(each, field) for each in comparisons)
    return f"{statistics.median(values):.2f} ({values[0]:.2f} to {values[-1]:.2f})"


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--costs", type=Path, default=Path(__file__).parent / "costs" / "tiny-cpu.json")
    parser.add_argument("--budgets", type=int, nargs="+", default=[8192, 16384, 32768])
    parser.add_argument("--prefill-share", type=float, default=RolloutSettings().max_prefill_share)
    parser.add_argument("--target-seconds", type=float)
    parser.add_argument("--median", type=float, default=Load.median)
    parser.add_argument("--sigma", type=float, default=Load.sigma)
    parser.add_argument("--groups", type=int, default=Load.groups)
    parser.add_argument("--groups-with-budget", type=int)
    parser.add_argument("--speeds", type=float, nargs="+", default=list(Load.speeds))
    parser.add_argument("--capacity", type=int, default=Load.capacity)
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    """Simulates and prints."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    arguments = parse()
    costs = read_costs(arguments.costs)
    load = Load(
        median=arguments.median,
        sigma=arguments.sigma,
        groups=arguments.groups,
        speeds=tuple(arguments.speeds),
        capacity=arguments.capacity,
    )
    figures: dict[str, object] = {"costs": str(arguments.costs), "load": asdict(load)}
    for budget in arguments.budgets:
        settings = RolloutSettings(
            token_budget=budget,
            max_response_tokens=CAP,
            max_prefill_share=arguments.prefill_share,
            target_seconds=arguments.target_seconds,
            costs=costs.token_costs(load.capacity),
        )
        groups = arguments.groups_with_budget or load.groups
        found = [compare(costs, load, groups, settings, seed, arguments.iterations) for seed in range(arguments.seeds)]
        figures[str(budget)] = [asdict(each) for each in found]
        names = [field.name for field in fields(Comparison) if field.name != "rollout_seconds"]
        print(f"budget {budget}:", *(f"{name} {show(found, name)}" for name in names), sep="\n  ")
        print(f"  rollout seconds, 5%, 50%, 95% of the first seed: {found[0].rollout_seconds}", flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
