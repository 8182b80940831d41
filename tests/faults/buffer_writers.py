"""Writers that keep a buffer busy and remember what it acknowledged."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from perigee.buffer.client import BufferClient
from perigee.buffer.packing import pack_logprobs, pack_token_ids, unpack_token_ids
from perigee.buffer.v1 import buffer_pb2 as pb
from perigee.errors import CancelledError, DeadlineExceededError, UnavailableError

RUN = "crashes"
TRAJECTORIES = ("t0", "t1", "t2", "t3")
SEGMENT = 8
# How a call fails whose server or server's server is gone; it is sent again. gRPC answers CANCELLED to a call that
# arrives in the moment that a server begins to stop.
GONE = (UnavailableError, DeadlineExceededError, CancelledError)


@dataclass
class Acknowledged:
    """Tokens of each trajectory and iterations that the buffer said it has."""

    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(TRAJECTORIES, 0))
    iteration: int = 0


async def start_run(client: BufferClient) -> None:
    """A run with one group."""
    await client.create_run(pb.CreateRunRequest(run_id=RUN, config_digest="d"))
    group = pb.NewGroup(group_id="g", prompt_id="p", prompt_token_ids=pack_token_ids([1]), trajectory_ids=TRAJECTORIES)
    await client.create_groups(pb.CreateGroupsRequest(run_id=RUN, groups=[group]))


@asynccontextmanager
async def writing(client: BufferClient) -> AsyncIterator[Acknowledged]:
    """Writers at work for as long as the block lasts."""
    acknowledged, stop = Acknowledged(), asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        for trajectory_id in TRAJECTORIES:
            tasks.create_task(_write(client, trajectory_id, acknowledged, stop))
        tasks.create_task(_commit(client, acknowledged, stop))
        try:
            yield acknowledged
        finally:
            stop.set()


async def until(condition: Callable[[], bool], timeout_s: float) -> None:
    """Returns when the condition holds; raises TimeoutError when it does not in time."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 (what other processes do sets no event here)
            await asyncio.sleep(0.01)


async def until_written(acknowledged: Acknowledged, more: int) -> None:
    """Returns when every writer got `more` acknowledgements further."""
    tokens = {name: count + more * SEGMENT for name, count in acknowledged.tokens.items()}
    iteration = acknowledged.iteration + more
    await until(
        lambda: (
            acknowledged.iteration >= iteration and all(acknowledged.tokens[name] >= tokens[name] for name in tokens)
        ),
        timeout_s=60,
    )


async def check(client: BufferClient, acknowledged: Acknowledged) -> None:
    """What was acknowledged is there, and nothing is torn."""
    held: dict[str, int] = {}
    async for stored in client.read_trajectories(RUN, TRAJECTORIES, with_logprobs=True):
        assert list(unpack_token_ids(stored.token_ids)) == list(range(stored.tokens))
        held[stored.trajectory_id] = stored.tokens
    assert list(held) == list(TRAJECTORIES)
    assert all(held[name] >= count for name, count in acknowledged.tokens.items())
    assert all(count % SEGMENT == 0 for count in held.values())
    state = (await client.get_run(pb.GetRunRequest(run_id=RUN))).run
    assert state.iteration in (acknowledged.iteration, acknowledged.iteration + 1)
    (statistics,) = (await client.list_prompt_statistics(pb.ListPromptStatisticsRequest(run_id=RUN))).prompts
    assert (statistics.trajectories, statistics.correct) == (2 * state.iteration, state.iteration)


async def _write(client: BufferClient, trajectory_id: str, acknowledged: Acknowledged, stop: asyncio.Event) -> None:
    while not stop.is_set():
        try:
            request = pb.LeaseTrajectoriesRequest(run_id=RUN, worker_id="w", trajectory_ids=[trajectory_id])
            (lease,) = (await client.lease_trajectories(request, timeout_s=5)).leases
            assert lease.tokens >= acknowledged.tokens[trajectory_id]
            chunk = pb.Chunk(
                trajectory_id=trajectory_id,
                epoch=lease.epoch,
                offset=lease.tokens,
                token_ids=pack_token_ids(range(lease.tokens, lease.tokens + SEGMENT)),
                logprobs=pack_logprobs([-1] * SEGMENT),
                versions=[pb.VersionSpan(policy_version=1, tokens=SEGMENT)],
                end_reason=pb.END_REASON_BUDGET,
            )
            append = pb.AppendChunksRequest(run_id=RUN, chunks=[chunk])
            (outcome,) = (await client.append_chunks(append, timeout_s=5)).outcomes
        except GONE:
            await asyncio.sleep(0.01)
            continue
        assert outcome in (pb.APPEND_OUTCOME_APPENDED, pb.APPEND_OUTCOME_DUPLICATE)
        acknowledged.tokens[trajectory_id] = lease.tokens + SEGMENT


async def _commit(client: BufferClient, acknowledged: Acknowledged, stop: asyncio.Event) -> None:
    while not stop.is_set():
        increment = pb.PromptStatistics(prompt_id="p", trajectories=2, correct=1)
        request = pb.CommitIterationRequest(
            run_id=RUN, iteration=acknowledged.iteration + 1, prompt_increments=[increment]
        )
        try:
            response = await client.commit_iteration(request, timeout_s=5)
        except GONE:
            await asyncio.sleep(0.01)
            continue
        acknowledged.iteration += 1
        assert response.run.iteration == acknowledged.iteration
