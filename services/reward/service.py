"""perigee.reward.v1.RewardService over a Scorer."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from perigee.buffer.v1 import buffer_pb2
from perigee.reward.v1 import reward_pb2 as pb
from perigee.reward.v1.reward_pb2_grpc import RewardServiceServicer
from services.reward.requests import read_items
from services.reward.scoring import Scored, Scorer
from services.reward.verifiers.base import Verdict

FULL_NAME = "perigee.reward.v1.RewardService"

VERDICTS = {
    Verdict.CORRECT: buffer_pb2.VERDICT_CORRECT,
    Verdict.WRONG: buffer_pb2.VERDICT_WRONG,
    Verdict.UNGRADABLE: buffer_pb2.VERDICT_UNGRADABLE,
    Verdict.FAILED: buffer_pb2.VERDICT_FAILED,
}


class RewardService(RewardServiceServicer):
    """Translates protobuf to the scorer and back."""

    def __init__(self, scorer: Scorer, max_response_bytes: int) -> None:
        self._scorer = scorer
        self._max_response_bytes = max_response_bytes

    async def Score(self, request: pb.ScoreRequest, context: Any) -> AsyncIterator[pb.ScoreResponse]:
        items = read_items(request, self._scorer, self._max_response_bytes)
        async with aclosing(self._scorer.score(items)) as outcomes:
            async for scored in outcomes:
                yield build_response(scored)

    async def ListVerifiers(self, request: pb.ListVerifiersRequest, context: Any) -> pb.ListVerifiersResponse:
        verifiers = [pb.Verifier(name=verifier.name, version=verifier.version) for verifier in self._scorer.verifiers]
        return pb.ListVerifiersResponse(verifiers=verifiers)


def build_response(scored: Scored) -> pb.ScoreResponse:
    """The message of one outcome; without a reward when it is FAILED."""
    outcome = scored.outcome
    return pb.ScoreResponse(
        id=scored.item_id,
        verdict=VERDICTS[outcome.verdict],
        reward=outcome.reward,
        extracted_answer=outcome.extracted,
        reason=outcome.reason,
        verifier=scored.verifier,
        latency_ms=scored.latency_ms,
        retryable=outcome.retryable,
    )
