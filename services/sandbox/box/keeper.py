"""The trusted process of a place where warm Python runs: takes orders from the service, has each run by a process that
was prepared before the order came, and reports what became of it.

It stays outside of the namespaces of its jobs. It is the only one that holds the socket to the service; when that
closes it ends, and all that it started ends with it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from typing import Any, NoReturn

from . import control, kernel
from .collect import collect_files
from .confine import Confinement
from .control import Message
from .files import own_files, read_files, write_files
from .orders import Order, read_order
from .program import Isolated, Plain, Program
from .supervise import Supervisor
from .usage import UsageFiles

_FIRST_SPACE_BYTES = 16 << 20
_SMALL_BYTES = 4 << 20


class Keeper:
    """Runs the orders of one job after another, each in namespaces of its own."""

    def __init__(
        self, channel: socket.socket, confinement: Confinement, usage: UsageFiles | None, isolated: bool
    ) -> None:
        self._channel = channel
        self._confinement = confinement
        self._isolated = isolated
        self._usage = usage
        self._supervisor = Supervisor(channel, usage)
        self._prepared: Isolated | None = None
        self._program: Program | None = None
        self._space_bytes = _FIRST_SPACE_BYTES

    def serve(self) -> NoReturn:
        """Serves until the service closes the socket."""
        while True:
            if self._isolated and self._prepared is None:
                self._prepared = self._prepare()
                self._prepared.offer(self._channel)
            message = control.receive(self._channel)
            match message.header["kind"]:
                case "run":
                    self._run(message)
                case "begin":
                    self._lay_down(message.descriptors[0])
            message.close()

    def _prepare(self) -> Isolated:
        assert self._usage is not None
        return Isolated.prepare(self._confinement, self._space_bytes, self._usage)

    def discard_prepared(self) -> None:
        """Ends the program that waits for an order, so that nothing is left to be reaped by others."""
        if self._prepared is not None:
            self._prepared.discard()

    def _lay_down(self, files: int) -> None:
        """Files into a folder that all runs of a job share: there is no other where nothing can be mounted."""
        write_files(self._confinement.home, read_files(files))
        if self._confinement.uid is not None:
            own_files(self._confinement.home, self._confinement.uid)

    def _run(self, message: Message) -> None:
        order = read_order(message.header)
        descriptors = message.descriptors[:-1] if order.brings_files else message.descriptors
        if order.brings_files:
            self._lay_down(message.descriptors[-1])
        begun = message.header.get("begun", False)
        outcome = self._supervisor.run(order, descriptors, lambda handed: self._start(order, handed, begun), self._hear)
        assert self._program is not None
        found: list[int] = []
        if order.collect:
            self._supervisor.clear()  # nobody is left to change the files
            with self._program.opened_home() as home:
                found.append(collect_files(home, order.collect, order.collect_bytes))
        small = self._supervisor.held_bytes() < _SMALL_BYTES
        if not small:  # before the end is told, so that the next job is not charged with this one's memory
            self._let_go()
        control.send(self._channel, {"kind": "ended", **vars(outcome)}, found)
        for file in found:
            os.close(file)
        if small:
            self._let_go()

    def _let_go(self) -> None:
        """Waits until everything that ran for the job is gone, and forgets its files."""
        self._supervisor.clear()
        assert self._program is not None
        self._program.close()
        self._program = None

    def _start(self, order: Order, descriptors: list[int], begun: bool) -> Program:
        if self._isolated:
            program, self._prepared = self._prepared, None
            assert program is not None
            if not begun and program.space_bytes != order.limits.file_bytes:  # the next orders are likely to be alike
                self._space_bytes = order.limits.file_bytes
                program.discard()
                program = self._prepare()
            if not begun:
                program.begin(order, descriptors)
            self._program = program
        else:
            self._program = Plain.start(self._confinement, order, descriptors)
        return self._program

    def _hear(self, header: dict[str, Any]) -> None:
        """What the service asks while a program runs: to interrupt it, or for files that it has written."""
        assert self._program is not None
        if header["kind"] == "interrupt":
            with contextlib.suppress(ProcessLookupError):
                os.kill(-self._program.pid, signal.SIGINT)
        elif header["kind"] == "collect":
            with self._program.opened_home() as home:
                found = collect_files(home, header["paths"], header["bytes"])
            control.send(self._channel, {"kind": "collected"}, [found])
            os.close(found)


def become_keeper(
    channel: socket.socket, confinement: Confinement, usage: UsageFiles | None, isolated: bool
) -> NoReturn:
    """The keeper's process from here to its end; a failure of its own is told to the service by a message `failed`."""
    kernel.set_dumpable(False)
    keeper = Keeper(channel, confinement, usage, isolated)
    try:
        keeper.serve()
    except (EOFError, ConnectionError):
        keeper.discard_prepared()
        os._exit(0)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        sys.stderr.write(f"sandbox keeper: {reason}\n")
        with contextlib.suppress(OSError):  # the service has gone away: nobody is left to be told
            control.send(channel, {"kind": "failed", "reason": reason}, [])
        os._exit(4)
