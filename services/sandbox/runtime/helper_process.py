"""Helper processes of the sandbox: each runs a module of the `agent` package, talks over a socket, reports when it is
ready, and is killed with all that it started.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from asyncio.subprocess import Process
from pathlib import Path
from typing import Any

from services.kit.tasks import finish
from services.kit.telemetry import get_logger
from services.sandbox.agent import ENVIRONMENT, protocol, start_code
from services.sandbox.agent.protocol import Message, Packet
from services.sandbox.runtime.failure import SandboxFailedError

log = get_logger(__name__)

AGENT = Path(__file__).parents[1] / "agent"
"""Folder of the package that these processes run."""
_START_S = 60.0
_LAST_OUTPUT_S = 1.0
_OUTPUT_BYTES = 4096


class HelperProcess:
    """Process that runs a module of the `agent` package."""

    def __init__(self, name: str, python: str, module: str, options: dict[str, Any]) -> None:
        self.name = name
        self.version = ""
        self._command = [python, "-I", "-c", start_code(str(AGENT.parent), module)]
        self._options = options
        self._process: Process | None = None
        self._channel: socket.socket | None = None
        self._reading: asyncio.Task[None] | None = None
        self._output = b""

    @property
    def channel(self) -> socket.socket:
        """Socket to the running process; raises SandboxFailedError when it is not running."""
        if self._channel is None or self._process is None or self._process.returncode is not None:
            raise SandboxFailedError(f"{self.name} is not running")
        return self._channel

    @property
    def running(self) -> bool:
        """Whether the process was started and has not ended."""
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        """Starts the process and waits until it is ready; raises SandboxFailedError with its last output."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        self._channel = ours
        try:
            options = {**self._options, "control": theirs.fileno(), "parent": os.getpid()}
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                json.dumps(options),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                env=ENVIRONMENT,
                cwd="/",
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        except BaseException:
            await self.kill()
            raise
        finally:
            theirs.close()
        assert self._process.stderr is not None
        self._reading = asyncio.create_task(self._read_output(self._process.stderr))
        try:
            async with asyncio.timeout(_START_S):
                message = await receive(ours)
        except (SandboxFailedError, TimeoutError) as error:
            output = await self.last_output()
            raise SandboxFailedError(f"{self.name} did not start: {output or error}") from error
        except BaseException:
            await self.kill()
            raise
        self.version = message.header["version"]

    async def _read_output(self, stderr: asyncio.StreamReader) -> None:
        """Reads what the process and its forks write to standard error, so that they never block on a full pipe."""
        while output := await stderr.read(_OUTPUT_BYTES):
            self._output = (self._output + output)[-_OUTPUT_BYTES:]
            log.warning("helper_process_output", process=self.name, output=output.decode(errors="replace").strip())

    async def kill(self) -> None:
        """Ends the process, also when the caller is cancelled meanwhile; its forks die with it."""
        await finish(self._kill())

    async def _kill(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
        if self._reading is not None:  # to the end, unless another process holds the pipe open
            await asyncio.wait({self._reading}, timeout=_LAST_OUTPUT_S)
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)

    async def last_output(self) -> str:
        """Ends the process and returns the end of its standard error."""
        await self.kill()
        return self._output.decode(errors="replace").strip()


async def receive(channel: socket.socket) -> Message:
    """Receives the next message; raises SandboxFailedError when the other end is gone or reports a failure."""
    return _read(await receive_packet(channel))


def _read(packet: Packet) -> Message:
    message = Message(json.loads(packet.data), packet.descriptors)
    if message.header["kind"] == "failed":
        message.close()
        raise SandboxFailedError(message.header["reason"])
    return message


async def receive_packet(channel: socket.socket) -> Packet:
    """Receives the next packet, whatever is in it; raises SandboxFailedError when the other end is gone."""
    while True:
        try:
            return protocol.receive_packet(channel)
        except BlockingIOError:
            await _until_readable(channel)
        except (EOFError, ConnectionError) as error:
            raise SandboxFailedError(f"the sandbox broke: {error}") from error


def send(channel: socket.socket, header: dict[str, Any], descriptors: list[int]) -> None:
    """Sends a message; raises SandboxFailedError when the other end does not take it."""
    try:
        protocol.send(channel, header, descriptors)
    except OSError as error:
        raise SandboxFailedError(f"the sandbox takes no message: {error.strerror}") from error


async def _until_readable(channel: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    readable: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not readable.done():
            readable.set_result(None)

    loop.add_reader(channel, wake)
    try:
        await readable
    finally:
        loop.remove_reader(channel)
