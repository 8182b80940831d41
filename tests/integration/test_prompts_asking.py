"""Samples from a scripted worker and verdicts from a scripted service: what fails in passing, and what stays."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import grpc
import pytest

from perigee.buffer.v1 import buffer_pb2
from perigee.cli.prompts.sampling import EncodedPrompt, ModelStage, SampledModel, read_policy_version, sample
from perigee.curation.findings import Finding, SampleCounts
from perigee.errors import FailedPreconditionError, UnavailableError
from perigee.image_sources import ImageStore
from perigee.reward.client import RewardClient
from perigee.reward.items import PromptLine
from perigee.reward.v1.reward_pb2_grpc import add_RewardServiceServicer_to_server
from perigee.rollout.client import RolloutClient
from perigee.rollout.v1 import rollout_pb2 as pb
from perigee.rollout.v1.rollout_pb2_grpc import RolloutServiceServicer, add_RolloutServiceServicer_to_server
from services.kit.chat import PromptEncoder
from tests.fixtures.coordinator_fakes import FakeReward, fake_server
from tests.fixtures.reward import math_item


@dataclass
class FakeSampler(RolloutServiceServicer):
    """Answers the number of the sample; dies under way as often as it is told."""

    deaths: int = 0
    # Answers that it gives before it dies.
    last_words: int = 2
    # Answers, by their number, of which no message holds the text.
    too_long: frozenset[str] = frozenset()
    version: int = 5
    status: int = pb.WORKER_STATUS_READY
    asked: list[list[str]] = field(default_factory=list)

    async def GetState(self, request: pb.GetStateRequest, context: Any) -> pb.GetStateResponse:
        status = pb.WorkerStatus.ValueType(self.status)
        return pb.GetStateResponse(status=status, policy_version=self.version, max_model_len=64)

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        if request.policy_version != self.version:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"holds policy version {self.version}")
        self.asked.append([item.id for item in request.items])
        for number, item in enumerate(request.items):
            if self.deaths and number == self.last_words:
                self.deaths -= 1
                await context.abort(grpc.StatusCode.UNAVAILABLE, "the engine died")
            answer = item.id.rpartition("/")[2]
            response = pb.GenerateResponse(id=item.id, end_reason=buffer_pb2.END_REASON_STOP)
            if answer in self.too_long:
                response.left_out_bytes = 4 << 20
            else:
                response.text = "#" + answer
            yield response


SAMPLES = 4


def prompts(count: int) -> list[EncodedPrompt]:
    """Prompts whose right answer is 1."""
    return [EncodedPrompt(PromptLine(f"q{i}", "d", 0.0, math_item("", "1", "")), [1, 2]) for i in range(count)]


async def ask_all(
    workers: Sequence[FakeSampler], reward: FakeReward, asked: Sequence[EncodedPrompt], **changes: Any
) -> dict[str, SampleCounts]:
    stage = ModelStage("s", SAMPLES, 8, lambda name, counts: Finding(name))
    options = {"policy_version": 5, "temperature": 1.0, "seed": 0, "unavailable_s": 5.0, "context_tokens": 64} | changes
    found: dict[str, SampleCounts] = {}
    async with AsyncExitStack() as stack:
        clients = []
        for worker in workers:
            address = await stack.enter_async_context(fake_server(add_RolloutServiceServicer_to_server, worker))
            clients.append(await stack.enter_async_context(RolloutClient.connect(address)))
        address = await stack.enter_async_context(fake_server(add_RewardServiceServicer_to_server, reward))
        client = await stack.enter_async_context(RewardClient.connect(address))
        model = SampledModel(clients, client, cast(PromptEncoder, None), images=ImageStore(Path("unused")), **options)
        async for counts in sample(stage, model, asked):
            assert not found.keys() & counts.keys()
            found |= counts
    return found


async def test_every_prompt_is_asked_about_and_workers_share_the_work() -> None:
    workers = [FakeSampler(), FakeSampler()]
    found = await ask_all(workers, FakeReward(), prompts(70))
    assert found == {f"q{i}": SampleCounts(correct=1, wrong=3) for i in range(70)}
    # 64 sequences a call: 16 prompts.
    assert [len(worker.asked) for worker in workers] == [3, 2]


async def test_an_engine_that_dies_is_asked_only_for_what_is_missing() -> None:
    worker = FakeSampler(deaths=2)
    found = await ask_all([worker], FakeReward(), prompts(2))
    assert found == {name: SampleCounts(correct=1, wrong=3) for name in ("q0", "q1")}
    assert [len(asked) for asked in worker.asked] == [8, 6, 4]


async def test_what_is_never_judged_is_counted_as_failed() -> None:
    reward = FakeReward(broken={"s/q0/1", "s/q0/3"}, failing={"s/q1/1": 1})
    found = await ask_all([FakeSampler()], reward, prompts(2))
    assert found == {"q0": SampleCounts(wrong=2, failed=2), "q1": SampleCounts(correct=1, wrong=3)}


async def test_an_answer_whose_text_no_message_holds_is_counted_as_failed() -> None:
    found = await ask_all([FakeSampler(too_long=frozenset({"1", "2"}))], FakeReward(), prompts(1))
    assert found == {"q0": SampleCounts(wrong=2, failed=2)}


async def test_a_worker_with_other_weights_ends_it() -> None:
    with pytest.raises(FailedPreconditionError, match="holds policy version 5"):
        await ask_all([FakeSampler()], FakeReward(), prompts(1), policy_version=4)


async def test_a_worker_that_stays_away_ends_it() -> None:
    worker = FakeSampler(deaths=10_000, last_words=0)
    with pytest.raises(UnavailableError, match="the engine died"):
        await ask_all([worker], FakeReward(), prompts(1), unavailable_s=0.3)
    assert len(worker.asked) > 1


async def test_workers_must_hold_one_version() -> None:
    async with AsyncExitStack() as stack:

        async def serve(worker: FakeSampler) -> RolloutClient:
            address = await stack.enter_async_context(fake_server(add_RolloutServiceServicer_to_server, worker))
            return await stack.enter_async_context(RolloutClient.connect(address))

        one, other = await serve(FakeSampler()), await serve(FakeSampler(version=6))
        empty = await serve(FakeSampler(status=pb.WORKER_STATUS_EMPTY))
        assert await read_policy_version([one, one]) == (5, 64)
        with pytest.raises(FailedPreconditionError, match=r"different policy versions: \[5, 6\]"):
            await read_policy_version([one, other])
        with pytest.raises(FailedPreconditionError, match="is empty and answers nothing: --push"):
            await read_policy_version([one, empty])
