"""Rollout phase: trajectories are leased, extended by workers, and submitted to scoring as soon as they finish."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from perigee.buffer.packing import unpack_token_ids
from perigee.buffer.v1 import buffer_pb2
from perigee.errors import FailedPreconditionError, PerigeeError
from perigee.reward.scoring import ScoringPipeline
from perigee.rollout.v1 import rollout_pb2
from services.coordinator.budgets import Context, choose_budgets, update_speed
from services.coordinator.context import RunContext
from services.coordinator.dispatcher import Dispatcher, PeerError, Progress, Work
from services.coordinator.groups import EndReason, LiveGroups, Trajectory
from services.coordinator.samples import SampleCollector
from services.coordinator.workers import Worker
from services.kit.server import end_tasks


@dataclass
class RolloutCounts:
    """Tokens, ends and failures of a rollout phase."""

    # Of the iteration, those that an attempt that broke off had made durable included, and `ahead_tokens`, which an
    # earlier version sampled while the trainer trained; `timed_tokens` without either.
    tokens: int = 0
    timed_tokens: int = 0
    ahead_tokens: int = 0
    # Prompt and earlier tokens of segments: served from a prefix cache, and computed.
    cached_tokens: int = 0
    prefilled_tokens: int = 0
    # Seconds of the engines' steps, in which they did both.
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    failures: int = 0
    # Token budget of short contexts, those of the trajectories, and the share of prefill in the work that they make.
    base_budget: int = 0
    budgets: list[int] = field(default_factory=list)
    planned_prefill_share: float | None = None
    # End reason of each trajectory's segment.
    ended: dict[str, EndReason] = field(default_factory=dict)


@dataclass
class WorkerShare:
    """What a worker has done in a phase."""

    begun: float
    ended: float = 0.0
    work: float = 0.0


def now() -> float:
    """Returns the seconds of the event loop's clock."""
    return asyncio.get_running_loop().time()


class RolloutPhase:
    """Extends every unfinished trajectory by its token budget at most in each iteration.

    An iteration that is done again, after a trainer or a coordinator died, goes on where its tokens in the buffer end.
    While the trainer trains, a phase may begin ahead with the trajectories that it does not train. Whatever that adds,
    the iteration under way does not see it (`Trajectory.limit`): the same groups are complete as without it.
    """

    def __init__(self, context: RunContext, groups: LiveGroups) -> None:
        self.context = context
        self.groups = groups
        # Work per second of the phases so far, for the budgets of the next one; None before a phase has told it.
        self.speed: float | None = None
        self._ahead: asyncio.Task[None] | None = None
        self._ahead_since = 0.0
        # Seconds in which workers generated ahead before the latest phase.
        self._ahead_seconds = 0.0
        self._begin_anew(0)

    def _begin_anew(self, policy_version: int, only: Callable[[Worker], bool] | None = None) -> None:
        context = self.context
        self.policy_version = policy_version
        # None while a phase runs ahead: what finishes then is scored when the phase begins.
        self.scoring: ScoringPipeline | None = None
        self.samples: SampleCollector | None = None
        # Whether every group begins in this iteration, as in a run's first, and when all ended together before.
        self.all_begin = False
        self.counts = RolloutCounts()
        self._tokens_before = 0
        self._targets: dict[str, int] = {}
        # Work that the budgets allow, and the seconds of the phase.
        self._planned_work = self._seconds = 0.0
        self._shares: dict[Worker, WorkerShare] = {}
        self._dispatcher = Dispatcher(
            context.registry,
            policy_version,
            context.settings.dispatch,
            self._extend,
            context.status.set_waiting,
            only,
            self._work,
        )

    def begin_ahead(self, only: Callable[[Worker], bool]) -> None:
        """Begins the next iteration's phase, with the same weights, on the workers of which `only` is true.

        Calls under way go on while their worker takes the next weights. `begin` and `run` make it the phase of all.
        """
        self._begin_anew(self.policy_version, only)
        self._ahead_since = now()
        config = self.context.config
        partial = [trajectory for trajectory in self.groups.trajectories() if not trajectory.finished]
        # The groups that are trained make room for new ones.
        fresh = sum(group.complete for group in self.groups) * config.group_size
        contexts = [self._context_of(t, t.counted) for t in partial] + [(0, self._cap)] * fresh
        budgets = choose_budgets(config.rollout, contexts, self.speed, self._ahead_seconds)
        for trajectory in partial:
            tokens, room = self._context_of(trajectory, trajectory.counted)
            target = trajectory.counted + min(room, budgets.of(tokens))
            if trajectory.tokens < target:
                self._targets[trajectory.id] = target
        self._ahead = asyncio.create_task(self._dispatcher.run(self._longest_first(partial)))

    async def drain(self) -> None:
        """Leaves the workers to others for a while: what they are extending ahead ends, and nothing more begins."""
        if self._ahead is not None:
            await self._dispatcher.drain()

    async def aclose(self) -> None:
        """Ends what has begun ahead."""
        if self._ahead is not None:
            await end_tasks(self._ahead)

    def begin(
        self,
        policy_version: int,
        iteration: int,
        speed: float | None,
        scoring: ScoringPipeline,
        samples: SampleCollector,
    ) -> None:
        """Gives each trajectory its budget of the iteration; what ends from here on is scored.

        `speed` is that of the iterations committed, so that an iteration that is done again has the same budgets.
        """
        if self._ahead is None:
            self._begin_anew(policy_version)
        self._ahead_seconds = now() - self._ahead_since if self._ahead else 0.0
        self.policy_version, self.speed, self.scoring, self.samples = policy_version, speed, scoring, samples
        self.all_begin = all(group.iteration == iteration for group in self.groups)
        self._plan()

    def _plan(self) -> None:
        """Sets the limits of the iteration; a trajectory that has begun ahead keeps its own."""
        settings, counts = self.context.config.rollout, self.counts
        # All that were not finished when the iteration began, whatever an attempt at it has added since.
        moving = [t for t in self.groups.trajectories() if not t.finished or t.tokens > t.start]
        contexts = [self._context_of(trajectory, trajectory.start) for trajectory in moving]
        budgets = choose_budgets(settings, contexts, self.speed, self._ahead_seconds)
        prefill = 0.0
        for trajectory, (tokens, room) in zip(moving, contexts, strict=True):
            budget = min(room, self._turns_of(trajectory, budgets.base) * budgets.of(tokens))
            trajectory.limit = self._targets.get(trajectory.id, trajectory.start + budget)
            counts.budgets.append(trajectory.limit - trajectory.start)
            prefill += settings.costs.prefill_work(tokens)
            self._planned_work += settings.costs.work(tokens, counts.budgets[-1])
        counts.base_budget = budgets.base
        counts.planned_prefill_share = prefill / self._planned_work if self._planned_work else None

    async def run(self) -> None:
        """Extends the trajectories until the segment of each has ended."""
        due: list[Trajectory] = []
        for trajectory in self.groups.trajectories():
            if trajectory.id in self._targets:
                continue  # it has begun ahead
            self._targets[trajectory.id] = trajectory.limit
            if trajectory.ended:
                if trajectory.added:
                    self.counts.ended[trajectory.id] = trajectory.end_reason
            elif trajectory.tokens < trajectory.limit:
                due.append(trajectory)
            else:
                self.counts.ended[trajectory.id] = buffer_pb2.END_REASON_BUDGET
        self._tokens_before = self._count_tokens()
        started = now()
        self._dispatcher.go_on(self.policy_version, self._longest_first(due))
        if self._ahead is not None:
            await self._ahead
        await self._dispatcher.run(())
        self._seconds = now() - started
        for worker, share in self._shares.items():
            if share.work:
                worker.record_phase(share.work, share.ended - share.begun)

    async def count(self) -> RolloutCounts:
        """Returns the counts of the phase, once nothing of it is under way."""
        counts, trajectories = self.counts, list(self.groups.trajectories())
        # Some tokens of an iteration that is done again are from before this phase.
        is_whole = self._ahead is not None or not self._tokens_before
        if self._ahead is not None:
            # The ends of calls do not tell where the weights changed.
            self._ahead = None
            await self.groups.refresh(trajectories)
        counts.tokens = self._count_tokens()
        # All tokens of the version are of this iteration, unless the one before has trained nothing.
        counts.ahead_tokens = sum(max(0, t.added - t.tokens_by_version[self.policy_version]) for t in trajectories)
        counts.timed_tokens = counts.tokens - max(self._tokens_before, counts.ahead_tokens)
        # Where no budget ended a trajectory, other budgets would not have changed the phase.
        if is_whole and not self.all_begin and buffer_pb2.END_REASON_BUDGET in counts.ended.values():
            settings, seconds = self.context.config.rollout, self._seconds
            self.speed = update_speed(settings, self.speed, self._planned_work, seconds, self._ahead_seconds)
        return counts

    def _count_tokens(self) -> int:
        return sum(trajectory.added for trajectory in self.groups.trajectories())

    @property
    def _cap(self) -> int:
        return self.context.config.rollout.max_response_tokens

    def _context_of(self, trajectory: Trajectory, tokens: int) -> Context:
        """Returns what a trajectory with so many response tokens holds, and the response tokens that are left to it."""
        return trajectory.group.prompt.tokens + tokens, self._cap - tokens

    def _turns_of(self, trajectory: Trajectory, base_budget: int) -> int:
        """Returns how many budgets the trajectory gets in this iteration: one, unless every group begins in it.

        Groups that begin together would end together, budgets later, and the iterations between would train nothing:
        they get one to `cap / budget` budgets in turn.
        """
        if not self.all_begin:
            return 1
        turns = math.ceil(self._cap / base_budget)
        return turns - int(trajectory.group.id.removeprefix("g")) % turns

    def _longest_first(self, trajectories: Sequence[Trajectory]) -> list[str]:
        """Returns the ids of trajectories with a target: most work left first, of equals the oldest."""
        work = {t.id: self._work(t.id).work for t in trajectories if t.id in self._targets}
        return sorted(work, key=lambda trajectory_id: -work[trajectory_id])

    def _work(self, trajectory_id: str) -> Work:
        """Returns the work that a trajectory has left, in sampled tokens, without its prefill where its prefix is."""
        trajectory, settings = self.groups.trajectory(trajectory_id), self.context.config.rollout
        tokens, _ = self._context_of(trajectory, trajectory.tokens)
        work = settings.costs.work(tokens, max(0, self._targets[trajectory_id] - trajectory.tokens))
        age = self.policy_version - trajectory.held_version
        if not trajectory.holder or not 0 <= age <= settings.max_kv_staleness:
            return Work(work)
        return Work(work, trajectory.holder, settings.costs.prefill_work(tokens))

    async def _extend(self, worker: Worker, trajectory_ids: list[str]) -> AsyncGenerator[Progress, None]:
        """Makes one call: leases the trajectories, extends them, records their ends."""
        due: dict[str, buffer_pb2.Lease] = {}
        ended: list[str] = []
        try:
            leases, done = await self._lease(worker, trajectory_ids)
            for trajectory_id in done:
                await self._recover_end(trajectory_id)
                ended.append(trajectory_id)
        except PerigeeError as error:
            raise PeerError(error) from error
        for lease in leases:
            if lease.tokens < self._targets[lease.trajectory_id]:
                due[lease.trajectory_id] = lease
            else:
                self._record_tokens(lease.trajectory_id, lease.tokens)
                ended.append(lease.trajectory_id)
        if ended:
            yield Progress(ended=ended)
        if due:
            async with aclosing(self._call(worker, due)) as stream:
                async for progress in stream:
                    yield progress

    async def _lease(self, worker: Worker, trajectory_ids: list[str]) -> tuple[Sequence[buffer_pb2.Lease], list[str]]:
        """Returns leases, and the trajectories whose ends were not received: the buffer has them as finished."""
        done: list[str] = []
        for _ in range(2):
            request = buffer_pb2.LeaseTrajectoriesRequest(
                run_id=self.context.run_id, worker_id=worker.worker_id, trajectory_ids=trajectory_ids
            )
            try:
                response = await self.context.peers.buffer.lease_trajectories(
                    request, timeout_s=self.context.settings.control_timeout_s
                )
                return response.leases, done
            except FailedPreconditionError:
                trajectories = [self.groups.trajectory(trajectory_id) for trajectory_id in trajectory_ids]
                await self.groups.refresh(trajectories)
                done = [t.id for t in trajectories if t.finished]
                trajectory_ids = [t.id for t in trajectories if not t.finished]
                if not done:
                    raise
                if not trajectory_ids:
                    return [], done
        raise FailedPreconditionError("Trajectories cannot be leased: they end while nobody extends them.")

    async def _call(self, worker: Worker, leases: Mapping[str, buffer_pb2.Lease]) -> AsyncGenerator[Progress, None]:
        settings = self.context.config.rollout
        budgets = {lease.trajectory_id: self._targets[lease.trajectory_id] - lease.tokens for lease in leases.values()}
        share = self._shares.setdefault(worker, WorkerShare(now()))
        request = rollout_pb2.ExtendTrajectoriesRequest(
            run_id=self.context.run_id,
            policy_version=self.policy_version,
            trajectories=[
                rollout_pb2.LeasedTrajectory(
                    trajectory_id=trajectory_id,
                    epoch=lease.epoch,
                    tokens=lease.tokens,
                    token_budget=budgets[trajectory_id],
                )
                for trajectory_id, lease in leases.items()
            ],
            # Of a worker that knows no budgets of single trajectories, none gets more than its own.
            token_budget=min(budgets.values()),
            max_response_tokens=settings.max_response_tokens,
            sampling=rollout_pb2.Sampling(temperature=settings.temperature),
            repetition_stop=settings.repetition_stop.message(),
            max_kv_staleness=settings.max_kv_staleness,
        )
        longest = max(self.groups.trajectory(key).group.prompt.tokens + self._targets[key] for key in leases)
        async for response in worker.client.extend_trajectories(
            request, timeout_s=self.context.settings.dispatch.deadline_s(longest)
        ):
            for end in response.ended:
                tokens, _ = self._context_of(self.groups.trajectory(end.trajectory_id), end.tokens - end.new_tokens)
                share.work += settings.costs.work(tokens, end.new_tokens)
                share.ended = now()
                await self._record_end(worker, end)
            if self.scoring is not None:
                self.context.status.done = len(self.counts.ended)
            self.counts.failures += len(response.failed)
            self.counts.prefill_seconds += response.prefill_seconds
            self.counts.decode_seconds += response.decode_seconds
            yield Progress(
                ended=[end.trajectory_id for end in response.ended],
                failed=[(failure.trajectory_id, failure.reason) for failure in response.failed],
            )

    async def _record_end(self, worker: Worker, end: rollout_pb2.SegmentEnd) -> None:
        trajectory = self.groups.trajectory(end.trajectory_id)
        trajectory.holder, trajectory.held_version = worker.worker_id, self.policy_version
        self.counts.cached_tokens += end.cached_tokens
        self.counts.prefilled_tokens += end.prefilled_tokens
        self._record_tokens(end.trajectory_id, end.tokens)
        if end.end_reason != buffer_pb2.END_REASON_BUDGET:
            await self._finish(trajectory, end.end_reason, end.text, end.left_out_bytes)

    def _record_tokens(self, trajectory_id: str, tokens: int) -> None:
        trajectory = self.groups.trajectory(trajectory_id)
        trajectory.tokens_by_version[self.policy_version] += tokens - trajectory.tokens
        trajectory.tokens = tokens
        self.counts.ended[trajectory_id] = buffer_pb2.END_REASON_BUDGET

    async def _recover_end(self, trajectory_id: str) -> None:
        trajectory = self.groups.trajectory(trajectory_id)
        async for found, text in read_response_texts(self.context, [trajectory]):
            await self._finish(found, found.end_reason, text)

    async def _finish(self, trajectory: Trajectory, end_reason: EndReason, text: str, left_out_bytes: int = 0) -> None:
        if self.counts.ended.get(trajectory.id, buffer_pb2.END_REASON_BUDGET) != buffer_pb2.END_REASON_BUDGET:
            return
        if self.scoring is not None and self.samples is not None:
            prompt, versions = trajectory.group.prompt, trajectory.tokens_by_version
            self.samples.add(trajectory.id, prompt, text, trajectory.tokens, versions, end_reason)
            await self.scoring.submit(self.context.inputs.score_job(trajectory.id, prompt, text, left_out_bytes))
        trajectory.finished = True
        trajectory.end_reason = end_reason
        self.counts.ended[trajectory.id] = end_reason


async def read_response_texts(
    context: RunContext, trajectories: Sequence[Trajectory]
) -> AsyncGenerator[tuple[Trajectory, str], None]:
    """Reads responses from the buffer, one after the other, and yields their texts, special tokens left out."""
    tokenizer, timeout_s = context.inputs.tokenizer, context.settings.control_timeout_s
    for trajectory in trajectories:
        async for stored in context.peers.buffer.read_trajectories(
            context.run_id, [trajectory.id], timeout_s=timeout_s, tokens=trajectory.tokens
        ):
            yield trajectory, tokenizer.decode(list(unpack_token_ids(stored.token_ids)))
