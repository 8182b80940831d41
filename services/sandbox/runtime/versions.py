"""What the runtimes of this machine are: versions are asked for in a box, once."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from services.sandbox.agent.protocol import BoxLimits, Order
from services.sandbox.languages.catalog import Missing, Runtime, find_version
from services.sandbox.runtime.helper_process import BoxFailedError
from services.sandbox.runtime.jobs import Program
from services.sandbox.runtime.pool import Pool
from services.sandbox.runtime.programs import check_started, explain, memory_streams, open_program, read_output

_LIMITS = BoxLimits(20_000, 10_000, 512 << 20, 128, 1 << 20, 65536)


@dataclass(frozen=True)
class Described:
    """Runtimes with version and isolation, and what cannot be used here."""

    runtimes: list[tuple[Runtime, str, str]]
    missing: list[Missing]


class Versions:
    """Describes the runtimes of a pool."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._versions: dict[str, str] = {}
        self._asking = asyncio.Lock()

    async def describe(self) -> Described:
        """All runtimes; the first call runs each one's version command."""
        opener = self._pool.opener
        missing = list(self._pool.catalog.missing)
        runtimes: list[tuple[Runtime, str, str]] = []
        async with self._asking:
            for runtime in self._pool.catalog.runtimes:
                if (reason := opener.explain_missing(runtime)) is not None:
                    missing.append(Missing(runtime.name, reason))
                    continue
                if (version := self._versions.get(runtime.name)) is None:
                    try:
                        version = self._versions[runtime.name] = await self._ask(runtime)
                    except BoxFailedError as error:  # which may pass: the next caller asks again
                        version = f"unknown ({error.message})"
                runtimes.append((runtime, version, opener.isolation.label(runtime.python is not None)))
        return Described(runtimes, missing)

    async def _ask(self, runtime: Runtime) -> str:
        if runtime.python is not None:
            return runtime.python.version
        if not runtime.config.version:
            return ""
        program = Program(runtime, b"", _LIMITS, _LIMITS)
        command = list(runtime.config.version)
        async with (
            self._pool.take(cost_s=0.0) as slot,
            open_program(self._pool.opener, program, slot.program) as loaded,
        ):
            await loaded.begin()
            with memory_streams(b"") as streams:
                order = Order("exec", _LIMITS, command, dict(runtime.environment))
                ended = await loaded.box.run(order, [streams.stdin, streams.stdout, streams.stderr])
                check_started(ended.outcome, command)
                if ended.outcome.stop is not None:
                    raise BoxFailedError(f"{command[0]} passed its {explain(ended.outcome, _LIMITS)}")
                texts = [read_output(file, 4096)[0] for file in (streams.stdout, streams.stderr)]
        return find_version(b"\n".join(texts).decode(errors="replace"))
