"""The HTTP side of the service: which path calls which method, and how streams of outcomes become JSON."""

from __future__ import annotations

import json
from collections.abc import AsyncIterable, AsyncIterator, Iterable
from typing import Any, NamedTuple

from google.protobuf import json_format
from google.protobuf.message import Message

from perigee.errors import InternalError
from perigee.reward.v1 import reward_pb2 as pb

NDJSON = "application/x-ndjson"


class Route(NamedTuple):
    """A path and the method of perigee.reward.v1.RewardService behind it."""

    method: str
    path: str
    rpc: str
    request: type[Message]
    response: type[Message]
    streaming: bool
    """Whether the method answers with a stream: newline-delimited JSON, or one collected object."""


ROUTES = (
    Route("POST", "/v1/score", "Score", pb.ScoreRequest, pb.ScoreResponse, True),
    Route("GET", "/v1/verifiers", "ListVerifiers", pb.ListVerifiersRequest, pb.ListVerifiersResponse, False),
)


def wants_ndjson(accept: str) -> bool:
    """Whether an Accept header asks for outcomes as they come; otherwise they are collected into one object."""
    return any(part.partition(";")[0].strip() == NDJSON for part in accept.split(","))


def to_json(message: Message) -> dict[str, Any]:
    """The message as JSON values under the contract's names; what is unset and optional is left out."""
    values: dict[str, Any] = json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return values


async def ndjson_lines(outcomes: AsyncIterable[pb.ScoreResponse]) -> AsyncIterator[bytes]:
    """A line per outcome, as it comes."""
    async for outcome in outcomes:
        yield json.dumps(to_json(outcome), ensure_ascii=False).encode() + b"\n"


def collect(request: pb.ScoreRequest, outcomes: Iterable[pb.ScoreResponse]) -> dict[str, Any]:
    """All outcomes in one object, in the order of the request's items.

    Raises InternalError when one is missing.
    """
    by_id = {outcome.id: outcome for outcome in outcomes}
    if missing := [item.id for item in request.items if item.id not in by_id]:
        raise InternalError(f"{len(missing)} items have no outcome, {missing[0]} for one")
    return {"outcomes": [to_json(by_id[item.id]) for item in request.items]}
