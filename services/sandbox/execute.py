"""Runs programs once, whole or with their output as it is written."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
from collections.abc import AsyncGenerator, Callable

from services.sandbox import metrics
from services.sandbox.attendants import BoxFailedError
from services.sandbox.box.limits import BoxLimits
from services.sandbox.box.orders import Outcome
from services.sandbox.jobs import CompileReport, Execution, Job, Verdict
from services.sandbox.places import Place
from services.sandbox.pool import Pool
from services.sandbox.programs import Streams, explain, memory_streams, open_program

_STREAM_TICK_S = 0.02
_STREAM_CHUNK_BYTES = 1 << 20
_VERDICT_BY_STOP = {
    "wall": Verdict.TIME_LIMIT,
    "cpu": Verdict.TIME_LIMIT,
    "memory": Verdict.MEMORY_LIMIT,
    "output": Verdict.OUTPUT_LIMIT,
    "died": Verdict.RUNTIME_ERROR,
    "told": Verdict.RUNTIME_ERROR,
}


async def execute(
    pool: Pool, job: Job, remaining_s: float | None = None, on_start: Callable[[Streams], None] | None = None
) -> Execution:
    """Compiles and runs a program; the box's own failures come back as INFRA_ERROR.

    Raises ResourceExhaustedError when the job cannot have a slot in time.
    """
    program = job.program
    cost_s = (program.limits.wall_ms + (program.compile_limits.wall_ms if program.runtime.config.compile else 0)) / 1000
    async with pool.take(cost_s, remaining_s) as slot:
        started = time.monotonic()
        try:
            execution = await _execute(pool, job, slot.program, on_start)
        except BoxFailedError as error:
            execution = Execution(Verdict.INFRA_ERROR, -1, reason=error.message)
    metrics.count("execute", execution.verdict, started)
    return execution


async def _execute(pool: Pool, job: Job, place: Place, on_start: Callable[[Streams], None] | None) -> Execution:
    program = job.program
    async with open_program(pool.opener, program, place) as loaded:
        if not await loaded.load():
            assert loaded.compile_report is not None
            return uncompiled(loaded.compile_report)
        with memory_streams(job.stdin) as streams:
            if on_start is not None:
                on_start(streams)
            outcome, files = await loaded.run(streams, job.arguments, (), job.output_files, job.most_output_file_bytes)
            if loaded.compile_report is not None and not loaded.compile_report.ok:
                return uncompiled(loaded.compile_report)
            execution = read_execution(outcome, streams, program.limits)
    return dataclasses.replace(execution, compile=loaded.compile_report, files=files)


def uncompiled(report: CompileReport) -> Execution:
    """The execution of a program that did not compile."""
    verdict = Verdict.COMPILE_ERROR
    return Execution(verdict, report.exit_code, reason=report.reason or "the source does not compile", compile=report)


def read_execution(outcome: Outcome, streams: Streams, limits: BoxLimits) -> Execution:
    """What became of a run whose streams are in memory."""
    (stdout, stdout_cut), (stderr, stderr_cut) = (
        read_output(file, limits.output_bytes) for file in (streams.stdout, streams.stderr)
    )
    if outcome.stop is None and (stdout_cut or stderr_cut):
        outcome = dataclasses.replace(outcome, stop="output")
    return Execution(
        verdict=read_verdict(outcome),
        exit_code=-1 if outcome.exit_code is None else outcome.exit_code,
        signal=outcome.signal,
        stdout=stdout,
        stderr=stderr,
        stdout_truncated=stdout_cut,
        stderr_truncated=stderr_cut,
        wall_ms=outcome.wall_ms,
        cpu_ms=outcome.cpu_ms,
        peak_bytes=outcome.peak_bytes or 0,
        reason=explain(outcome, limits),
    )


def read_verdict(outcome: Outcome) -> Verdict:
    """The verdict of a process that nothing was expected of but to end well."""
    if outcome.stop is not None:
        return _VERDICT_BY_STOP[outcome.stop]
    return Verdict.ACCEPTED if outcome.exit_code == 0 else Verdict.RUNTIME_ERROR


def read_output(file: int, most_bytes: int) -> tuple[bytes, bool]:
    """An output in memory, cut, and whether it was."""
    return os.pread(file, most_bytes, 0), os.fstat(file).st_size > most_bytes


@dataclasses.dataclass(frozen=True)
class Piece:
    """Output of a running program."""

    stream: str
    content: bytes


async def execute_stream(
    pool: Pool, job: Job, remaining_s: float | None = None
) -> AsyncGenerator[Piece | Execution, None]:
    """Pieces of the output as they are written, then the execution; leaving the iteration ends the program."""
    taps: dict[str, int] = {}
    sent = {"stdout": 0, "stderr": 0}

    def tap(streams: Streams) -> None:
        # descriptors of our own: the run closes its ones when it ends
        taps.update(stdout=os.dup(streams.stdout), stderr=os.dup(streams.stderr))

    task = asyncio.create_task(execute(pool, job, remaining_s, tap))
    try:
        while not task.done():
            await asyncio.wait([task], timeout=_STREAM_TICK_S)
            for piece in read_pieces(taps, sent, job.program.limits.output_bytes):
                yield piece
        execution = await task
        yield dataclasses.replace(execution, stdout=b"", stderr=b"")
    finally:
        task.cancel()
        try:
            await asyncio.gather(task, return_exceptions=True)
        finally:
            for descriptor in taps.values():
                os.close(descriptor)


def read_pieces(taps: dict[str, int], sent: dict[str, int], most_bytes: int) -> list[Piece]:
    """What was written since the last look, up to the limit, in pieces that fit into a message."""
    pieces = []
    for name, descriptor in taps.items():
        end = min(os.fstat(descriptor).st_size, most_bytes)
        while sent[name] < end:
            content = os.pread(descriptor, min(_STREAM_CHUNK_BYTES, end - sent[name]), sent[name])
            sent[name] += len(content)
            pieces.append(Piece(name, content))
    return pieces
