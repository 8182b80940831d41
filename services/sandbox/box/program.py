"""The process of a program that warm Python runs: forked from the keeper, confined, and then the submission's own."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from . import control, kernel, root
from .confine import Confinement, give_up_privileges, place_descriptors, take_limits
from .modes import rehearse, run_mode
from .orders import Order, read_order
from .supervise import Process
from .usage import UsageFiles

_NAMESPACES = kernel.CLONE_NEWNS | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS | kernel.CLONE_NEWNET
_UNFIT = 125
_INIT = f"{root.OWN_FOLDER}/init"


class Program(Process):
    """A program's process, its working folder, and what it told before it was confined."""

    def __init__(self, pid: int, channel: socket.socket) -> None:
        self.pid = pid
        self._channel = channel
        self._home = -1

    @abstractmethod
    def kill(self) -> None:
        """Ends everything that runs for it."""

    def settle(self, status: int | None, stopped: bool) -> int:
        """The status as it is; raises RuntimeError when the process could not be confined."""
        assert status is not None
        self._hear()
        return status

    def _hear(self) -> None:
        """Takes what the process told before it was confined; afterwards it has no way to tell anything."""
        while True:
            try:
                header, descriptors = control.receive(self._channel)
            except (BlockingIOError, EOFError, ConnectionError):
                return
            if header["kind"] == "unfit":
                raise RuntimeError(f"cannot confine the program: {header['reason']}")
            [self._home] = descriptors

    @contextmanager
    def opened_home(self) -> Iterator[int]:
        """The working folder, open, also when the program's namespaces are gone."""
        self._hear()
        if self._home < 0:
            raise RuntimeError("the program did not hand over its working folder")
        yield self._home

    def close(self) -> None:
        """Lets go of the working folder and all that is in it."""
        self._channel.close()
        if self._home >= 0:
            os.close(self._home)


class Isolated(Program):
    """A process in fresh namespaces, made before its order comes; an init in front of it reaps what it leaves."""

    def __init__(self, pid: int, channel: socket.socket, init: int, space_bytes: int, held_bytes: int) -> None:
        super().__init__(pid, channel)
        self._init = init
        self.space_bytes = space_bytes
        self.baseline_bytes = held_bytes

    @classmethod
    def prepare(cls, confinement: Confinement, space_bytes: int, usage: UsageFiles) -> Isolated:
        """Forks a process that waits for its order, beside an init, PID 1 of their namespace; its working folder and
        its /tmp have `space_bytes` each.
        """
        held_bytes = usage.current_bytes()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        own = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        kernel.unshare(kernel.CLONE_NEWPID)  # of the children to come, not of this process
        init = os.posix_spawn(_INIT, [_INIT], {})
        pid = os.fork()
        if pid == 0:
            ours.close()
            _await_order(confinement, space_bytes, theirs)
        kernel.enter_namespace(own, kernel.CLONE_NEWPID)  # so that the next program can have a namespace of its own
        os.close(own)
        theirs.close()
        ours.setblocking(False)
        return cls(pid, ours, init, space_bytes, held_bytes)

    def offer(self, channel: socket.socket) -> None:
        """Tells the service how to hand over the order itself, which then need not pass through here."""
        control.send(channel, {"kind": "prepared", "space_bytes": self.space_bytes}, [self._channel.fileno()])

    def begin(self, order: Order, descriptors: list[int]) -> None:
        """Hands the order over."""
        with contextlib.suppress(BrokenPipeError):  # it has ended, which the supervisor is about to see
            control.send(self._channel, order.to_header(), descriptors)

    def kill(self) -> None:
        """Ends the init, and with it, by the kernel's rule for PID 1, everything in the namespace."""
        os.kill(self._init, signal.SIGKILL)

    def discard(self) -> None:
        """Ends a process that was never given an order."""
        self.kill()
        for pid in (self.pid, self._init):
            os.waitpid(pid, 0)
        self.close()


class Plain(Program):
    """A process with nothing around it."""

    @classmethod
    def start(cls, confinement: Confinement, order: Order, descriptors: list[int]) -> Plain:
        """Forks the process of an order."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = os.fork()
        if pid == 0:
            ours.close()
            _run_at_once(confinement, order, descriptors, theirs)
        theirs.close()
        ours.setblocking(False)
        return cls(pid, ours)

    def kill(self) -> None:
        """Ends the process and its group; one that has ended already is not reaped yet, so its number is its own."""
        for target in (-self.pid, self.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(target, signal.SIGKILL)


def _await_order(confinement: Confinement, space_bytes: int, channel: socket.socket) -> NoReturn:
    """The prepared process: gives up everything before its order comes."""
    try:
        kernel.die_with_parent(signal.SIGKILL)
        kernel.unshare(_NAMESPACES)
        kernel.mount("proc", "/proc", "proc", root.PROC_FLAGS)
        kernel.set_hostname("box")
        assert confinement.uid is not None
        root.mount_writable(confinement.uid, space_bytes)
        give_up_privileges(confinement)
        rehearse()
        header, descriptors = control.receive(channel)
        order = read_order(header)
    except (EOFError, ConnectionError):
        os._exit(0)
    except Exception as error:
        _tell_unfit(channel, error)
    _run(confinement, order, descriptors, channel)


def _run_at_once(confinement: Confinement, order: Order, descriptors: list[int], channel: socket.socket) -> NoReturn:
    """A process that was forked for its order."""
    try:
        give_up_privileges(confinement)
    except Exception as error:
        _tell_unfit(channel, error)
    _run(confinement, order, descriptors, channel)


def _run(confinement: Confinement, order: Order, descriptors: list[int], channel: socket.socket) -> NoReturn:
    """Takes the order's limits and descriptors, and becomes the submission."""
    try:
        if order.collect or order.mode == "session":
            home = os.open(confinement.home, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            control.send(channel, {"kind": "home"}, [home])
        take_limits(confinement, order.limits, order.answers)
        place_descriptors(descriptors)
    except Exception as error:
        _tell_unfit(channel, error)
    try:
        os.environ.update(order.environment)
        if order.mode == "exec":
            os.execvpe(order.command[0], order.command, dict(os.environ))
        run_mode(order.mode, confinement.home)
    except BaseException as error:  # from here on it is the program's own failure, and so is what it says of it
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        sys.stderr.flush()
    finally:
        os._exit(127)


def _tell_unfit(channel: socket.socket, error: Exception) -> NoReturn:
    control.send(channel, {"kind": "unfit", "reason": f"{type(error).__name__}: {error}"}, [])
    os._exit(_UNFIT)
