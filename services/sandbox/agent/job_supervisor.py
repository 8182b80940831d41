"""The process of a program that warm Python runs: forked from the keeper, confined, and then the submission's own.

The trusted process of a place where warm Python runs: takes orders from the service, has each run by a process that
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
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from . import kernel, protocol, root
from .archive import own_files, read_files, write_files
from .collect import collect_files
from .confinement import Confinement, give_up_privileges, place_descriptors, take_limits
from .modes import rehearse, run_mode
from .monitor import Process, Supervisor, UsageFiles
from .protocol import Message, Order, read_order

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
                header, descriptors = protocol.receive(self._channel)
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
        protocol.send(channel, {"kind": "prepared", "space_bytes": self.space_bytes}, [self._channel.fileno()])

    def begin(self, order: Order, descriptors: list[int]) -> None:
        """Hands the order over."""
        with contextlib.suppress(BrokenPipeError):  # it has ended, which the supervisor is about to see
            protocol.send(self._channel, order.to_header(), descriptors)

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
        header, descriptors = protocol.receive(channel)
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
            protocol.send(channel, {"kind": "home"}, [home])
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
    protocol.send(channel, {"kind": "unfit", "reason": f"{type(error).__name__}: {error}"}, [])
    os._exit(_UNFIT)


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
            message = protocol.receive(self._channel)
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
        protocol.send(self._channel, {"kind": "ended", **vars(outcome)}, found)
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
            protocol.send(self._channel, {"kind": "collected"}, [found])
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
            protocol.send(channel, {"kind": "failed", "reason": reason}, [])
        os._exit(4)
