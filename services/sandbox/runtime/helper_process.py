"""Work that must not be left half done.

The resident processes at the box's side: each is started with a socket and its options, says when it is ready, and
is killed with all that it started.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from asyncio.subprocess import Process
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from perigee.errors import PerigeeError
from services.kit.telemetry import get_logger
from services.sandbox.agent import protocol
from services.sandbox.agent.protocol import ENVIRONMENT, Message, Packet, start_code

T = TypeVar("T")


async def finish(work: Coroutine[Any, Any, T]) -> T:
    """The result of work that is done to its end; whoever is cancelled meanwhile is told so when it is done.

    For what gives something back: a place that is only half emptied would be lost, or be another job's.
    """
    task = asyncio.create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with contextlib.suppress(asyncio.CancelledError):  # the first one is raised below
                await asyncio.wait({task})
        task.result()  # its own failure goes before
        raise


log = get_logger(__name__)

AGENT = Path(__file__).parents[1] / "agent"
"""Folder of the package that these processes run."""
_START_S = 60.0
_LAST_WORDS_S = 1.0
_WORDS_BYTES = 4096


class BoxFailedError(PerigeeError):
    """The box failed, not the program: the job may be tried again."""


class Attendant:
    """A process that runs a module of the `box` package."""

    def __init__(self, name: str, python: str, module: str, options: dict[str, Any]) -> None:
        self.name = name
        self.version = ""
        self._command = [python, "-I", "-c", start_code(str(AGENT.parent), module)]
        self._options = options
        self._process: Process | None = None
        self._channel: socket.socket | None = None
        self._listening: asyncio.Task[None] | None = None
        self._words = b""

    @property
    def channel(self) -> socket.socket:
        """The socket to the running process; raises BoxFailedError when it is not running."""
        if self._channel is None or self._process is None or self._process.returncode is not None:
            raise BoxFailedError(f"{self.name} is not running")
        return self._channel

    @property
    def running(self) -> bool:
        """Whether the process was started and has not ended."""
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        """Starts the process and waits until it is ready; raises BoxFailedError with its last words when it does not
        get there.
        """
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
        self._listening = asyncio.create_task(self._listen(self._process.stderr))
        try:
            async with asyncio.timeout(_START_S):
                message = await receive(ours)
        except (BoxFailedError, TimeoutError) as error:
            words = await self.last_words()
            raise BoxFailedError(f"{self.name} did not start: {words or error}") from error
        except BaseException:
            await self.kill()
            raise
        self.version = message.header["version"]

    async def _listen(self, stderr: asyncio.StreamReader) -> None:
        """Reads what the process says, and those that it forked: whoever has nobody to read it would wait for ever."""
        while words := await stderr.read(_WORDS_BYTES):
            self._words = (self._words + words)[-_WORDS_BYTES:]
            log.warning("attendant_says", attendant=self.name, words=words.decode(errors="replace").strip())

    async def kill(self) -> None:
        """Ends the process, also where the caller is cancelled meanwhile; what it forked dies with it."""
        await finish(self._kill())

    async def _kill(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
        if self._listening is not None:  # to the end, unless somebody else holds the pipe open
            await asyncio.wait({self._listening}, timeout=_LAST_WORDS_S)
            self._listening.cancel()
            await asyncio.gather(self._listening, return_exceptions=True)

    async def last_words(self) -> str:
        """Ends the process and returns what it wrote last to standard error."""
        await self.kill()
        return self._words.decode(errors="replace").strip()


async def receive(channel: socket.socket) -> Message:
    """The next message; raises BoxFailedError when the other side has gone or says that it failed."""
    return _read(await receive_packet(channel))


def receive_at_once(channel: socket.socket) -> Message | None:
    """A message that has come already, or None; errors as for `receive`."""
    try:
        return _read(protocol.receive_packet(channel))
    except BlockingIOError:
        return None
    except (EOFError, ConnectionError) as error:
        raise BoxFailedError(f"the box broke: {error}") from error


def _read(packet: Packet) -> Message:
    message = Message(json.loads(packet.data), packet.descriptors)
    if message.header["kind"] == "failed":
        message.close()
        raise BoxFailedError(message.header["reason"])
    return message


async def receive_packet(channel: socket.socket) -> Packet:
    """The next packet, from whoever sent it; raises BoxFailedError when the other side has gone."""
    while True:
        try:
            return protocol.receive_packet(channel)
        except BlockingIOError:
            await _until_readable(channel)
        except (EOFError, ConnectionError) as error:
            raise BoxFailedError(f"the box broke: {error}") from error


def send(channel: socket.socket, header: dict[str, Any], descriptors: list[int]) -> None:
    """Sends a message; raises BoxFailedError when the other side does not take it."""
    try:
        protocol.send(channel, header, descriptors)
    except OSError as error:
        raise BoxFailedError(f"the box takes no message: {error.strerror}") from error


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
