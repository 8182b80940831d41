"""OpenRLHF's remote reward model (`--reward.remote_url URL`).

    POST {"query": [...], "prompts": [...], "labels": [...]} -> {"rewards": [...], "scores": [...], "extra_logs": {...}}

A query is a prompt and its response as one text with special tokens, a label is the ground truth (`--data.label_key`).
How it is judged stands in the URL: ?verifier=math&answer_marker=%23%23%23%23&end=%3C%7Cim_end%7C%3E. OpenRLHF makes
tensors of the rewards, so that none can be null: when a response cannot be judged, the call fails with 503, which
OpenRLHF tries four times more, or with 422 when asking again does not help.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse

from perigee.buffer.v1 import buffer_pb2
from perigee.errors import FieldViolation, InvalidArgumentError, PerigeeError
from perigee.json_codec import parse_json
from perigee.reward.adapters.ground_truth import GroundTruthOptions, make_item
from perigee.reward.scoring import ScoreClient, ScoringOptions, score_items
from perigee.reward.v1 import reward_pb2 as pb
from services.kit.http import ForeignApi
from services.kit.http_errors import write_error

PATH = "/v1/compat/openrlhf"
RETRY_AFTER_S = 1
# Characters of the tokens that a tokenizer may put before the prompt.
MAX_PREFIX = 64
# OpenRLHF gives a call 180 s and then makes it again.
OPTIONS = ScoringOptions(call_timeout_s=150.0, unavailable_s=10.0)


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


@dataclass(frozen=True)
class Answer:
    """An HTTP answer."""

    status: int
    body: dict[str, Any]


def read_request(body: object, options: GroundTruthOptions, ends: Sequence[str] = ()) -> pb.ScoreRequest:
    """The items of a call, named "0", "1", ... in its order. Empty lists are a call without items.

    `ends` are taken off the ends of responses: the tokens that end a turn.

    Raises InvalidArgumentError with a violation per wrong field.
    """
    if not isinstance(body, Mapping):
        raise InvalidArgumentError.of("body", "must be a JSON object with query, prompts and labels")
    queries, prompts, labels = (body.get(name) for name in ("query", "prompts", "labels"))
    lists = {"query": queries, "prompts": prompts, "labels": labels}
    violations = [
        FieldViolation(name, "must be a list") for name, found in lists.items() if not isinstance(found, list)
    ]
    if violations:
        raise InvalidArgumentError(f"{violations[0].field}: {violations[0].description}", violations=violations)
    assert isinstance(queries, list)
    assert isinstance(prompts, list)
    assert isinstance(labels, list)
    if not len(queries) == len(prompts) == len(labels):
        raise InvalidArgumentError.of(
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
        raise InvalidArgumentError(f"{violations[0].field}: {violations[0].description}", violations=violations)
    return request


def split_response(query: object, prompt: object, ends: Sequence[str]) -> str:
    """What follows the prompt in a query, without the tokens that end it.

    Raises InvalidArgumentError when the query does not hold the prompt.
    """
    if not isinstance(query, str) or not isinstance(prompt, str):
        raise InvalidArgumentError.of("query", "query and prompt must be strings")
    place = query.find(prompt)
    if not 0 <= place <= MAX_PREFIX:
        raise InvalidArgumentError.of("query", "does not begin with its prompt")
    response = query[place + len(prompt) :].rstrip()
    while end := next((end for end in ends if end and response.endswith(end)), ""):
        response = response.removesuffix(end).rstrip()
    return response


def build_answer(request: pb.ScoreRequest, outcomes: Sequence[pb.ScoreResponse]) -> Answer:
    """200 with a reward per item, in order; 503 or 422 when one could not be judged: nobody makes a number of that."""
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


def openrlhf_api(scores: ScoreClient) -> ForeignApi:
    """The endpoint over a client of the reward service."""
    router = APIRouter()

    @router.post(
        PATH,
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
        outcomes = [outcome async for outcome in score_items(scores, call.items, OPTIONS)]
        answer = build_answer(call, outcomes)
        headers = {"Retry-After": str(RETRY_AFTER_S)} if answer.status == 503 else None
        return JSONResponse(answer.body, answer.status, headers)

    return ForeignApi(router, write_openrlhf_error)


def write_openrlhf_error(error: PerigeeError) -> tuple[int, Any]:
    """One sentence with the error's status."""
    status, _ = write_error(error)
    return status, {"error": error.message}
