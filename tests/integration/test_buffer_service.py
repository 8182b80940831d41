"""The buffer's contract, through gRPC, on a real Valkey server."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest

from perigee.buffer.client import BufferClient
from perigee.buffer.packing import pack_logprobs, pack_token_ids, unpack_logprobs, unpack_token_ids
from perigee.buffer.v1 import buffer_pb2 as pb
from perigee.errors import (
    AbortedError,
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
)

STOP, REPETITION, CAP, BUDGET = (
    pb.END_REASON_STOP,
    pb.END_REASON_REPETITION,
    pb.END_REASON_MAX_RESPONSE_TOKENS,
    pb.END_REASON_BUDGET,
)
APPENDED, DUPLICATE, FENCED, GAP, CONFLICT, UNKNOWN = (
    pb.APPEND_OUTCOME_APPENDED,
    pb.APPEND_OUTCOME_DUPLICATE,
    pb.APPEND_OUTCOME_FENCED,
    pb.APPEND_OUTCOME_GAP,
    pb.APPEND_OUTCOME_CONFLICT,
    pb.APPEND_OUTCOME_UNKNOWN,
)
numbers = itertools.count()


@pytest.fixture
async def run_id(buffer_client: BufferClient) -> str:
    """A new run."""
    name = f"service-{next(numbers)}"
    response = await buffer_client.create_run(pb.CreateRunRequest(run_id=name, config_digest="d", policy_version=3))
    assert response.created
    return name


def group(name: str, k: int = 2, iteration: int = 1) -> pb.NewGroup:
    """A group `name` with trajectories `name.0`, `name.1`, ..."""
    return pb.NewGroup(
        group_id=name,
        prompt_id=f"prompt-{name}",
        prompt_token_ids=pack_token_ids([7, 8, 9]),
        trajectory_ids=[f"{name}.{index}" for index in range(k)],
        iteration=iteration,
    )


def chunk(
    trajectory_id: str,
    epoch: int,
    offset: int,
    token_ids: Sequence[int],
    end: pb.EndReason.ValueType = 0,
    version: int = 3,
) -> pb.Chunk:
    """A chunk of one policy version; each logprob follows from its token."""
    return pb.Chunk(
        trajectory_id=trajectory_id,
        epoch=epoch,
        offset=offset,
        token_ids=pack_token_ids(token_ids),
        logprobs=pack_logprobs(-token / 64 for token in token_ids),
        versions=[pb.VersionSpan(policy_version=version, tokens=len(token_ids))] if token_ids else [],
        end_reason=end,
    )


async def append(client: BufferClient, run_id: str, *chunks: pb.Chunk) -> list[int]:
    """The outcomes of one call."""
    return list((await client.append_chunks(pb.AppendChunksRequest(run_id=run_id, chunks=chunks))).outcomes)


async def lease(client: BufferClient, run_id: str, *trajectory_ids: str) -> list[pb.Lease]:
    """Leases for one worker."""
    request = pb.LeaseTrajectoriesRequest(run_id=run_id, worker_id="w", trajectory_ids=trajectory_ids)
    return list((await client.lease_trajectories(request)).leases)


async def read(client: BufferClient, run_id: str, *trajectory_ids: str) -> list[pb.ReadTrajectoriesResponse]:
    """All pieces of the trajectories."""
    request = pb.ReadTrajectoriesRequest(run_id=run_id, trajectory_ids=trajectory_ids, with_logprobs=True)
    return [piece async for piece in client.read_pieces(request)]


async def list_groups(client: BufferClient, run_id: str) -> list[pb.GroupSummary]:
    """All groups not consumed."""
    return [item async for page in client.list_groups(pb.ListGroupsRequest(run_id=run_id)) for item in page.groups]


async def read_experts(client: BufferClient, run_id: str, trajectory_id: str) -> bytes:
    """The expert choices that the buffer holds, if it holds them for every token."""
    [stored] = [each async for each in client.read_trajectories(run_id, [trajectory_id], with_experts=True)]
    assert len(stored.experts) in (0, 3 * stored.tokens)
    return stored.experts


async def test_expert_choices_are_those_of_all_tokens_or_none(buffer_client: BufferClient, run_id: str) -> None:
    def add(position: int, offset: int, tokens: str, width: int = 3) -> pb.Chunk:
        added = chunk(f"g.{position}", 1, offset, list(tokens.encode()))
        added.experts = b"".join(token.encode() * width for token in tokens)
        return added

    await buffer_client.create_groups(pb.CreateGroupsRequest(run_id=run_id, groups=[group("g", k=4)]))
    await lease(buffer_client, run_id, *(f"g.{position}" for position in range(4)))
    first = [add(0, 0, "abcd"), add(1, 0, "ab", width=0), add(2, 0, "ab"), add(3, 0, "ab")]
    assert await append(buffer_client, run_id, *first) == [APPENDED] * 4
    # One goes on, sent again and overlapping; the others lack choices at first, lose them, or change their size.
    then = [add(0, 0, "abcd"), add(0, 2, "cdef"), add(1, 2, "c"), add(2, 2, "c", width=0), add(3, 2, "c", width=2)]
    assert await append(buffer_client, run_id, *then) == [DUPLICATE, *[APPENDED] * 4]
    assert await read_experts(buffer_client, run_id, "g.0") == b"aaabbbcccdddeeefff"
    assert [await read_experts(buffer_client, run_id, f"g.{position}") for position in (1, 2, 3)] == [b""] * 3
    # They do not come back with later chunks that have them, nor without being asked for.
    assert await append(buffer_client, run_id, add(2, 3, "d"), add(3, 3, "d")) == [APPENDED] * 2
    assert [await read_experts(buffer_client, run_id, f"g.{position}") for position in (2, 3)] == [b""] * 2
    assert [piece.experts for piece in await read(buffer_client, run_id, "g.0")] == [b""]
    broken = add(0, 6, "gh")
    broken.experts = b"12345"
    with pytest.raises(InvalidArgumentError, match="holds 5 bytes, not as many for each of 2 tokens"):
        await append(buffer_client, run_id, broken)


async def test_pieces_with_expert_choices_stay_small(buffer_client: BufferClient, run_id: str) -> None:
    await buffer_client.create_groups(pb.CreateGroupsRequest(run_id=run_id, groups=[group("g", k=1)]))
    await lease(buffer_client, run_id, "g.0")
    for offset in (0, 2000):
        large = chunk("g.0", 1, offset, range(offset, offset + 2000))
        large.experts = b"".join(token.to_bytes(2, "little") * 600 for token in range(offset, offset + 2000))
        assert await append(buffer_client, run_id, large) == [APPENDED]
    request = pb.ReadTrajectoriesRequest(run_id=run_id, trajectory_ids=["g.0"], with_experts=True)
    pieces = [piece async for piece in buffer_client.read_pieces(request)]
    assert [piece.ByteSize() < 2 << 20 for piece in pieces] == [True] * 3
    experts = b"".join(piece.experts for piece in pieces)
    assert [experts[at : at + 2] for at in range(0, len(experts), 1200)] == [
        token.to_bytes(2, "little") for token in range(4000)
    ]


async def test_run_is_created_once(buffer_client: BufferClient, run_id: str) -> None:
    request = pb.CreateRunRequest(run_id=run_id, config_digest="d", policy_version=9, coordinator_state=b"other")
    response = await buffer_client.create_run(request)
    assert not response.created
    assert response.run.policy_version == 3
    with pytest.raises(AlreadyExistsError, match="another configuration"):
        await buffer_client.create_run(pb.CreateRunRequest(run_id=run_id, config_digest="e"))


async def test_state_of_coordinator_survives_any_bytes(buffer_client: BufferClient) -> None:
    state = bytes(range(256)) * 8
    name = f"service-{next(numbers)}"
    await buffer_client.create_run(pb.CreateRunRequest(run_id=name, config_digest="d", coordinator_state=state))
    assert (await buffer_client.get_run(pb.GetRunRequest(run_id=name))).run.coordinator_state == state


async def test_unknown_run_is_not_found_by_every_call(buffer_client: BufferClient) -> None:
    client = buffer_client
    with pytest.raises(NotFoundError, match="'none'"):
        await client.get_run(pb.GetRunRequest(run_id="none"))
    with pytest.raises(NotFoundError):
        await client.create_groups(pb.CreateGroupsRequest(run_id="none", groups=[group("g")]))
    with pytest.raises(NotFoundError):
        await list_groups(client, "none")
    with pytest.raises(NotFoundError):
        await lease(client, "none", "g.0")
    with pytest.raises(NotFoundError):
        await append(client, "none", chunk("g.0", 1, 0, [1]))
    with pytest.raises(NotFoundError):
        await read(client, "none", "g.0")
    with pytest.raises(NotFoundError):
        await client.commit_iteration(pb.CommitIterationRequest(run_id="none", iteration=1))
    with pytest.raises(NotFoundError):
        await client.list_prompt_statistics(pb.ListPromptStatisticsRequest(run_id="none"))


async def test_a_trajectory_over_two_segments(buffer_client: BufferClient, run_id: str) -> None:
    client = buffer_client
    await client.create_groups(pb.CreateGroupsRequest(run_id=run_id, groups=[group("g")]))
    (first,) = await lease(client, run_id, "g.0")
    assert (first.epoch, first.tokens) == (1, 0)
    assert await append(
        client, run_id, chunk("g.0", 1, 0, [1, 2]), chunk("g.0", 1, 2, [3], BUDGET), chunk("g.0", 1, 3, [4])
    ) == [APPENDED, APPENDED, CONFLICT]
    (second,) = await lease(client, run_id, "g.0")
    assert (second.epoch, second.tokens) == (2, 3)
    assert await append(
        client, run_id, chunk("g.0", 1, 3, [4]), chunk("g.0", 2, 3, [4, 5], version=4), chunk("g.0", 2, 5, [], STOP)
    ) == [FENCED, APPENDED, APPENDED]

    (piece,) = await read(client, run_id, "g.0")
    assert list(unpack_token_ids(piece.prompt_token_ids)) == [7, 8, 9]
    assert list(unpack_token_ids(piece.token_ids)) == [1, 2, 3, 4, 5]
    assert list(unpack_logprobs(piece.logprobs)) == [-token / 64 for token in [1, 2, 3, 4, 5]]
    assert [(span.policy_version, span.tokens) for span in piece.versions] == [(3, 3), (4, 2)]
    assert (piece.last, piece.end_reason, piece.epoch) == (True, STOP, 2)

    (summary,) = await list_groups(client, run_id)
    done, pending = summary.trajectories
    assert done.state == pb.TRAJECTORY_STATE_FINISHED
    assert done.end_reason == STOP
    assert pending.state == pb.TRAJECTORY_STATE_PENDING
    with pytest.raises(FailedPreconditionError, match="finished"):
        await lease(client, run_id, "g.1", "g.0")
    (untouched,) = await lease(client, run_id, "g.1")
    assert untouched.epoch == 1


async def test_chunks_sent_again_gaps_and_conflicts(buffer_client: BufferClient, run_id: str) -> None:
    client = buffer_client
    await client.create_groups(pb.CreateGroupsRequest(run_id=run_id, groups=[group("g")]))
    await lease(client, run_id, "g.0")
    assert await append(client, run_id, chunk("g.0", 1, 0, [1, 2, 3])) == [APPENDED]
    outcomes = await append(
        client,
        run_id,
        chunk("g.0", 1, 0, [1, 2, 3]),
        chunk("g.0", 1, 1, [2]),
        chunk("g.0", 1, 1, [9]),
        chunk("g.0", 1, 0, [1, 2, 3], version=4),
        chunk("g.0", 1, 4, [5]),
        chunk("g.0", 2, 3, [4]),
        chunk("g.1", 1, 0, [1]),
        chunk("x", 1, 0, [1]),
        chunk("g.0", 1, 2, [3, 4], STOP),
        chunk("g.0", 1, 2, [3, 4], STOP),
        chunk("g.0", 1, 0, [1, 2, 3]),
        chunk("g.0", 1, 2, [3, 4], CAP),
        chunk("g.0", 1, 4, [5]),
    )
    assert outcomes == [
        DUPLICATE, DUPLICATE, CONFLICT, CONFLICT, GAP, FENCED, FENCED, UNKNOWN,
        APPENDED, DUPLICATE, DUPLICATE, CONFLICT, CONFLICT,
    ]  # fmt: skip
    (piece,) = await read(client, run_id, "g.0")
    assert list(unpack_token_ids(piece.token_ids)) == [1, 2, 3, 4]


async def test_a_trajectory_of_128k_tokens_is_read_in_bounded_pieces(buffer_client: BufferClient, run_id: str) -> None:
    client = buffer_client
    count, step = 128 * 1024, 50_000
    tokens = [(index * 2654435761) % 2**31 for index in range(count)]
    await client.create_groups(pb.CreateGroupsRequest(run_id=run_id, groups=[group("g")]))
    await lease(client, run_id, "g.0")
    for offset in range(0, count, step):
        part = tokens[offset : offset + step]
        end = STOP if offset + step >= count else 0
        assert await append(client, run_id, chunk("g.0", 1, offset, part, end, version=offset)) == [APPENDED]
    pieces = await read(client, run_id, "g.1", "g.0")
    assert [piece.trajectory_id for piece in pieces[:2]] == ["g.1", "g.0"]
    assert pieces[0].last
    assert [list(unpack_token_ids(piece.prompt_token_ids)) for piece in pieces[1:]] == [
        [7, 8, 9],
        *([[]] * (len(pieces) - 2)),
    ]
    assert [piece.last for piece in pieces[1:]] == [*([False] * (len(pieces) - 2)), True]
    assert [token for piece in pieces for token in unpack_token_ids(piece.token_ids)] == tokens
    assert max(piece.ByteSize() for piece in pieces) < 1 << 20
    versions = [span.policy_version for piece in pieces for span in piece.versions for _ in range(span.tokens)]
    assert versions == [index // step * step for index in range(count)]


async def test_groups_are_created_once_and_listed_in_order(buffer_client: BufferClient, run_id: str) -> None:
    client = buffer_client
    names = [f"g{index}" for index in range(150)]
    request = pb.CreateGroupsRequest(run_id=run_id, groups=[group(name, k=8) for name in names])
    assert (await client.create_groups(request)).created == 150
    assert (await client.create_groups(request)).created == 0
    assert [item.group_id for item in await list_groups(client, run_id)] == names
    stolen = group("other")
    stolen.trajectory_ids[1] = "g7.3"
    with pytest.raises(AlreadyExistsError, match=r"g7\.3"):
        await client.create_groups(pb.CreateGroupsRequest(run_id=run_id, groups=[group("fresh"), stolen]))
    assert len(await list_groups(client, run_id)) == 150


async def test_first_verdict_stands_and_failures_have_no_reward(buffer_client: BufferClient, run_id: str) -> None:
    client = buffer_client
    await client.create_groups(pb.CreateGroupsRequest(run_id=run_id, groups=[group("g", k=3)]))
    await lease(client, run_id, "g.0", "g.1", "g.2")
    await append(
        client, run_id, *(chunk(f"g.{index}", 1, 0, [1], end) for index, end in enumerate([STOP, CAP, BUDGET]))
    )
    correct = pb.TrajectoryVerdict(trajectory_id="g.0", verdict=pb.VERDICT_CORRECT, reward=0.1)
    failed = pb.TrajectoryVerdict(trajectory_id="g.1", verdict=pb.VERDICT_FAILED)
    wrong = pb.TrajectoryVerdict(trajectory_id="g.0", verdict=pb.VERDICT_WRONG, reward=0)
    partial = pb.TrajectoryVerdict(trajectory_id="g.2", verdict=pb.VERDICT_WRONG, reward=0)

    with pytest.raises(FailedPreconditionError, match=r"'g.2' is not finished"):
        await client.record_verdicts(pb.RecordVerdictsRequest(run_id=run_id, verdicts=[correct, partial]))
    first = await client.record_verdicts(pb.RecordVerdictsRequest(run_id=run_id, verdicts=[correct, failed]))
    again = await client.record_verdicts(pb.RecordVerdictsRequest(run_id=run_id, verdicts=[wrong, failed]))
    assert (first.recorded, again.recorded) == (2, 0)
    (summary,) = await list_groups(client, run_id)
    one, two, three = summary.trajectories
    assert (one.verdict, one.reward) == (pb.VERDICT_CORRECT, 0.1)
    assert (two.verdict, two.HasField("reward")) == (pb.VERDICT_FAILED, False)
    assert (three.verdict, three.state) == (pb.VERDICT_UNSPECIFIED, pb.TRAJECTORY_STATE_PARTIAL)


async def test_commit_is_one_change_and_happens_once(buffer_client: BufferClient, run_id: str) -> None:
    client = buffer_client
    await client.create_groups(pb.CreateGroupsRequest(run_id=run_id, groups=[group("a"), group("b"), group("c")]))
    await lease(client, run_id, "a.0")
    await append(client, run_id, chunk("a.0", 1, 0, [1, 2], STOP))
    commit = pb.CommitIterationRequest(
        run_id=run_id,
        iteration=1,
        policy_version=4,
        consumed_group_ids=["a", "b"],
        prompt_increments=[pb.PromptStatistics(prompt_id="prompt-a", trajectories=2, correct=1)],
        coordinator_state=b"\x00state",
    )
    bad = pb.CommitIterationRequest()
    bad.CopyFrom(commit)
    bad.consumed_group_ids.append("missing")
    with pytest.raises(FailedPreconditionError, match="'missing' does not exist"):
        await client.commit_iteration(bad)
    assert len(await list_groups(client, run_id)) == 3
    assert not (await client.list_prompt_statistics(pb.ListPromptStatisticsRequest(run_id=run_id))).prompts

    done = await client.commit_iteration(commit)
    assert not done.duplicate
    assert (done.run.iteration, done.run.policy_version, done.run.coordinator_state) == (1, 4, b"\x00state")
    assert [item.group_id for item in await list_groups(client, run_id)] == ["c"]
    with pytest.raises(NotFoundError, match=r"a\.0"):
        await read(client, run_id, "a.0")

    again = await client.commit_iteration(commit)
    assert again.duplicate
    assert again.run == done.run
    (statistics,) = (await client.list_prompt_statistics(pb.ListPromptStatisticsRequest(run_id=run_id))).prompts
    assert (statistics.prompt_id, statistics.trajectories, statistics.correct) == ("prompt-a", 2, 1)

    commit.policy_version = 5
    with pytest.raises(AbortedError, match="other contents"):
        await client.commit_iteration(commit)
    commit.iteration = 3
    with pytest.raises(FailedPreconditionError, match="the next is 2"):
        await client.commit_iteration(commit)
    commit.iteration = 2
    with pytest.raises(FailedPreconditionError, match="'a' was consumed"):
        await client.commit_iteration(commit)
    late = await client.create_groups(pb.CreateGroupsRequest(run_id=run_id, groups=[group("a")]))
    assert late.created == 0


async def test_statistics_add_up_and_are_paged(buffer_client: BufferClient, run_id: str) -> None:
    client = buffer_client
    names = [f"p{index:05d}" for index in range(2345)]
    for iteration in (1, 2):
        increments = [pb.PromptStatistics(prompt_id=name, trajectories=4, correct=iteration) for name in names]
        await client.commit_iteration(
            pb.CommitIterationRequest(run_id=run_id, iteration=iteration, prompt_increments=increments)
        )
    token, listed = "", []
    while True:
        page = await client.list_prompt_statistics(pb.ListPromptStatisticsRequest(run_id=run_id, page_token=token))
        listed += [(item.prompt_id, item.trajectories, item.correct) for item in page.prompts]
        token = page.next_page_token
        if not token:
            break
    assert listed == [(name, 8, 3) for name in names]


async def test_runs_are_apart(buffer_client: BufferClient, run_id: str) -> None:
    other = f"{run_id}-other"
    await buffer_client.create_run(pb.CreateRunRequest(run_id=other, config_digest="d"))
    await buffer_client.create_groups(pb.CreateGroupsRequest(run_id=run_id, groups=[group("g")]))
    assert await list_groups(buffer_client, other) == []
    with pytest.raises(NotFoundError):
        await lease(buffer_client, other, "g.0")


async def test_wrong_requests_name_their_fields(buffer_client: BufferClient, run_id: str) -> None:
    client = buffer_client

    async def violations(*chunks: pb.Chunk) -> list[str]:
        with pytest.raises(InvalidArgumentError) as caught:
            await append(client, run_id, *chunks)
        return [violation.field for violation in caught.value.violations]

    good = chunk("t", 1, 0, [1, 2])
    short, misspanned, nan, empty, epochless, nameless, endless = (pb.Chunk() for _ in range(7))
    for item in (short, misspanned, nan, empty, epochless, nameless, endless):
        item.CopyFrom(good)
    short.logprobs = short.logprobs[:4]
    misspanned.versions[0].tokens = 1
    nan.logprobs = pack_logprobs([float("nan"), -1])
    empty.CopyFrom(chunk("t", 1, 0, []))
    epochless.epoch = 0
    nameless.trajectory_id = ""
    endless.end_reason = 77
    assert await violations(good, short) == ["chunks[1].logprobs"]
    assert await violations(misspanned) == ["chunks[0].versions"]
    assert await violations(good, nan) == ["chunks[1].logprobs"]
    assert await violations(empty) == ["chunks[0]"]
    assert await violations(epochless, nameless) == ["chunks[0].epoch", "chunks[1].trajectory_id"]
    assert await violations(endless) == ["chunks[0].end_reason"]
    assert await violations() == ["chunks"]

    with pytest.raises(InvalidArgumentError, match="run_id: must not be empty"):
        await client.get_run(pb.GetRunRequest())
    with pytest.raises(InvalidArgumentError, match="braces"):
        await client.get_run(pb.GetRunRequest(run_id="a{b}"))
    with pytest.raises(InvalidArgumentError, match="there twice"):
        await lease(client, run_id, "t", "t")
    with pytest.raises(InvalidArgumentError, match=r"groups\[0\]\.trajectory_ids"):
        await client.create_groups(
            pb.CreateGroupsRequest(run_id=run_id, groups=[group("empty", k=0), group("full", k=1)])
        )
    rewarded = pb.TrajectoryVerdict(trajectory_id="t", verdict=pb.VERDICT_FAILED, reward=0)
    with pytest.raises(InvalidArgumentError, match="a failed verdict has no reward"):
        await client.record_verdicts(pb.RecordVerdictsRequest(run_id=run_id, verdicts=[rewarded]))
    with pytest.raises(InvalidArgumentError, match="iteration: must be 1 or more"):
        await client.commit_iteration(pb.CommitIterationRequest(run_id=run_id))
