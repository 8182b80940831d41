"""One rollout phase: trajectories are leased, extended by workers, and scored as soon as they end."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from tokenizers import Tokenizer

from perigee.buffer.client import BufferClient
from perigee.buffer.v1 import buffer_pb2
from perigee.errors import FailedPreconditionError, PerigeeError
from perigee.reward.scoring import ScoreJob, ScoringPipeline
from perigee.rollout.v1 import rollout_pb2
from services.coordinator.config import CoordinatorConfig
from services.coordinator.fan_out import FanOut, PeerError, Progress
from services.coordinator.groups import EndReason, LiveGroups, Trajectory
from services.coordinator.responses import read_response_texts
from services.coordinator.run_config import RolloutSettings
from services.coordinator.workers import Worker, WorkerRegistry


@dataclass
class RolloutCounts:
    """What a rollout phase did."""

    tokens: int = 0
    cached_tokens: int = 0
    failures: int = 0
    # Why each trajectory's segment ended.
    ended: dict[str, EndReason] = field(default_factory=dict)
    finished: list[Trajectory] = field(default_factory=list)


@dataclass
class TrajectoryDispatch:
    """Gives every trajectory one segment of at most the token budget with one policy version."""

    run_id: str
    policy_version: int
    settings: RolloutSettings
    config: CoordinatorConfig
    buffer: BufferClient
    registry: WorkerRegistry
    groups: LiveGroups
    scoring: ScoringPipeline
    tokenizer: Tokenizer
    on_waiting: Callable[[bool], None]
    on_progress: Callable[[int], None]
    counts: RolloutCounts = field(default_factory=RolloutCounts)
    _targets: dict[str, int] = field(default_factory=dict)

    async def run(self, trajectories: Sequence[Trajectory]) -> RolloutCounts:
        """Extends the trajectories in the order given; returns when each has ended its segment."""
        starts = {trajectory.id: trajectory.tokens for trajectory in trajectories}
        self._targets = {trajectory_id: min(self._cap, start + self._budget) for trajectory_id, start in starts.items()}
        fan_out = FanOut(self.registry, self.policy_version, self.config.dispatch, self._extend, self.on_waiting)
        await fan_out.run(starts)
        self.counts.tokens = sum(trajectory.tokens - starts[trajectory.id] for trajectory in trajectories)
        return self.counts

    @property
    def _cap(self) -> int:
        return self.settings.max_response_tokens

    @property
    def _budget(self) -> int:
        return self.settings.token_budget or self.settings.max_response_tokens

    async def _extend(self, worker: Worker, trajectory_ids: list[str]) -> AsyncGenerator[Progress, None]:
        """One call's work: lease, extend, take the ends."""
        by_budget: dict[int, list[buffer_pb2.Lease]] = defaultdict(list)
        ended: list[str] = []
        try:
            leases, done = await self._lease(worker, trajectory_ids)
            for trajectory_id in done:
                await self._take_end_from_buffer(trajectory_id)
                ended.append(trajectory_id)
        except PerigeeError as error:
            raise PeerError(error) from error
        for lease in leases:
            left = self._targets[lease.trajectory_id] - lease.tokens
            if left > 0:
                # What a call that broke off has left of the budget; else the cap alone may shorten it.
                is_full = left == min(self._budget, self._cap - lease.tokens)
                by_budget[self._budget if is_full else left].append(lease)
            else:
                self._take_partial(lease.trajectory_id, lease.tokens)
                ended.append(lease.trajectory_id)
        if ended:
            yield Progress(ended=ended)
        for budget, some in by_budget.items():
            async with aclosing(self._call(worker, some, budget)) as stream:
                async for progress in stream:
                    yield progress

    async def _lease(self, worker: Worker, trajectory_ids: list[str]) -> tuple[Sequence[buffer_pb2.Lease], list[str]]:
        """Leases, and the trajectories that have ended without the coordinator hearing of it."""
        done: list[str] = []
        for _ in range(2):
            request = buffer_pb2.LeaseTrajectoriesRequest(
                run_id=self.run_id, worker_id=worker.worker_id, trajectory_ids=trajectory_ids
            )
            try:
                response = await self.buffer.lease_trajectories(request, timeout_s=self.config.control_timeout_s)
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

    async def _call(
        self, worker: Worker, leases: Sequence[buffer_pb2.Lease], budget: int
    ) -> AsyncGenerator[Progress, None]:
        settings = self.settings
        request = rollout_pb2.ExtendTrajectoriesRequest(
            run_id=self.run_id,
            policy_version=self.policy_version,
            trajectories=[
                rollout_pb2.LeasedTrajectory(trajectory_id=lease.trajectory_id, epoch=lease.epoch, tokens=lease.tokens)
                for lease in leases
            ],
            token_budget=budget,
            max_response_tokens=settings.max_response_tokens,
            sampling=rollout_pb2.Sampling(temperature=settings.temperature),
        )
        if settings.repetition_stop.min_repeats:
            request.repetition_stop.max_period = settings.repetition_stop.max_period
            request.repetition_stop.min_repeats = settings.repetition_stop.min_repeats
        async for response in worker.client.extend_trajectories(request, timeout_s=self.config.dispatch.call_timeout_s):
            for end in response.ended:
                await self._take_end(end)
            self.on_progress(len(self.counts.ended))
            self.counts.failures += len(response.failed)
            yield Progress(
                ended=[end.trajectory_id for end in response.ended],
                failed=[(failure.trajectory_id, failure.reason) for failure in response.failed],
            )

    async def _take_end(self, end: rollout_pb2.SegmentEnd) -> None:
        trajectory = self.groups.trajectory(end.trajectory_id)
        self.counts.cached_tokens += end.cached_tokens
        self._take_partial(end.trajectory_id, end.tokens)
        if end.end_reason != buffer_pb2.END_REASON_BUDGET:
            await self._finish(trajectory, end.end_reason, end.text)

    def _take_partial(self, trajectory_id: str, tokens: int) -> None:
        trajectory = self.groups.trajectory(trajectory_id)
        added = tokens - trajectory.tokens
        trajectory.tokens = tokens
        trajectory.tokens_by_version[self.policy_version] += added
        self.counts.tokens += added
        self.counts.ended[trajectory_id] = buffer_pb2.END_REASON_BUDGET

    async def _take_end_from_buffer(self, trajectory_id: str) -> None:
        trajectory = self.groups.trajectory(trajectory_id)
        texts = await read_response_texts(
            self.buffer, self.run_id, [trajectory_id], self.tokenizer, self.config.control_timeout_s
        )
        await self._finish(trajectory, trajectory.end_reason, texts[trajectory_id])

    async def _finish(self, trajectory: Trajectory, end_reason: EndReason, text: str) -> None:
        if self.counts.ended.get(trajectory.id, buffer_pb2.END_REASON_BUDGET) != buffer_pb2.END_REASON_BUDGET:
            return
        await self.scoring.submit(ScoreJob(trajectory.id, text, trajectory.group.prompt.line.item))
        trajectory.finished = True
        trajectory.end_reason = end_reason
        self.counts.ended[trajectory.id] = end_reason
        self.counts.finished.append(trajectory)
