"""A program in an open box: compiled where its language needs it, and run as often as wanted."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

from services.sandbox.attendants import BoxFailedError
from services.sandbox.box.control import memory_file
from services.sandbox.box.limits import BoxLimits
from services.sandbox.box.orders import Order, Outcome
from services.sandbox.box.payload import Parcel, encode_parcel
from services.sandbox.boxes import Box
from services.sandbox.jobs import CompileReport, InputFile, OutputFile, Program
from services.sandbox.places import Place
from services.sandbox.slots import Opener

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
