"""Channels and calls: keepalive, message limits, retries, tokens, TLS, and errors as Python classes."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, Self, TypeVar, cast

import grpc
from google.protobuf.message import Message

from perigee.errors import InvalidArgumentError, PerigeeError, UnavailableError, from_rpc_error
from perigee.reload import Reloaded, read_tokens
from perigee.tls import find_tls_fault, read_pair, read_roots

# No unary message passes this size but those of services that take files; streams are cut into pieces below it.
MAX_MESSAGE_BYTES = 4 << 20
# A silent connection is probed this often; servers must allow it.
KEEPALIVE_MS = 30_000
# Environment variables of the fields of ChannelOptions.
VARIABLES = {
    "token": "PERIGEE_TOKEN",
    "token_file": "PERIGEE_TOKEN_FILE",
    "ca_file": "PERIGEE_CA_FILE",
    "cert_file": "PERIGEE_CERT_FILE",
    "key_file": "PERIGEE_KEY_FILE",
    "server_name": "PERIGEE_SERVER_NAME",
}
# Calls in flight have so long to end on the certificates that they began with.
_OLD_CHANNEL_S = 3600.0
# What gRPC says of a connection that TLS may have ended.
_TLS_SIGNS = ("handshake", "verification", "Socket closed", "reset", "EOF", "recvmsg")

RequestT = TypeVar("RequestT", bound=Message)
ResponseT = TypeVar("ResponseT", bound=Message)
Metadata = tuple[tuple[str, str | bytes], ...]


@dataclass(frozen=True)
class ChannelOptions:
    """How to reach a service; files are read anew when they change.

    Raises InvalidArgumentError for fields that need or exclude one another.
    """

    token: str | None = None
    """Bearer token."""
    token_file: str | None = None
    """File whose first line is the bearer token."""
    ca_file: str | None = None
    """PEM roots of the service's certificate; without them the channel is in clear."""
    cert_file: str | None = None
    """PEM certificate chain to show to a service that asks for one."""
    key_file: str | None = None
    """PEM private key of `cert_file`."""
    server_name: str | None = None
    """Name in the service's certificate, where it is not that of the address."""
    interceptors: Sequence[grpc.aio.ClientInterceptor] = field(default=())

    def __post_init__(self) -> None:
        if self.token is not None and self.token_file is not None:
            raise InvalidArgumentError.for_field("token_file", "is given beside a token: leave out one of them")
        if (self.cert_file is None) != (self.key_file is None):
            raise InvalidArgumentError.for_field("cert_file, key_file", "are given together or not at all")
        if self.ca_file is None and (self.cert_file is not None or self.server_name is not None):
            given = "cert_file" if self.cert_file is not None else "server_name"
            raise InvalidArgumentError.for_field("ca_file", f"is required with {given}: the roots of the service")

    @classmethod
    def from_environment(cls, **given: str | None) -> Self:
        """Returns the options that are given; the rest is that of PERIGEE_TOKEN, PERIGEE_CA_FILE and so on.

        A token that is given, as such or as a file, leaves out that of the environment.
        """
        options = {name: os.environ.get(variable) or None for name, variable in VARIABLES.items()}
        if given.get("token") or given.get("token_file"):
            options |= {"token": None, "token_file": None}
        return cls(**options | {name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]

    @property
    def name_arguments(self) -> list[tuple[str, int | str]]:
        """gRPC's option of a channel for `server_name`."""
        return [] if self.server_name is None else [("grpc.ssl_target_name_override", self.server_name)]

    def read_metadata(self) -> tuple[tuple[str, str | bytes], ...] | None:
        """Returns what every call carries."""
        token = self.token if self.token_file is None else read_tokens(self.token_file)[0]
        return (("authorization", f"Bearer {token}"),) if token else None

    def read_credentials(self) -> grpc.ChannelCredentials:
        """Returns the TLS credentials of a channel; `ca_file` is given."""
        assert self.ca_file is not None
        key, cert = (None, None) if self.cert_file is None else read_pair(self.cert_file, self.key_file or "")
        return grpc.ssl_channel_credentials(read_roots(self.ca_file), key, cert)

    def find_fault(self, target: str) -> str | None:
        """Returns what TLS has against a connection to `target`, by a handshake; None when it has nothing."""
        return find_tls_fault(
            target.rpartition("/")[2],  # dns:///host:port
            ca_file=self.ca_file,
            cert_file=self.cert_file,
            key_file=self.key_file,
            server_name=self.server_name,
        )


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
    service_name: str = "",
    idempotent: Sequence[str] = (),
    message_bytes: int = MAX_MESSAGE_BYTES,
) -> grpc.aio.Channel:
    """A channel to `target` that retries the methods in `idempotent` while the service is unavailable."""
    arguments = channel_arguments(service_name, idempotent, message_bytes)
    if options.ca_file is None:
        return grpc.aio.insecure_channel(target, options=arguments, interceptors=options.interceptors)
    arguments += options.name_arguments
    return cast(
        grpc.aio.Channel,
        _ReloadedChannel(
            options,
            lambda credentials: grpc.aio.secure_channel(
                target, credentials, options=arguments, interceptors=options.interceptors
            ),
        ),
    )


def open_blocking_channel(target: str, options: ChannelOptions, client: type[ServiceClient]) -> grpc.Channel:
    """A channel like that of `client` for code that is not asynchronous, with the certificates as they are now."""
    arguments = channel_arguments(client.service_name, client.idempotent, client.message_bytes)
    if options.ca_file is None:
        return grpc.insecure_channel(target, options=arguments)
    return grpc.secure_channel(target, options.read_credentials(), options=[*arguments, *options.name_arguments])


def may_be_tls(error: PerigeeError) -> bool:
    """Whether TLS may be why a call failed."""
    return isinstance(error, UnavailableError) and any(sign in error.message for sign in _TLS_SIGNS)


class _ReloadedChannel:
    """Channel that is opened anew when its certificates have changed, since gRPC's read theirs once.

    Calls in flight end on the channel that they began on.
    """

    def __init__(self, options: ChannelOptions, connect: Callable[[grpc.ChannelCredentials], grpc.aio.Channel]) -> None:
        files = (options.ca_file, options.cert_file, options.key_file)
        self._files = Reloaded(files, options.read_credentials)
        self._connect = connect
        self._credentials = self._files.value
        self._channel = connect(self._credentials)
        self._ending: dict[grpc.aio.Channel, asyncio.Task[None]] = {}

    def unary_unary(self, *arguments: Any, **options: Any) -> Callable[..., Any]:
        return lambda request, **call: self._open().unary_unary(*arguments, **options)(request, **call)

    def unary_stream(self, *arguments: Any, **options: Any) -> Callable[..., Any]:
        return lambda request, **call: self._open().unary_stream(*arguments, **options)(request, **call)

    def stream_stream(self, *arguments: Any, **options: Any) -> Callable[..., Any]:
        return lambda requests, **call: self._open().stream_stream(*arguments, **options)(requests, **call)

    async def close(self, grace: float | None = None) -> None:
        """Closes this channel and those before it."""
        ending = dict(self._ending)
        await asyncio.gather(*(channel.close() for channel in (self._channel, *ending)))
        await asyncio.gather(*ending.values())

    def _open(self) -> grpc.aio.Channel:
        """Returns the channel with the certificates as they are."""
        if (credentials := self._files.value) is not self._credentials:
            old, self._credentials, self._channel = self._channel, credentials, self._connect(credentials)
            task = self._ending[old] = asyncio.create_task(old.close(_OLD_CHANNEL_S))
            task.add_done_callback(lambda _: self._ending.pop(old))
        return self._channel


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
        # Half a minute otherwise, for which a replica that moved to another address would be missed.
        ("grpc.dns_min_time_between_resolutions_ms", 5_000),
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
        self._options = options
        self._metadata = Reloaded((options.token_file,), options.read_metadata)

    @classmethod
    def connect(
        cls,
        target: str,
        *,
        token: str | None = None,
        token_file: str | None = None,
        ca_file: str | None = None,
        cert_file: str | None = None,
        key_file: str | None = None,
        server_name: str | None = None,
    ) -> Self:
        """A client of the service at `target` (host:port); nothing is sent before the first call.

        Raises InvalidArgumentError naming a file that cannot be read; ChannelOptions says what each of them is.
        """
        return cls(target, ChannelOptions(token, token_file, ca_file, cert_file, key_file, server_name))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the channel; calls in flight are cancelled."""
        await self.channel.close()

    async def _unary(self, call: UnaryCall[RequestT, ResponseT], request: RequestT, timeout_s: float) -> ResponseT:
        try:
            return await call(request, timeout=timeout_s, metadata=self._metadata.value)
        except grpc.aio.AioRpcError as error:
            raise await self._describe(error) from error

    async def _stream(
        self, call: StreamCall[RequestT, ResponseT], request: RequestT, timeout_s: float | None
    ) -> AsyncIterator[ResponseT]:
        stream = call(request, timeout=timeout_s, metadata=self._metadata.value)
        try:
            async for response in stream:
                yield response
        except grpc.aio.AioRpcError as error:
            raise await self._describe(error) from error
        finally:
            stream.cancel()

    async def _describe(self, error: grpc.aio.AioRpcError) -> PerigeeError:
        """Returns the error of a call, with the reason where TLS is what failed."""
        shown = from_rpc_error(error, self._label)
        if may_be_tls(shown) and (fault := await asyncio.to_thread(self._options.find_fault, self.target)):
            return UnavailableError(fault)
        return shown


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
