"""A program in an open box: compiled where its language needs it, and run as often as wanted.

Runs programs once, whole or with their output as it is written."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

from services.sandbox.agent.archive import Parcel, encode_parcel
from services.sandbox.agent.protocol import BoxLimits, Order, Outcome, memory_file
from services.sandbox.runtime import metrics
from services.sandbox.runtime.helper_process import BoxFailedError
from services.sandbox.runtime.jobs import CompileReport, Execution, InputFile, Job, OutputFile, Program, Verdict
from services.sandbox.runtime.pool import Pool
from services.sandbox.runtime.sandboxes import Box, Opener
from services.sandbox.runtime.worker_slots import Place

COMPILER_BYTES = 65536


@dataclass(frozen=True)
class Streams:
    """Descriptors of a run's standard streams; files in memory, or pipes to another box."""

    stdin: int
    stdout: int
    stderr: int


@contextmanager
def opened(*contents: bytes) -> Iterator[list[int]]:
    """Files in memory, closed at the end of the block."""
    descriptors: list[int] = []
    try:
        for content in contents:
            descriptors.append(memory_file(content))
        yield descriptors
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


@contextmanager
def memory_streams(stdin: bytes) -> Iterator[Streams]:
    """Standard streams in memory."""
    with opened(stdin, b"", b"") as (first, second, third):
        yield Streams(first, second, third)


class LoadedProgram:
    """Runs a program in a box, in which its files are laid down and what its compiler made of them is kept."""

    def __init__(self, program: Program, box: Box, forks: bool) -> None:
        self.program = program
        self.box = box
        self.compile_report: CompileReport | None = None
        self._in_container = not forks
        self._begun = False

    async def load(self) -> bool:
        """Lays down the files and compiles; whether the program can be run. For Python, compiling is part of a run."""
        runtime = self.program.runtime
        if self._in_container or runtime.python is None:
            await self.begin()
        if runtime.config.compile:
            self.compile_report = await self._compile()
            return self.compile_report.ok
        return True

    async def begin(self) -> None:
        """Lays down the files alone."""
        program = self.program
        files: list[InputFile] = []
        if program.runtime.python is None:  # Python's modes bring the files of each run with it
            files = [*program.files, InputFile(program.runtime.config.source, program.source)]
        header = {
            "root_name": program.runtime.name,
            "root": program.runtime.root_options([self.box.place.uid]),
            "kept_bytes": program.compile_limits.file_bytes if program.runtime.config.compile else 0,
        }
        await self.box.begin(header, pack_files(files))
        self._begun = True

    async def _compile(self) -> CompileReport:
        runtime, limits = self.program.runtime, self.program.compile_limits
        command = runtime.command(runtime.config.compile, limits.memory_bytes)
        order = Order("exec", limits, command, self._environment(), keep=True)
        with memory_streams(b"") as streams:
            ended = await self.box.run(order, [streams.stdin, streams.stdout, streams.stderr])
            outcome = ended.outcome
            check_started(outcome, command)
            stdout, stderr = (os.pread(file, COMPILER_BYTES, 0) for file in (streams.stdout, streams.stderr))
        ok = outcome.stop is None and outcome.exit_code == 0
        reason = "" if ok else explain(outcome, limits) or f"the compiler ended with {last_words(outcome)}"
        exit_code = -1 if outcome.exit_code is None else outcome.exit_code
        return CompileReport(ok, exit_code, stdout, stderr, outcome.wall_ms, reason)

    async def run(
        self,
        streams: Streams,
        arguments: Sequence[str] = (),
        files: Sequence[InputFile] = (),
        collect: Sequence[str] = (),
        collect_bytes: int = 0,
    ) -> tuple[Outcome, list[OutputFile]]:
        """Runs the program once, with files for this run alone. A Python source that does not compile sets
        `compile_report`.
        """
        runtime, limits = self.program.runtime, self.program.limits
        standard = [streams.stdin, streams.stdout, streams.stderr]
        if runtime.python is None:
            command = [*runtime.command(runtime.config.run, limits.memory_bytes), *arguments]
            order = self._order("exec", command, collect=collect, collect_bytes=collect_bytes, brings_files=bool(files))
            with opened(*([pack_files(files)] if files else [])) as brought:
                ended = await self.box.run(order, [*standard, *brought])
            check_started(ended.outcome, command)
            return ended.outcome, unpack_files(ended.files)
        order = self._order("program", collect=collect, collect_bytes=collect_bytes)
        header = {"main": runtime.config.source, "arguments": list(arguments)}
        with opened(b"", self.parcel(header, [self.program.source], files)) as (report, parcel):
            ended = await self.box.run(order, [*standard, report, parcel])
            if os.fstat(report).st_size:
                words = os.pread(report, COMPILER_BYTES, 0)
                self.compile_report = CompileReport(False, 1, b"", words, ended.outcome.wall_ms)
        return ended.outcome, unpack_files(ended.files)

    async def run_mode(self, mode: str, descriptors: list[int], **fields: Any) -> Outcome:
        """Runs one of Python's modes; `descriptors` end with the parcel."""
        return (await self.box.run(self._order(mode, **fields), descriptors)).outcome

    def parcel(self, header: dict[str, Any], blobs: Sequence[bytes], extra: Sequence[InputFile] = ()) -> bytes:
        """A job of one of Python's modes: its own blobs, then the files that it finds in the working folder."""
        files = [*self.program.files, *extra]
        if header.get("main"):
            files.append(InputFile(self.program.runtime.config.source, self.program.source))
        fields = {
            **header,
            "environment": self._environment(),
            "first_file": len(blobs),
            "paths": [file.path for file in files],
            "executable": [file.executable for file in files],
        }
        return encode_parcel(fields, [*blobs, *(file.content for file in files)])

    def _order(self, mode: str, command: Sequence[str] = (), **fields: Any) -> Order:
        runtime = self.program.runtime
        if self._in_container and mode != "exec":
            command = runtime.python_command()
        limits = fields.pop("limits", self.program.limits)
        collect = list(fields.pop("collect", ()))
        # the keeper of warm Python hears orders, and the next programs are its forks: variables come in the parcel
        environment = self._environment() if self._in_container or mode == "exec" else {}
        return Order(mode, limits, list(command), environment, collect=collect, **fields)

    def _environment(self) -> dict[str, str]:
        return {**self.program.runtime.environment, **self.program.environment}

    def unload(self) -> None:
        """Takes the files out of a box that keeps them."""
        if self._begun and not self.box.broken:
            self.box.end()


@asynccontextmanager
async def open_program(opener: Opener, program: Program, place: Place) -> AsyncIterator[LoadedProgram]:
    """A program in a box of its own, not loaded yet."""
    async with opener.open(program.runtime, place) as box:
        loaded = LoadedProgram(program, box, opener.forks(program.runtime))
        try:
            await place.make_room(program.limits.memory_bytes)
            yield loaded
        except BaseException:
            box.broken = True
            raise
        try:
            loaded.unload()
        except BoxFailedError:  # what the job gave is known already; the box is thrown away
            box.broken = True


def pack_files(files: Sequence[InputFile]) -> bytes:
    """A parcel of files."""
    header = {"paths": [file.path for file in files], "executable": [file.executable for file in files]}
    return encode_parcel(header, [file.content for file in files])


def unpack_files(parcel: Parcel | None) -> list[OutputFile]:
    """The files that were collected, in the order in which they were asked for."""
    if parcel is None:
        return []
    entries = parcel.header["files"]
    return [
        OutputFile(entry["path"], content, entry["truncated"], entry["error"])
        for entry, content in zip(entries, parcel.blobs, strict=True)
    ]


def check_started(outcome: Outcome, command: Sequence[str]) -> None:
    """Raises BoxFailedError when a command of the runtime's description could not be executed."""
    if outcome.start_error:
        raise BoxFailedError(f"{command[0]} cannot be executed: {os.strerror(outcome.start_error)}")


def explain(outcome: Outcome, limits: BoxLimits) -> str:
    """The limit that ended a process, in words; empty when none did."""
    return {
        "wall": f"wall-clock limit of {limits.wall_ms} ms",
        "cpu": f"CPU limit of {limits.cpu_ms} ms",
        "memory": f"memory limit of {limits.memory_bytes} bytes",
        "output": f"output limit of {limits.output_bytes} bytes",
    }.get(outcome.stop or "", "")


def last_words(outcome: Outcome) -> str:
    """Exit code or signal, in words."""
    return f"signal {outcome.signal}" if outcome.signal else f"exit code {outcome.exit_code}"


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
