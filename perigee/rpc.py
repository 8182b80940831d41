"""Channels and calls: keepalive, message limits, retries, tokens, TLS, and errors as Python classes."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol, Self, TypeVar

import grpc
from google.protobuf.message import Message

from perigee.errors import from_rpc_error

# No unary message passes this size but those of services that take files; streams are cut into pieces below it.
MAX_MESSAGE_BYTES = 4 << 20
# A silent connection is probed this often; servers must allow it.
KEEPALIVE_MS = 30_000

RequestT = TypeVar("RequestT", bound=Message)
ResponseT = TypeVar("ResponseT", bound=Message)
Metadata = Sequence[tuple[str, str | bytes]]


@dataclass(frozen=True)
class ChannelOptions:
    """How to reach a service. Without `ca_file` the channel is in clear, which services allow on loopback only."""

    token: str | None = None
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    interceptors: Sequence[grpc.aio.ClientInterceptor] = field(default=())


class UnaryCall(Protocol[RequestT, ResponseT]):
    """A unary method of a generated stub."""

    def __call__(
        self, request: RequestT, /, *, timeout: float | None, metadata: Metadata | None
    ) -> grpc.aio.UnaryUnaryCall[RequestT, ResponseT]: ...


class StreamCall(Protocol[RequestT, ResponseT]):
    """A server-streaming method of a generated stub."""

    def __call__(
        self, request: RequestT, /, *, timeout: float | None, metadata: Metadata | None
    ) -> grpc.aio.UnaryStreamCall[RequestT, ResponseT]: ...


def open_channel(
    target: str,
    options: ChannelOptions,
    service_name: str,
    idempotent: Sequence[str],
    message_bytes: int = MAX_MESSAGE_BYTES,
) -> grpc.aio.Channel:
    """A channel to `target` that retries the methods in `idempotent` while the service is unavailable."""
    arguments = channel_arguments(service_name, idempotent, message_bytes)
    if options.ca_file is None:
        return grpc.aio.insecure_channel(target, options=arguments, interceptors=options.interceptors)
    credentials = grpc.ssl_channel_credentials(
        _read(options.ca_file), _read(options.key_file), _read(options.cert_file)
    )
    return grpc.aio.secure_channel(target, credentials, options=arguments, interceptors=options.interceptors)


def channel_arguments(
    service_name: str, idempotent: Sequence[str], message_bytes: int = MAX_MESSAGE_BYTES
) -> list[tuple[str, int | str]]:
    """gRPC's options of a channel by name; gRPC takes no notice of a name that it does not know."""
    return [
        ("grpc.max_send_message_length", message_bytes),
        ("grpc.max_receive_message_length", message_bytes),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 5_000),
        ("grpc.enable_retries", 1),
        ("grpc.service_config", _service_config(service_name, idempotent)),
    ]


class ServiceClient:
    """Base of the typed clients: owns a channel and turns gRPC errors into `perigee.errors` classes."""

    service_name: ClassVar[str]
    # Methods that may be sent again when the service was unavailable.
    idempotent: ClassVar[tuple[str, ...]] = ()
    message_bytes: ClassVar[int] = MAX_MESSAGE_BYTES

    def __init__(self, target: str, options: ChannelOptions) -> None:
        self.target = target
        self.channel = open_channel(target, options, self.service_name, self.idempotent, self.message_bytes)
        self._label = f"{self.service_name.split('.')[-1]} at {target}"
        self._metadata: Metadata | None = None
        if options.token:
            self._metadata = (("authorization", f"Bearer {options.token}"),)

    @classmethod
    def connect(cls, target: str, *, token: str | None = None, ca_file: str | None = None) -> Self:
        """A client of the service at `target` (host:port); nothing is sent before the first call."""
        return cls(target, ChannelOptions(token=token, ca_file=ca_file))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the channel; calls in flight are cancelled."""
        await self.channel.close()

    async def _unary(self, call: UnaryCall[RequestT, ResponseT], request: RequestT, timeout_s: float) -> ResponseT:
        try:
            return await call(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, self._label) from error

    async def _stream(
        self, call: StreamCall[RequestT, ResponseT], request: RequestT, timeout_s: float
    ) -> AsyncIterator[ResponseT]:
        stream = call(request, timeout=timeout_s, metadata=self._metadata)
        try:
            async for response in stream:
                yield response
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, self._label) from error
        finally:
            stream.cancel()


def _service_config(service_name: str, idempotent: Sequence[str]) -> str:
    retry = {
        "maxAttempts": 5,
        "initialBackoff": "0.1s",
        "maxBackoff": "2s",
        "backoffMultiplier": 2,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
    names = [{"service": service_name, "method": method} for method in idempotent]
    methods = [{"name": names, "retryPolicy": retry}] if names else []
    return json.dumps({"loadBalancingConfig": [{"round_robin": {}}], "methodConfig": methods})


def _read(path: str | None) -> bytes | None:
    return None if path is None else Path(path).read_bytes()
