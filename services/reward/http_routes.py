"""The service's methods over HTTP: which path calls which, and all outcomes of a call in one object."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any, NamedTuple, Protocol

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from google.protobuf.message import Message

from perigee.errors import DeadlineExceededError, InternalError
from perigee.reward.v1 import reward_pb2 as pb

COLLECTED_PATH = "/v1/score/collected"


class Route(NamedTuple):
    """A path and the method of perigee.reward.v1.RewardService behind it."""

    method: str
    path: str
    rpc: str
    request: type[Message]
    response: type[Message]
    streaming: bool
    """Whether the method answers with a stream: a line of JSON per message, as it comes."""


ROUTES = (
    Route("POST", "/v1/score", "Score", pb.ScoreRequest, pb.ScoreResponse, True),
    Route("GET", "/v1/verifiers", "ListVerifiers", pb.ListVerifiersRequest, pb.ListVerifiersResponse, False),
)


class ScoreServicer(Protocol):
    """What of the servicer is called in its own process."""

    def Score(self, request: pb.ScoreRequest, context: Any, /) -> AsyncIterator[pb.ScoreResponse]: ...


class ServicerScores:
    """The service's own servicer, for callers in its process that ask as a client does."""

    def __init__(self, servicer: ScoreServicer) -> None:
        self._servicer = servicer

    async def score(self, request: pb.ScoreRequest, *, timeout_s: float) -> AsyncIterator[pb.ScoreResponse]:
        """Outcomes as they are known. Raises DeadlineExceededError after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                async for response in self._servicer.Score(request, None):
                    yield response
        except TimeoutError as error:
            raise DeadlineExceededError(f"the items were not scored within {timeout_s:g} s") from error


def collect(request: pb.ScoreRequest, outcomes: Iterable[pb.ScoreResponse]) -> list[pb.ScoreResponse]:
    """The outcomes in the order of the request's items. Raises InternalError when one is missing."""
    by_id = {outcome.id: outcome for outcome in outcomes}
    if missing := [item.id for item in request.items if item.id not in by_id]:
        raise InternalError(f"{len(missing)} items have no outcome, {missing[0]} for one")
    return [by_id[item.id] for item in request.items]


def make_collecting_router(
    servicer: ScoreServicer,
    read_message: Callable[[type[Message], Any], Message],
    write_message: Callable[[Message], Any],
) -> APIRouter:
    """POST /v1/score/collected: the body of /v1/score, answered by {"outcomes": [...]} in the order of its items.

    `read_message` and `write_message` are the gateway's codec; errors are the gateway's to write.
    """
    router = APIRouter()

    @router.post(COLLECTED_PATH, summary="Scores a batch; all outcomes come in one object, in the order of the items.")
    async def score_collected(body: Request) -> JSONResponse:
        request = read_message(pb.ScoreRequest, await body.json())
        assert isinstance(request, pb.ScoreRequest)
        outcomes = [outcome async for outcome in servicer.Score(request, None)]
        return JSONResponse({"outcomes": [write_message(outcome) for outcome in collect(request, outcomes)]})

    return router
