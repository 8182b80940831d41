"""One iteration: rollout with scoring, training, checkpoint, weights, commit."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from perigee.buffer.v1 import buffer_pb2
from perigee.coordinator.v1 import coordinator_pb2
from perigee.errors import InternalError
from perigee.reward.scoring import ScoreJob, ScoringPipeline, read_reward
from perigee.reward.v1 import reward_pb2
from perigee.trainer.v1 import trainer_pb2
from services.coordinator import metrics
from services.coordinator.context import RunContext
from services.coordinator.dispatch import RolloutCounts, TrajectoryDispatch
from services.coordinator.groups import LiveGroups, Trajectory
from services.coordinator.iteration_metrics import IterationFacts, add_phases, describe_iteration
from services.coordinator.responses import read_response_texts
from services.coordinator.rewards import score_responses
from services.coordinator.run_errors import single_error
from services.coordinator.run_state import CoordinatorState, Totals
from services.coordinator.sampling import Sampler
from services.coordinator.shaping import ShapingWeights
from services.coordinator.timeline import Timeline
from services.coordinator.training_batch import (
    TrainingBatch,
    learning_rate_at,
    make_algorithm,
    make_optimizer,
    make_training_batch,
    make_update,
)
from services.coordinator.weight_pushes import WeightKeeper


@dataclass
class Committed:
    """What the buffer's latest commit says, and what grows from it."""

    iteration: int
    policy_version: int
    state: CoordinatorState


class Iteration:
    """The iteration after the committed one. `run` changes `committed` only when the buffer has committed it."""

    def __init__(
        self, context: RunContext, committed: Committed, groups: LiveGroups, sampler: Sampler, keeper: WeightKeeper
    ) -> None:
        self._context = context
        self._committed = committed
        self._groups = groups
        self._sampler = sampler
        self._keeper = keeper
        self._number = committed.iteration + 1
        self._next_group = committed.state.next_group
        self._timeline = Timeline()
        self._judging_failures = 0

    async def run(self) -> dict[str, Any]:
        """Returns the iteration's line of metrics.jsonl."""
        board = self._context.board
        board.iteration = self._number
        with self._timeline.phase("preparation"):
            await self._keeper.require(self._committed.policy_version)
            await self._create_groups()
        counts = await self._roll_out()
        config = self._context.config
        weights = ShapingWeights.at(config, self._number)
        batch = make_training_batch(self._groups, weights, config.drop_uniform_groups)
        learning_rate = learning_rate_at(config.algorithm, self._progress())
        result: trainer_pb2.TrainResult | None = None
        version = self._committed.policy_version
        if batch.groups:
            result = await self._train(batch, learning_rate)
            version = result.policy_version
            with self._timeline.phase("checkpoint"):
                await self._save_checkpoint(version)
        facts = IterationFacts(
            iteration=self._number,
            policy_version=version,
            elapsed_seconds=board.elapsed_seconds,
            counts=counts,
            judging_failures=self._judging_failures,
            batch=batch,
            result=result,
            learning_rate=learning_rate,
            weights=weights,
            live_groups=len(self._groups) - len(batch.consumed),
            workers=len(self._context.registry.all()),
        )
        line = describe_iteration(facts, self._timeline)
        await self._close(batch, version, line)
        return line

    async def _create_groups(self) -> None:
        config = self._context.config
        missing = config.max_live_groups - len(self._groups)
        prompts = self._sampler.sample(max(0, missing), self._number, self._groups.prompt_ids())
        named = [(f"g{self._next_group + offset:08d}", prompt) for offset, prompt in enumerate(prompts)]
        self._next_group += len(named)
        await self._groups.create(named, self._number, config.group_size)

    async def _roll_out(self) -> RolloutCounts:
        context, board = self._context, self._context.board
        version = self._committed.policy_version
        # Partial trajectories first, oldest first; then those that have no token yet.
        unfinished = [trajectory for trajectory in self._groups.trajectories() if not trajectory.finished]
        unfinished.sort(key=lambda trajectory: trajectory.tokens == 0)
        unscored = [t for t in self._groups.trajectories() if t.finished and not t.judged]
        board.enter(coordinator_pb2.RUN_PHASE_ROLLOUT, len(unfinished))
        async with score_responses(context.peers.reward, context.settings.scoring, self._record) as scoring:
            dispatch = TrajectoryDispatch(
                run_id=context.run_id,
                policy_version=version,
                settings=context.config.rollout,
                config=context.settings,
                buffer=context.peers.buffer,
                registry=context.registry,
                groups=self._groups,
                scoring=scoring,
                tokenizer=context.inputs.model.tokenizer,
                on_waiting=board.set_waiting,
                on_progress=self._show_progress,
            )
            with self._timeline.phase("rollout"):
                async with self._keeper.keeping(version):
                    await self._score_again(unscored, scoring)
                    counts = await dispatch.run(unfinished)
            board.enter(coordinator_pb2.RUN_PHASE_SCORING)
            with self._timeline.phase("scoring"):
                await scoring.drain()
        counts.finished.extend(unscored)
        return counts

    def _show_progress(self, ended: int) -> None:
        self._context.board.done = ended

    async def _score_again(self, unscored: Sequence[Trajectory], scoring: ScoringPipeline) -> None:
        """Scores what had ended, but had no verdict, when a coordinator died."""
        context = self._context
        for start in range(0, len(unscored), context.settings.scoring.batch):
            some = unscored[start : start + context.settings.scoring.batch]
            texts = await read_response_texts(
                context.peers.buffer,
                context.run_id,
                [trajectory.id for trajectory in some],
                context.inputs.model.tokenizer,
                context.settings.control_timeout_s,
            )
            for trajectory in some:
                await scoring.submit(ScoreJob(trajectory.id, texts[trajectory.id], trajectory.group.prompt.line.item))

    async def _record(self, outcomes: list[reward_pb2.ScoreResponse]) -> None:
        """Makes verdicts durable, then counts them. The first verdict recorded stands."""
        context = self._context
        request = buffer_pb2.RecordVerdictsRequest(
            run_id=context.run_id,
            verdicts=[
                buffer_pb2.TrajectoryVerdict(
                    trajectory_id=outcome.id, verdict=outcome.verdict, reward=read_reward(outcome)
                )
                for outcome in outcomes
            ],
        )
        response = await context.peers.buffer.record_verdicts(request, timeout_s=context.settings.control_timeout_s)
        trajectories = [self._groups.trajectory(outcome.id) for outcome in outcomes]
        for trajectory, outcome in zip(trajectories, outcomes, strict=True):
            trajectory.verdict, trajectory.reward = outcome.verdict, read_reward(outcome)
            self._judging_failures += outcome.verdict == buffer_pb2.VERDICT_FAILED
        if response.recorded < len(outcomes):
            await self._groups.refresh(trajectories)

    async def _train(self, batch: TrainingBatch, learning_rate: float) -> trainer_pb2.TrainResult:
        context, config = self._context, self._context.config
        base = self._committed.policy_version
        request = trainer_pb2.TrainRequest(
            run_id=context.run_id,
            iteration=self._number,
            base_version=base,
            new_version=base + 1,
            groups=batch.groups,
            algorithm=make_algorithm(config.algorithm),
            update=make_update(config.algorithm, config.rollout.temperature),
            optimizer=make_optimizer(config.algorithm.optimizer),
        )
        request.optimizer.learning_rate = learning_rate
        context.board.enter(coordinator_pb2.RUN_PHASE_TRAINING, config.algorithm.minibatches)
        result: trainer_pb2.TrainResult | None = None
        with self._timeline.phase("training"):
            # To the stream's end: until then the trainer is busy and refuses the checkpoint.
            async for response in context.peers.trainer.train(request, timeout_s=context.settings.train_timeout_s):
                context.board.done, context.board.total = response.step, response.steps
                if response.HasField("result"):
                    result = response.result
        if result is None:
            raise InternalError("The trainer ended an iteration without a result: look at its log.")
        return result

    async def _save_checkpoint(self, version: int) -> None:
        context = self._context
        await context.peers.trainer.save_checkpoint(
            trainer_pb2.SaveCheckpointRequest(run_id=context.run_id, policy_version=version),
            timeout_s=context.settings.checkpoint_timeout_s,
        )

    async def _close(self, batch: TrainingBatch, version: int, line: dict[str, Any]) -> None:
        """Commits and pushes at once, since both only need the checkpoint to be there; then records the line."""
        context, board = self._context, self._context.board
        state = self._next_state(line)
        board.enter(coordinator_pb2.RUN_PHASE_WEIGHTS)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._commit(batch, version, state))
                if version != self._committed.policy_version:
                    tasks.create_task(self._push(version))
        except BaseExceptionGroup as group:
            raise single_error(group) from group
        self._committed.iteration, self._committed.policy_version = self._number, version
        self._committed.state = state
        self._groups.remove(batch.consumed)
        for increment in batch.increments:
            self._sampler.record(increment.prompt_id, increment.trajectories, increment.correct)
        add_phases(line, self._timeline)
        for phase in ("commit", "weights"):
            if phase in self._timeline.phases:
                state.totals.add_seconds(phase, self._timeline.phases[phase].seconds)
        show_metrics(line)
        await asyncio.to_thread(context.records.add_iteration, line)
        board.policy_version = version

    async def _commit(self, batch: TrainingBatch, version: int, state: CoordinatorState) -> None:
        context = self._context
        request = buffer_pb2.CommitIterationRequest(
            run_id=context.run_id,
            iteration=self._number,
            policy_version=version,
            consumed_group_ids=[group.id for group in batch.consumed],
            prompt_increments=batch.increments,
            coordinator_state=state.encode(),
        )
        with self._timeline.phase("commit"):
            await context.peers.buffer.commit_iteration(request, timeout_s=context.settings.control_timeout_s)

    async def _push(self, version: int) -> None:
        with self._timeline.phase("weights"):
            await self._keeper.push(version)

    def _next_state(self, line: dict[str, Any]) -> CoordinatorState:
        state = self._committed.state
        totals = replace(state.totals, seconds=dict(state.totals.seconds))
        add_to_totals(totals, line)
        return replace(
            state,
            sampler=self._sampler.state(),
            next_group=self._next_group,
            elapsed_seconds=self._context.board.elapsed_seconds,
            totals=totals,
            last_line=line,
        )

    def _progress(self) -> float:
        """Share of the run that has passed, by iterations or by its time limit, whichever is further."""
        config, state = self._context.config, self._committed.state
        by_iterations = (self._number - 1) / max(1, config.iterations - 1)
        by_time = 0.0
        if config.time_limit_s is not None and state.started_seconds is not None:
            left = max(1e-9, config.time_limit_s - state.started_seconds)
            by_time = (self._context.board.elapsed_seconds - state.started_seconds) / left
        return min(1.0, max(by_iterations, by_time))


def add_to_totals(totals: Totals, line: dict[str, Any]) -> None:
    """Adds an iteration's line to the run's sums."""
    totals.tokens_generated += line["tokens_generated"]
    totals.trajectories_trained += line["trajectories_trained"]
    totals.trajectories_multi_version += line["trajectories_multi_version"]
    totals.max_logprob_difference = max(totals.max_logprob_difference, line["max_logprob_difference"] or 0.0)
    for phase, times in line["phases"].items():
        totals.add_seconds(phase, times["seconds"])


def show_metrics(line: dict[str, Any]) -> None:
    """Sets the Prometheus metrics of a committed iteration."""
    metrics.GENERATED.inc(line["tokens_generated"])
    metrics.TRAINED.inc(line["trajectories_trained"])
    metrics.ITERATION.set(line["iteration"])
    metrics.POLICY_VERSION.set(line["policy_version"])
    if line["reward"]["mean"] is not None:
        metrics.REWARD.set(line["reward"]["mean"])
