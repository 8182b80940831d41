"""Live groups: the coordinator's view of the buffer's groups, without tokens."""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from perigee.buffer.client import BufferClient
from perigee.buffer.packing import pack_token_ids
from perigee.buffer.v1 import buffer_pb2 as pb
from perigee.errors import FailedPreconditionError
from perigee.image_sources import ImageStore, split_images
from perigee.images import ImageInfo
from services.coordinator.prompts import Prompt

# A CreateGroups message stays far below the limit of 4 MiB.
MAX_PROMPT_TOKENS_PER_CALL = 200_000
MAX_TRAJECTORIES_PER_CALL = 10_000

# As values rather than the generated enums' wrapper types: they are compared for every trajectory.
EndReason: TypeAlias = "pb.EndReason.ValueType"
Verdict: TypeAlias = "pb.Verdict.ValueType"


@dataclass(eq=False, slots=True)
class Trajectory:
    """Trajectory of a live group."""

    id: str
    group: Group
    tokens: int = 0
    # Tokens with which it began the iteration under way, whatever attempt at it added the others.
    start: int = 0
    # Tokens that it may have at the end of that iteration: those beyond are of the next one, which has begun.
    limit: int = sys.maxsize
    finished: bool = False
    end_reason: EndReason = pb.END_REASON_UNSPECIFIED
    verdict: Verdict = pb.VERDICT_UNSPECIFIED
    # The verifier's reward; None before there is a verdict, and when judging failed.
    reward: float | None = None
    tokens_by_version: Counter[int] = field(default_factory=Counter)
    # The worker whose prefix cache had it last, "" when none is known, and with the weights of which version.
    holder: str = ""
    held_version: int = 0

    @property
    def judged(self) -> bool:
        """Whether there is a verdict, a failure included."""
        return self.verdict != pb.VERDICT_UNSPECIFIED

    @property
    def counted(self) -> int:
        """Tokens without those of the next iteration."""
        return min(self.tokens, self.limit)

    @property
    def added(self) -> int:
        """Tokens that the iteration under way has added."""
        return self.counted - self.start

    @property
    def ended(self) -> bool:
        """Whether it has finished within its budget of the iteration under way."""
        return self.finished and self.tokens <= self.limit

    @property
    def correct(self) -> bool:
        """Whether the verdict is correct."""
        return self.verdict == pb.VERDICT_CORRECT

    def apply(self, summary: pb.TrajectorySummary) -> None:
        """Takes over the buffer's state of the trajectory."""
        self.tokens = summary.tokens
        self.finished = summary.state == pb.TRAJECTORY_STATE_FINISHED
        self.end_reason = summary.end_reason
        self.verdict = summary.verdict
        self.reward = summary.reward if summary.HasField("reward") else None
        self.tokens_by_version = Counter()
        for span in summary.versions:
            self.tokens_by_version[span.policy_version] += span.tokens


@dataclass(eq=False, slots=True)
class Group:
    """Live group: the trajectories of one prompt."""

    id: str
    prompt: Prompt
    iteration: int
    trajectories: list[Trajectory] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether every trajectory has finished, not later than in the iteration under way, and has a verdict."""
        return all(trajectory.ended and trajectory.judged for trajectory in self.trajectories)


class LiveGroups:
    """Groups that no iteration has consumed, oldest first."""

    def __init__(self, run_id: str, buffer: BufferClient, timeout_s: float, images: ImageStore) -> None:
        self._run_id = run_id
        self._buffer = buffer
        self._timeout_s = timeout_s
        self._images = images
        self._groups: dict[str, Group] = {}
        self._trajectories: dict[str, Trajectory] = {}

    def __len__(self) -> int:
        return len(self._groups)

    def __iter__(self) -> Iterator[Group]:
        return iter(self._groups.values())

    def trajectory(self, trajectory_id: str) -> Trajectory:
        """Returns a trajectory by its id."""
        return self._trajectories[trajectory_id]

    def trajectories(self) -> Iterable[Trajectory]:
        """Returns the trajectories of all live groups, oldest group first."""
        return self._trajectories.values()

    def prompt_ids(self) -> set[str]:
        """Returns the ids of the prompts that have a live group."""
        return {group.prompt.id for group in self}

    async def load(self, prompts: Mapping[str, Prompt], starts: Mapping[str, Sequence[int]] | None) -> None:
        """Loads the groups of the run in the buffer; `starts` as the latest commit had them, None as they are now.

        Raises FailedPreconditionError when a group is of a prompt that the prompt set lacks.
        """
        self._groups.clear()
        self._trajectories.clear()
        async for summary in self._list():
            prompt = prompts.get(summary.prompt_id)
            if prompt is None:
                raise FailedPreconditionError(
                    f"Group {summary.group_id} is of prompt {summary.prompt_id}, which run.prompts lacks: "
                    "resume the run with the prompt file that it was started with."
                )
            group = Group(summary.group_id, prompt, summary.iteration)
            self._add(group, [trajectory.trajectory_id for trajectory in summary.trajectories])
            tokens = [listed.tokens for listed in summary.trajectories]
            begun = tokens if starts is None else starts.get(group.id, [0] * len(tokens))
            for trajectory, listed, start in zip(group.trajectories, summary.trajectories, begun, strict=True):
                trajectory.apply(listed)
                trajectory.start = start

    async def refresh(self, trajectories: Iterable[Trajectory]) -> None:
        """Reads the state of these trajectories from the buffer."""
        wanted = {trajectory.id: trajectory for trajectory in trajectories}
        async for summary in self._list():
            for listed in summary.trajectories:
                if listed.trajectory_id in wanted:
                    wanted[listed.trajectory_id].apply(listed)

    async def create(self, groups: Iterable[tuple[str, Prompt]], iteration: int, size: int) -> None:
        """Creates groups of `size` empty trajectories in the buffer, and here."""
        there = {image.digest for group in self for image in group.prompt.line.images}
        created: list[Group] = []
        prompt_tokens = 0
        for group_id, prompt in groups:
            group = Group(group_id, prompt, iteration)
            self._add(group, [f"{group_id}-{number}" for number in range(size)])
            created.append(group)
            prompt_tokens += len(prompt.token_ids)
            if prompt_tokens > MAX_PROMPT_TOKENS_PER_CALL or len(created) * size > MAX_TRAJECTORIES_PER_CALL:
                await self._create(created, there)
                created, prompt_tokens = [], 0
        if created:
            await self._create(created, there)

    async def _create(self, groups: Sequence[Group], there: set[str]) -> None:
        """Creates groups in the buffer, after those of their images that are not `there`."""
        images = {image.digest: image for group in groups for image in group.prompt.line.images}
        request = pb.CreateGroupsRequest(run_id=self._run_id, groups=map(_to_message, groups))
        await self._put_images([image for digest, image in images.items() if digest not in there])
        try:
            await self._buffer.create_groups(request, timeout_s=self._timeout_s)
        except FailedPreconditionError:
            if not images:
                raise
            # The groups that kept an image were consumed meanwhile, or the buffer had no word of it for too long.
            await self._put_images(list(images.values()))
            await self._buffer.create_groups(request, timeout_s=self._timeout_s)
        there.update(images)

    async def _put_images(self, images: Sequence[ImageInfo]) -> None:
        """Sends images to the buffer, a bounded number of bytes at a time in memory."""
        for part in split_images(images):
            found = await asyncio.to_thread(self._images.read_all, part)
            await self._buffer.put_images(self._run_id, found, timeout_s=self._timeout_s)

    def starts(self, consumed: Iterable[Group]) -> dict[str, list[int]]:
        """Returns the tokens with which trajectories begin the next iteration, by group, where one has any."""
        tokens = {group.id: [trajectory.counted for trajectory in group.trajectories] for group in self}
        gone = {group.id for group in consumed}
        return {group_id: some for group_id, some in tokens.items() if any(some) and group_id not in gone}

    def close_iteration(self, consumed: Iterable[Group]) -> None:
        """Removes the groups that the iteration has consumed; the others begin the next one as they are."""
        for group in consumed:
            del self._groups[group.id]
            for trajectory in group.trajectories:
                del self._trajectories[trajectory.id]
        for trajectory in self.trajectories():
            trajectory.start = trajectory.counted

    def _add(self, group: Group, trajectory_ids: Iterable[str]) -> None:
        self._groups[group.id] = group
        group.trajectories = [Trajectory(trajectory_id, group) for trajectory_id in trajectory_ids]
        self._trajectories.update((trajectory.id, trajectory) for trajectory in group.trajectories)

    async def _list(self) -> AsyncIterator[pb.GroupSummary]:
        request = pb.ListGroupsRequest(run_id=self._run_id)
        async for response in self._buffer.list_groups(request, timeout_s=self._timeout_s):
            for summary in response.groups:
                yield summary


def _to_message(group: Group) -> pb.NewGroup:
    """Returns what creates a group."""
    return pb.NewGroup(
        group_id=group.id,
        prompt_id=group.prompt.id,
        prompt_token_ids=pack_token_ids(group.prompt.token_ids),
        trajectory_ids=[trajectory.id for trajectory in group.trajectories],
        iteration=group.iteration,
        image_digests=[image.digest for image in group.prompt.line.images],
    )
