"""Verdicts on a run's responses, from the reward service; failures are counted and never made a number."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from perigee.buffer.v1 import buffer_pb2
from perigee.reward.client import RewardClient
from perigee.reward.scoring import RewardLostError, ScoringOptions, ScoringPipeline, Sink, scoring
from perigee.reward.v1 import reward_pb2
from services.coordinator import metrics
from services.coordinator.config import ScoringConfig
from services.coordinator.run_errors import PeerLostError
from services.kit.telemetry import get_logger

log = get_logger(__name__)

# Verdicts of one call reach the buffer this often.
REPORT_S = 0.2


@asynccontextmanager
async def score_responses(client: RewardClient, config: ScoringConfig, sink: Sink) -> AsyncIterator[ScoringPipeline]:
    """Opens a pipeline that hands outcomes to `sink`; leaving the block without an error waits for all of them.

    Raises PeerLostError, which cancels the block, when the service was out of reach for `unavailable_s`.
    """

    async def report(outcomes: list[reward_pb2.ScoreResponse]) -> None:
        await sink(outcomes)
        for outcome in outcomes:
            if outcome.verdict == buffer_pb2.VERDICT_FAILED:
                metrics.FAILURES.labels("judging").inc()
                log.warning("response was not judged", response=outcome.id, reason=outcome.reason)

    try:
        async with scoring(client, scoring_options(config), report) as pipeline:
            yield pipeline
    except RewardLostError as error:
        raise PeerLostError(error.message) from error


def scoring_options(config: ScoringConfig) -> ScoringOptions:
    """Returns the options of a run's scoring."""
    return ScoringOptions(
        batch=config.batch,
        concurrency=config.concurrency,
        attempts=config.attempts,
        # One late call must not look like an outage.
        call_timeout_s=min(config.call_timeout_s, config.unavailable_s),
        unavailable_s=config.unavailable_s,
        first_pause_s=config.retry_s,
        max_pending=config.queue,
        report_s=REPORT_S,
    )
