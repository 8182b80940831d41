"""Prefixes that a worker on the real engine keeps over evaluations and commits, with a real buffer."""

from __future__ import annotations

import itertools
import time

import pytest
import pytest_asyncio
from prometheus_client import REGISTRY

from perigee.buffer.client import BufferClient
from perigee.buffer.packing import pack_token_ids, unpack_logprobs, unpack_token_ids
from perigee.buffer.v1 import buffer_pb2
from perigee.rollout.client import RolloutClient
from perigee.rollout.v1 import rollout_pb2 as pb
from tests.fixtures.rollout import (
    CHARACTERS,
    NewTrajectories,
    Pusher,
    extend_request,
    make_policy,
    policy_logprobs,
    policy_tensors,
)

POLICIES = [make_policy(seed) for seed in (13, 14)]
# Logprobs of the engine against an fp32 forward pass of transformers on the same tokens.
TOLERANCE = 1e-3
TEMPERATURE = 1.0
PROMPT = [2 + (5 * i * i) % len(CHARACTERS) for i in range(100)]
_runs = itertools.count()


@pytest_asyncio.fixture(loop_scope="session")
async def trajectories(
    rollout_address: str, pusher: Pusher, buffer_client: BufferClient, rollout_client: RolloutClient
) -> NewTrajectories:
    """Trajectories of a run of its own, whose weights the worker holds: policy 0 as version 0."""
    run_id = f"prefixes-{next(_runs)}"
    assert await pusher.push(policy_tensors(POLICIES[0]), 0, rollout_address, run_id) == ""
    return NewTrajectories(buffer_client, rollout_client, run_id)


async def evaluate(client: RolloutClient, prompt: list[int]) -> tuple[list[int], list[float]]:
    """Tokens and log-probabilities of a response, as an evaluation asks for it."""
    item = pb.GenerateItem(id="e", prompt_token_ids=pack_token_ids(prompt), max_tokens=8)
    request = pb.GenerateRequest(items=[item], sampling=pb.Sampling(temperature=TEMPERATURE))
    responses = [response async for response in client.generate(request, timeout_s=60)]
    return (
        [token for response in responses for token in unpack_token_ids(response.token_ids)],
        [logprob for response in responses for logprob in unpack_logprobs(response.logprobs)],
    )


def partial_ones(ended: dict[str, pb.SegmentEnd]) -> list[str]:
    """The trajectories that have not finished; of many some have not."""
    return [name for name, end in ended.items() if end.end_reason == buffer_pb2.END_REASON_BUDGET]


async def test_a_prefix_stays_cached_over_an_evaluation_and_a_push_of_the_same_weights(
    trajectories: NewTrajectories, rollout_address: str, pusher: Pusher
) -> None:
    first, _ = await trajectories.extend(await trajectories.create([PROMPT], k=12), token_budget=20)
    await evaluate(trajectories.rollout, PROMPT[::-1])
    assert await pusher.push(policy_tensors(POLICIES[0]), 0, rollout_address, trajectories.run_id) == ""
    again, _ = await trajectories.extend(partial_ones(first), token_budget=1)
    assert again
    # The last block of 120 tokens is not full.
    assert {end.cached_tokens for end in again.values()} == {96}
    assert {end.prefilled_tokens for end in again.values()} == {24}


async def test_prefixes_of_older_weights_are_taken_by_trajectories_alone_and_as_long_as_the_run_allows(
    trajectories: NewTrajectories, rollout_address: str, pusher: Pusher
) -> None:
    names, cached = await trajectories.create([PROMPT], k=12), []
    for version in range(3):
        weights = policy_tensors(POLICIES[version % 2])
        assert await pusher.push(weights, version, rollout_address, trajectories.run_id) == ""
        token_ids, logprobs = await evaluate(trajectories.rollout, PROMPT)
        expected = policy_logprobs(POLICIES[version % 2], PROMPT, token_ids, TEMPERATURE)
        assert logprobs == pytest.approx(expected, abs=TOLERANCE)
        ended, _ = await trajectories.extend(names, policy_version=version, token_budget=4, max_kv_staleness=1)
        names = partial_ones(ended)
        cached.append({ended[name].cached_tokens for name in names})
    # The prompt's whole blocks, where they may be of the version before; in the third version they are its own.
    assert cached[1] == {96}
    held = await trajectories.read(names[0])
    assert [(span.policy_version, span.tokens) for span in held.versions] == [(0, 4), (1, 4), (2, 4)]
    differences = [
        [abs(a - b) for a, b in zip(policy_logprobs(policy, PROMPT, held.token_ids), held.logprobs, strict=True)]
        for policy in POLICIES
    ]
    assert max(differences[0][:4] + differences[0][8:]) < TOLERANCE
    assert max(differences[1][4:8]) > 20 * TOLERANCE


async def test_the_engine_says_how_long_it_prefilled_and_decoded(trajectories: NewTrajectories) -> None:
    def counted(kind: str) -> float:
        return REGISTRY.get_sample_value("perigee_rollout_engine_seconds_total", {"kind": kind}) or 0.0

    await evaluate(trajectories.rollout, PROMPT)
    before = {kind: counted(kind) for kind in ("prefill", "decode")}
    names = await trajectories.create([PROMPT])
    request = extend_request(trajectories.run_id, await trajectories.lease(names), token_budget=8)
    begun = time.monotonic()
    responses = [response async for response in trajectories.rollout.extend_trajectories(request, timeout_s=60)]
    seconds = time.monotonic() - begun
    [*others, last] = responses
    assert not any(response.prefill_seconds or response.decode_seconds for response in others)
    # What the evaluation took is in the counters alone.
    assert counted("prefill") - before["prefill"] == pytest.approx(last.prefill_seconds)
    assert counted("decode") - before["decode"] == pytest.approx(last.decode_seconds)
    assert last.prefill_seconds > 0
    assert 0 < last.prefill_seconds + last.decode_seconds < seconds


async def test_a_seed_gives_the_same_tokens_where_the_prefill_is_split_over_steps(
    trajectories: NewTrajectories,
) -> None:
    """On a CPU vLLM takes 2,048 tokens in a step."""
    prompts = {str(n): [2 + (n * n + (n + 3) * i) % len(CHARACTERS) for i in range(90)] for n in range(30)}
    items = [
        pb.GenerateItem(id=name, prompt_token_ids=pack_token_ids(ids), max_tokens=6) for name, ids in prompts.items()
    ]
    found: list[dict[str, str]] = []
    for batches in ([items], [[item] for item in items]):
        answers: dict[str, str] = {}
        for batch in batches:
            request = pb.GenerateRequest(items=batch, sampling=pb.Sampling(temperature=1, seed=5), text_only=True)
            async for response in trajectories.rollout.generate(request, timeout_s=60):
                answers[response.id] = response.text
        found.append(answers)
    assert found[0] == found[1]
    assert len(set(found[0].values())) > len(items) // 2
