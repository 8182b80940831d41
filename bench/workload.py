"""Trajectories as the coordinator makes them: groups in the buffer, leases, calls to the worker."""

import asyncio
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from rollout_stack import POLICY_VERSION, RolloutStack

from perigee.buffer.packing import pack_token_ids
from perigee.buffer.v1 import buffer_pb2
from perigee.rollout.v1 import rollout_pb2

# As the coordinator's defaults: calls in flight at once, and trajectories of one call.
CALLS = 4
MAX_BATCH = 256
TIMEOUT_S = 600.0

_numbers = itertools.count()


@dataclass
class Round:
    """Result of one round of ExtendTrajectories."""

    seconds: float = 0.0
    tokens: int = 0
    finished: list[str] = field(default_factory=list)
    partial: list[str] = field(default_factory=list)


async def create_trajectories(stack: RolloutStack, prompts: Sequence[Sequence[int]], size: int) -> list[str]:
    """Creates a group of `size` trajectories for each prompt and returns the ids of all."""
    groups = []
    for prompt in prompts:
        group_id = f"g{next(_numbers)}"
        ids = [f"{group_id}-{member}" for member in range(size)]
        groups.append(
            buffer_pb2.NewGroup(
                group_id=group_id, prompt_id=group_id, prompt_token_ids=pack_token_ids(prompt), trajectory_ids=ids
            )
        )
    request = buffer_pb2.CreateGroupsRequest(run_id=stack.run_id, groups=groups)
    await stack.buffer.create_groups(request, timeout_s=TIMEOUT_S)
    return [trajectory_id for group in groups for trajectory_id in group.trajectory_ids]


async def create_run(stack: RolloutStack) -> None:
    """Creates the run in the buffer."""
    await stack.buffer.create_run(
        buffer_pb2.CreateRunRequest(run_id=stack.run_id, config_digest="bench", policy_version=POLICY_VERSION),
        timeout_s=TIMEOUT_S,
    )


async def extend(
    stack: RolloutStack, trajectory_ids: Sequence[str], token_budget: int, max_response_tokens: int
) -> Round:
    """Leases the trajectories and extends each once; leasing is not timed. Raises RuntimeError when a segment fails."""
    request = buffer_pb2.LeaseTrajectoriesRequest(
        run_id=stack.run_id, worker_id="worker", trajectory_ids=trajectory_ids
    )
    leases = list((await stack.buffer.lease_trajectories(request, timeout_s=TIMEOUT_S)).leases)
    batch = min(MAX_BATCH, -(-len(leases) // CALLS))
    waiting = [leases[begin : begin + batch] for begin in range(0, len(leases), batch)]
    result = Round()
    begin = time.perf_counter()

    async def work() -> None:
        while waiting:
            await _call(stack, waiting.pop(0), token_budget, max_response_tokens, result)

    async with asyncio.TaskGroup() as group:
        for _ in range(CALLS):
            group.create_task(work())
    result.seconds = time.perf_counter() - begin
    return result


async def _call(
    stack: RolloutStack, leases: Sequence[buffer_pb2.Lease], token_budget: int, max_response_tokens: int, result: Round
) -> None:
    request = rollout_pb2.ExtendTrajectoriesRequest(
        run_id=stack.run_id,
        policy_version=POLICY_VERSION,
        trajectories=[
            rollout_pb2.LeasedTrajectory(trajectory_id=lease.trajectory_id, epoch=lease.epoch, tokens=lease.tokens)
            for lease in leases
        ],
        token_budget=token_budget,
        max_response_tokens=max_response_tokens,
        sampling=rollout_pb2.Sampling(temperature=1.0),
    )
    async for response in stack.rollout.extend_trajectories(request, timeout_s=TIMEOUT_S):
        if response.failed:
            raise RuntimeError(f"{response.failed[0].trajectory_id}: {response.failed[0].reason}")
        for end in response.ended:
            result.tokens += end.new_tokens
            ended = result.partial if end.end_reason == buffer_pb2.END_REASON_BUDGET else result.finished
            ended.append(end.trajectory_id)
