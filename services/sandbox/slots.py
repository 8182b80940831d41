"""One slot: a launcher process and the socket over which jobs go in and what became of them comes out."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from typing import Any

from perigee.errors import PerigeeError
from services.kit.telemetry import get_logger
from services.sandbox.box import control
from services.sandbox.box.control import Message
from services.sandbox.box.limits import BoxLimits
from services.sandbox.isolation import ENVIRONMENT, Isolation, Place

log = get_logger(__name__)

_START_S = 30.0
_END_S = 10.0


class BoxFailedError(PerigeeError):
    """The box failed, not the program: the job may be tried again."""


class Slot:
    """Runs one job at a time; after a failure or a cancelled job it is killed and started again."""

    def __init__(self, isolation: Isolation, place: Place) -> None:
        self.place = place
        self.version = ""
        self._isolation = isolation
        self._process: Process | None = None
        self._channel: socket.socket | None = None
        self._watch: asyncio.Task[None] | None = None
        self.idle = False

    async def start(self) -> None:
        """Starts the launcher and waits until it is ready; raises BoxFailedError with its last words when it does not
        get there.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        self._channel = ours
        try:
            options = {**self._isolation.base_options(self.place), "control": theirs.fileno()}
            self._process = await asyncio.create_subprocess_exec(
                *self._isolation.launcher_command(),
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
        try:
            async with asyncio.timeout(_START_S):
                message = await self._receive()
        except (BoxFailedError, TimeoutError) as error:
            words = await self._last_words()
            raise BoxFailedError(f"the launcher of slot {self.place.index} did not start: {words or error}") from error
        except BaseException:
            await self.kill()
            raise
        self._watch = asyncio.create_task(self._close_when_launcher_ends(self._process, ours))
        self.version = message.header["version"]
        self.idle = True

    async def _close_when_launcher_ends(self, process: Process, channel: socket.socket) -> None:
        """An agent holds the socket too, so that the launcher's end alone would not close it."""
        await process.wait()
        with contextlib.suppress(OSError):  # the agent's end has closed it already
            channel.shutdown(socket.SHUT_RDWR)

    async def messages(self, header: dict[str, Any], job: int, limits: BoxLimits) -> AsyncIterator[Message]:
        """Runs the job in a file and yields what is told of it, `end` included; raises BoxFailedError when the slot
        breaks.
        """
        assert self._channel is not None
        self.idle = False
        cgroup = self.place.cgroup
        try:
            self._isolation.configure(self.place, limits)
            kills_before = cgroup.oom_kills() if cgroup else 0
            control.send(self._channel, header, [job])
        except OSError as error:
            raise BoxFailedError(f"slot {self.place.index} takes no job: {error}") from error
        while not self.idle:
            try:
                message = await self._receive()
            except BoxFailedError:
                if cgroup is None or cgroup.oom_kills() == kills_before:
                    raise
                yield Message({"kind": "end", "killed_for_memory": True}, [])  # the slot stays broken
                return
            self.idle = message.header["kind"] == "end"
            yield message

    def answer(self, go_on: bool) -> None:
        """Tells an agent that waits whether to run the next test."""
        assert self._channel is not None
        control.send(self._channel, {"go_on": go_on}, [])

    async def kill(self) -> None:
        """Ends the launcher and, through it, everything in the slot; returns when it is gone."""
        self.idle = False
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait([self._watch])
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
        await self._empty_cgroup()
        await asyncio.to_thread(self._isolation.clean, self.place)

    async def _empty_cgroup(self) -> None:
        """Ends what did not end with the launcher, such as a container that was being made."""
        cgroup = self.place.cgroup
        try:
            async with asyncio.timeout(_END_S):
                while cgroup is not None and (processes := cgroup.processes()):
                    for pid in processes:
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)
                    await asyncio.sleep(0.002)  # a killed process leaves its group a moment later and tells nobody
        except TimeoutError:
            log.error("slot_not_empty", slot=self.place.index)

    async def _receive(self) -> Message:
        assert self._channel is not None
        while True:
            try:
                return control.receive(self._channel)
            except BlockingIOError:
                await _until_readable(self._channel)
            except (EOFError, ConnectionError) as error:
                raise BoxFailedError(f"slot {self.place.index} broke: {error}") from error

    async def _last_words(self) -> str:
        assert self._process is not None
        process = self._process
        await self.kill()
        assert process.stderr is not None
        return (await process.stderr.read()).decode(errors="replace").strip()


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
