"""RPCs of a servicer as HTTP endpoints: JSON in; JSON, or a line of JSON for each message of a stream, out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal

from fastapi import Request, Response
from google.protobuf.message import Message
from starlette.routing import compile_path
from starlette.types import Receive, Scope, Send

from perigee.errors import InvalidArgumentError
from perigee.json_codec import dump_json, parse_json, read_message, write_message
from services.kit.http.middleware import NDJSON

_LARGE_BYTES = 1 << 20


@dataclass(frozen=True)
class HttpRoute:
    """RPC over HTTP; `{name}` in the path fills the request's string field of that name."""

    method: Literal["GET", "POST", "DELETE"]
    path: str
    rpc: str
    request: type[Message]
    response: type[Message]
    streaming: bool = False

    @property
    def path_fields(self) -> list[str]:
        """Names of the fields that the path fills."""
        return list(compile_path(self.path)[2])

    @property
    def takes_body(self) -> bool:
        """Whether the request comes in the body."""
        return self.method == "POST"


class CallContext:
    """Context of a call that servicers get in place of gRPC's."""

    def __init__(self, deadline: float | None) -> None:
        self._deadline = deadline

    def time_remaining(self) -> float | None:
        """Returns the seconds until the caller's deadline; None without one."""
        return None if self._deadline is None else max(0.0, self._deadline - asyncio.get_running_loop().time())


def call_context(request: Request) -> CallContext:
    """Returns the context of the call that a request is."""
    return CallContext(request.scope["deadline"])


def make_endpoint(route: HttpRoute, servicer: Any) -> Callable[[Request], Awaitable[Response]]:
    """Returns the handler of a route; it calls the servicer's method in this process."""
    method = getattr(servicer, route.rpc)

    async def call(request: Request) -> Response:
        body = await request.body()
        value = parse_json(body) if route.takes_body else {}
        if len(body) > _LARGE_BYTES:  # others are answered between the steps
            await asyncio.sleep(0)
        message = read_request(route, value, request.path_params)
        if route.streaming:
            return StreamResponse(write_lines(method(message, call_context(request))), NDJSON)
        response = await method(message, call_context(request))
        return Response(dump_json(write_message(response)), media_type="application/json")

    return call


def read_request(route: HttpRoute, value: Any, path_params: dict[str, Any]) -> Message:
    """Returns the request's message from the body's value and the path.

    Raises InvalidArgumentError with every violation.
    """
    if isinstance(value, dict):
        for name in path_params.keys() & value.keys():
            raise InvalidArgumentError.for_field(name, "is given by the path and must not be in the body")
        value = value | path_params
    return read_message(route.request, value)


async def write_lines(messages: AsyncGenerator[Message, None]) -> AsyncGenerator[bytes, None]:
    """Yields messages as lines of JSON."""
    async with aclosing(messages):
        async for message in messages:
            yield dump_json(write_message(message)) + b"\n"


class StreamResponse(Response):
    """Response that sends the parts of a stream as they come; an error before the first is the response's."""

    def __init__(
        self, parts: AsyncGenerator[bytes, None], media_type: str, headers: Mapping[str, str] | None = None
    ) -> None:
        self.status_code = 200
        self.background = None
        self.media_type = media_type
        self.init_headers(headers)
        self._parts = parts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the response; leaving it early ends the stream."""
        start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        started = False
        async with aclosing(self._parts) as parts:
            async for part in parts:
                if not started:
                    await send(start)
                    started = True
                await send({"type": "http.response.body", "body": part, "more_body": True})
                # Neither a ready part nor a send to a caller that has gone away suspends: without this, a stream of
                # such would hold the loop, and the middleware would never see the disconnect.
                await asyncio.sleep(0)
        if not started:
            await send(start)
        await send({"type": "http.response.body", "body": b""})
