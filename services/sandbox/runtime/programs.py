"""Programs in open sandboxes: compiled when their language needs it, run once or often, with their output as it is
written.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

from perigee.errors import InvalidArgumentError
from perigee.sandbox.v1 import sandbox_pb2 as pb
from services.sandbox.agent.archive import Archive, encode_archive
from services.sandbox.agent.protocol import Limits, RunRequest, RunResult, memory_file
from services.sandbox.languages.catalog import OutOfMemory
from services.sandbox.runtime.compile_cache import LARGEST_BYTES, CompileCache
from services.sandbox.runtime.failure import SandboxFailedError
from services.sandbox.runtime.jobs import Program
from services.sandbox.runtime.sandboxes import Sandbox, SandboxFactory
from services.sandbox.runtime.worker_slots import WorkerSlot

COMPILER_BYTES = 65536
_IMPORT_PATH = "PYTHONPATH"
# errors of execve that say nothing of the file
_NOT_THE_PROGRAMS = (errno.EAGAIN, errno.EMFILE, errno.ENFILE)
# of the CPU limit: a program that has less left met both limits
_SPARE = 0.1


@dataclass(frozen=True)
class Streams:
    """Descriptors of a run's standard streams: files in memory, or pipes to another sandbox."""

    stdin: int
    stdout: int
    stderr: int


@contextmanager
def opened(*contents: bytes) -> Iterator[list[int]]:
    """Yields files in memory, closed at the end of the block."""
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
    """Yields standard streams in memory."""
    with opened(stdin, b"", b"") as (first, second, third):
        yield Streams(first, second, third)


class LoadedProgram:
    """Program in a sandbox that keeps its files, and what its compiler made of them, from run to run."""

    def __init__(self, program: Program, sandbox: Sandbox, forks: bool, cache: CompileCache) -> None:
        self.program = program
        self.sandbox = sandbox
        self._cache = cache
        self.compiled: pb.CompileResult | None = None
        """Result of the compilation; its reason says whether it failed."""
        self.compiler_was_starved = False
        """Whether the wall clock ended the compiler, with CPU time to spare."""
        self._in_container = not forks
        self._is_loaded = False

    async def load(self) -> bool:
        """Unpacks the files and compiles; returns whether the program can run. Python is compiled in each run."""
        runtime = self.program.runtime
        if runtime.config.compile and not self.program.command:
            await self._load_compiled()
        elif self._in_container or runtime.python is None:
            await self.send_files()
        return not self.compile_failed

    async def _load_compiled(self) -> None:
        """Loads what the compiler made of the program before, or compiles it. What comes in archives is not kept."""
        if self.program.archives:
            await self.send_files()
            self.compiled, _ = await self._compile()
            return
        key = digest_of(self.program)
        if (known := await self._cache.find(key)) is not None:
            await self._send(encode_archive(known.folder.header, known.folder.blobs))
            self.compiled = pb.CompileResult()
            self.compiled.CopyFrom(known.result)  # a program that cannot be executed changes its own
            return
        with self._cache.compiling(key):
            await self.send_files()
            self.compiled, folder = await self._compile()
            if folder is not None and not self.compile_failed:
                self._cache.keep(key, self.compiled, folder)

    @property
    def compile_failed(self) -> bool:
        """Whether the program does not compile."""
        return self.compiled is not None and bool(self.compiled.reason)

    async def send_files(self) -> None:
        """Hands over the files without compiling."""
        program = self.program
        files: list[pb.File] = []
        if program.runtime.python is None and not program.command:  # modes of Python get the files with each run
            config = program.runtime.config
            own = [pb.File(path=path, content=text.encode()) for path, text in config.files.items()]
            files = [*own, *program.files, pb.File(path=config.source, content=program.source)]
        await self._send(pack_files(files))

    async def _send(self, files: bytes) -> None:
        program = self.program
        root = program.runtime.root_options([self.sandbox.slot.uid])
        header = {"root_name": program.runtime.name, "root": root}
        await self.sandbox.load(header, files)
        self._is_loaded = True

    async def _compile(self) -> tuple[pb.CompileResult, Archive | None]:
        runtime, limits = self.program.runtime, self.program.compile_limits
        command = [*runtime.command(runtime.config.compile, limits.memory_bytes), *self.program.compile_arguments]
        kept_bytes = 0 if self.program.archives else LARGEST_BYTES
        request = RunRequest("exec", limits, command, self._environment(), keep=True, collect_bytes=kept_bytes)
        with memory_streams(b"") as streams:
            result, folder = await self._run(request, [streams.stdin, streams.stdout, streams.stderr])
            check_started(result, command)
            stdout, stderr = (os.pread(file, COMPILER_BYTES, 0) for file in (streams.stdout, streams.stderr))
        self.compiler_was_starved = is_wall_limited(result, limits)
        status = status_of_run(result)
        reason = explain(result, limits) or f"the compiler ended with {describe_exit(result)}"
        compiled = pb.CompileResult(
            exit_code=exit_code_of(result),
            stdout=stdout,
            stderr=stderr,
            wall_ms=result.wall_ms,
            reason="" if status == pb.STATUS_OK else reason,
            status=pb.STATUS_COMPILE_ERROR if status == pb.STATUS_RUNTIME_ERROR else status,
            signal=result.signal,
        )
        return compiled, folder

    async def run(
        self,
        streams: Streams,
        arguments: Sequence[str] = (),
        files: Sequence[pb.File] = (),
        collect: Sequence[str] = (),
        collect_bytes: int = 0,
        pack: Sequence[str] = (),
        input_is_file: bool = False,
    ) -> tuple[RunResult, list[pb.OutputFile]]:
        """Runs the program once, with `files` for this run alone.

        A Python source that does not compile sets `compiled`.
        """
        runtime, limits = self.program.runtime, self.program.limits
        standard = [streams.stdin, streams.stdout, streams.stderr]
        wanted: dict[str, Any] = {"collect": list(collect), "collect_bytes": collect_bytes, "pack": list(pack)}
        wanted["input_is_file"] = input_is_file
        if self.program.command or runtime.python is None:
            own = self.program.command or runtime.command(runtime.config.run, limits.memory_bytes)
            command = [*own, *arguments]
            request = self._request("exec", command, brings_files=bool(files), **wanted)
            with opened(*([pack_files(files)] if files else [])) as brought:
                result, left = await self._run(request, [*standard, *brought])
            if not self.program.command:
                self._check_started(result, command)
            if ran_out_of_memory(result, streams.stderr, runtime.config.out_of_memory):
                result = dataclasses.replace(result, stop="memory")
            return result, unpack_files(left)
        request = self._request("program", **wanted)
        header = {
            "main": runtime.config.source,
            "arguments": list(arguments),
            "own_interpreter": any(name.startswith("PYTHON") for name in self.program.environment),
        }
        with opened(b"", self.archive(header, [self.program.source], files)) as (report, archive):
            result, left = await self._run(request, [*standard, report, archive])
            if os.fstat(report).st_size:
                message = os.pread(report, COMPILER_BYTES, 0)
                reason = "the source does not compile"
                self.compiled = pb.CompileResult(
                    exit_code=1,
                    stderr=message,
                    wall_ms=result.wall_ms,
                    reason=reason,
                    status=pb.STATUS_COMPILE_ERROR,
                )
        return result, unpack_files(left)

    def _check_started(self, result: RunResult, command: Sequence[str]) -> None:
        """Takes a compiled program that cannot be executed, a library for one, for one that does not compile."""
        is_own = self.compiled is not None and command[0].startswith("./")
        if is_own and result.start_error and result.start_error not in _NOT_THE_PROGRAMS:
            assert self.compiled is not None
            why = os.strerror(result.start_error)
            self.compiled.status = pb.STATUS_COMPILE_ERROR
            self.compiled.reason = f"the compiler made nothing that can be executed: {command[0]}: {why}"
            return
        check_started(result, command)

    async def run_mode(self, mode: str, descriptors: list[int], **fields: Any) -> RunResult:
        """Runs one of Python's modes; the last of `descriptors` is the archive."""
        result, _ = await self._run(self._request(mode, **fields), descriptors)
        return result

    async def _run(self, request: RunRequest, descriptors: list[int]) -> tuple[RunResult, Archive | None]:
        """Runs a process, whose archives are unpacked first unless a compiler had them."""
        archives = () if self.compiled else self.program.archives
        unpack = [(archive.folder, archive.strip_folders) for archive in archives]
        request = dataclasses.replace(request, unpack=unpack, any_links=self.program.any_links)
        with opened(*(archive.content for archive in archives)) as files:
            return await self.sandbox.run(request, [*descriptors, *files])

    def archive(self, header: dict[str, Any], blobs: Sequence[bytes], extra: Sequence[pb.File] = ()) -> bytes:
        """Returns the archive for one of Python's modes: its own blobs, then the files of the working folder."""
        files = [*self.program.files, *extra]
        if header.get("main"):
            files.append(pb.File(path=self.program.runtime.config.source, content=self.program.source))
        fields = {
            **header,
            "environment": self._environment(),
            "first_file": len(blobs),
            "paths": [file.path for file in files],
            "executable": [file.executable for file in files],
        }
        return encode_archive(fields, [*blobs, *(file.content for file in files)])

    def _request(self, mode: str, command: Sequence[str] = (), **fields: Any) -> RunRequest:
        runtime = self.program.runtime
        if self._in_container and mode != "exec":
            command = runtime.python_command()
        limits = fields.pop("limits", self.program.limits)
        # A mode of Python finds variables in the archive: the job supervisor, of which later programs are forks, sees
        # requests, and the interpreter of a container would heed them itself.
        environment = self.program.runtime.environment if self._in_container else {}
        if mode == "exec":
            environment = self._environment()
        return RunRequest(mode, limits, list(command), environment, loopback=self.program.loopback, **fields)

    def _environment(self) -> dict[str, str]:
        own, given = self.program.runtime.environment, self.program.environment
        if _IMPORT_PATH in own and _IMPORT_PATH in given:  # the runtime's packages stay
            given = {**given, _IMPORT_PATH: f"{own[_IMPORT_PATH]}:{given[_IMPORT_PATH]}"}
        return {**own, **given}

    def unload(self) -> None:
        """Removes the files from a sandbox that keeps them."""
        if self._is_loaded and not self.sandbox.broken:
            self.sandbox.unload()


@asynccontextmanager
async def open_program(factory: SandboxFactory, program: Program, slot: WorkerSlot) -> AsyncIterator[LoadedProgram]:
    """Yields a program in a sandbox of its own, not loaded yet."""
    async with factory.open(program.runtime, slot) as sandbox:
        loaded = LoadedProgram(program, sandbox, factory.forks(program.runtime), factory.compile_cache)
        try:
            await slot.reclaim_memory(program.limits.memory_bytes)
            yield loaded
        except InvalidArgumentError:  # an archive was refused, and nothing has run
            loaded.unload()
            raise
        except BaseException:
            sandbox.broken = True
            raise
        try:
            loaded.unload()
        except SandboxFailedError:  # the result is known already; the sandbox is thrown away
            sandbox.broken = True


def digest_of(program: Program) -> bytes:
    """Returns a digest of all that a program's compiler sees, and of the limits under which it runs."""
    runtime = program.runtime
    header = {
        "runtime": runtime.config.model_dump(mode="json", exclude={"limits", "compile_limits"}),
        "environment": {**runtime.environment, **program.environment},
        "root": runtime.root_options(()),
        "root_state": runtime.root_state(),
        "arguments": program.compile_arguments,
        "loopback": program.loopback,
        "limits": dataclasses.asdict(program.compile_limits),
        "paths": [file.path for file in program.files],
        "executable": [file.executable for file in program.files],
    }
    return hashlib.sha256(encode_archive(header, [program.source, *(file.content for file in program.files)])).digest()


def pack_files(files: Sequence[pb.File]) -> bytes:
    """Packs files into an archive."""
    header = {"paths": [file.path for file in files], "executable": [file.executable for file in files]}
    return encode_archive(header, [file.content for file in files])


def unpack_files(archive: Archive | None) -> list[pb.OutputFile]:
    """Returns the collected files in the order in which they were asked for."""
    if archive is None:
        return []
    entries = archive.header["files"]
    return [
        pb.OutputFile(path=entry["path"], content=content, truncated=entry["truncated"], error=entry["error"])
        for entry, content in zip(entries, archive.blobs, strict=True)
    ]


def check_started(result: RunResult, command: Sequence[str]) -> None:
    """Raises SandboxFailedError when a command of the runtime's description could not be executed."""
    if result.start_error:
        raise SandboxFailedError(f"{command[0]} cannot be executed: {os.strerror(result.start_error)}")


def ran_out_of_memory(result: RunResult, stderr: int, sign: OutOfMemory | None) -> bool:
    """Returns whether the language's own runtime ended a program whose heap is full: by its exit code and its words, of
    which a program may print either.
    """
    if sign is None or result.stop is not None or result.exit_code != sign.exit_code:
        return False
    tail = os.pread(stderr, COMPILER_BYTES, max(0, os.fstat(stderr).st_size - COMPILER_BYTES))
    return tail.rstrip().rpartition(b"\n")[2].startswith(sign.message.encode())


def explain(result: RunResult, limits: Limits) -> str:
    """Names the limit that ended a process; empty when none did."""
    return {
        "wall": f"wall-clock limit of {limits.wall_ms} ms",
        "cpu": f"CPU limit of {limits.cpu_ms} ms",
        "memory": f"memory limit of {limits.memory_bytes} bytes",
        "output": f"output limit of {limits.output_bytes} bytes",
    }.get(result.stop or "", "")


def describe_exit(result: RunResult) -> str:
    """Names the exit code or the signal of a process."""
    return f"signal {result.signal}" if result.signal else f"exit code {result.exit_code}"


def exit_code_of(result: RunResult) -> int:
    """Returns the exit code of a process; -1 when it has none."""
    return -1 if result.exit_code is None else result.exit_code


_STATUS_BY_STOP = {
    "wall": pb.STATUS_TIME_LIMIT,
    "cpu": pb.STATUS_TIME_LIMIT,
    "memory": pb.STATUS_MEMORY_LIMIT,
    "output": pb.STATUS_OUTPUT_LIMIT,
    "exited": pb.STATUS_RUNTIME_ERROR,
    "stopped": pb.STATUS_RUNTIME_ERROR,
}


def read_execution(result: RunResult, streams: Streams, limits: Limits) -> pb.ExecuteResponse:
    """Returns the result of a run whose streams are in memory."""
    (stdout, stdout_cut), (stderr, stderr_cut) = (
        read_output(file, limits.output_bytes) for file in (streams.stdout, streams.stderr)
    )
    if result.stop is None and (stdout_cut or stderr_cut):
        result = dataclasses.replace(result, stop="output")
    return pb.ExecuteResponse(
        status=status_of_run(result),
        exit_code=exit_code_of(result),
        signal=result.signal,
        stdout=stdout,
        stderr=stderr,
        stdout_truncated=stdout_cut,
        stderr_truncated=stderr_cut,
        wall_ms=result.wall_ms,
        cpu_ms=result.cpu_ms,
        peak_memory_bytes=result.peak_bytes or 0,
        reason=explain(result, limits),
        wall_limited=is_wall_limited(result, limits),
    )


def is_wall_limited(result: RunResult, limits: Limits) -> bool:
    """Returns whether the wall clock ended a run that had CPU time to spare."""
    return result.stop == "wall" and result.cpu_ms < (1 - _SPARE) * min(limits.cpu_ms, limits.wall_ms)


def status_of_run(result: RunResult) -> pb.Status.ValueType:
    """Returns the status of a run of which nothing is expected but an exit code of 0."""
    if result.stop is not None:
        return _STATUS_BY_STOP[result.stop]
    return pb.STATUS_OK if result.exit_code == 0 else pb.STATUS_RUNTIME_ERROR


def read_output(file: int, most_bytes: int) -> tuple[bytes, bool]:
    """Reads an output in memory up to `most_bytes`; returns it and whether it was cut."""
    return os.pread(file, most_bytes, 0), os.fstat(file).st_size > most_bytes
