"""Runs programs once, whole or with their output as it is written."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, suppress

from perigee.errors import FailedPreconditionError, ResourceExhaustedError
from perigee.sandbox.v1 import sandbox_pb2 as pb
from services.sandbox.agent.protocol import Limits
from services.sandbox.runtime import metrics
from services.sandbox.runtime.failure import SandboxFailedError
from services.sandbox.runtime.jobs import Job, Program
from services.sandbox.runtime.pool import Pool
from services.sandbox.runtime.programs import LoadedProgram, Streams, memory_streams, open_program, read_execution
from services.sandbox.runtime.worker_slots import SlotPair, WorkerSlot

_STREAM_TICK_S = 0.02
_STREAM_CHUNK_BYTES = 1 << 20
_COMPUTING = 0.05
"""Least CPU time, as a part of the wall time, of a program that computes."""


async def execute(
    pool: Pool, job: Job, remaining_s: float | None = None, on_start: Callable[[Streams], None] | None = None
) -> pb.ExecuteResponse:
    """Compiles and runs a program; failures of the sandbox come back as INFRA_ERROR.

    One that was starved is run once more, alone, where its request says so and its output is not watched. Raises
    ResourceExhaustedError when no slot is free in time.
    """
    program = job.program
    cost_s = (program.limits.wall_ms + (program.compile_limits.wall_ms if program.runtime.config.compile else 0)) / 1000
    begun = time.monotonic()
    response = await _execute_once(pool, job, pool.lease(cost_s, remaining_s), on_start)
    if job.request.retry_starved and on_start is None and is_starved(response):
        left_s = None if remaining_s is None else remaining_s - (time.monotonic() - begun)
        with suppress(ResourceExhaustedError):  # the first response stands
            return await _execute_once(pool, job, pool.lease_alone(cost_s, left_s), None)
    return response


async def _execute_once(
    pool: Pool,
    job: Job,
    lease: AbstractAsyncContextManager[SlotPair],
    on_start: Callable[[Streams], None] | None,
) -> pb.ExecuteResponse:
    async with lease as pair:
        started = time.monotonic()
        try:
            response = await _execute(pool, job, pair.program, on_start)
        except SandboxFailedError as error:
            response = pb.ExecuteResponse(status=pb.STATUS_INFRA_ERROR, exit_code=-1, reason=error.message)
    metrics.count("execute", pb.Status.Name(response.status).removeprefix("STATUS_"), started)
    return response


def is_starved(run: pb.ExecuteResponse | pb.TestResult) -> bool:
    """Returns whether a run met the wall clock while it computed, and not while it slept."""
    return run.wall_limited and run.cpu_ms >= _COMPUTING * run.wall_ms


async def _execute(
    pool: Pool, job: Job, slot: WorkerSlot, on_start: Callable[[Streams], None] | None
) -> pb.ExecuteResponse:
    program, request = job.program, job.request
    async with open_program(pool.factory, program, slot) as loaded:
        if not await loaded.load():
            return _compile_failure(loaded)
        with memory_streams(request.stdin) as streams:
            if on_start is not None:
                on_start(streams)
            most_bytes = pool.config.max_output_file_bytes
            result, files = await loaded.run(
                streams, request.args, (), request.output_files, most_bytes, request.output_folders
            )
            if loaded.compile_failed:
                return _compile_failure(loaded)
            response = read_execution(result, streams, program.limits)
    response.files.extend(files)
    if loaded.compiled is not None:
        response.compile.CopyFrom(loaded.compiled)
    return response


def _compile_failure(loaded: LoadedProgram) -> pb.ExecuteResponse:
    compiled = loaded.compiled
    assert compiled is not None
    return pb.ExecuteResponse(
        status=pb.STATUS_COMPILE_ERROR, exit_code=compiled.exit_code, reason=compiled.reason, compile=compiled
    )


async def check_jobs_run(pool: Pool) -> None:
    """Runs a job before others do, since a sandbox may open where no program starts; raises FailedPreconditionError.

    Does nothing where the sandbox has no Python.
    """
    runtime = pool.catalog.find("python")
    if runtime is None or pool.factory.explain_missing(runtime) is not None:
        return
    limits = Limits(**runtime.limits.model_dump())
    job = Job(Program(runtime, b"print()", limits, limits), pb.ExecuteRequest())
    try:
        # Not by a lease, whose time would count in the estimates of waits.
        await _execute(pool, job, pool.pairs[0].program, None)
    except SandboxFailedError as error:
        label = pool.factory.isolation.label(python=True)
        raise FailedPreconditionError(f"sandbox.isolation: {label} runs no job here: {error.message}") from error


async def execute_stream(
    pool: Pool, job: Job, remaining_s: float | None = None
) -> AsyncGenerator[pb.ExecuteStreamResponse, None]:
    """Yields the output as it is written, then the result; leaving the iteration ends the program."""
    taps: dict[str, int] = {}
    sent = {"stdout": 0, "stderr": 0}

    def tap(streams: Streams) -> None:
        # copies: the run closes its descriptors when it ends
        taps.update(stdout=os.dup(streams.stdout), stderr=os.dup(streams.stderr))

    task = asyncio.create_task(execute(pool, job, remaining_s, tap))
    try:
        while not task.done():
            await asyncio.wait([task], timeout=_STREAM_TICK_S)
            for chunk in read_chunks(taps, sent, job.program.limits.output_bytes):
                yield chunk
        response = await task
        response.ClearField("stdout")
        response.ClearField("stderr")
        yield pb.ExecuteStreamResponse(finished=response)
    finally:
        task.cancel()
        try:
            await asyncio.gather(task, return_exceptions=True)
        finally:
            for descriptor in taps.values():
                os.close(descriptor)


def read_chunks(taps: dict[str, int], sent: dict[str, int], most_bytes: int) -> list[pb.ExecuteStreamResponse]:
    """Reads what was written since the last call, up to the limit, in chunks that fit into a message."""
    chunks = []
    for name, descriptor in taps.items():
        end = min(os.fstat(descriptor).st_size, most_bytes)
        while sent[name] < end:
            content = os.pread(descriptor, min(_STREAM_CHUNK_BYTES, end - sent[name]), sent[name])
            sent[name] += len(content)
            if name == "stdout":
                chunks.append(pb.ExecuteStreamResponse(stdout=content))
            else:
                chunks.append(pb.ExecuteStreamResponse(stderr=content))
    return chunks
