"""Interceptor that every gRPC call passes: access, limits on calls and on bytes at once, metrics, log, errors as
statuses.

A request is received by the handler, not before it: a call that is refused costs no more than its headers.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
from google.protobuf.message import DecodeError
from prometheus_client import Histogram

from perigee.errors import (
    STATUS_DETAILS_KEY,
    InternalError,
    InvalidArgumentError,
    PerigeeError,
    ResourceExhaustedError,
    to_status,
)
from services.kit.access import REQUEST_ID_HEADER, Access, Call, Usage
from services.kit.telemetry import get_logger
from services.kit.tracing import carry_request

log = get_logger(__name__)

# Orchestrators probe health without a token.
OPEN_PREFIX = "/grpc.health.v1.Health/"
_GZIP_MAGIC = b"\x1f\x8b"  # begins no message: wire type 7 does not exist
_UNCOMPRESSED_BYTES = 4 << 20
_LARGE_BYTES = 1 << 20

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]
    Handler = grpc.RpcMethodHandler[Any, Any]
    CallMetadata = Mapping[str, str | bytes]


def as_perigee_error(error: Exception, call: str) -> PerigeeError:
    """Returns the error that the caller gets: what is no PerigeeError is a fault of the service, and is logged."""
    if isinstance(error, PerigeeError):
        return error
    log.error("call failed", method=call, exc_info=error)
    return InternalError(f"{type(error).__name__}: {error}")


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every handler: a PerigeeError becomes its status with details, anything else INTERNAL with a log entry."""

    def __init__(self, access: Access, limit: int, seconds: Histogram) -> None:
        self._access = access
        self._limit = limit
        self._seconds = seconds
        self._calls = 0

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Returns the handler, wrapped unless it is a health probe."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method.startswith(OPEN_PREFIX):
            return handler
        metadata = dict(handler_call_details.invocation_metadata or ())
        if handler.unary_unary:
            return grpc.stream_unary_rpc_method_handler(
                self._wrap_unary(method, handler.unary_unary, metadata),  # type: ignore[arg-type]
                request_deserializer=_read_request(handler.request_deserializer),
                response_serializer=handler.response_serializer,
            )
        # Only reflection takes a stream of requests.
        behaviour = handler.unary_stream or handler.stream_stream
        return grpc.stream_stream_rpc_method_handler(
            self._wrap_stream(method, behaviour, metadata, handler.stream_stream is not None),  # type: ignore[arg-type]
            request_deserializer=_read_request(handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )

    def _wrap_unary(
        self, method: str, behaviour: Callable[[Any, Context], Awaitable[Any]], metadata: CallMetadata
    ) -> Callable[[AsyncIterator[_Received], Context], Awaitable[Any]]:
        """Returns the handler of a unary method with access, limits, metrics, log and statuses."""

        async def call(requests: AsyncIterator[_Received], context: Context) -> Any:
            async with self._serving(method, metadata, context) as usage, self._receive(requests, usage) as request:
                return await behaviour(request, context)

        return call

    def _wrap_stream(
        self,
        method: str,
        behaviour: Callable[[Any, Context], AsyncIterator[Any]],
        metadata: CallMetadata,
        takes_stream: bool,
    ) -> Callable[[AsyncIterator[_Received], Context], AsyncIterator[Any]]:
        """Returns the handler of a streaming method with access, limits, metrics, log and statuses."""

        async def call(requests: AsyncIterator[_Received], context: Context) -> AsyncIterator[Any]:
            async with self._serving(method, metadata, context) as usage:
                if takes_stream:
                    async for response in behaviour((_require_message(each) async for each in requests), context):
                        yield response
                    return
                async with self._receive(requests, usage) as request:
                    async for response in behaviour(request, context):
                        yield response

        return call

    @asynccontextmanager
    async def _receive(self, requests: AsyncIterator[_Received], usage: Usage) -> AsyncIterator[Any]:
        """Yields the call's one request, whose bytes are held until the block ends."""
        with self._access.requests.hold() as grow:
            async with usage.receiving.enter():
                received = await anext(requests, _Received(None, 0, "it did not come"))
            grow(received.size)
            if received.size > _LARGE_BYTES:  # others are answered between the receipt and the checks
                await asyncio.sleep(0)
            yield _require_message(received)

    @asynccontextmanager
    async def _serving(self, method: str, metadata: CallMetadata, context: Context) -> AsyncIterator[Usage]:
        """Admits one call, counts it for as long as the block lasts, and ends it with the status of what it raises."""
        call = self._access.begin(method, context.peer(), metadata.get(REQUEST_ID_HEADER))
        context.set_trailing_metadata(((REQUEST_ID_HEADER, call.request_id),))
        try:
            with self._access.admit(call, metadata.get("authorization")) as usage, self._count():
                yield usage
            self._end(call, "OK")
        except asyncio.CancelledError:
            self._end(call, "CANCELLED")
            raise
        except Exception as error:
            await self._abort(call, error, context)

    @contextmanager
    def _count(self) -> Iterator[None]:
        if self._calls >= self._limit:
            raise ResourceExhaustedError(f"{self._limit} calls are in flight, the server's limit.", retry_after_s=1.0)
        self._calls += 1
        try:
            yield
        finally:
            self._calls -= 1

    async def _abort(self, call: Call, error: Exception, context: Context) -> NoReturn:
        """Ends the call with the status of an error."""
        if isinstance(error, grpc.aio.AbortError):
            raise error
        shown = as_perigee_error(error, call.method.removeprefix("/"))
        self._end(call, shown.code.name)
        details = to_status(shown).SerializeToString()
        trailing = ((STATUS_DETAILS_KEY, details), (REQUEST_ID_HEADER, call.request_id))
        await context.abort(shown.code, shown.message, trailing)

    def _end(self, call: Call, code: str) -> None:
        self._seconds.labels(call.method.rsplit("/", 1)[-1], code).observe(call.seconds)
        self._access.record(call, code)


@dataclass(frozen=True)
class _Received:
    """A request with the bytes that it took, or why it cannot be read."""

    message: Any
    size: int
    fault: str = ""


def _read_request(deserializer: Callable[[bytes], Any] | None) -> Callable[[bytes], _Received]:
    """Wraps a deserializer, whose error gRPC would answer with INTERNAL and without details."""
    assert deserializer is not None

    def read(data: bytes) -> _Received:
        try:
            message = _decompress(data) if data.startswith(_GZIP_MAGIC) else data
            return _Received(deserializer(message), len(message))
        except (DecodeError, zlib.error) as error:
            return _Received(None, 0, str(error))

    return read


def _decompress(data: bytes) -> bytes:
    """Returns what gzip has made small; raises zlib.error for what is more than 4 MiB."""
    stream = zlib.decompressobj(zlib.MAX_WBITS | 16)
    message = stream.decompress(data, _UNCOMPRESSED_BYTES)
    if not stream.eof:
        raise zlib.error(f"a compressed message may hold {_UNCOMPRESSED_BYTES} bytes: send it uncompressed")
    return message


def _require_message(received: _Received) -> Any:
    if received.fault:
        raise InvalidArgumentError.for_field("request", f"is not of the method's message: {received.fault}")
    carry_request(received.message)
    return received.message
