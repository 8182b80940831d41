"""Runs the Lua scripts on Redis: one script is one atomic change, and may be waited for until it is on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from redis import exceptions
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from perigee.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    UnavailableError,
)
from services.buffer.keys import run_key
from services.buffer.metrics import DURABILITY_SECONDS
from services.kit.telemetry import get_logger

log = get_logger(__name__)

RETRY_AFTER_S = 1.0
OLDEST_REDIS = (7, 0)


@dataclass(frozen=True)
class Script:
    """A Lua script and the digest that Redis knows it by."""

    name: str
    source: str
    sha1: str


def load_script(name: str) -> Script:
    """Reads `lua/<name>.lua`."""
    source = (Path(__file__).parent / "lua" / f"{name}.lua").read_text(encoding="utf-8")
    return Script(name, source, hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest())


def open_redis(url: str, *, connections: int, timeout_s: float) -> Redis:
    """A client of the server at `url`; nothing is sent before the first command, and lost connections are reopened.

    Raises InvalidArgumentError when `url` is not one.
    """
    try:
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=connections,
            timeout=timeout_s,
            socket_timeout=timeout_s,
            socket_connect_timeout=min(timeout_s, 5.0),
            # A pooled connection may have died with a server that is back: one more try finds out.
            retry=Retry(NoBackoff(), 1),
        )
    except ValueError as error:
        raise InvalidArgumentError.of("redis_url", f"{error}; use redis://host:port or unix:///path") from error
    return Redis.from_pool(pool)


class ScriptRunner:
    """Runs scripts on one Redis.

    With `waits`, a durable call is answered when the server has synced it to its append-only file (WAITAOF); servers
    older than Redis 7.2 have no such command, and keep what their own fsync policy keeps.
    """

    def __init__(self, redis: Redis, *, waits: bool, durability_timeout_s: float) -> None:
        self.redis = redis
        self._durability_timeout_s = durability_timeout_s
        self._waits = waits
        self._has_waitaof: bool | None = None

    async def check(self) -> None:
        """Learns what the server can do.

        Raises FailedPreconditionError for a server that is too old or keeps nothing on disk, UnavailableError when it
        cannot be reached.
        """
        with translating_errors():
            server = await self.redis.info("server")
            persistence = await self.redis.info("persistence")
            commands = await cast(Any, self.redis).execute_command("COMMAND", "INFO", "WAITAOF")
        version = tuple(int(part) for part in str(server["redis_version"]).split(".")[:2])
        if version < OLDEST_REDIS:
            raise FailedPreconditionError(f"redis_url: Redis 7.0 or later is needed, the server is {version}")
        if self._waits and not int(persistence.get("aof_enabled", 0)):
            raise FailedPreconditionError(
                "redis_url: the server keeps no append-only file, so its crash would lose the run: "
                "set `appendonly yes` there, or `durability: none` here"
            )
        self._has_waitaof = any(commands.values() if isinstance(commands, dict) else commands)
        if self._waits and not self._has_waitaof:
            log.warning("server has no WAITAOF: set appendfsync to always there", redis_version=server["redis_version"])

    async def run(self, script: Script, run_id: str, *arguments: str | bytes | int, durable: bool = False) -> list[Any]:
        """The reply of `script`, whose first element says how it went ("OK" or the reason that nothing changed).

        Raises NotFoundError for an unknown run, UnavailableError when Redis cannot be reached or does not sync in time.
        """
        command = ("EVALSHA", script.sha1, 1, run_key(run_id), *arguments)
        with translating_errors():
            reply = await self._execute(command, durable)
            if isinstance(reply, exceptions.NoScriptError):
                await self.redis.script_load(script.source)
                reply = await self._execute(command, durable)
            if isinstance(reply, Exception):
                raise reply
        fields = cast(list[Any], reply)
        if fields[0] == b"NO_RUN":
            raise NotFoundError(f"run {run_id!r} does not exist: create it first")
        return fields

    async def _execute(self, command: tuple[str | bytes | int, ...], durable: bool) -> Any:
        waits = self._waits and durable
        if waits and self._has_waitaof is None:
            await self.check()
        pipeline = self.redis.pipeline(transaction=False)
        pipeline.execute_command(*command)
        if not (waits and self._has_waitaof):
            return (await pipeline.execute(raise_on_error=False))[0]
        # WAITAOF speaks of the writes of its own connection: both commands travel together.
        pipeline.execute_command("WAITAOF", 1, 0, round(self._durability_timeout_s * 1000))
        with DURABILITY_SECONDS.time():
            reply, synced = await pipeline.execute(raise_on_error=False)
        if isinstance(reply, Exception):
            return reply
        if isinstance(synced, Exception):
            raise synced
        if synced[0] < 1:
            raise UnavailableError(
                f"redis did not sync its append-only file within {self._durability_timeout_s:g} s: send the call again",
                retry_after_s=RETRY_AFTER_S,
            )
        return reply


@contextmanager
def translating_errors() -> Iterator[None]:
    """Turns errors of the Redis client into the errors that callers get."""
    try:
        yield
    except exceptions.OutOfMemoryError as error:
        raise ResourceExhaustedError("redis is full: raise its maxmemory", retry_after_s=RETRY_AFTER_S) from error
    except exceptions.AuthenticationError as error:
        raise FailedPreconditionError(f"redis_url: redis refuses the user or password: {error}") from error
    except (
        exceptions.ConnectionError,
        exceptions.TimeoutError,
        exceptions.ReadOnlyError,
        exceptions.MasterDownError,
        OSError,
    ) as error:
        raise UnavailableError(f"redis cannot be used: {error}", retry_after_s=RETRY_AFTER_S) from error
    except exceptions.ResponseError as error:
        if str(error).startswith(("MISCONF", "BUSY", "NOREPLICAS")):
            raise UnavailableError(f"redis takes no writes: {error}", retry_after_s=RETRY_AFTER_S) from error
        raise
