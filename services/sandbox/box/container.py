"""Containers by an OCI runtime's command: started before their order comes, with an init inside that waits for it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import resource
import select
import shutil
import signal
import socket
import struct
import time
from pathlib import Path
from typing import Any

from . import kernel, root
from .confine import place_descriptors, resource_limits
from .control import memory_file
from .orders import Order
from .seccomp import build_filter
from .supervise import Process

_STATUS = struct.Struct("=ci")
_KILLED_STATUS = signal.SIGKILL
_END_S = 10.0
_READY_S = 30.0
_ANSWER_BYTES = 64
_PROGRAM = 5
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


class Container(Process):
    """A container; `pid` is the runtime's own command, `events` the socket to the init inside."""

    def __init__(self, pid: int, name: str, channel: socket.socket, runtime: ContainerRuntime) -> None:
        self.pid = pid
        self.events = channel.fileno()
        self._channel = channel
        self._name = name
        self._runtime = runtime
        self._start_error = 0
        self._status: int | None = None

    def await_ready(self) -> None:
        """Returns when the init waits for its order, so that what it took to get there is not the job's; raises
        RuntimeError when it does not get there.
        """
        poller = select.poll()
        poller.register(self._channel, select.POLLIN)
        answer = self._channel.recv(_ANSWER_BYTES) if poller.poll(_READY_S * 1000) else b""
        if answer[:1] != b"r":
            raise RuntimeError(f"the container did not start: {self._runtime.last_words() or 'no message'}")

    def begin(self, uid: int, order: Order, command: list[str], descriptors: list[int]) -> None:
        """Hands the order over."""
        limits = {**resource_limits(order.limits, order.answers), "RLIMIT_NPROC": order.limits.processes}
        strings = [str(uid), str(len(limits))]
        for name, value in limits.items():
            strings += [str(getattr(resource, name)), str(value)]
        strings += [str(len(command)), *command, *(f"{name}={value}" for name, value in order.environment.items())]
        packet = b"".join(string.encode(errors="surrogateescape") + b"\0" for string in strings)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the supervisor is about to see that it ended
            socket.send_fds(self._channel, [packet], descriptors)

    def note_events(self) -> bool:
        """Whether the job has ended."""
        while True:
            try:
                answer = self._channel.recv(_ANSWER_BYTES)
            except (BlockingIOError, ConnectionResetError):
                return self._status is not None
            if not answer:
                return self._status is not None
            kind, value = _STATUS.unpack(answer)
            if kind == b"x":
                self._start_error = value
            else:
                self._status = value

    def kill(self) -> None:
        """Ends every process of the slot but the launcher."""
        self._runtime.kill_all()

    def settle(self, status: int | None, stopped: bool) -> int:
        """The status that the init told; raises OSError when the command could not be executed, and RuntimeError when
        the runtime did not get as far as the job.
        """
        self.note_events()
        if self._start_error:
            raise OSError(self._start_error, os.strerror(self._start_error))
        if self._status is not None:
            return self._status
        if stopped:
            return _KILLED_STATUS
        raise RuntimeError(f"the container ended with status {status}: {self._runtime.last_words() or 'no message'}")

    def close(self) -> None:
        """Removes what the runtime may have left; its command has ended."""
        self._channel.close()
        self._runtime.forget(self._name)


class ContainerRuntime:
    """One slot's way to start containers, one at a time."""

    def __init__(
        self, command: list[str], state: str, log: str, procs: str, folder: str, bundle: dict[str, Any]
    ) -> None:
        self._command = command
        self._program = seal_program(command[0])
        self._bundle = bundle
        self._state = Path(state)
        if self._state.exists():  # of a launcher that was killed with its containers
            shutil.rmtree(self._state)
        self._log = Path(log)
        self._procs = procs
        self._config = Path(folder) / "config.json"
        self._filter = memory_file(build_filter())
        self._null = os.open("/dev/null", os.O_RDWR)
        self._written = ""
        self._count = 0

    def start(self, root_path: str, mounts: list[tuple[str, str]]) -> Container:
        """Starts a container whose init waits for its order."""
        self._write_config(root_path, mounts)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        self._count += 1
        name = f"job-{self._count}"
        pid = os.fork()
        if pid:
            theirs.close()
            return Container(pid, name, ours, self)
        try:
            kernel.die_with_parent(signal.SIGKILL)
            place_descriptors([self._null, self._null, self._null, theirs.fileno(), self._filter, self._program])
            os.set_inheritable(_PROGRAM, False)
            arguments = [*self._command, "--preserve-fds", "2", name]
            os.execve(_PROGRAM, arguments, os.environ)
        finally:
            os._exit(127)

    def _write_config(self, root_path: str, mounts: list[tuple[str, str]]) -> None:
        binds = [
            {"destination": inside, "type": "bind", "source": path, "options": ["bind", "nosuid", "nodev"]}
            for path, inside in mounts
        ]
        config = {
            **self._bundle,
            "root": {"path": root_path, "readonly": True},
            "process": {**self._bundle["process"], "args": [f"{root.OWN_FOLDER}/init", "3", "4"]},
            "mounts": [*self._bundle["mounts"], *binds],
        }
        text = json.dumps(config)
        if text != self._written:
            self._config.write_text(text)
            self._written = text

    def kill_all(self) -> None:
        """Kills all in the control group but this process, until nobody is left to be killed."""
        deadline = time.monotonic() + _END_S
        while others := self._others():
            for pid in others:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() > deadline:
                raise RuntimeError(f"{len(others)} processes of the slot do not end")
            time.sleep(0.001)  # a killed process leaves its group a moment later and tells nobody

    def _others(self) -> list[int]:
        with open(self._procs) as file:
            own = os.getpid()
            return [pid for pid in map(int, file.read().split()) if pid != own and not _is_zombie(pid)]

    def interrupt(self) -> None:
        """Sends SIGINT to the job's processes, as a terminal's interrupt key would."""
        for pid in self._others():
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                if Path(f"/proc/{pid}/exe").readlink().name not in ("init", Path(self._command[0]).name):
                    os.kill(pid, signal.SIGINT)

    def forget(self, name: str) -> None:
        """Removes what a container's command that was killed could not remove."""
        if (self._state / name).exists():
            shutil.rmtree(self._state / name)

    def last_words(self) -> str:
        """What the runtime logged."""
        return self._log.read_text(errors="replace")[-2000:].strip() if self._log.exists() else ""


def seal_program(path: str) -> int:
    """A copy of a program in memory that nobody can change.

    A runtime that is executed from such a copy needs not make one itself each time, by which it guards the host's
    against what runs in the container (CVE-2019-5736).
    """
    descriptor = os.memfd_create("runtime", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with open(path, "rb") as program:
        while os.sendfile(descriptor, program.fileno(), None, 1 << 20):
            pass
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
    return descriptor


def _is_zombie(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] == b"Z"
    except (FileNotFoundError, ProcessLookupError):
        return True
