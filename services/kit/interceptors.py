"""What every call passes on its way in: token check, limit on calls at once, metrics, errors as statuses."""

from __future__ import annotations

import hmac
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc
from prometheus_client import Histogram

from perigee.errors import (
    STATUS_DETAILS_KEY,
    InternalError,
    PerigeeError,
    ResourceExhaustedError,
    UnauthenticatedError,
    to_status,
)
from services.kit.telemetry import get_logger

log = get_logger(__name__)

# Orchestrators probe health without a token.
OPEN_PREFIX = "/grpc.health.v1.Health/"

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]
    Handler = grpc.RpcMethodHandler[Any, Any]


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
        authorized = self._is_authorized(metadata.get("authorization"))
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(
                self._wrap_unary(method, handler.unary_unary, authorized),  # type: ignore[arg-type]
                request_deserializer=handler.request_deserializer,
                response_serializer=handler.response_serializer,
            )
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(
                self._wrap_stream(method, handler.unary_stream, authorized),  # type: ignore[arg-type]
                request_deserializer=handler.request_deserializer,
                response_serializer=handler.response_serializer,
            )
        # Only reflection takes a stream of requests; it has no domain errors to translate.
        return handler if authorized else _refuse_stream()

    def _is_authorized(self, header: str | bytes | None) -> bool:
        if self._token is None:
            return True
        return isinstance(header, str) and hmac.compare_digest(header.encode(), f"Bearer {self._token}".encode())

    def _wrap_unary(
        self, method: str, behaviour: Callable[[Any, Context], Awaitable[Any]], authorized: bool
    ) -> Callable[[Any, Context], Awaitable[Any]]:
        async def call(request: Any, context: Context) -> Any:
            start = time.perf_counter()
            try:
                self._enter(authorized)
                try:
                    response = await behaviour(request, context)
                finally:
                    self._calls -= 1
                self._observe(method, "OK", start)
                return response
            except Exception as error:
                await self._abort(method, error, context, start)

        return call

    def _wrap_stream(
        self, method: str, behaviour: Callable[[Any, Context], AsyncIterator[Any]], authorized: bool
    ) -> Callable[[Any, Context], AsyncIterator[Any]]:
        async def call(request: Any, context: Context) -> AsyncIterator[Any]:
            start = time.perf_counter()
            try:
                self._enter(authorized)
                try:
                    async for response in behaviour(request, context):
                        yield response
                finally:
                    self._calls -= 1
                self._observe(method, "OK", start)
            except Exception as error:
                await self._abort(method, error, context, start)

        return call

    def _enter(self, authorized: bool) -> None:
        if not authorized:
            raise UnauthenticatedError("The call carries no valid bearer token: set PERIGEE_TOKEN to the service's.")
        if self._calls >= self._limit:
            raise ResourceExhaustedError(f"{self._limit} calls are in flight, the server's limit.", retry_after_s=1.0)
        self._calls += 1

    async def _abort(self, method: str, error: Exception, context: Context, start: float) -> None:
        if isinstance(error, grpc.aio.AbortError):
            raise error
        if not isinstance(error, PerigeeError):
            log.error("call failed", method=method, exc_info=error)
            error = InternalError(f"{type(error).__name__}: {error}")
        self._observe(method, error.code.name, start)
        details = to_status(error).SerializeToString()
        await context.abort(error.code, error.message, ((STATUS_DETAILS_KEY, details),))

    def _observe(self, method: str, code: str, start: float) -> None:
        self._seconds.labels(method.rsplit("/", 1)[-1], code).observe(time.perf_counter() - start)


def _refuse_stream() -> Handler:
    async def refuse(_requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "The call carries no valid bearer token.")
        yield

    return grpc.stream_stream_rpc_method_handler(refuse)
