"""Redis servers that hold the runs: one server, or the primaries of a cluster, learned from its MOVED replies.

A run is one slot of a cluster. Move a slot that is in use with `CLUSTER MIGRATESLOTS` (Valkey 9), which moves it whole;
the older way moves key by key, and a script may see half a run meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import MovedError
from redis.exceptions import TimeoutError as RedisTimeoutError

from perigee.errors import FailedPreconditionError, InvalidArgumentError

OLDEST_REDIS = (7, 0)
# Valkey calls itself Redis 7.2.4 in every version.
FIRST_WITH_WAITAOF = (7, 2)


def check_server(info: Mapping[str, Any], *, needs_file: bool) -> tuple[int, int]:
    """Returns the version of a server that reports `info` (sections server, persistence, memory).

    Raises FailedPreconditionError with what to change when it cannot hold a run.
    """
    major, minor, *_ = str(info["redis_version"]).split(".")
    if (int(major), int(minor)) < OLDEST_REDIS:
        raise FailedPreconditionError(f"redis_url: Redis 7.0 or later is needed, the server is {major}.{minor}")
    if info.get("maxmemory", 0) and str(info.get("maxmemory_policy", "")).startswith("allkeys"):
        raise FailedPreconditionError(
            "redis_url: the server drops keys when it is full: set `maxmemory-policy noeviction` there"
        )
    if needs_file and not info.get("aof_enabled", 0):
        raise FailedPreconditionError(
            "redis_url: the server keeps no append-only file, so its crash would lose the run: "
            "set `appendonly yes` there, or `durability: none` here"
        )
    return int(major), int(minor)


class Nodes:
    """Clients of the servers; lost connections are reopened, nothing is sent before the first command.

    Raises InvalidArgumentError when `url` is not one.
    """

    def __init__(self, url: str, *, connections: int, timeout_s: float) -> None:
        self._url = url
        self._connections = connections
        self._timeout_s = timeout_s
        self._by_address: dict[str, Redis] = {}
        self._by_slot: dict[int, Redis] = {}
        try:
            self.first = self._open({})
        except ValueError as error:
            raise InvalidArgumentError.for_field(
                "redis_url", f"{error}; use redis://host:port or unix:///path"
            ) from error
        self._by_address[urlsplit(url).netloc.rpartition("@")[2]] = self.first

    async def close(self) -> None:
        """Closes all connections."""
        for node in self._by_address.values():
            await node.aclose()

    @property
    def known(self) -> list[Redis]:
        """Servers that were given or learned."""
        return list(self._by_address.values())

    def holder_of(self, key: str) -> Redis:
        """Returns the server that holds the key, or one that knows which does."""
        return self._by_slot.get(key_slot(key.encode()), self.first)

    def learn(self, moved: MovedError) -> None:
        """Remembers the server that holds a slot."""
        address = f"{moved.host}:{moved.port}"
        if address not in self._by_address:
            self._by_address[address] = self._open({"host": moved.host, "port": moved.port})
        self._by_slot[moved.slot_id] = self._by_address[address]

    def forget(self, node: Redis) -> None:
        """Forgets the slots of a server that cannot be reached, so that another one is asked for them."""
        self._by_slot = {slot: holder for slot, holder in self._by_slot.items() if holder is not node}

    async def use_one_that_answers(self) -> None:
        """Makes the first server that answers the one to ask; raises the last one's error when none does."""
        failure: Exception = RedisConnectionError("no server")
        for node in (self.first, *self._by_address.values()):
            try:
                await node.ping()
            except (RedisConnectionError, RedisTimeoutError, OSError) as error:
                failure = error
            else:
                self.first = node
                return
        raise failure

    def _open(self, address: dict[str, Any]) -> Redis:
        pool = BlockingConnectionPool.from_url(
            self._url,
            max_connections=self._connections,
            timeout=self._timeout_s,
            socket_timeout=self._timeout_s,
            socket_connect_timeout=min(self._timeout_s, 5.0),
            # A pooled connection may have died with a server that is back: one more try finds out.
            retry=Retry(NoBackoff(), 1),
        )
        pool.connection_kwargs.update(address)
        return Redis.from_pool(pool)
