"""One slot: a launcher process and the socket over which jobs go in and frames come out."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from typing import Any

from perigee.errors import PerigeeError
from services.kit.telemetry import get_logger
from services.sandbox.box import wire
from services.sandbox.box.agent import GO_ON
from services.sandbox.box.limits import BoxLimits
from services.sandbox.isolation import ENVIRONMENT, Isolation, Place

log = get_logger(__name__)

_START_S = 30.0
_END_S = 10.0
STOP = b"s"


class BoxFailedError(PerigeeError):
    """The box failed, not the program: the job may be tried again."""


class Slot:
    """Runs one job at a time; after a failure or a cancelled job it is killed and started again."""

    def __init__(self, isolation: Isolation, place: Place) -> None:
        self.place = place
        self.version = ""
        self._isolation = isolation
        self._process: Process | None = None
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._watch: asyncio.Task[None] | None = None
        self.idle = False

    async def start(self) -> None:
        """Starts the launcher and waits until it is ready; raises BoxFailedError with its last words when it does not
        get there.
        """
        ours, theirs = socket.socketpair()
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
            self._reader, self._writer = await asyncio.open_connection(sock=ours)
        except BaseException:
            ours.close()
            await self.kill()
            raise
        finally:
            theirs.close()
        try:
            async with asyncio.timeout(_START_S):
                frame = await self._read_frame()
        except (BoxFailedError, TimeoutError) as error:
            words = await self._last_words()
            raise BoxFailedError(f"the launcher of slot {self.place.index} did not start: {words or error}") from error
        except BaseException:
            await self.kill()
            raise
        self._watch = asyncio.create_task(self._close_when_launcher_ends(self._process, self._writer))
        self.version = frame.header["version"]
        self.idle = True

    async def _close_when_launcher_ends(self, process: Process, writer: asyncio.StreamWriter) -> None:
        """An agent holds the socket too, so that the launcher's end alone would not close it."""
        await process.wait()
        writer.transport.abort()

    async def frames(self, header: dict[str, Any], blobs: list[bytes], limits: BoxLimits) -> AsyncIterator[wire.Frame]:
        """Runs a job and yields its frames, `end` included; raises BoxFailedError when the slot breaks."""
        assert self._writer is not None
        self.idle = False
        try:
            self._isolation.configure(self.place, limits)
        except OSError as error:
            raise BoxFailedError(f"the limits of slot {self.place.index} cannot be set: {error}") from error
        self._writer.write(wire.encode(header, blobs))
        while True:
            frame = await self._read_frame()
            self.idle = frame.header["kind"] == "end"
            yield frame
            if self.idle:
                return

    def answer(self, go_on: bool) -> None:
        """Tells an agent that waits whether to run the next test."""
        assert self._writer is not None
        self._writer.write(GO_ON if go_on else STOP)

    async def kill(self) -> None:
        """Ends the launcher and, through it, everything in the slot; returns when it is gone."""
        self.idle = False
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait([self._watch])
        if self._writer is not None:
            self._writer.close()
            with contextlib.suppress(ConnectionError):
                await self._writer.wait_closed()
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
        await asyncio.to_thread(self._isolation.clean, self.place)
        await self._wait_until_empty()

    async def _wait_until_empty(self) -> None:
        cgroup = self.place.cgroup
        try:
            async with asyncio.timeout(_END_S):
                # the kernel empties a killed group a moment later and tells nobody
                while cgroup is not None and cgroup.processes():  # noqa: ASYNC110
                    await asyncio.sleep(0.002)
        except TimeoutError:
            log.error("slot_not_empty", slot=self.place.index, processes=cgroup.processes() if cgroup else [])

    async def _read_frame(self) -> wire.Frame:
        assert self._reader is not None
        try:
            total, header_length = wire.decode_prefix(await self._reader.readexactly(wire.PREFIX.size))
            return wire.decode_body(await self._reader.readexactly(total), header_length)
        except (asyncio.IncompleteReadError, ConnectionError, ValueError) as error:
            raise BoxFailedError(f"slot {self.place.index} broke: {error}") from error

    async def _last_words(self) -> str:
        assert self._process is not None
        process = self._process
        await self.kill()
        assert process.stderr is not None
        return (await process.stderr.read()).decode(errors="replace").strip()
