"""The reward service's RPCs over HTTP, and all outcomes of a call in one object."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import aclosing
from typing import Any, Protocol

from fastapi import APIRouter, Request, Response

from perigee.errors import DeadlineExceededError, InternalError
from perigee.json_codec import dump_json, parse_json, read_message, write_message
from perigee.reward.v1 import reward_pb2 as pb
from services.kit.http import ForeignApi, HttpRoute, call_context
from services.kit.http_errors import write_error

COLLECTED_PATH = "/v1/score/collected"

ROUTES = (
    HttpRoute("POST", "/v1/score", "Score", pb.ScoreRequest, pb.ScoreResponse, streaming=True),
    HttpRoute("GET", "/v1/verifiers", "ListVerifiers", pb.ListVerifiersRequest, pb.ListVerifiersResponse),
)


class ScoreServicer(Protocol):
    """What of the servicer is called in its own process."""

    def Score(self, request: pb.ScoreRequest, context: Any, /) -> AsyncGenerator[pb.ScoreResponse, None]: ...


class ServicerScores:
    """The service's own servicer, for callers in its process that ask as a client does."""

    def __init__(self, servicer: ScoreServicer) -> None:
        self._servicer = servicer

    async def score(self, request: pb.ScoreRequest, *, timeout_s: float) -> AsyncIterator[pb.ScoreResponse]:
        """Outcomes as they are known. Raises DeadlineExceededError after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s), aclosing(self._servicer.Score(request, None)) as outcomes:
                async for outcome in outcomes:
                    yield outcome
        except TimeoutError as error:
            raise DeadlineExceededError(f"the items were not scored within {timeout_s:g} s") from error


def collect(request: pb.ScoreRequest, outcomes: Iterable[pb.ScoreResponse]) -> list[pb.ScoreResponse]:
    """The outcomes in the order of the request's items. Raises InternalError when one is missing."""
    by_id = {outcome.id: outcome for outcome in outcomes}
    if missing := [item.id for item in request.items if item.id not in by_id]:
        raise InternalError(f"{len(missing)} items have no outcome, {missing[0]} for one")
    return [by_id[item.id] for item in request.items]


def collecting_api(servicer: ScoreServicer) -> ForeignApi:
    """POST /v1/score/collected: the body of /v1/score, answered by {"outcomes": [...]} in the order of its items."""
    router = APIRouter()
    items = {"$ref": "#/components/schemas/ScoreRequest"}
    outcomes = {"type": "array", "items": {"$ref": "#/components/schemas/ScoreResponse"}}
    answer = {"type": "object", "properties": {"outcomes": outcomes}, "required": ["outcomes"]}

    @router.post(
        COLLECTED_PATH,
        summary="Scores a batch; all outcomes come in one object, in the order of the items.",
        response_class=Response,
        responses={200: {"content": {"application/json": {"schema": answer}}}},
        openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": items}}}},
    )
    async def score_collected(http_request: Request) -> Response:
        request = read_message(pb.ScoreRequest, parse_json(await http_request.body()))
        async with aclosing(servicer.Score(request, call_context(http_request))) as scored:
            found = collect(request, [outcome async for outcome in scored])
        body = dump_json({"outcomes": [write_message(outcome) for outcome in found]})
        return Response(body, media_type="application/json")

    return ForeignApi(router, write_error)
