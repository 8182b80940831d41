"""Versions of the runtimes: each is asked for once, in a sandbox."""

from __future__ import annotations

import asyncio

from perigee.sandbox.v1 import sandbox_pb2 as pb
from services.sandbox.agent.protocol import Limits, RunRequest
from services.sandbox.languages.catalog import Runtime, find_version
from services.sandbox.runtime.failure import SandboxFailedError
from services.sandbox.runtime.jobs import Program
from services.sandbox.runtime.pool import Pool
from services.sandbox.runtime.programs import check_started, explain, memory_streams, open_program, read_output

_LIMITS = Limits(20_000, 10_000, 512 << 20, 128, 1 << 20, 65536, 1024)


class Versions:
    """Versions of the runtimes of a pool."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._versions: dict[str, str] = {}
        self._asking = asyncio.Lock()

    async def describe(self) -> pb.ListRuntimesResponse:
        """Describes all runtimes; the first call runs the version command of each."""
        factory = self._pool.factory
        response = pb.ListRuntimesResponse(missing=self._pool.catalog.missing)
        async with self._asking:
            for runtime in self._pool.catalog.runtimes:
                if (reason := factory.explain_missing(runtime)) is not None:
                    response.missing.add(language=runtime.name, reason=reason)
                    continue
                if (version := self._versions.get(runtime.name)) is None:
                    try:
                        version = self._versions[runtime.name] = await self._ask(runtime)
                    except SandboxFailedError as error:  # it may be temporary: the next call asks again
                        version = f"unknown ({error.message})"
                response.runtimes.append(self._describe(runtime, version))
        return response

    def _describe(self, runtime: Runtime, version: str) -> pb.Runtime:
        return pb.Runtime(
            language=runtime.name,
            version=version,
            default_limits=pb.Limits(**runtime.limits.model_dump()),
            maximum_limits=pb.Limits(**self._pool.config.maximum_limits.model_dump()),
            isolation=self._pool.factory.isolation.label(runtime.python is not None),
            title=runtime.config.title,
            aliases=runtime.config.aliases,
            compiled=bool(runtime.config.compile),
            sessions=runtime.python is not None,
            functions=runtime.python is not None,
            imported=runtime.config.preload,
            packages=runtime.importable,
        )

    async def _ask(self, runtime: Runtime) -> str:
        if runtime.python is not None:
            return runtime.python.version
        if not runtime.config.version:
            return ""
        program = Program(runtime, b"", _LIMITS, _LIMITS)
        command = list(runtime.config.version)
        async with (
            self._pool.lease(cost_s=0.0) as pair,
            open_program(self._pool.factory, program, pair.program) as loaded,
        ):
            await loaded.send_files()
            with memory_streams(b"") as streams:
                request = RunRequest("exec", _LIMITS, command, dict(runtime.environment))
                result, _ = await loaded.sandbox.run(request, [streams.stdin, streams.stdout, streams.stderr])
                check_started(result, command)
                if result.stop is not None:
                    raise SandboxFailedError(f"{command[0]} passed its {explain(result, _LIMITS)}")
                texts = [read_output(file, 4096)[0] for file in (streams.stdout, streams.stderr)]
        return find_version(b"\n".join(texts).decode(errors="replace"))
