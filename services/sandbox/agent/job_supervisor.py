"""Job supervisor of a slot in which warm Python runs: the trusted process that receives requests from the service, has
each run by a process that was prepared before the request came, and reports the result.

It stays outside of the namespaces of its jobs. It is the only one that holds the socket to the service; when that
closes it ends, and all that it started ends with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import os
import select
import signal
import socket
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn

from . import OWN_FOLDER, kernel, protocol, root
from .archive import encode_archive, own_files, read_archive, read_files, write_files
from .collect import collect_files
from .confinement import Confinement, apply_limits, build_filter, give_up_privileges, install_descriptors
from .modes import run_mode, seed_generators
from .monitor import Process, ProcessMonitor
from .program import Begin, report_end_in
from .protocol import Message, Preparation, RunRequest, RunResult, memory_file, read_run_request
from .unpack import unpack_all, unpack_in_session
from .usage import UsageFiles

_NAMESPACES = kernel.CLONE_NEWNS | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS | kernel.CLONE_NEWNET
_UNFIT = 125
_READY_S = 30.0
_INIT = f"{OWN_FOLDER}/init"


class Program(Process):
    """Process of a program, forked from the job supervisor and confined."""

    def __init__(self, pid: int, channel: socket.socket) -> None:
        self.pid = pid
        self._channel = channel
        self._home = -1
        self._unfit = ""
        self._killed = False

    def kill(self) -> None:
        """Ends everything that runs for it."""
        if not self._killed:  # what has been reaped since may have left its number to another
            self._killed = True
            self._kill()

    @abstractmethod
    def _kill(self) -> None: ...

    def exit_status(self, status: int | None, stopped: bool) -> int:
        """Returns the status as it is; raises RuntimeError when the process could not be confined."""
        assert status is not None
        self._receive()
        return status

    def _receive(self) -> None:
        """Receives the reports of the process before it was confined; afterwards it has no channel for any.

        Raises RuntimeError when it could not be confined.
        """
        with contextlib.suppress(BlockingIOError, EOFError, ConnectionError):
            while True:
                header, descriptors = protocol.receive(self._channel)
                if header["kind"] == "unfit":
                    self._unfit = header["reason"]
                elif header["kind"] == "ready":
                    [self._home] = descriptors
        if self._unfit:
            raise RuntimeError(f"cannot confine the program: {self._unfit}")

    @contextmanager
    def opened_home(self) -> Iterator[int]:
        """Yields a descriptor of the working folder, which works when the program's namespaces are gone, too."""
        self._receive()
        if self._home < 0:
            raise RuntimeError("the program did not hand over its working folder")
        yield self._home

    def close(self) -> None:
        """Closes the working folder, and with it frees all that is in it."""
        self._channel.close()
        if self._home >= 0:
            os.close(self._home)


class Isolated(Program):
    """Process in fresh namespaces, made before its request comes; an init in front of it reaps what it leaves."""

    def __init__(
        self,
        pid: int,
        channel: socket.socket,
        init: int,
        ending: mmap.mmap,
        preparation: Preparation,
        held_bytes: int,
    ) -> None:
        super().__init__(pid, channel)
        self._init = init
        self._ending = ending
        self._reported: int | None = None
        self.preparation = preparation
        self.baseline_bytes = held_bytes

    @classmethod
    def prepare(cls, confinement: Confinement, preparation: Preparation, usage: UsageFiles) -> Isolated:
        """Forks a process that waits for its request, beside an init, PID 1 of their namespace.

        In that process it raises Begin.
        """
        held_bytes = usage.current_bytes()
        knows_peak = usage.reset_peak()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ending = mmap.mmap(-1, mmap.PAGESIZE)
        own = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        kernel.unshare(kernel.CLONE_NEWPID)  # of the children to come, not of this process
        init = os.posix_spawn(_INIT, [_INIT], {})
        pid = os.fork()
        if pid == 0:
            ours.close()
            if knows_peak:  # else the peak is that of the process, known when the kernel has taken it apart
                report_end_in(ending)
            # what the stack refers to is let go of now: later that would take the program's time
            raise Begin(partial(_await_request, confinement, preparation, theirs))
        kernel.enter_namespace(own, kernel.CLONE_NEWPID)  # so that the next program can have a namespace of its own
        os.close(own)
        theirs.close()
        ours.setblocking(False)
        return cls(pid, ours, init, ending, preparation, held_bytes)

    def await_ready(self) -> None:
        """Waits until the process has made itself ready, which is not charged to the program.

        One that could not is told of when its request has come.
        """
        poller = select.poll()
        poller.register(self._channel, select.POLLIN)
        if not poller.poll(_READY_S * 1000):
            self._unfit = f"it was not ready within {_READY_S:.0f} s"
            return
        with contextlib.suppress(RuntimeError):
            self._receive()

    def begin(self, request: RunRequest, descriptors: list[int]) -> None:
        """Hands the request over."""
        with contextlib.suppress(BrokenPipeError):  # it has ended, as the monitor is about to see
            protocol.send(self._channel, request.to_header(), descriptors)

    def read_events(self) -> bool:
        """Returns whether the program says that it ends; it may say what is not so, as it may end at any time."""
        if self._reported is None and self._ending[0]:
            self._reported = self._ending[1]  # now: once its outputs are closed, one that goes on ends by that
        return self._reported is not None

    def exit_status(self, status: int | None, stopped: bool) -> int:
        """Returns the status, without one that which the program has reported; raises as its base."""
        return super().exit_status((self._reported or 0) << 8 if status is None else status, stopped)

    def _kill(self) -> None:
        """Ends the init, and with it, by the kernel's rule for PID 1, everything in the namespace."""
        os.kill(self._init, signal.SIGKILL)

    def discard(self) -> None:
        """Ends a process that was never given a request."""
        self.kill()
        for pid in (self.pid, self._init):
            os.waitpid(pid, 0)
        self.close()


class Plain(Program):
    """Process without isolation."""

    @classmethod
    def start(cls, confinement: Confinement, request: RunRequest, descriptors: list[int]) -> Plain:
        """Forks the process of a request."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = os.fork()
        if pid == 0:
            ours.close()
            _run_at_once(confinement, request, descriptors, theirs)
        theirs.close()
        ours.setblocking(False)
        program = cls(pid, ours)
        program._home = os.open(confinement.home, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        return program

    def _kill(self) -> None:
        """Ends the process and its group; an ended one is not reaped yet, so its id is its own."""
        for target in (-self.pid, self.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(target, signal.SIGKILL)


def _await_request(confinement: Confinement, preparation: Preparation, channel: socket.socket) -> Callable[[], Any]:
    """Gives up all privileges, waits for the request and runs it; returns what runs a whole program."""
    try:
        kernel.die_with_parent(signal.SIGKILL)
        kernel.unshare(_NAMESPACES)
        root.mount_proc()
        sys.orig_argv = ["python3", "main.py"]
        kernel.set_command_line(sys.orig_argv)
        kernel.set_hostname("box")
        assert confinement.uid is not None
        root.mount_writable(confinement.uid, preparation)
        if preparation.loopback:
            kernel.raise_loopback()
            confinement = dataclasses.replace(confinement, seccomp=build_filter(loopback=True))
        give_up_privileges(confinement)
        _rehearse()
        seed_generators()
        home = os.open(confinement.home, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        protocol.send(channel, {"kind": "ready"}, [home])
        header, descriptors = protocol.receive(channel)
        request = read_run_request(header)
    except (EOFError, ConnectionError):
        os._exit(0)
    except Exception as error:
        _report_unfit(channel, error)
    try:
        _run(confinement, request, descriptors, channel)
    except Begin as begin:
        return begin.run


def _rehearse() -> None:
    """Executes what every run begins with, so that the memory pages that it writes to are copied before the run."""
    archive = memory_file(encode_archive({"paths": [], "executable": []}, [b"pass"]))
    try:
        exec(compile(read_archive(archive).blobs[0], "<rehearsal>", "exec"), {})
    finally:
        os.close(archive)


def _run_at_once(
    confinement: Confinement, request: RunRequest, descriptors: list[int], channel: socket.socket
) -> NoReturn:
    """Gives up privileges and runs a request that has come already."""
    try:
        give_up_privileges(confinement)
        seed_generators()
    except Exception as error:
        _report_unfit(channel, error)
    _run(confinement, request, descriptors, channel)


def _run(confinement: Confinement, request: RunRequest, descriptors: list[int], channel: socket.socket) -> NoReturn:
    """Applies the request's limits, installs its descriptors and becomes the submission."""
    try:
        apply_limits(confinement, request.limits, request.answers)
        install_descriptors(descriptors)
    except Exception as error:
        _report_unfit(channel, error)
    try:
        os.environ.update(request.environment)
        if request.mode == "exec":
            for number in (signal.SIGPIPE, signal.SIGXFSZ):  # which this interpreter ignores, unlike a shell
                signal.signal(number, signal.SIG_DFL)
            os.execvpe(request.command[0], request.command, dict(os.environ))
        run_mode(request.mode, confinement.home)
    except Begin:  # up to the main function: nothing on the way may clean up what is the job supervisor's
        raise
    except BaseException as error:  # from here on a failure is the program's own
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        sys.stderr.flush()
    os._exit(127)


def _report_unfit(channel: socket.socket, error: Exception) -> NoReturn:
    protocol.send(channel, {"kind": "unfit", "reason": f"{type(error).__name__}: {error}"}, [])
    os._exit(_UNFIT)


_SMALL_BYTES = 4 << 20


class JobSupervisor:
    """Runs the requests of one job after another, each in namespaces of its own."""

    def __init__(
        self, channel: socket.socket, confinement: Confinement, usage: UsageFiles | None, isolated: bool
    ) -> None:
        self._channel = channel
        self._confinement = confinement
        self._isolated = isolated
        self._usage = usage
        self._monitor = ProcessMonitor(channel, usage)
        self._prepared: Isolated | None = None
        self._program: Program | None = None
        self._preparation = Preparation()

    def serve(self) -> NoReturn:
        """Serves until the service closes the socket."""
        while True:
            if self._isolated and self._prepared is None:
                self._prepared = self._prepare()
            message = protocol.receive(self._channel)
            match message.header["kind"]:
                case "run":
                    self._run(message)
                case "load":
                    self._unpack(message.descriptors[0])
            message.close()

    def _prepare(self) -> Isolated:
        assert self._usage is not None
        program = Isolated.prepare(self._confinement, self._preparation, self._usage)
        program.await_ready()
        self._monitor.take_baseline()
        return program

    def discard_prepared(self) -> None:
        """Ends the program that waits for a request, so that nothing is left for others to reap."""
        if self._prepared is not None:
            self._prepared.discard()
            self._prepared = None

    def _unpack(self, files: int) -> None:
        """Writes files into the folder that all runs of a job share, since nothing can be mounted."""
        write_files(self._confinement.home, read_files(files))
        if self._confinement.uid is not None:
            own_files(self._confinement.home, self._confinement.uid)

    def _run(self, message: Message) -> None:
        request = read_run_request(message.header)
        descriptors, brought, archives = request.split(message.descriptors)
        for files in brought:
            self._unpack(files)
        if archives and (refused := self._unpack_archives(request, archives)) is not None:
            protocol.send(self._channel, {"kind": "ended", **vars(refused)}, [])
            return
        result = self._monitor.run(request, descriptors, lambda handed: self._start(request, handed), self._receive)
        assert self._program is not None
        self._program.kill()  # what is left of one that has reported its end
        found: list[int] = []
        if request.collect or request.pack:
            self._monitor.clear()  # nobody is left to change the files
            with self._program.opened_home() as home:
                found.append(collect_files(home, request.collect, request.pack, request.collect_bytes))
        small = self._monitor.held_bytes() < _SMALL_BYTES
        if not small:  # before the end is reported, so that the next job is not charged with this one's memory
            self._release()
        protocol.send(self._channel, {"kind": "ended", **vars(result)}, found)
        for file in found:
            os.close(file)
        if small:
            self._release()

    def _release(self) -> None:
        """Waits until every process of the job is gone, and frees its files."""
        self._monitor.clear()
        assert self._program is not None
        self._program.close()
        self._program = None

    def _unpack_archives(self, request: RunRequest, archives: list[int]) -> RunResult | None:
        """Unpacks archives into the working folder of the request's process; returns a result when one is refused."""
        if self._isolated:
            program = self._fit(request)
            with program.opened_home() as home:
                refused = unpack_all(self._confinement.uid, home, archives, request)
        else:
            folder = os.open(self._confinement.home, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            refused = unpack_all(self._confinement.uid, folder, archives, request)
            os.close(folder)
        if refused is not None:
            self.discard_prepared()
        self._monitor.begin_anew()
        return refused

    def _fit(self, request: RunRequest) -> Isolated:
        """Returns the process that waits, made anew where it does not fit the request."""
        assert self._prepared is not None
        if self._prepared.preparation != request.preparation:
            self._preparation = request.preparation  # the next requests are likely to have the same
            self._prepared.discard()
            self._prepared = self._prepare()
        return self._prepared

    def _start(self, request: RunRequest, descriptors: list[int]) -> Program:
        if self._isolated:
            program, self._prepared = self._fit(request), None
            program.begin(request, descriptors)
            self._program = program
        else:
            self._program = Plain.start(self._confinement, request, descriptors)
        return self._program

    def _receive(self, message: Message) -> None:
        """Handles a message of the service while a program runs: interrupts it, collects or unpacks files."""
        assert self._program is not None
        header = message.header
        if header["kind"] == "interrupt":
            with contextlib.suppress(ProcessLookupError):
                os.kill(-self._program.pid, signal.SIGINT)
            protocol.send(self._channel, {"kind": "replied"}, [])
        elif header["kind"] == "collect":
            with self._program.opened_home() as home:
                found = collect_files(home, header["paths"], header["pack"], header["bytes"])
            protocol.send(self._channel, {"kind": "replied"}, [found])
            os.close(found)
        elif header["kind"] == "unpack":
            with self._program.opened_home() as home:
                reply = unpack_in_session(self._confinement.uid, home, message)
            protocol.send(self._channel, {"kind": "replied", **reply}, [])


def run_job_supervisor(
    channel: socket.socket, confinement: Confinement, usage: UsageFiles | None, isolated: bool
) -> NoReturn:
    """Serves until the service closes the socket, then ends the process; reports a failure as `failed`."""
    kernel.set_dumpable(False)
    supervisor = JobSupervisor(channel, confinement, usage, isolated)
    try:
        supervisor.serve()
    except (EOFError, ConnectionError):
        supervisor.discard_prepared()
        os._exit(0)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        sys.stderr.write(f"sandbox job supervisor: {reason}\n")
        with contextlib.suppress(OSError):  # the service is gone
            protocol.send(channel, {"kind": "failed", "reason": reason}, [])
        os._exit(4)
