"""An open box: runs the orders of one job, one after another, and hands back what the box tells."""

from __future__ import annotations

import asyncio
import os
import select
import shutil
import socket
from dataclasses import dataclass
from typing import Any

from services.sandbox.attendants import BoxFailedError, receive, receive_at_once, send
from services.sandbox.box.control import memory_file
from services.sandbox.box.orders import Order, Outcome
from services.sandbox.box.payload import Parcel, read_parcel
from services.sandbox.places import Place

_ANSWER_S = 30.0
_GRACE_S = 15.0


@dataclass(frozen=True)
class Ended:
    """How a process ended, and the files that were collected after it."""

    outcome: Outcome
    files: Parcel | None = None


class Box:
    """The service's end of a box; whoever opened it closes it."""

    def __init__(self, channel: socket.socket, place: Place, home: str = "") -> None:
        self.channel = channel
        self.place = place
        self._home = home
        self._prepared: tuple[int, int] | None = None
        """Space of a program that waits for its order, and the descriptor by which it takes it."""
        self.broken = False
        """Whether the box must not be used again."""
        self._running = False
        self._collected: asyncio.Future[Parcel] | None = None

    async def run(self, order: Order, descriptors: list[int]) -> Ended:
        """Runs a process to its end. Being cancelled ends it; raises BoxFailedError when the box breaks."""
        self.place.limit(order.limits.memory_bytes, order.limits.processes)
        kills_before = self.place.oom_kills()
        runs_s = max(1, order.answers) * order.limits.wall_ms / 1000
        try:
            async with asyncio.timeout(runs_s + _GRACE_S):
                return await self._run(order, descriptors)
        except BoxFailedError as error:
            self.broken = True
            if self.place.oom_kills() == kills_before:
                raise BoxFailedError(f"{self.place.name}: {error.message}") from error
            return Ended(Outcome("memory", None, 9, peak_bytes=order.limits.memory_bytes))
        except TimeoutError as error:
            self.broken = True
            raise BoxFailedError(f"{self.place.name} overran the limits of its job") from error
        except BaseException:
            self.broken = True
            raise

    async def _run(self, order: Order, descriptors: list[int]) -> Ended:
        header = order.to_header()
        prepared = self._take_prepared(order)
        if prepared is not None:  # the keeper hears of it at the same time, and only watches
            with socket.socket(fileno=prepared) as program:
                send(program, header, descriptors)
            header["begun"] = True
        send(self.channel, header, descriptors)
        self._running = True
        try:
            while True:
                message = await receive(self.channel)
                if message.header["kind"] == "collected":
                    self._hand_over(message.descriptors)
                    continue
                if message.header["kind"] == "prepared":  # of the program that runs already
                    message.close()
                    continue
                fields = {name: value for name, value in message.header.items() if name != "kind"}
                try:
                    files = read_parcel(message.descriptors[0]) if message.descriptors else None
                finally:
                    message.close()
                return Ended(Outcome(**fields), files)
        finally:
            self._running = False
            if self._collected is not None and not self._collected.done():
                self._collected.set_exception(BoxFailedError("the process has ended before its files were collected"))

    def _take_prepared(self, order: Order) -> int | None:
        """The descriptor of a program that was prepared for such an order; the caller closes it."""
        while (message := receive_at_once(self.channel)) is not None:
            self._drop_prepared()
            self._prepared = (message.header["space_bytes"], message.descriptors[0])
        if self._prepared is None:
            return None
        space_bytes, descriptor = self._prepared
        fits = space_bytes == order.limits.file_bytes and not order.answers and not order.brings_files
        if not fits:
            self._drop_prepared()
            return None
        self._prepared = None
        return descriptor

    def _drop_prepared(self) -> None:
        if self._prepared is not None:
            os.close(self._prepared[1])
            self._prepared = None

    def _hand_over(self, descriptors: list[int]) -> None:
        parcel = read_parcel(descriptors[0])
        os.close(descriptors[0])
        if self._collected is not None and not self._collected.done():
            self._collected.set_result(parcel)

    def close(self) -> None:
        """Lets go of a box that ends with its job."""
        self._drop_prepared()
        self.channel.close()
        if self._home:
            shutil.rmtree(self._home, ignore_errors=True)

    async def dismiss(self) -> None:
        """Has the keeper end, and waits until it has: what it still does is charged to its place."""
        try:
            self._drop_prepared()
            self.channel.shutdown(socket.SHUT_WR)
            async with asyncio.timeout(_ANSWER_S):
                while True:
                    (await receive(self.channel)).close()
        except (BoxFailedError, OSError):  # it has ended
            return
        finally:
            self.close()

    def stop(self) -> None:
        """Ends the process that runs now; its outcome follows."""
        if self._running:
            send(self.channel, {"kind": "stop"}, [])

    def interrupt(self) -> None:
        """Sends SIGINT to the process that runs now."""
        send(self.channel, {"kind": "interrupt"}, [])

    async def collect(self, paths: list[str], most_bytes: int) -> Parcel:
        """Files of the process that runs now; raises BoxFailedError when it ends before they are there."""
        if not self._running:
            raise BoxFailedError("no process runs whose files could be collected")
        send(self.channel, {"kind": "collect", "paths": paths, "bytes": most_bytes}, [])
        self._collected = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(_ANSWER_S):
                return await self._collected
        except TimeoutError as error:
            raise BoxFailedError(f"the files of {self.place.name} are not handed over") from error
        finally:
            self._collected = None

    async def begin(self, header: dict[str, Any], files: bytes) -> None:
        """Lays down a parcel with the files of a job; for boxes that keep them from run to run."""
        parcel = memory_file(files)
        try:
            send(self.channel, {"kind": "begin", **header}, [parcel])
        finally:
            os.close(parcel)

    def end(self) -> None:
        """Has the files of the job taken away before the next job's come."""
        send(self.channel, {"kind": "end"}, [])


def has_ended(box: Box) -> bool:
    """Whether a box that waits for its job is gone already."""
    poller = select.poll()
    poller.register(box.channel, 0)  # POLLHUP and POLLERR are always told
    return bool(poller.poll(0))
