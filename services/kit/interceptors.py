"""Interceptor that every gRPC call passes: token, limit on calls at once, metrics, errors as statuses."""

from __future__ import annotations

import hmac
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import DecodeError
from prometheus_client import Histogram

from perigee.errors import (
    STATUS_DETAILS_KEY,
    InternalError,
    InvalidArgumentError,
    PerigeeError,
    ResourceExhaustedError,
    UnauthenticatedError,
    UnimplementedError,
    to_status,
)
from services.kit.telemetry import get_logger

log = get_logger(__name__)

# Orchestrators probe health without a token.
OPEN_PREFIX = "/grpc.health.v1.Health/"

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]
    Handler = grpc.RpcMethodHandler[Any, Any]


def check_token(token: str | None, header: str | bytes | None) -> None:
    """Raises UnauthenticatedError unless the authorization header carries the service's token, where it has one."""
    if token is None:
        return
    if not isinstance(header, str) or not hmac.compare_digest(header.encode(), f"Bearer {token}".encode()):
        raise UnauthenticatedError("The call carries no valid bearer token: set PERIGEE_TOKEN to the service's.")


def as_perigee_error(error: Exception, call: str) -> PerigeeError:
    """Returns the error that the caller gets: what is no PerigeeError is a fault of the service, and is logged."""
    if isinstance(error, PerigeeError):
        return error
    if isinstance(error, NotImplementedError):
        # Generated servicers raise it for methods that the service does not define.
        return UnimplementedError(f"The service does not offer {call}.")
    log.error("call failed", method=call, exc_info=error)
    return InternalError(f"{type(error).__name__}: {error}")


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every handler: a PerigeeError becomes its status with details, anything else INTERNAL with a log entry."""

    def __init__(self, token: str | None, limit: int, seconds: Histogram) -> None:
        self._token = token
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
        header = metadata.get("authorization")
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(
                self._wrap_unary(method, handler.unary_unary, header),  # type: ignore[arg-type]
                request_deserializer=_read_request(handler.request_deserializer),
                response_serializer=handler.response_serializer,
            )
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(
                self._wrap_stream(method, handler.unary_stream, header),  # type: ignore[arg-type]
                request_deserializer=_read_request(handler.request_deserializer),
                response_serializer=handler.response_serializer,
            )
        # Only reflection takes a stream of requests; it has no domain errors to translate.
        try:
            check_token(self._token, header)
        except UnauthenticatedError as error:
            return _refuse_stream(error.message)
        return handler

    def _wrap_unary(
        self, method: str, behaviour: Callable[[Any, Context], Awaitable[Any]], header: str | bytes | None
    ) -> Callable[[Any, Context], Awaitable[Any]]:
        """Returns the handler of a unary method with token, limit, metrics and statuses."""

        async def call(request: Any, context: Context) -> Any:
            async with self._serving(method, header, context):
                return await behaviour(_require_message(request), context)

        return call

    def _wrap_stream(
        self, method: str, behaviour: Callable[[Any, Context], AsyncIterator[Any]], header: str | bytes | None
    ) -> Callable[[Any, Context], AsyncIterator[Any]]:
        """Returns the handler of a streaming method with token, limit, metrics and statuses."""

        async def call(request: Any, context: Context) -> AsyncIterator[Any]:
            async with self._serving(method, header, context):
                async for response in behaviour(_require_message(request), context):
                    yield response

        return call

    @asynccontextmanager
    async def _serving(self, method: str, header: str | bytes | None, context: Context) -> AsyncIterator[None]:
        """Admits one call, counts it for as long as the block lasts, and ends it with the status of what it raises."""
        start = time.perf_counter()
        try:
            check_token(self._token, header)
            if self._calls >= self._limit:
                message = f"{self._limit} calls are in flight, the server's limit."
                raise ResourceExhaustedError(message, retry_after_s=1.0)
            self._calls += 1
            try:
                yield
            finally:
                self._calls -= 1
            self._observe(method, "OK", start)
        except Exception as error:
            await self._abort(method, error, context, start)

    async def _abort(self, method: str, error: Exception, context: Context, start: float) -> None:
        """Ends the call with the status of an error."""
        if isinstance(error, grpc.aio.AbortError):
            raise error
        shown = as_perigee_error(error, method.removeprefix("/"))
        self._observe(method, shown.code.name, start)
        details = to_status(shown).SerializeToString()
        await context.abort(shown.code, shown.message, ((STATUS_DETAILS_KEY, details),))

    def _observe(self, method: str, code: str, start: float) -> None:
        self._seconds.labels(method.rsplit("/", 1)[-1], code).observe(time.perf_counter() - start)


@dataclass(frozen=True)
class _Unreadable:
    """Placeholder of a request that is not of the method's message."""

    reason: str


def _read_request(deserializer: Callable[[bytes], Any] | None) -> Callable[[bytes], Any]:
    """Wraps a deserializer, whose error gRPC would answer with INTERNAL and without details."""
    assert deserializer is not None

    def read(data: bytes) -> Any:
        try:
            return deserializer(data)
        except DecodeError as error:
            return _Unreadable(str(error))

    return read


def _require_message(request: Any) -> Any:
    if isinstance(request, _Unreadable):
        raise InvalidArgumentError.for_field("request", f"is not of the method's message: {request.reason}")
    return request


def _refuse_stream(message: str) -> Handler:
    """Returns a handler that refuses the call."""

    async def refuse(_requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, message)
        yield

    return grpc.stream_stream_rpc_method_handler(refuse)
