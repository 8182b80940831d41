"""The trusted process of a warm box, PID 1 in it: takes orders from the service and reports what became of each.

It is the only thing in the box that holds the socket to the service; when that closes it ends, and with it, by the
kernel's rule for PID 1, everything in the box.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import socket
import sys
from dataclasses import asdict
from typing import Any, NoReturn

from . import control, kernel, root
from .collect import collect_files
from .confine import Confinement, confine
from .control import Message
from .files import own_files, read_files, write_files
from .modes import run_mode
from .orders import Order, read_order
from .supervise import Process, Supervisor
from .usage import UsageFiles

_NOTE_BYTES = 1024
_UNFIT = 125


class Fork(Process):
    """A child of this process; its note tells why it could not be confined."""

    def __init__(self, pid: int, note: mmap.mmap) -> None:
        self.pid = pid
        self._note = note

    def kill(self) -> None:
        """Ends the process and its group; one that has ended already is not reaped yet, so its number is its own."""
        for target in (-self.pid, self.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(target, signal.SIGKILL)

    def settle(self, status: int, stopped: bool) -> int:
        """The status as it is; raises RuntimeError with the note."""
        if note := self._note[:_NOTE_BYTES].rstrip(b"\0"):
            raise RuntimeError(f"cannot confine the program: {note.decode(errors='replace')}")
        return status


class Box:
    """Runs the orders of one job, one after another, each in an empty box."""

    def __init__(self, channel: socket.socket, confinement: Confinement, usage: UsageFiles | None) -> None:
        self._channel = channel
        self._confinement = confinement
        self._isolated = os.getpid() == 1
        self._supervisor = Supervisor(channel, usage)
        self._program = 0

    def serve(self) -> NoReturn:
        """Serves until the service closes the socket."""
        while True:
            message = control.receive(self._channel)
            match message.header["kind"]:
                case "run":
                    self._run(message)
                case "begin":
                    self._lay_down(message.descriptors[0])
                case "end":
                    control.send(self._channel, {"kind": "cleared"}, [])
            message.close()

    def _lay_down(self, files: int) -> None:
        """Files into a folder that all runs of a job share: there is no other where nothing can be mounted."""
        write_files(self._confinement.home, read_files(files))
        if self._confinement.uid is not None:
            own_files(self._confinement.home, self._confinement.uid)

    def _run(self, message: Message) -> None:
        order = read_order(message.header)
        if self._isolated:
            assert self._confinement.uid is not None
            root.mount_writable(self._confinement.uid, order.limits.file_bytes)
        descriptors = message.descriptors[:-1] if order.brings_files else message.descriptors
        if order.brings_files:
            self._lay_down(message.descriptors[-1])
        outcome = self._supervisor.run(order, descriptors, lambda handed: self._start(order, handed), self._hear)
        self._clear()
        found = collect_files(self._confinement.home, order.collect, order.collect_bytes)
        if self._isolated:  # before the end is told, so that the next job is not charged with these files
            root.unmount_writable()
        control.send(self._channel, {"kind": "ended", **asdict(outcome)}, [] if found is None else [found])
        if found is not None:
            os.close(found)

    def _start(self, order: Order, descriptors: list[int]) -> Process:
        note = mmap.mmap(-1, mmap.PAGESIZE)
        self._program = os.fork()
        if self._program:
            return Fork(self._program, note)
        try:
            confine(self._confinement, order.limits, order.answers, descriptors)
            note.close()
            os.environ.update(order.environment)
            if order.mode == "exec":
                os.execvpe(order.command[0], order.command, dict(os.environ))
            run_mode(order.mode, self._confinement.home)
        except OSError as error:
            self._tell(note, error)
            os._exit(127)
        except Exception as error:
            self._tell(note, error)
        finally:
            os._exit(_UNFIT)

    def _tell(self, note: mmap.mmap, error: Exception) -> None:
        if note.closed:  # confined: from here on it is the program's own failure, and so is what it says of it
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            sys.stderr.flush()
            return
        text = f"{type(error).__name__}: {error}".encode()[:_NOTE_BYTES]
        note[:_NOTE_BYTES] = text.ljust(_NOTE_BYTES, b"\0")

    def _hear(self, header: dict[str, Any]) -> None:
        """What the service asks while a program runs: to interrupt it, or for files that it has written."""
        if header["kind"] == "interrupt":
            with contextlib.suppress(ProcessLookupError):
                os.kill(-self._program, signal.SIGINT)
        elif header["kind"] == "collect":
            found = collect_files(self._confinement.home, header["paths"], header["bytes"])
            assert found is not None
            control.send(self._channel, {"kind": "collected"}, [found])
            os.close(found)

    def _clear(self) -> None:
        """Ends everything in the box but this process, so that the next run starts alone."""
        if self._isolated:
            with contextlib.suppress(ProcessLookupError):  # nobody is left
                os.kill(-1, signal.SIGKILL)
        self._supervisor.clear()


def become_box(channel: socket.socket, confinement: Confinement, usage: UsageFiles | None) -> NoReturn:
    """The box's process from here to its end; a failure of its own is told to the service by a message `failed`."""
    kernel.set_dumpable(False)
    try:
        Box(channel, confinement, usage).serve()
    except (EOFError, ConnectionError):
        os._exit(0)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        sys.stderr.write(f"sandbox box: {reason}\n")
        with contextlib.suppress(OSError):  # the service has gone away: nobody is left to be told
            control.send(channel, {"kind": "failed", "reason": reason}, [])
        os._exit(4)
