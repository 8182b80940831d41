"""perigee.reward.v1.RewardService over a Scorer."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from perigee.buffer.v1 import buffer_pb2
from perigee.reward.v1 import reward_pb2 as pb
from perigee.reward.v1.reward_pb2_grpc import RewardServiceServicer
from services.reward.config import RewardConfig
from services.reward.requests import read_items
from services.reward.scorer import Scored, Scorer
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

    def __init__(self, scorer: Scorer, config: RewardConfig) -> None:
        self._scorer = scorer
        self._config = config

    async def Score(self, request: pb.ScoreRequest, context: Any) -> AsyncGenerator[pb.ScoreResponse, None]:
        items = read_items(request, self._scorer.verifiers, self._config)
        async with aclosing(self._scorer.score(items)) as outcomes:
            async for scored in outcomes:
                yield build_response(scored)

    async def ListVerifiers(self, request: pb.ListVerifiersRequest, context: Any) -> pb.ListVerifiersResponse:
        verifiers = [
            pb.Verifier(name=verifier.name, version=verifier.version, unavailable=verifier.unavailable)
            for verifier in self._scorer.verifiers.values()
        ]
        return pb.ListVerifiersResponse(verifiers=verifiers)


def build_response(scored: Scored) -> pb.ScoreResponse:
    """Returns the message of one outcome; without a reward when it is FAILED."""
    outcome = scored.outcome
    parts = [
        pb.PartScore(name=name, verdict=VERDICTS[part.verdict], reward=part.reward, reason=part.reason)
        for name, part in outcome.parts.items()
    ]
    return pb.ScoreResponse(
        id=scored.item_id,
        verdict=VERDICTS[outcome.verdict],
        reward=outcome.reward,
        extracted_answer=outcome.extracted,
        reason=outcome.reason,
        verifier=scored.verifier.name,
        latency_ms=scored.seconds * 1000,
        retryable=outcome.retryable,
        verifier_version=scored.verifier.version,
        parts=parts,
        retry_after_ms=None if outcome.retry_after_s is None else round(outcome.retry_after_s * 1000),
    )
