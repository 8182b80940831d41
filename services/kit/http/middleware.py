"""Middleware that every HTTP request passes: access, limits, deadline, disconnect, metrics, log, error responses."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from prometheus_client import Histogram
from starlette.datastructures import Headers
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from perigee.errors import (
    CancelledError,
    DeadlineExceededError,
    InvalidArgumentError,
    NotFoundError,
    PerigeeError,
    ResourceExhaustedError,
    UnavailableError,
)
from services.kit.access import REQUEST_ID_HEADER, Access
from services.kit.config import Audience
from services.kit.http.errors import MethodNotAllowedError, WriteError, dump_error, error_headers, write_error
from services.kit.interceptors import as_perigee_error
from services.kit.telemetry import get_logger
from services.kit.tracing import describe, http_span, mark_failed

log = get_logger(__name__)

TIMEOUT_HEADER = "x-timeout-seconds"
KEY_HEADERS = ("x-api-key", "x-access-token", "e2b-traffic-access-token")
NDJSON, EVENTS = "application/x-ndjson", "text/event-stream"
# A stream's last part, an error, by the stream's type.
_LAST_PARTS = {NDJSON: b"%s\n", EVENTS: b"data: %s\n\n"}
_LONGEST_TIMEOUT_S = 86_400.0
_BODY_S = 60.0
RETRY_AFTER_S = 1.0


class Calls:
    """Counter of requests in flight; `ended` is done when those still there must end. Belongs to the running loop."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._count = 0
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @contextmanager
    def enter(self) -> Iterator[None]:
        """Counts one request.

        Raises ResourceExhaustedError when there are too many, UnavailableError while the service stops.
        """
        if self._draining:
            raise UnavailableError("The service is stopping.", retry_after_s=RETRY_AFTER_S)
        if self._count >= self._limit:
            raise ResourceExhaustedError(
                f"{self._limit} requests are in flight, the server's limit.", retry_after_s=RETRY_AFTER_S
            )
        self._count += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._count -= 1
            if self._count == 0:
                self._idle.set()

    async def drain(self, seconds: float) -> None:
        """Refuses new requests, and returns when the last has ended, by itself or after `seconds`."""
        self._draining = True
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            if not self.ended.done():
                self.ended.set_result(None)
            await self._idle.wait()


@dataclass(frozen=True)
class CallMiddleware:
    """ASGI middleware that reads the body whole and runs the handler in a task of its own.

    It cancels that task when the caller goes away, when the deadline passes, and when the service has drained long
    enough. `open_paths` are served without a token and past every limit; `rpc_paths` ask for a token that is for the
    service, the others for one that is for `audience`; `write_errors` has the paths whose errors have the form of
    another tool, `raw_paths` those whose bodies need not be JSON.
    """

    app: ASGIApp
    calls: Calls
    access: Access
    audience: Audience | None
    rpc_paths: Collection[str]
    max_body_bytes: int
    timeout_s: float | None
    seconds: Histogram
    open_paths: Collection[str]
    write_errors: Mapping[str, WriteError]
    raw_paths: Collection[str]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route, allowed = _find_route(scope)
        if route is not None and route.path in self.open_paths:
            await self.app(scope, receive, send)
            return
        label = f"{scope['method']} {route.path}" if route else "unmatched"
        headers = Headers(scope=scope)
        peer = ":".join(str(part) for part in scope["client"] or ())
        call = self.access.begin(label, peer, headers.get(REQUEST_ID_HEADER))
        reply = Reply(send, call.request_id)
        code = "CANCELLED"
        with http_span(label, headers) as span:
            try:
                audience = None if route is not None and route.path in self.rpc_paths else self.audience
                with self.access.admit(call, read_token(headers), audience):
                    await self._serve(route, allowed, scope, receive, reply)
                code = "OK"
            except Exception as error:
                shown = as_perigee_error(error, label)
                code = shown.code.name
                mark_failed(span, shown.message)
                write = self.write_errors.get(route.path, write_error) if route else write_error
                await reply.fail(shown, write)
            finally:
                describe(span, code=code)
                self.seconds.labels(label, code).observe(call.seconds)
                self.access.record(call, code)

    async def _serve(
        self, route: Route | None, allowed: set[str], scope: Scope, receive: Receive, reply: Reply
    ) -> None:
        """Checks the request, reads its body and runs the handler."""
        headers = Headers(scope=scope)
        if route is None and allowed:
            raise MethodNotAllowedError(f"{scope['path']} takes {', '.join(sorted(allowed))}.", allowed)
        if route is None:
            raise NotFoundError(f"{scope['method']} {scope['path']} is no route of this service; see /openapi.json.")
        deadline = read_deadline(headers, self.timeout_s)
        with self.calls.enter(), self.access.requests.hold() as grow:
            raw = route.path in self.raw_paths
            body = await self._read_body(headers, receive, deadline, raw, grow)
            scope["deadline"] = deadline
            handler = self.app(scope, replay(body), reply.send)
            late = "The call did not finish before its deadline."
            await self._supervise(_run(handler), deadline, late, _until_disconnect(receive, reply))

    async def _read_body(
        self, headers: Headers, receive: Receive, deadline: float | None, raw: bool, grow: Callable[[int], None]
    ) -> bytes:
        """Returns the body; raises PerigeeError when it is late, too large or no JSON."""
        arrival = asyncio.get_running_loop().time() + _BODY_S
        late = "The body did not arrive in time."
        reading = read_body(headers, receive, self.max_body_bytes, grow)
        body = await self._supervise(reading, arrival if deadline is None else min(arrival, deadline), late)
        if body and not raw and not is_json(headers.get("content-type", "")):
            # Web pages may send other types to any address without being asked for permission first.
            raise InvalidArgumentError.for_field("body", "must be sent with the header Content-Type: application/json")
        return body

    async def _supervise(
        self,
        call: Coroutine[Any, Any, bytes],
        deadline: float | None,
        late: str,
        until: Coroutine[Any, Any, None] | None = None,
    ) -> bytes:
        """Returns the call's result, unless `until` returns, the deadline passes or the service must stop before."""
        task = asyncio.create_task(call)
        watch = asyncio.create_task(until) if until is not None else None
        ends: set[asyncio.Future[Any]] = {self.calls.ended} if watch is None else {self.calls.ended, watch}
        left = None if deadline is None else max(0.0, deadline - asyncio.get_running_loop().time())
        try:
            await asyncio.wait({task, *ends}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if task.cancelled():
                raise RuntimeError("the handler was cancelled from inside")
            if task.done():
                return task.result()
            if watch is not None and watch.done():
                raise CancelledError("The caller went away.")
            if self.calls.ended.done():
                raise UnavailableError("The service is stopping.", retry_after_s=RETRY_AFTER_S)
            raise DeadlineExceededError(late)
        finally:
            await _cancel(task)
            if watch is not None:
                await _cancel(watch)


class Reply:
    """Response on its way: what has been sent of it."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._request_id = (REQUEST_ID_HEADER.encode(), request_id.encode("latin-1"))
        self._started = False
        self._last_part: bytes | None = None
        self.complete = False

    async def send(self, message: Message) -> None:
        """Forwards what the handler sends."""
        if message["type"] == "http.response.start":
            self._started = True
            content_type = Headers(raw=message["headers"]).get("content-type", "")
            self._last_part = _LAST_PARTS.get(content_type.partition(";")[0])
            message = {**message, "headers": [*message["headers"], self._request_id]}
        await self._send(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self.complete = True

    async def fail(self, error: PerigeeError, write: WriteError) -> None:
        """Sends an error: as the response, as the last part of a stream; raises it where neither can be."""
        if self.complete:
            return
        if self._started and self._last_part is None:
            raise error
        status, content = write(error)
        body = dump_error(content)
        if self._last_part is not None:
            await self._send({"type": "http.response.body", "body": self._last_part % body})
            return
        headers = {"content-type": "application/json", "content-length": str(len(body)), **error_headers(error)}
        raw = [*((name.encode(), value.encode()) for name, value in headers.items()), self._request_id]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})
        await self._send({"type": "http.response.body", "body": body})


def read_token(headers: Headers) -> str | None:
    """Returns the authorization header; without a bearer token, the key in one of the headers of other tools."""
    authorization = headers.get("authorization")
    if authorization is not None and authorization.lower().startswith("bearer "):
        return authorization
    return next((f"Bearer {headers[name]}" for name in KEY_HEADERS if name in headers), authorization)


def read_deadline(headers: Headers, timeout_s: float | None) -> float | None:
    """Returns the caller's deadline in the loop's time, that of `timeout_s` when the caller brings none.

    Raises InvalidArgumentError for what is no time.
    """
    text = headers.get(TIMEOUT_HEADER)
    if text is None:
        return None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= _LONGEST_TIMEOUT_S:
        raise InvalidArgumentError.for_field(
            "X-Timeout-Seconds", f"must be a number of seconds, above 0 and at most {_LONGEST_TIMEOUT_S:.0f}"
        )
    return asyncio.get_running_loop().time() + seconds


def _find_route(scope: Scope) -> tuple[Route | None, set[str]]:
    """Returns the route of a request, or the methods that its path takes instead."""
    allowed: set[str] = set()
    for route in scope["app"].routes:
        match, _ = route.matches(scope)
        if match is Match.FULL:
            return route, allowed
        if match is Match.PARTIAL:
            allowed |= route.methods
    return None, allowed


async def _run(handler: Any) -> bytes:
    await handler
    return b""


async def _until_disconnect(receive: Receive, reply: Reply) -> None:
    """Returns when the caller closes the connection before the response is complete."""
    while (await receive())["type"] != "http.disconnect":
        pass
    if reply.complete:
        # The end of a response looks like a disconnect; the handler is about to return.
        await asyncio.Event().wait()


async def _cancel(task: asyncio.Task[Any]) -> None:
    """Cancels a task, waits for its end, and logs an error that it ends with."""
    if task.done():
        return
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("call failed while it was cancelled", exc_info=error)


async def read_body(headers: Headers, receive: Receive, limit: int, grow: Callable[[int], None]) -> bytes:
    """Returns the whole body, whose parts are counted by `grow`.

    Raises InvalidArgumentError as soon as it is known to be above the limit, and what `grow` raises.
    """
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
        grow(len(chunk))
        chunks.append(chunk)
        if not message.get("more_body", False):
            return b"".join(chunks)


def is_json(content_type: str) -> bool:
    """Returns whether the header names JSON or a format made of it."""
    media_type = content_type.partition(";")[0].strip().lower()
    return media_type == "application/json" or (media_type.startswith("application/") and media_type.endswith("+json"))


def replay(body: bytes) -> Receive:
    """Returns a `receive` that gives a handler the body and then blocks: the middleware watches for the disconnect."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if not messages:
            await asyncio.Event().wait()
        return messages.pop()

    return receive
