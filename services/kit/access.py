"""Who may call a service, and how much: tokens and their audiences, quotas, and the log of calls.

One `Access` serves gRPC and HTTP, so that a caller has one quota for both.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import get_args

from pydantic import SecretStr

from perigee.config import Model, read_yaml, validate
from perigee.errors import (
    DeadlineExceededError,
    InvalidArgumentError,
    PermissionDeniedError,
    ResourceExhaustedError,
    UnauthenticatedError,
)
from perigee.reload import Reloaded, read_tokens
from services.kit.config import Audience, CallerConfig, QuotaConfig, ServerConfig, ServiceConfig
from services.kit.telemetry import get_logger

log = get_logger(__name__)

REQUEST_ID_HEADER = "x-request-id"
EVERYTHING = frozenset(get_args(Audience))
# Holders of the stack's own token, and anyone where there are no tokens.
STACK, ANYONE = "stack", "anyone"
_REQUEST_ID_LENGTH = 128
_NO_QUOTA = QuotaConfig()
_RETRY_AFTER_S = 1.0
_RECEIVED_AT_ONCE = 8
_MESSAGE_S = 60.0


@dataclass(frozen=True)
class Caller:
    """Holder of a valid token."""

    name: str
    audiences: frozenset[str]
    quota: QuotaConfig


@dataclass
class Call:
    """What the log says of a call; `caller` is empty until the token is known."""

    method: str
    peer: str
    request_id: str
    caller: str = ""
    begun_at: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """Seconds since it began."""
        return time.perf_counter() - self.begun_at


class Receptions:
    """Requests of one caller that are being received, so many at once; those that take long give way to others."""

    def __init__(self, gives_way_s: float = 10.0) -> None:
        self._gives_way_s = gives_way_s
        self._places = asyncio.Semaphore(_RECEIVED_AT_ONCE)
        self._waiting = 0
        self._under_way: dict[asyncio.Timeout, float] = {}

    @asynccontextmanager
    async def enter(self) -> AsyncIterator[None]:
        """Waits for a place and has it for the block.

        Raises DeadlineExceededError after a minute, ResourceExhaustedError when it gives way.
        """
        await self._wait()
        begun = asyncio.get_running_loop().time()
        timeout = asyncio.timeout_at(begun + (self._gives_way_s if self._waiting else _MESSAGE_S))
        self._under_way[timeout] = begun
        try:
            async with timeout:
                yield
        except TimeoutError as error:
            if asyncio.get_running_loop().time() >= begun + _MESSAGE_S:
                raise DeadlineExceededError(f"The request did not arrive within {_MESSAGE_S:g} s.") from error
            message = f"The request did not arrive within {self._gives_way_s:g} s, and others of its caller waited."
            raise ResourceExhaustedError(message, retry_after_s=_RETRY_AFTER_S) from error
        finally:
            del self._under_way[timeout]
            self._places.release()

    async def _wait(self) -> None:
        """Waits for a place; where there is none, one more of the requests under way gets less time."""
        self._waiting += 1
        try:
            if self._places.locked():
                for timeout, begun in self._under_way.items():
                    until = begun + self._gives_way_s
                    if not timeout.expired() and (timeout.when() or 0.0) > until:
                        timeout.reschedule(until)
                        break
            await self._places.acquire()
        finally:
            self._waiting -= 1


class Usage:
    """Calls of one caller in flight, and those of the last second; `receiving` bounds the requests that it sends."""

    def __init__(self) -> None:
        self.receiving = Receptions()
        self._in_flight = 0
        # When the calls begun so far would all have begun, had they come at the quota's rate.
        self._paid_until = 0.0

    @contextmanager
    def enter(self, caller: Caller) -> Iterator[None]:
        """Counts one call; raises ResourceExhaustedError, with when to try again, above the caller's quota."""
        quota = caller.quota
        if quota.max_in_flight is not None and self._in_flight >= quota.max_in_flight:
            message = f"{caller.name} has {self._in_flight} calls in flight, its quota."
            raise ResourceExhaustedError(message, retry_after_s=_RETRY_AFTER_S)
        if quota.per_second is not None:
            self._pay(caller.name, quota.per_second)
        self._in_flight += 1
        try:
            yield
        finally:
            self._in_flight -= 1

    def _pay(self, name: str, per_second: float) -> None:
        """Pays for one call; a second's worth, or one call where that is less, may come at once."""
        now, interval = time.monotonic(), 1 / per_second
        paid_until = max(now, self._paid_until) + interval
        if (early_s := paid_until - now - max(1.0, interval)) > 0:
            message = f"{name} calls more often than {per_second:g} times a second, its quota."
            raise ResourceExhaustedError(message, retry_after_s=early_s)
        self._paid_until = paid_until


class HeldBytes:
    """Bytes of all requests that are being served, or wait to be."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0

    @contextmanager
    def hold(self) -> Iterator[Callable[[int], None]]:
        """Yields a function that adds bytes to those of one request, which ends with the block.

        It raises ResourceExhaustedError where all requests together would have more than the limit.
        """
        own = 0

        def grow(size: int) -> None:
            nonlocal own
            if self._held + size > self._limit:
                message = f"The requests in flight have {self._held} bytes, and the server's limit is {self._limit}."
                raise ResourceExhaustedError(message, retry_after_s=_RETRY_AFTER_S)
            self._held += size
            own += size

        try:
            yield grow
        finally:
            self._held -= own


class Access:
    """Tokens, quotas and log of a service; `requests` bounds the memory that requests take."""

    def __init__(self, config: ServiceConfig) -> None:
        server = config.server
        self.needs_token = server.has_tokens
        self.requests = HeldBytes(server.max_request_bytes_in_flight)
        self._service = config.section
        self._audience = config.audience
        self._audit = server.audit
        self._callers = Reloaded((server.token_file, server.callers_file), lambda: read_callers(server))
        self._usage: defaultdict[str, Usage] = defaultdict(Usage)

    def begin(self, method: str, peer: str, request_id: str | bytes | None) -> Call:
        """Returns the record of a call; it keeps the caller's `x-request-id`, else it gets one."""
        given = request_id if isinstance(request_id, str) and request_id else uuid.uuid4().hex
        return Call(method, peer, given[:_REQUEST_ID_LENGTH])

    @contextmanager
    def admit(self, call: Call, header: str | bytes | None, audience: Audience | None = None) -> Iterator[Usage]:
        """Admits a call with this authorization header for as long as the block lasts.

        `audience` stands for the service's own where it is given. Raises UnauthenticatedError, PermissionDeniedError
        for another audience, and ResourceExhaustedError.
        """
        caller = self.identify(header)
        call.caller = caller.name
        audience = audience or self._audience
        if audience not in caller.audiences:
            granted = " and ".join(sorted(caller.audiences))
            message = f"The token of {caller.name} is for {granted}; {self._service} asks for one for {audience}."
            raise PermissionDeniedError(message)
        usage = self._usage[caller.name]
        with usage.enter(caller):
            yield usage

    def identify(self, header: str | bytes | None) -> Caller:
        """Returns who holds the header's token; raises UnauthenticatedError."""
        if not self.needs_token:
            return Caller(ANYONE, EVERYTHING, _NO_QUOTA)
        scheme, _, token = header.partition(" ") if isinstance(header, str) else ("", "", "")
        caller = self._callers.value.get(_digest(token)) if scheme.lower() == "bearer" else None
        if caller is None:
            raise UnauthenticatedError("The call carries no valid bearer token: set PERIGEE_TOKEN to one.")
        return caller

    def record(self, call: Call, code: str) -> None:
        """Logs the end of a call, where the configuration asks for it."""
        if self._audit == "all" or (self._audit == "callers" and call.caller not in (STACK, ANYONE)):
            log.info(
                "call",
                caller=call.caller or None,
                method=call.method,
                code=code,
                seconds=round(call.seconds, 6),
                request_id=call.request_id,
                peer=call.peer,
            )


class _CallersFile(Model):
    callers: dict[str, CallerConfig]


def read_callers(server: ServerConfig) -> Mapping[bytes, Caller]:
    """Returns the callers by their tokens' digests, which are looked up in a time that says nothing of the tokens.

    Raises InvalidArgumentError naming the file and the field, or the callers that have the same token.
    """
    tokens = [server.token.get_secret_value()] if server.token else []
    tokens += read_tokens(server.token_file) if server.token_file else []
    found = {_digest(token): Caller(STACK, EVERYTHING, _NO_QUOTA) for token in tokens}
    configs = dict(server.callers)
    if server.callers_file is not None:
        configs |= validate(_CallersFile, {"callers": read_yaml(server.callers_file)}, server.callers_file, "").callers
    for name, config in configs.items():
        caller = Caller(name, frozenset(config.audiences), config.quota or server.quota)
        for token in config.tokens:
            if (other := found.setdefault(_secret_digest(token), caller)).name != name:
                raise InvalidArgumentError.for_field("callers", f"{name} and {other.name} have the same token")
    return found


def _secret_digest(token: SecretStr) -> bytes:
    return _digest(token.get_secret_value())


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
