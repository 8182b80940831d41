"""The body of an HTTP request: read whole, within a limit, and handed on."""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers
from starlette.types import Message, Receive

from perigee.errors import CancelledError, InvalidArgumentError


async def read_body(headers: Headers, receive: Receive, limit: int) -> bytes:
    """The whole body; raises InvalidArgumentError as soon as it is known to be above the limit."""
    length = headers.get("content-length", "")
    too_large = InvalidArgumentError.for_field("body", f"is larger than {limit} bytes, the largest that is taken")
    if length.isdigit() and int(length) > limit:
        raise too_large
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise CancelledError("The caller went away.")
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > limit:
            raise too_large
        chunks.append(chunk)
        if not message.get("more_body", False):
            return b"".join(chunks)


def is_json(content_type: str) -> bool:
    """Whether the header names JSON or a format made of it."""
    media_type = content_type.partition(";")[0].strip().lower()
    return media_type == "application/json" or (media_type.startswith("application/") and media_type.endswith("+json"))


def replay(body: bytes) -> Receive:
    """Gives a handler the body, and then waits for ever: whoever read it watches for the disconnect."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if not messages:
            await asyncio.Event().wait()
        return messages.pop()

    return receive
