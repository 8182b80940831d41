"""`perigee sandbox run`: one program, its output as it is written, its exit code."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from perigee.cli.sandbox.connection import (
    check_relative,
    check_size,
    language_of,
    megabytes,
    open_sandbox,
    read_bytes,
    read_input_file,
    wall_seconds,
)
from perigee.errors import InternalError, InvalidArgumentError
from perigee.files import write_atomically
from perigee.rpc import ChannelOptions
from perigee.sandbox.client import SandboxClient
from perigee.sandbox.v1 import sandbox_pb2 as pb

# A call's deadline beyond the program's own limits: the wait in the queue, and the compiler.
QUEUE_S = 300.0
COMPILE_S = 60.0
TIME_LIMIT_CODE = 124
INFRA_CODE = 125
COMPILE_CODE = 126
PIPE_CODE = 128 + signal.SIGPIPE
_CODES: Mapping[int, int] = {
    pb.STATUS_TIME_LIMIT: TIME_LIMIT_CODE,
    pb.STATUS_MEMORY_LIMIT: 128 + signal.SIGKILL,
    pb.STATUS_OUTPUT_LIMIT: 128 + signal.SIGXFSZ,
    pb.STATUS_COMPILE_ERROR: COMPILE_CODE,
    pb.STATUS_INFRA_ERROR: INFRA_CODE,
    pb.STATUS_UNSPECIFIED: INFRA_CODE,
}


def make_request(
    file: Path,
    arguments: Sequence[str] = (),
    language: str | None = None,
    stdin: str | None = None,
    files: Sequence[str] = (),
    outputs: Sequence[str] = (),
    env: Sequence[str] = (),
    limits: pb.Limits | None = None,
) -> pb.ExecuteRequest:
    """Returns the request of the command's options; `stdin` is a file, or "-" for standard input.

    Raises InvalidArgumentError naming an invalid option.
    """
    request = pb.ExecuteRequest(
        language=language or language_of(file),
        source=read_bytes(file),
        args=arguments,
        limits=limits,
        files=[read_input_file("--file", name) for name in files],
        env=dict(_split(text) for text in env),
        output_files=[check_relative("--output", name) for name in outputs],
    )
    if stdin is not None:
        request.stdin = sys.stdin.buffer.read() if stdin == "-" else read_bytes(Path(stdin))
    check_size(request, str(file))
    return request


async def run(
    address: str,
    channel: ChannelOptions,
    request: pb.ExecuteRequest,
    name: str,
    output_folder: Path,
    with_stats: bool,
) -> int:
    """Runs the program and returns the exit code to end with; `name` is the program's in messages."""
    async with open_sandbox(address, channel) as sandbox:
        runtime = sandbox.find_runtime(request.language, name)
        deadline_s = QUEUE_S + COMPILE_S + 2 * wall_seconds(runtime, request.limits)
        try:
            response = await _stream(sandbox.client, request, deadline_s)
        except BrokenPipeError:  # the reader of the output is gone
            return PIPE_CODE
    if response.status == pb.STATUS_COMPILE_ERROR:
        _write(2, response.compile.stdout + response.compile.stderr)
    for line in describe_end(name, response):
        print(f"perigee: {line}", file=sys.stderr)
    fetched = _keep_outputs(output_folder, request, response)
    if with_stats:
        print(stats_line(response), file=sys.stderr)
    code = exit_code(response)
    return code if code or fetched else 1


def leave() -> None:
    """Ends the process at once, even while it waits for a reader of its output."""
    os._exit(128 + signal.SIGINT)


def exit_code(response: pb.ExecuteResponse) -> int:
    """Returns the exit code for a response."""
    if response.status in _CODES:
        return _CODES[response.status]
    if response.signal:
        return 128 + response.signal
    # a program that failed never gives 0
    return response.exit_code if response.exit_code > 0 else int(response.status != pb.STATUS_OK)


def describe_end(name: str, response: pb.ExecuteResponse) -> list[str]:
    """Describes the end of the program beyond its own output, in lines."""
    reason = f": {response.reason}" if response.reason else ""
    lines = []
    if response.status == pb.STATUS_COMPILE_ERROR:
        lines.append(f"{name} does not compile{reason}")
    elif response.status in (pb.STATUS_INFRA_ERROR, pb.STATUS_UNSPECIFIED):
        lines.append(f"the sandbox failed{reason}; try again")
    elif response.status in _CODES:
        status = pb.Status.Name(response.status).removeprefix("STATUS_").lower().replace("_", " ")
        lines.append(f"{name} was ended: {response.reason or status}")
    elif response.signal:
        lines.append(f"{name} was ended by {_signal_name(response.signal)}")
    streams = (("standard output", response.stdout_truncated), ("standard error", response.stderr_truncated))
    return lines + [f"{stream} of {name} is cut at the output limit" for stream, is_cut in streams if is_cut]


def stats_line(response: pb.ExecuteResponse) -> str:
    """Returns time and memory in one line."""
    line = f"wall {response.wall_ms} ms, CPU {response.cpu_ms} ms, memory {megabytes(response.peak_memory_bytes)}"
    return f"{line}, compiler {response.compile.wall_ms} ms" if response.HasField("compile") else line


async def _stream(client: SandboxClient, request: pb.ExecuteRequest, deadline_s: float) -> pb.ExecuteResponse:
    events = client.execute_stream(request, timeout_s=deadline_s)
    async for event in events:
        match event.WhichOneof("event"):
            case "stdout":
                await asyncio.to_thread(_write, 1, event.stdout)
            case "stderr":
                await asyncio.to_thread(_write, 2, event.stderr)
            case "finished":
                return event.finished
    raise InternalError("the sandbox ended the stream before the program ended")


def _write(descriptor: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]


def _keep_outputs(folder: Path, request: pb.ExecuteRequest, response: pb.ExecuteResponse) -> bool:
    """Writes the requested files; returns false, and prints a line for each, when some are missing."""
    if response.status in (pb.STATUS_COMPILE_ERROR, pb.STATUS_INFRA_ERROR):
        return False  # it was not run, which is reported already
    found = {output.path: output for output in response.files}
    complete = True
    for name in request.output_files:
        output = found.get(name, pb.OutputFile(error="the sandbox did not return it"))
        if error := output.error or ("is larger than what the sandbox returns" if output.truncated else ""):
            print(f"perigee: --output {name}: {error}", file=sys.stderr)
            complete = False
        else:
            write_atomically(folder / name, output.content)
    return complete


def _split(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise InvalidArgumentError.for_field("--env", f"{text!r} is not of the form NAME=VALUE")
    return name, value


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
