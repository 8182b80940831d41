"""The reward service over HTTP: its RPCs, all outcomes of a call in one object, and OpenRLHF's remote reward model.

OpenRLHF's (`--reward.remote_url URL`) is

    POST {"query": [...], "prompts": [...], "labels": [...]} -> {"rewards": [...], "scores": [...], "extra_logs": {...}}

A query is a prompt and its response as one text with special tokens, a label is the ground truth (`--data.label_key`).
How it is judged stands in the URL: ?verifier=math&answer_marker=%23%23%23%23&end=%3C%7Cim_end%7C%3E. OpenRLHF makes
tensors of the rewards, so that none can be null: when a response cannot be judged, the call fails with 503, which
OpenRLHF tries four times more, or with 422 when asking again does not help.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Annotated, Any, Protocol

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from perigee.buffer.v1 import buffer_pb2
from perigee.errors import DeadlineExceededError, FieldViolation, InternalError, InvalidArgumentError, PerigeeError
from perigee.json_codec import dump_json, parse_json, read_message, write_message
from perigee.reward.adapters.blocking import GroundTruthOptions, make_item
from perigee.reward.v1 import reward_pb2 as pb
from services.kit.http import CompatRouter, HttpRoute, call_context, write_error

COLLECTED_PATH = "/v1/score/collected"
OPENRLHF_PATH = "/v1/compat/openrlhf"
RETRY_AFTER_S = 1
# Characters of the tokens that a tokenizer may put before the prompt.
MAX_PREFIX = 64
# OpenRLHF gives a call 180 s and then makes it again.
OPENRLHF_TIMEOUT_S = 150.0

OPENAPI_FILE = Path(__file__).with_name("openapi.json")
ROUTES = (
    HttpRoute("POST", "/v1/score", "Score", pb.ScoreRequest, pb.ScoreResponse, streaming=True),
    HttpRoute("GET", "/v1/verifiers", "ListVerifiers", pb.ListVerifiersRequest, pb.ListVerifiersResponse),
)


class ScoreServicer(Protocol):
    """Calls of the servicer in its own process."""

    def Score(self, request: pb.ScoreRequest, context: Any, /) -> AsyncGenerator[pb.ScoreResponse, None]: ...


def collect(request: pb.ScoreRequest, outcomes: Iterable[pb.ScoreResponse]) -> list[pb.ScoreResponse]:
    """Returns the outcomes in the order of the request's items. Raises InternalError when one is missing."""
    by_id = {outcome.id: outcome for outcome in outcomes}
    if missing := [item.id for item in request.items if item.id not in by_id]:
        raise InternalError(f"{len(missing)} items have no outcome, {missing[0]} for one")
    return [by_id[item.id] for item in request.items]


async def score_all(servicer: ScoreServicer, request: pb.ScoreRequest, context: Any) -> list[pb.ScoreResponse]:
    """Returns all outcomes of a call, in the order of its items."""
    async with aclosing(servicer.Score(request, context)) as scored:
        return collect(request, [outcome async for outcome in scored])


def collecting_api(servicer: ScoreServicer) -> CompatRouter:
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
        found = await score_all(servicer, request, call_context(http_request))
        body = dump_json({"outcomes": [write_message(outcome) for outcome in found]})
        return Response(body, media_type="application/json")

    return CompatRouter(router, write_error)


class OpenRlhfCall(BaseModel):
    """Body of OpenRLHF's call: as many queries as prompts and labels."""

    query: list[str]
    prompts: list[str]
    labels: list[Any]


class OpenRlhfRewards(BaseModel):
    """Rewards in the order of the queries, once more as scores, and figures that OpenRLHF logs."""

    rewards: list[float]
    scores: list[float]
    extra_logs: dict[str, list[float]]


def read_request(call: OpenRlhfCall, options: GroundTruthOptions, ends: Sequence[str] = ()) -> pb.ScoreRequest:
    """Returns the items of a call, named "0", "1", ... in its order. Empty lists are a call without items.

    `ends` are taken off the ends of responses: the tokens that end a turn.

    Raises InvalidArgumentError with a violation per wrong field.
    """
    sizes = [len(call.query), len(call.prompts), len(call.labels)]
    if len(set(sizes)) > 1:
        raise InvalidArgumentError.for_field(
            "query", f"query, prompts and labels differ in length: {', '.join(map(str, sizes))}"
        )
    request = pb.ScoreRequest()
    violations: list[FieldViolation] = []
    for number, (query, prompt, label) in enumerate(zip(call.query, call.prompts, call.labels, strict=True)):
        try:
            response = split_response(query, prompt, ends)
            request.items.append(make_item(str(number), prompt, response, label, options))
        except InvalidArgumentError as error:
            violations += [FieldViolation(f"[{number}].{v.field}", v.description) for v in error.violations]
    if violations:
        raise InvalidArgumentError.for_fields(violations)
    return request


def split_response(query: str, prompt: str, ends: Sequence[str]) -> str:
    """Returns what follows the prompt in a query, without the tokens that end it.

    Raises InvalidArgumentError when the query does not hold the prompt.
    """
    place = query.find(prompt)
    if not 0 <= place <= MAX_PREFIX:
        raise InvalidArgumentError.for_field("query", "does not begin with its prompt")
    response = query[place + len(prompt) :].rstrip()
    while end := next((end for end in ends if end and response.endswith(end)), ""):
        response = response.removesuffix(end).rstrip()
    return response


def build_answer(outcomes: Sequence[pb.ScoreResponse]) -> JSONResponse:
    """Returns 200 with a reward per item, in order; 503 or 422 when one could not be judged: a failure is no number."""
    failed = [outcome for outcome in outcomes if not outcome.HasField("reward")]
    if failed:
        reason = f"{len(failed)} of {len(outcomes)} responses could not be judged: {failed[0].reason}"
        if any(outcome.retryable for outcome in failed):
            return JSONResponse({"error": reason}, 503, {"Retry-After": str(RETRY_AFTER_S)})
        return JSONResponse({"error": reason}, 422)
    rewards = [outcome.reward for outcome in outcomes]
    kinds = {"correct": buffer_pb2.VERDICT_CORRECT, "ungradable": buffer_pb2.VERDICT_UNGRADABLE}
    logs = {name: [float(outcome.verdict == verdict) for outcome in outcomes] for name, verdict in kinds.items()}
    return JSONResponse(OpenRlhfRewards(rewards=rewards, scores=rewards, extra_logs=logs).model_dump())


def openrlhf_api(servicer: ScoreServicer) -> CompatRouter:
    """Returns OpenRLHF's endpoint, whose calls the servicer answers."""
    router = APIRouter()

    @router.post(OPENRLHF_PATH, summary="OpenRLHF's remote reward model.", response_model=OpenRlhfRewards)
    async def get_reward(
        http_request: Request,
        call: OpenRlhfCall,
        verifier: str = "math",
        answer_marker: str = "",
        end: Annotated[list[str] | None, Query()] = None,
    ) -> JSONResponse:
        request = read_request(call, GroundTruthOptions(verifier, answer_marker), end or ())
        try:
            async with asyncio.timeout(OPENRLHF_TIMEOUT_S):
                return build_answer(await score_all(servicer, request, call_context(http_request)))
        except TimeoutError as error:
            raise DeadlineExceededError(f"the items were not scored within {OPENRLHF_TIMEOUT_S:g} s") from error

    return CompatRouter(router, write_openrlhf_error)


def write_openrlhf_error(error: PerigeeError) -> tuple[int, Any]:
    """Returns one sentence with the error's status."""
    status, _ = write_error(error)
    return status, {"error": error.message}


def compat_routers(servicer: ScoreServicer) -> tuple[CompatRouter, ...]:
    """Returns the interfaces beside the RPCs, whose handlers call the servicer."""
    return collecting_api(servicer), openrlhf_api(servicer)
