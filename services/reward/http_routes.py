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
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse

from perigee.buffer.v1 import buffer_pb2
from perigee.errors import DeadlineExceededError, FieldViolation, InternalError, InvalidArgumentError, PerigeeError
from perigee.json_codec import dump_json, parse_json, read_message, write_message
from perigee.reward.adapters.blocking import GroundTruthOptions, make_item
from perigee.reward.scoring import ScoreClient, ScoringOptions, score_items
from perigee.reward.v1 import reward_pb2 as pb
from services.kit.http import CompatRouter, HttpRoute, call_context, write_error

COLLECTED_PATH = "/v1/score/collected"
OPENRLHF_PATH = "/v1/compat/openrlhf"
RETRY_AFTER_S = 1
# Characters of the tokens that a tokenizer may put before the prompt.
MAX_PREFIX = 64
# OpenRLHF gives a call 180 s and then makes it again.
OPENRLHF_OPTIONS = ScoringOptions(call_timeout_s=150.0, unavailable_s=10.0)
TEXTS = {"type": "array", "items": {"type": "string"}}
NUMBERS = {"type": "array", "items": {"type": "number"}}
CALL_SCHEMA = {
    "type": "object",
    "properties": {"query": TEXTS, "prompts": TEXTS, "labels": {"type": "array"}},
    "required": ["query", "prompts", "labels"],
}
ANSWER_SCHEMA = {
    "type": "object",
    "properties": {
        "rewards": NUMBERS,
        "scores": NUMBERS,
        "extra_logs": {"type": "object", "additionalProperties": NUMBERS},
    },
    "required": ["rewards", "scores", "extra_logs"],
}

OPENAPI_FILE = Path(__file__).with_name("openapi.json")
ROUTES = (
    HttpRoute("POST", "/v1/score", "Score", pb.ScoreRequest, pb.ScoreResponse, streaming=True),
    HttpRoute("GET", "/v1/verifiers", "ListVerifiers", pb.ListVerifiersRequest, pb.ListVerifiersResponse),
)


class ScoreServicer(Protocol):
    """Calls of the servicer in its own process."""

    def Score(self, request: pb.ScoreRequest, context: Any, /) -> AsyncGenerator[pb.ScoreResponse, None]: ...


class ServicerClient:
    """Client of the service's own servicer, for callers in its process that ask as a client does."""

    def __init__(self, servicer: ScoreServicer) -> None:
        self._servicer = servicer

    async def score(self, request: pb.ScoreRequest, *, timeout_s: float) -> AsyncIterator[pb.ScoreResponse]:
        """Yields outcomes as they are known. Raises DeadlineExceededError after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s), aclosing(self._servicer.Score(request, None)) as outcomes:
                async for outcome in outcomes:
                    yield outcome
        except TimeoutError as error:
            raise DeadlineExceededError(f"the items were not scored within {timeout_s:g} s") from error


def collect(request: pb.ScoreRequest, outcomes: Iterable[pb.ScoreResponse]) -> list[pb.ScoreResponse]:
    """Returns the outcomes in the order of the request's items. Raises InternalError when one is missing."""
    by_id = {outcome.id: outcome for outcome in outcomes}
    if missing := [item.id for item in request.items if item.id not in by_id]:
        raise InternalError(f"{len(missing)} items have no outcome, {missing[0]} for one")
    return [by_id[item.id] for item in request.items]


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
        async with aclosing(servicer.Score(request, call_context(http_request))) as scored:
            found = collect(request, [outcome async for outcome in scored])
        body = dump_json({"outcomes": [write_message(outcome) for outcome in found]})
        return Response(body, media_type="application/json")

    return CompatRouter(router, write_error)


@dataclass(frozen=True)
class Answer:
    """An HTTP answer."""

    status: int
    body: dict[str, Any]


def read_request(body: object, options: GroundTruthOptions, ends: Sequence[str] = ()) -> pb.ScoreRequest:
    """Returns the items of a call, named "0", "1", ... in its order. Empty lists are a call without items.

    `ends` are taken off the ends of responses: the tokens that end a turn.

    Raises InvalidArgumentError with a violation per wrong field.
    """
    if not isinstance(body, Mapping):
        raise InvalidArgumentError.for_field("body", "must be a JSON object with query, prompts and labels")
    queries, prompts, labels = (body.get(name) for name in ("query", "prompts", "labels"))
    lists = {"query": queries, "prompts": prompts, "labels": labels}
    violations = [
        FieldViolation(name, "must be a list") for name, found in lists.items() if not isinstance(found, list)
    ]
    if violations:
        raise InvalidArgumentError.for_fields(violations)
    assert isinstance(queries, list)
    assert isinstance(prompts, list)
    assert isinstance(labels, list)
    if not len(queries) == len(prompts) == len(labels):
        raise InvalidArgumentError.for_field(
            "query", f"query, prompts and labels differ in length: {len(queries)}, {len(prompts)}, {len(labels)}"
        )
    request = pb.ScoreRequest()
    for number, (query, prompt, label) in enumerate(zip(queries, prompts, labels, strict=True)):
        try:
            response = split_response(query, prompt, ends)
            request.items.append(make_item(str(number), prompt, response, label, options))
        except InvalidArgumentError as error:
            violations += [FieldViolation(f"[{number}].{v.field}", v.description) for v in error.violations]
    if violations:
        raise InvalidArgumentError.for_fields(violations)
    return request


def split_response(query: object, prompt: object, ends: Sequence[str]) -> str:
    """Returns what follows the prompt in a query, without the tokens that end it.

    Raises InvalidArgumentError when the query does not hold the prompt.
    """
    if not isinstance(query, str) or not isinstance(prompt, str):
        raise InvalidArgumentError.for_field("query", "query and prompt must be strings")
    place = query.find(prompt)
    if not 0 <= place <= MAX_PREFIX:
        raise InvalidArgumentError.for_field("query", "does not begin with its prompt")
    response = query[place + len(prompt) :].rstrip()
    while end := next((end for end in ends if end and response.endswith(end)), ""):
        response = response.removesuffix(end).rstrip()
    return response


def build_answer(request: pb.ScoreRequest, outcomes: Sequence[pb.ScoreResponse]) -> Answer:
    """Returns 200 with a reward per item, in order; 503 or 422 when one could not be judged: a failure is no number."""
    failed = [outcome for outcome in outcomes if not outcome.HasField("reward")]
    if failed:
        passing = any(outcome.retryable for outcome in failed)
        reason = f"{len(failed)} of {len(request.items)} responses could not be judged: {failed[0].reason}"
        return Answer(503 if passing else 422, {"error": reason})
    by_id = {outcome.id: outcome for outcome in outcomes}
    found = [by_id[item.id] for item in request.items]
    rewards = [outcome.reward for outcome in found]
    correct = [float(outcome.verdict == buffer_pb2.VERDICT_CORRECT) for outcome in found]
    ungradable = [float(outcome.verdict == buffer_pb2.VERDICT_UNGRADABLE) for outcome in found]
    logs = {"correct": correct, "ungradable": ungradable}
    return Answer(200, {"rewards": rewards, "scores": rewards, "extra_logs": logs})


def openrlhf_api(scores: ScoreClient) -> CompatRouter:
    """Returns the endpoint over a client of the reward service."""
    router = APIRouter()

    @router.post(
        OPENRLHF_PATH,
        summary="OpenRLHF's remote reward model.",
        response_class=Response,
        responses={200: {"content": {"application/json": {"schema": ANSWER_SCHEMA}}}},
        openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": CALL_SCHEMA}}}},
    )
    async def get_reward(
        request: Request,
        verifier: str = "math",
        answer_marker: str = "",
        end: Annotated[list[str] | None, Query()] = None,
    ) -> JSONResponse:
        body = parse_json(await request.body())
        call = read_request(body, GroundTruthOptions(verifier, answer_marker), end or ())
        outcomes = [outcome async for outcome in score_items(scores, call.items, OPENRLHF_OPTIONS)]
        answer = build_answer(call, outcomes)
        headers = {"Retry-After": str(RETRY_AFTER_S)} if answer.status == 503 else None
        return JSONResponse(answer.body, answer.status, headers)

    return CompatRouter(router, write_openrlhf_error)


def write_openrlhf_error(error: PerigeeError) -> tuple[int, Any]:
    """Returns one sentence with the error's status."""
    status, _ = write_error(error)
    return status, {"error": error.message}


def compat_routers(servicer: ScoreServicer) -> tuple[CompatRouter, ...]:
    """Returns the interfaces beside the RPCs, whose handlers call the servicer."""
    return collecting_api(servicer), openrlhf_api(ServicerClient(servicer))
