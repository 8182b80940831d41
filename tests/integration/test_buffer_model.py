"""Leases, appends and reads against a plain model of the contract, through two buffers on one Valkey server."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import pytest
import pytest_asyncio
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from perigee.buffer.client import BufferClient
from perigee.buffer.packing import pack_logprobs, pack_token_ids, unpack_logprobs, unpack_token_ids
from perigee.buffer.v1 import buffer_pb2 as pb
from perigee.errors import FailedPreconditionError
from services.buffer.config import BufferConfig, LocalServerConfig
from services.buffer.local_server import local_server
from services.buffer.service import lifespan
from services.kit.server import serving

OPEN, STOP, REPETITION, CAP, BUDGET = range(5)
FINISHED = (STOP, REPETITION, CAP)
APPENDED, DUPLICATE, FENCED, GAP, CONFLICT, UNKNOWN = range(1, 7)
Token = tuple[int, float, int]
numbers = itertools.count()


@dataclass
class ModelTrajectory:
    """A trajectory as the contract describes it: tokens with their logprob and policy version."""

    epoch: int = 0
    tokens: list[Token] = field(default_factory=list)
    end: int = OPEN

    def lease(self) -> bool:
        """False when the trajectory cannot be leased."""
        if self.end in FINISHED:
            return False
        self.epoch += 1
        self.end = OPEN
        return True

    def append(self, epoch: int, offset: int, tokens: Sequence[Token], end: int) -> int:
        """The outcome that the contract gives."""
        if epoch != self.epoch:
            return FENCED
        if offset > len(self.tokens):
            return GAP
        held = self.tokens[offset : offset + len(tokens)]
        if held != list(tokens[: len(held)]):
            return CONFLICT
        new = list(tokens[len(held) :])
        reaches_end = offset + len(tokens) >= len(self.tokens)
        if not new and (end == OPEN or (reaches_end and end == self.end)):
            return DUPLICATE
        if self.end != OPEN or not reaches_end:
            return CONFLICT
        self.tokens += new
        self.end = end
        return APPENDED


@dataclass(frozen=True)
class LeaseStep:
    """Lease a trajectory through a replica."""

    replica: int
    trajectory: int


@dataclass(frozen=True)
class AppendStep:
    """Append chunks in one call: (trajectory, epochs behind, offset from the tokens held, length, oddity, end)."""

    replica: int
    chunks: Sequence[tuple[int, int, int, int, str, int]]


@dataclass(frozen=True)
class AgainStep:
    """Send a call of before once more."""

    replica: int
    calls_ago: int


replicas = st.integers(0, 1)
chunk_steps = st.tuples(
    st.integers(0, 1),
    st.sampled_from([0, 0, 0, 0, 0, 0, 1, -1]),
    st.sampled_from([0, 0, 0, 0, -1, -2, -3, 1]),
    st.integers(0, 5),
    st.sampled_from(["", "", "", "", "", "token", "logprob", "version", "mixed"]),
    st.sampled_from([OPEN, OPEN, OPEN, OPEN, BUDGET, BUDGET, STOP, CAP]),
)
append_steps = st.builds(AppendStep, replicas, st.lists(chunk_steps, min_size=1, max_size=4))
steps = st.lists(
    st.one_of(
        st.builds(LeaseStep, replicas, st.integers(0, 1)),
        append_steps,
        append_steps,
        st.builds(AgainStep, replicas, st.integers(1, 3)),
    ),
    max_size=25,
)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def two_replicas(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Sequence[BufferClient]]:
    """Clients of two buffers that share one Valkey server."""
    async with (
        local_server(tmp_path_factory.mktemp("shared"), LocalServerConfig()) as url,
        serving(BufferConfig(redis_url=url), lifespan) as first,
        serving(BufferConfig(redis_url=url, read_piece_tokens=3), lifespan) as second,
        BufferClient.connect(first.address) as first_client,
        BufferClient.connect(second.address) as second_client,
    ):
        yield first_client, second_client


def make_tokens(offset: int, count: int, oddity: str) -> list[Token]:
    """Tokens that follow from their offset, but for one oddity in the last."""
    tokens = [(index * 7 + 1, -index / 8, index // 3) for index in range(offset, offset + count)]
    if count and oddity:
        token, logprob, version = tokens[-1]
        tokens[-1] = {
            "token": (token + 1, logprob, version),
            "logprob": (token, logprob - 1, version),
            "version": (token, logprob, version + 9),
            "mixed": (token + 1, logprob - 1, version + 9),
        }[oddity]
    return tokens


def to_chunk(trajectory_id: str, epoch: int, offset: int, tokens: Sequence[Token], end: int, joined: bool) -> pb.Chunk:
    """A chunk with one span per version (joined) or per token: both say the same."""
    versions = [version for _, _, version in tokens]
    spans = [(version, len(list(same))) for version, same in itertools.groupby(versions)]
    return pb.Chunk(
        trajectory_id=trajectory_id,
        epoch=epoch,
        offset=offset,
        token_ids=pack_token_ids(token for token, _, _ in tokens),
        logprobs=pack_logprobs(logprob for _, logprob, _ in tokens),
        versions=[
            pb.VersionSpan(policy_version=version, tokens=count)
            for version, count in (spans if joined else [(version, 1) for version in versions])
        ],
        end_reason=pb.EndReason.ValueType(end),
    )


async def read_tokens(client: BufferClient, run_id: str, trajectory_id: str) -> tuple[list[Token], int, int]:
    """The tokens, end reason and epoch that the buffer holds."""
    [stored] = [stored async for stored in client.read_trajectories(run_id, [trajectory_id], with_logprobs=True)]
    versions = [span.policy_version for span in stored.versions for _ in range(span.tokens)]
    tokens = zip(unpack_token_ids(stored.token_ids), unpack_logprobs(stored.logprobs), versions, strict=True)
    return list(tokens), stored.end_reason, stored.epoch


async def lease(client: BufferClient, run_id: str, trajectory_id: str) -> tuple[int, int] | None:
    """The epoch of the lease and the tokens held; None when the trajectory cannot be leased."""
    request = pb.LeaseTrajectoriesRequest(run_id=run_id, worker_id="w", trajectory_ids=[trajectory_id])
    try:
        (given,) = (await client.lease_trajectories(request)).leases
    except FailedPreconditionError:
        return None
    return given.epoch, given.tokens


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=steps)
async def test_buffer_does_what_the_model_does(
    two_replicas: Sequence[BufferClient], steps: Sequence[LeaseStep | AppendStep | AgainStep]
) -> None:
    run_id = f"model-{next(numbers)}"
    model = {"t0": ModelTrajectory(), "t1": ModelTrajectory()}
    await two_replicas[0].create_run(pb.CreateRunRequest(run_id=run_id, config_digest="d"))
    new = pb.NewGroup(group_id="g", prompt_id="p", prompt_token_ids=pack_token_ids([1]), trajectory_ids=list(model))
    await two_replicas[1].create_groups(pb.CreateGroupsRequest(run_id=run_id, groups=[new]))
    calls: list[list[tuple[str, int, int, list[Token], int]]] = []

    for step in (LeaseStep(0, 0), LeaseStep(1, 1), *steps):
        client = two_replicas[step.replica]
        if isinstance(step, LeaseStep):
            name = f"t{step.trajectory}"
            given_by_model = model[name].lease()
            event(f"lease given: {given_by_model}")
            expected = (model[name].epoch, len(model[name].tokens)) if given_by_model else None
            assert await lease(client, run_id, name) == expected
            continue
        if isinstance(step, AgainStep):
            call = calls[-step.calls_ago] if len(calls) >= step.calls_ago else []
        else:
            call = []
            reached = {name: len(held.tokens) for name, held in model.items()}
            for index, behind, shift, count, oddity, end in step.chunks:
                name = f"t{index}"
                offset = max(reached[name] + shift, 0)
                if count or end:
                    call.append(
                        (name, max(model[name].epoch - behind, 1), offset, make_tokens(offset, count, oddity), end)
                    )
                    reached[name] = max(reached[name], offset + count)
            calls.append(call)
        outcomes = []
        for name, epoch, offset, tokens, end in call:
            outcomes.append(model[name].append(epoch, offset, tokens, end))
            event(f"outcome {outcomes[-1]}")
        if call:
            request = pb.AppendChunksRequest(
                run_id=run_id, chunks=[to_chunk(*fields, step.replica == 0) for fields in call]
            )
            assert list((await client.append_chunks(request)).outcomes) == outcomes

    for name, held in model.items():
        for client in two_replicas:
            assert await read_tokens(client, run_id, name) == (held.tokens, held.end, held.epoch)
