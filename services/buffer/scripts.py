"""Lua scripts on Redis: one script is one atomic change, whose sync to disk may be waited for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, cast

from opentelemetry.trace import SpanKind
from prometheus_client import Histogram
from redis import exceptions
from redis.asyncio import Redis
from redis.asyncio.client import Pipeline

from perigee.errors import (
    AbortedError,
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    PerigeeError,
    ResourceExhaustedError,
    UnavailableError,
)
from services.buffer.nodes import FIRST_WITH_WAITAOF, Nodes, check_server
from services.buffer.requests import describe_bad_run_id
from services.kit.tasks import keeping_cancellation
from services.kit.telemetry import get_logger
from services.kit.tracing import span

log = get_logger(__name__)

Arguments = list[str | bytes | int]

RETRY_AFTER_S = 1.0
# Once for a script that the server does not know, the others for a cluster that is moving the run.
MAX_REDIRECTIONS = 4
# Keys that one step of a scan looks at.
SCANNED = 1000
DURABILITY_SECONDS = Histogram(
    "perigee_buffer_durability_seconds", "Seconds of durable changes, the sync to disk included."
)


@dataclass(frozen=True)
class Script:
    """Lua script and the digest that Redis knows it by."""

    name: str
    source: str
    sha1: str


def load_script(name: str) -> Script:
    """Reads `lua/<name>.lua`."""
    source = (Path(__file__).parent / "lua" / f"{name}.lua").read_text(encoding="utf-8")
    return Script(name, source, hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest())


class Durability(IntEnum):
    """Class of a change by what its loss would cost, cheapest first."""

    NONE = 0
    """Loses nothing, or tokens that are generated again: reads, chunks within a segment."""
    SEGMENT = 1
    """Loses a segment that its worker believes to be kept, or a fence: groups, leases, ends of segments."""
    COMMIT = 2
    """Loses work that is not done again: runs, verdicts, commits."""


# Errors by the first element of a reply; {0} is the second one.
REFUSALS: dict[bytes, tuple[type[PerigeeError], str]] = {
    b"NO_RUN": (NotFoundError, "run {run!r} does not exist: create it first"),
    b"UNKNOWN": (NotFoundError, "trajectory {0!r} does not exist in run {run!r}"),
    b"FINISHED": (FailedPreconditionError, "trajectory {0!r} is finished: it cannot be leased"),
    b"UNFINISHED": (FailedPreconditionError, "trajectory {0!r} is not finished: it cannot have a verdict"),
    b"TRAJECTORY_TAKEN": (AlreadyExistsError, "trajectory {0!r} belongs to another group: take a new id"),
    b"IMAGES_MISSING": (FailedPreconditionError, "image {1} of group {0!r} is not in run {run!r}: put it first"),
    b"NO_IMAGE": (NotFoundError, "image {0} does not exist in run {run!r}"),
    b"UNKNOWN_GROUP": (FailedPreconditionError, "group {0!r} does not exist and cannot be consumed"),
    b"CONSUMED_BEFORE": (FailedPreconditionError, "group {0!r} was consumed by an earlier iteration"),
    b"NOT_NEXT": (FailedPreconditionError, "this iteration of run {run!r} cannot be committed: the next is {0}"),
    b"OTHER_CONTENTS": (
        AbortedError,
        "iteration {0} of run {run!r} was committed with other contents: another coordinator drives this run",
    ),
}
# The cheapest class that waits for the disk, by `durability` of the configuration.
LEAST_SYNCED = {"segments": Durability.SEGMENT, "commits": Durability.COMMIT, "none": None}


def run_key(run_id: str) -> str:
    """Returns the key of the run's state, from which the scripts derive every other key of the run.

    Raises InvalidArgumentError for an id that no run can have.
    """
    if trouble := describe_bad_run_id(run_id):
        raise InvalidArgumentError.for_field("run_id", trouble)
    return f"perigee:{{{run_id}}}:run"


class ScriptRunner:
    """Runs scripts on the servers of the runs.

    A change that `durability` covers is answered once the server has synced it to its append-only file (WAITAOF);
    servers older than Redis 7.2 have no such command, and keep what their own fsync policy keeps.
    """

    def __init__(self, nodes: Nodes, *, durability: str, durability_timeout_s: float) -> None:
        self._nodes = nodes
        self._durability_timeout_s = durability_timeout_s
        self._least_synced = LEAST_SYNCED[durability]
        self._has_waitaof: bool | None = None

    async def check(self) -> None:
        """Reads what the first server that answers can do.

        Raises FailedPreconditionError for a server that is too old, keeps nothing on disk or may drop keys, and
        UnavailableError when none can be reached.
        """
        with translating_errors():
            await self._nodes.use_one_that_answers()
            info = await self._nodes.first.info("server", "persistence", "memory")
        version = check_server(info, needs_file=self._least_synced is not None)
        has_waitaof = version >= FIRST_WITH_WAITAOF
        if self._least_synced is not None and not has_waitaof and self._has_waitaof is None:
            log.warning("redis has no WAITAOF: set appendfsync to always there", redis_version=version)
        self._has_waitaof = has_waitaof

    async def list_runs(self) -> set[str]:
        """Returns the ids of the runs on the known servers; raises UnavailableError when one is out of reach."""
        with translating_errors():
            keys = [key for node in self._nodes.known async for key in node.scan_iter(run_key("*"), count=SCANNED)]
        ids = {key.decode().removeprefix("perigee:{").removesuffix("}:run") for key in keys}
        return {run_id for run_id in ids if describe_bad_run_id(run_id) is None}  # a trajectory's id may end like a run

    async def run(
        self, script: Script, run_id: str, *arguments: str | bytes | int, durability: Durability = Durability.NONE
    ) -> list[Any]:
        """Returns the reply of `script`; its first element is "OK", or another word for a change that was there before.

        Raises the error of `REFUSALS` when the script changes nothing, NotFoundError for an unknown run for instance,
        and UnavailableError when Redis cannot be reached or does not sync in time.
        """
        key = run_key(run_id)
        command = ("EVALSHA", script.sha1, 1, key, *arguments)
        waits = self._least_synced is not None and durability >= self._least_synced
        with translating_errors(), span(f"redis {script.name}", SpanKind.CLIENT, run=run_id):
            if waits and self._has_waitaof is None:
                await self.check()
            for _ in range(MAX_REDIRECTIONS):
                node = self._nodes.holder_of(key)
                reply = await self._execute(node, command, waits and bool(self._has_waitaof))
                if isinstance(reply, exceptions.NoScriptError):
                    await node.script_load(script.source)
                elif isinstance(reply, exceptions.MovedError):
                    self._nodes.learn(reply)
                else:
                    break
            if isinstance(reply, Exception):
                raise reply
        fields = cast(list[Any], reply)
        if fields[0] in REFUSALS:
            error, text = REFUSALS[fields[0]]
            raise error(text.format(*(value.decode() for value in fields[1:]), run=run_id))
        return fields

    async def _execute(self, node: Redis, command: tuple[str | bytes | int, ...], waits: bool) -> Any:
        """Returns the reply or the error that the server sent; raises what kept it from replying."""
        pipeline = node.pipeline(transaction=False)
        pipeline.execute_command(*command)
        if not waits:
            return (await self._send(node, pipeline))[0]
        # WAITAOF speaks of the writes of its own connection: both commands travel together.
        pipeline.execute_command("WAITAOF", 1, 0, round(self._durability_timeout_s * 1000))
        with DURABILITY_SECONDS.time():
            reply, synced = await self._send(node, pipeline)
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

    async def _send(self, node: Redis, pipeline: Pipeline) -> list[Any]:
        try:
            return await pipeline.execute(raise_on_error=False)
        except (exceptions.ConnectionError, exceptions.TimeoutError):
            self._nodes.forget(node)
            raise


@contextmanager
def translating_errors() -> Iterator[None]:
    """Turns errors of the Redis client into the errors that callers get, and keeps a cancellation that it loses."""
    try:
        with keeping_cancellation():
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
        exceptions.ClusterDownError,
        exceptions.MovedError,
        exceptions.AskError,
        exceptions.TryAgainError,
        OSError,
    ) as error:
        raise UnavailableError(f"redis cannot be used: {error}", retry_after_s=RETRY_AFTER_S) from error
    except exceptions.ResponseError as error:
        if str(error).startswith(("MISCONF", "BUSY", "NOREPLICAS")):
            raise UnavailableError(f"redis takes no writes: {error}", retry_after_s=RETRY_AFTER_S) from error
        raise
