"""Programs, what they are started with, and how they end."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import re
import select
import signal
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from perigee.sandbox.client import SandboxClient
from perigee.sandbox.v1 import sandbox_pb2 as pb
from services.sandbox.languages.catalog import Runtime

FOLDER = Path(__file__).parent
RECORDED = FOLDER / "recorded.json"
KNOWN = {
    "python/env_limits": "the stack may take all of the memory limit",
    "python/env_recursion_depth": "three frames are below the program's own",
    "python/exit_del_raises": "the interpreter cannot read a source any more when it is taken apart",
    "python/prog_lru_cache_too_deep": "three frames are below the program's own",
    "python/syntax_indent": "a text is compiled, not a file: the mark below the line is longer",
    "python/trace_extract_stack": "two frames of the sandbox are below the program's own",
    "python/trace_frames": "two frames of the sandbox are below the program's own",
    "python/trace_inspect_stack": "two frames of the sandbox are below the program's own",
    "python/trace_print_stack": "two frames of the sandbox are below the program's own",
}
"""Programs that run differently, and why; docs/sandbox.md says it, too."""
_OPTIONS = re.compile(rb"differential: (\{.*\})")
_CHANGING = re.compile(r"0x[0-9a-f]{6,}|\bin \d+\.\d+s|line repeated \d+ more")
_MEMORY_BYTES = 512 << 20
_UID = 64321
_WAIT_S = 60


@dataclass(frozen=True)
class Program:
    """A program and what it is started with."""

    path: Path
    source: bytes
    stdin: bytes = b""
    args: list[str] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)

    @property
    def language(self) -> str:
        """The runtime's name."""
        return self.path.parent.name

    @property
    def name(self) -> str:
        """Name in reports."""
        return f"{self.language}/{self.path.stem}"


class Ending(NamedTuple):
    """What a caller sees of a run; `code` is minus the signal that ended it."""

    code: int
    stdout: str
    stderr: str

    def digest(self) -> str:
        """A short digest."""
        return hashlib.sha256(repr(tuple(self)).encode()).hexdigest()[:16]


def read_program(path: Path) -> Program:
    """Reads a program's file."""
    source = path.read_bytes()
    found = _OPTIONS.search(b"\n".join(source.split(b"\n")[:3]))
    options = json.loads(found[1]) if found else {}
    text, times = options.get("stdin_repeat", ["", 0])
    stdin = (options.get("stdin", "") + text * times).encode() + bytes.fromhex(options.get("stdin_hex", ""))
    return Program(path, source, stdin, options.get("args", []), options.get("env", {}))


def find_programs(prefix: str = "") -> list[Program]:
    """Returns the programs whose names begin with a prefix."""
    paths = sorted(path for path in FOLDER.glob("*/*.*") if path.parent.name != "__pycache__")
    programs = map(read_program, paths)
    return [program for program in programs if program.name.startswith(prefix)]


def _ending(code: int, stdout: bytes, stderr: bytes, folder: str) -> Ending:
    texts = [text.decode(errors="backslashreplace").replace(folder, "/box") for text in (stdout, stderr)]
    return Ending(code, *(_CHANGING.sub("#", text) for text in texts))


async def run_sandboxed(client: SandboxClient, program: Program) -> Ending:
    """The program in the sandbox."""
    request = pb.ExecuteRequest(
        language=program.language,
        source=program.source,
        stdin=program.stdin,
        args=program.args,
        env=program.env,
        limits=pb.Limits(memory_bytes=_MEMORY_BYTES),
    )
    response = await client.execute(request)
    if response.status == pb.STATUS_COMPILE_ERROR:
        return _ending(1, response.compile.stdout, response.compile.stderr, "/box")
    if response.reason:
        return Ending(response.exit_code, pb.Status.Name(response.status), response.reason)
    code = -response.signal or response.exit_code
    return _ending(code, response.stdout, response.stderr, "/box")


async def run_plainly(runtime: Runtime, program: Program) -> Ending:
    """The program by the commands of its runtime, without a sandbox, in a session without a terminal."""
    with tempfile.TemporaryDirectory(prefix="differential-") as home:
        _write_source(Path(home, runtime.config.source), program.source)
        return await _run_commands(runtime, program, home)


def _write_source(path: Path, source: bytes) -> None:
    path.write_bytes(source)
    path.chmod(0o600)
    for owned in (path.parent, path):
        os.chown(owned, _UID, _UID)


async def _run_commands(runtime: Runtime, program: Program, home: str) -> Ending:
    environment = {**runtime.environment, **program.env}
    environment = {name: re.sub("^/(box|tmp)", home, value) for name, value in environment.items()}
    if runtime.config.compile:
        command = runtime.command(runtime.config.compile, 1 << 30)
        compiled = await _run(command, b"", home, environment)
        if compiled.code:
            return Ending(1, compiled.stdout, compiled.stderr)
    command = runtime.command(runtime.config.run, _MEMORY_BYTES)
    if runtime.python is not None:
        command = [runtime.python.path, runtime.config.source]
    return await _run([*command, *program.args], program.stdin, home, environment)


async def _run(command: list[str], stdin: bytes, home: str, environment: dict[str, str]) -> Ending:
    process = _start(command, home, environment)
    descriptor = os.pidfd_open(process.pid)
    try:
        streams = asyncio.create_task(asyncio.to_thread(process.communicate, stdin, _WAIT_S))
        await asyncio.to_thread(select.select, [descriptor], [], [], _WAIT_S)
    finally:
        os.close(descriptor)
        with contextlib.suppress(ProcessLookupError):  # what it leaves running ends with it, as in the sandbox
            os.killpg(process.pid, signal.SIGKILL)
    stdout, stderr = await streams
    return _ending(process.returncode, stdout, stderr, home)


def _start(command: list[str], home: str, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Starts a process of the user's, by a program: to change users itself Popen would fork, which gRPC's threads would
    notice.
    """
    pipes = [os.pipe() for _ in range(3)]
    for reader, _ in pipes:  # so that the user can open /dev/stdin and its like
        os.fchmod(reader, 0o666)
    (stdin, to_stdin), (from_stdout, stdout), (from_stderr, stderr) = pipes
    process = subprocess.Popen(
        ["env", "--default-signal", "setpriv", f"--reuid={_UID}", f"--regid={_UID}", "--clear-groups", *command],
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        cwd=home,
        env=environment,
        umask=0o077,
        start_new_session=True,
    )
    for end in (stdin, stdout, stderr):
        os.close(end)
    process.stdin, process.stdout = os.fdopen(to_stdin, "wb"), os.fdopen(from_stdout, "rb")
    process.stderr = os.fdopen(from_stderr, "rb")
    return process
