"""Launcher of containers, the resident process of a slot: it sits in the slot's control group, so that what it starts
is born there, and runs each request in a container that was made before the request came.

It is trusted and outside of every container: it prepares the working folder, starts the container runtime, monitors the
job from beside it, and reads what the job left.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import resource
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import HOME, OWN_FOLDER, kernel, protocol, root
from .archive import File, own_files, read_files, write_files
from .collect import collect_files, collect_tree
from .confinement import build_filter, install_descriptors, resource_limits
from .monitor import Process, ProcessMonitor
from .protocol import Limits, Message, Preparation, RunRequest, RunResult, memory_file, read_run_request
from .root import WRITABLE_FLAGS, sized
from .unpack import unpack_all, unpack_in_session
from .usage import open_usage

_UNPACKED_BYTES = 8192
_OVERLAY_FILES = 8
"""Files of the overlay's own."""


class Workspace:
    """Working folder of a container's job: an overlay whose upper layer is a tmpfs, bounded in space and files.

    What a compiler has left is the lower layer of later runs, and never written to again. The mounts are below the
    slot's folder, in the launcher's own mount namespace.
    """

    def __init__(self, folder: str, uid: int) -> None:
        self._uid = uid
        self.home = f"{folder}/box"
        self._tmp = f"{folder}/tmp"
        self._top = f"{folder}/top"
        self._kept = f"{folder}/kept"
        self._nothing = f"{folder}/nothing"
        self._has_kept = False
        self._space_bytes = (0, 0)
        self._files = 0
        for path in (self.home, self._tmp, self._top, self._kept, self._nothing):
            Path(path).mkdir(exist_ok=True)

    @property
    def mounts(self) -> list[tuple[str, str]]:
        """Host folders and their paths in a container."""
        return [(self.home, HOME), (self._tmp, "/tmp"), (self._tmp, "/dev/shm")]

    def mount(self, space_bytes: int, files: int) -> None:
        """Mounts the working folder and /tmp of one run."""
        self._space_bytes, self._files = (space_bytes, space_bytes), files
        kernel.mount("tmpfs", self._top, "tmpfs", WRITABLE_FLAGS, sized(space_bytes, files + _OVERLAY_FILES))
        for name in ("upper", "work"):
            Path(f"{self._top}/{name}").mkdir(0o700)
        os.chown(f"{self._top}/upper", self._uid, self._uid)
        below = f"{self._kept}/upper" if self._has_kept else self._nothing
        options = f"lowerdir={below},upperdir={self._top}/upper,workdir={self._top}/work,volatile"
        kernel.mount("overlay", self.home, "overlay", WRITABLE_FLAGS, options)
        kernel.mount("tmpfs", self._tmp, "tmpfs", WRITABLE_FLAGS, f"{sized(space_bytes, files)},mode=1777")

    def fit(self, files: list[File], limits: Limits) -> None:
        """Gives a run its space beside its files."""
        space_bytes = limits.file_bytes
        wanted = (space_bytes + sum(len(content) + _UNPACKED_BYTES for _, content, _ in files), space_bytes)
        for path, had, wants in zip((self._top, self._tmp), self._space_bytes, wanted, strict=True):
            if (had, self._files) != (wants, limits.files):
                bounds = sized(wants, limits.files + (_OVERLAY_FILES if path == self._top else 0))
                kernel.mount("tmpfs", path, "tmpfs", WRITABLE_FLAGS | kernel.MS_REMOUNT, bounds)
        self._space_bytes, self._files = wanted, limits.files

    def fill(self, files: list[File]) -> None:
        """Writes the files of a run."""
        if files:
            write_files(self.home, files)
            own_files(self.home, self._uid)

    def keep(self) -> None:
        """Makes what the last run left the lower layer of later runs."""
        kernel.unmount_lazily(self.home)
        kernel.unmount_lazily(self._tmp)
        kernel.move_mount(self._top, self._kept)
        self._has_kept = True

    def unmount(self) -> None:
        """Unmounts what `mount` mounted."""
        for path in (self._tmp, self.home, self._top):
            if os.path.ismount(path):
                kernel.unmount_lazily(path)

    def forget_kept(self) -> bool:
        """Drops the lower layer; returns whether there was one."""
        had, self._has_kept = self._has_kept, False
        if had:
            kernel.unmount_lazily(self._kept)
        return had


_STATUS = struct.Struct("=ci")
_KILLED_STATUS = signal.SIGKILL
_END_S = 10.0
_READY_S = 30.0
_ANSWER_BYTES = 64
_PROGRAM = 5
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


class Container(Process):
    """Container that was started before its request; `pid` is that of the runtime's command, `events` the socket to the
    init.
    """

    def __init__(self, pid: int, name: str, channel: socket.socket, runtime: ContainerRuntime) -> None:
        self.pid = pid
        self.events = channel.fileno()
        self._channel = channel
        self._name = name
        self._runtime = runtime
        self._start_error = 0
        self._status: int | None = None

    def await_ready(self) -> None:
        """Waits until the init is ready for a request, so that the start is not charged to the job.

        Raises RuntimeError when it does not get there.
        """
        poller = select.poll()
        poller.register(self._channel, select.POLLIN)
        answer = self._channel.recv(_ANSWER_BYTES) if poller.poll(_READY_S * 1000) else b""
        if answer[:1] != b"r":
            raise RuntimeError(f"the container did not start: {self._runtime.last_output() or 'no message'}")
        self._runtime.take_out_of_groups()

    def begin(self, uid: int, request: RunRequest, command: list[str], descriptors: list[int]) -> None:
        """Hands the request over."""
        limits = {**resource_limits(request.limits, request.answers), "RLIMIT_NPROC": request.limits.processes}
        strings = [str(uid), str(len(limits))]
        for name, value in limits.items():
            strings += [str(getattr(resource, name)), str(value)]
        strings += [str(len(command)), *command, *(f"{name}={value}" for name, value in request.environment.items())]
        packet = b"".join(string.encode(errors="surrogateescape") + b"\0" for string in strings)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has ended, as the monitor is about to see
            socket.send_fds(self._channel, [packet], descriptors)

    def read_events(self) -> bool:
        """Reads reports of the init; returns whether the job has ended."""
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

    def exit_status(self, status: int | None, stopped: bool) -> int:
        """Returns the status that the init reported.

        Raises OSError when the command could not be executed, RuntimeError when the runtime did not start the job.
        """
        self.read_events()
        if self._start_error:
            raise OSError(self._start_error, os.strerror(self._start_error))
        if self._status is not None:
            return self._status
        if stopped:
            return _KILLED_STATUS
        raise RuntimeError(f"the container ended with status {status}: {self._runtime.last_output() or 'no message'}")

    def close(self) -> None:
        """Removes what the runtime may have left behind."""
        self._channel.close()
        self._runtime.forget(self._name)


class ContainerRuntime:
    """Starts the containers of one slot, one at a time."""

    def __init__(
        self,
        command: list[str],
        delete: list[str],
        state: str,
        log: str,
        procs: list[str],
        folder: str,
        bundle: dict[str, Any],
    ) -> None:
        self._command, self._delete = command, delete
        # some runtimes make groups by the name of the container in hierarchies that are not the slot's
        self._prefix = "-".join(Path(folder).parts[-2:])
        self._program = seal_program(command[0])
        self._bundle = bundle
        self._state = Path(state)
        if self._state.exists():  # of a launcher that was killed with its containers
            shutil.rmtree(self._state)
        self._log = Path(log)
        self._procs = procs
        self._config = Path(folder) / "config.json"
        self._filters = [memory_file(build_filter(loopback=loopback)) for loopback in (False, True)]
        self._null = os.open("/dev/null", os.O_RDWR)
        self._written = ""
        self._count = 0

    def start(self, root_path: str, mounts: list[tuple[str, str]], loopback: bool) -> Container:
        """Starts a container whose init waits for its request."""
        self._write_config(root_path, mounts)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        self._count += 1
        name = f"{self._prefix}-{self._count}"
        pid = os.fork()
        if pid:
            theirs.close()
            return Container(pid, name, ours, self)
        try:
            kernel.die_with_parent(signal.SIGKILL)
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            for number in (signal.SIGPIPE, signal.SIGXFSZ):  # which this interpreter ignores, unlike a shell
                signal.signal(number, signal.SIG_DFL)
            install_descriptors(
                [self._null, self._null, self._null, theirs.fileno(), self._filters[loopback], self._program]
            )
            os.set_inheritable(_PROGRAM, False)
            os.execve(_PROGRAM, [*self._command, name], os.environ)
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
            "process": {**self._bundle["process"], "args": [f"{OWN_FOLDER}/init", "3", "4"]},
            "mounts": [*self._bundle["mounts"], *binds],
        }
        text = json.dumps(config)
        if text != self._written:
            self._config.write_text(text)
            self._written = text

    def kill_all(self) -> None:
        """Kills every process of the control group but this one, until none is left."""
        deadline = time.monotonic() + _END_S
        self.take_out_of_groups()
        while others := self._others():
            for pid in others:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() > deadline:
                raise RuntimeError(f"{len(others)} processes of the slot do not end")
            time.sleep(0.001)  # a killed process leaves its group a moment later, without a signal
            self.take_out_of_groups()  # what a runtime that was killed had begun

    def _others(self) -> list[int]:
        with open(self._procs[0]) as file:
            own = os.getpid()
            return [pid for pid in map(int, file.read().split()) if pid != own and not _is_zombie(pid)]

    def interrupt(self) -> None:
        """Sends SIGINT to the job's processes, as a terminal's interrupt key would."""
        for pid in self._others():
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                if Path(f"/proc/{pid}/exe").readlink().name not in ("init", Path(self._command[0]).name):
                    os.kill(pid, signal.SIGINT)

    def take_out_of_groups(self) -> None:
        """Moves what the runtime has put into control groups of its own into the slot's, which bounds and counts it."""
        if not self._delete:  # it makes none
            return
        for procs in map(Path, self._procs):
            for own in procs.parent.glob("*/cgroup.procs"):
                for pid in own.read_text().split():
                    with contextlib.suppress(ProcessLookupError):
                        procs.write_text(pid)

    def forget(self, name: str) -> None:
        """Removes what a container's command that was killed could not remove."""
        if (self._state / name).exists():
            if self._delete:
                subprocess.run([*self._delete, name], capture_output=True, timeout=_END_S, check=False)
            shutil.rmtree(self._state / name, ignore_errors=True)

    def last_output(self) -> str:
        """Returns the end of the runtime's log."""
        return self._log.read_text(errors="replace")[-2000:].strip() if self._log.exists() else ""


def seal_program(path: str) -> int:
    """Returns a copy of a program in memory that cannot be changed.

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


_SMALL_BYTES = 4 << 20


@dataclass(frozen=True)
class Options:
    """Options of a launcher: `command` runs a container, its name to be appended; `bundle` is the configuration that
    all containers share.
    """

    control: int
    parent: int
    uid: int
    folder: str
    command: list[str]
    delete: list[str]
    state: str
    log: str
    bundle: dict[str, Any]
    init: str
    agent: str
    cgroup_procs: list[str]
    cgroup_version: int
    usage_paths: dict[str, str]
    hidden_cgroup_mounts: list[str]


class Launcher:
    """Serves one slot until the service closes the socket."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._channel = socket.socket(fileno=options.control)
        self._roots: dict[str, str] = {}
        self._root = ""
        self._files: list[File] = []
        self._workspace = Workspace(options.folder, options.uid)
        self._spare: tuple[str, bool, Container] | None = None
        self._preparation = Preparation()

    def prepare(self) -> None:
        """Does what all jobs of the slot have in common."""
        options = self._options
        usage = open_usage(options.cgroup_version, options.usage_paths)
        kernel.unshare(kernel.CLONE_NEWNS)
        kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
        for path in options.hidden_cgroup_mounts:  # crun refuses a host that has cgroup v1 and v2 side by side
            kernel.unmount_lazily(path)
        kernel.adopt_orphans()
        self._runtime = ContainerRuntime(
            options.command,
            options.delete,
            options.state,
            options.log,
            options.cgroup_procs,
            options.folder,
            options.bundle,
        )
        # late, so that the interpreter's own memory is not charged to the jobs
        for path in options.cgroup_procs:
            with open(path, "w") as file:
                file.write("0")
        self._monitor = ProcessMonitor(self._channel, usage)

    def serve(self) -> None:
        """Handles the messages of the service; makes the next container while none comes."""
        protocol.send(self._channel, {"kind": "ready", "version": platform.python_version()}, [])
        while True:
            message = protocol.receive(self._channel)
            match message.header["kind"]:
                case "load":
                    self._load(message)
                case "run":
                    self._run(message)
                case "unload":
                    self._unload()
                case "report_idle":
                    protocol.send(self._channel, {"kind": "idle"}, [])
            message.close()
            if self._root and self._spare is None:
                self._make_spare()

    def _load(self, message: Message) -> None:
        """Loads the files of a job, and the root of its containers."""
        header = message.header
        name = header["root_name"]
        if name not in self._roots:
            self._roots[name] = self._build_root(name, header["root"])
        self._root = self._roots[name]
        self._files = read_files(message.descriptors[0])

    def _build_root(self, name: str, fields: dict[str, Any]) -> str:
        folder = f"{self._options.folder}/roots/{name}"
        Path(folder).mkdir(parents=True, exist_ok=True)
        own = [[self._options.init, f"{OWN_FOLDER}/init"], [self._options.agent, f"{OWN_FOLDER}/agent"]]
        built = root.build_root(root.RootOptions(**{**fields, "folder": folder, "mounts": [*fields["mounts"], *own]}))
        return str(built)

    def _unload(self) -> None:
        """Drops the files of the job."""
        self._files = []
        if self._workspace.forget_kept():
            self._discard_spare()

    def _make_spare(self) -> None:
        space_bytes, files, loopback = self._preparation
        self._workspace.mount(space_bytes, files)
        self._spare = (self._root, loopback, self._runtime.start(self._root, self._workspace.mounts, loopback))

    def _discard_spare(self) -> None:
        if self._spare is not None:
            container = self._spare[2]
            self._spare = None
            container.kill()
            self._monitor.clear()
            container.close()
            self._workspace.unmount()

    def _take_spare(self, loopback: bool) -> Container:
        if self._spare is not None and self._spare[:2] != (self._root, loopback):
            self._discard_spare()
        if self._spare is None:
            self._preparation = self._preparation._replace(loopback=loopback)
            self._make_spare()
        assert self._spare is not None
        container = self._spare[2]
        self._spare = None
        return container

    def _run(self, message: Message) -> None:
        request = read_run_request(message.header)
        descriptors, sent, archives = request.split(message.descriptors)
        brought = [file for archive in sent for file in read_files(archive)]
        container = self._take_spare(request.loopback)
        command = request.command if request.mode == "exec" else [*request.command, request.mode]

        def start(handed: list[int]) -> Container:
            container.begin(self._options.uid, request, command, handed)
            return container

        container.await_ready()
        files = [*self._files, *brought]
        self._workspace.fit(files, request.limits)
        if archives and (refused := self._unpack(request, archives)) is not None:
            container.kill()
            self._clean_up(container, keep=False)
            protocol.send(self._channel, {"kind": "ended", **vars(refused)}, [])
            return
        self._workspace.fill(files)
        result = self._monitor.run(request, descriptors, start, self._receive)
        found = []
        if request.collect or request.pack:
            found = [self._collect(request.collect, request.pack, request.collect_bytes)]
        if request.keep and (tree := collect_tree(self._workspace.home, request.collect_bytes)) is not None:
            found = [tree]
        small = self._monitor.held_bytes() < _SMALL_BYTES and not request.keep
        if not small:  # before the end is reported, so that the next job is not charged with this one's memory
            self._clean_up(container, request.keep)
        protocol.send(self._channel, {"kind": "ended", **vars(result)}, found)
        for file in found:
            os.close(file)
        if small:
            self._clean_up(container, keep=False)
        self._preparation = request.preparation

    def _clean_up(self, container: Container, keep: bool) -> None:
        """Waits until the container is gone, and unmounts its working folder or keeps it for later runs."""
        self._monitor.clear()
        container.close()
        if keep:
            self._workspace.keep()
            self._files = []
        else:
            self._workspace.unmount()

    def _unpack(self, request: RunRequest, archives: list[int]) -> RunResult | None:
        """Unpacks archives into the working folder; returns a result when one is refused."""
        with self._opened_home() as home:
            refused = unpack_all(self._options.uid, home, archives, request)
        self._monitor.begin_anew()
        return refused

    @contextlib.contextmanager
    def _opened_home(self) -> Iterator[int]:
        folder = os.open(self._workspace.home, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield folder
        finally:
            os.close(folder)

    def _collect(self, paths: list[str], packed: list[str], most_bytes: int) -> int:
        with self._opened_home() as home:
            return collect_files(home, paths, packed, most_bytes)

    def _receive(self, message: Message) -> None:
        """Handles a message of the service while a container runs: interrupts the job, collects or unpacks files."""
        header = message.header
        if header["kind"] == "interrupt":
            self._runtime.interrupt()
            protocol.send(self._channel, {"kind": "replied"}, [])
        elif header["kind"] == "collect":
            found = self._collect(header["paths"], header["pack"], header["bytes"])
            protocol.send(self._channel, {"kind": "replied"}, [found])
            os.close(found)
        elif header["kind"] == "unpack":
            with self._opened_home() as home:
                reply = unpack_in_session(self._options.uid, home, message)
            protocol.send(self._channel, {"kind": "replied", **reply}, [])


def main() -> None:
    """Runs the launcher; its options are a JSON object in the first argument."""
    options = Options(**json.loads(sys.argv[1]))
    kernel.die_with_parent(signal.SIGKILL)
    if os.getppid() != options.parent:
        sys.exit("sandbox launcher: the service that started it has ended")
    launcher = Launcher(options)
    try:
        launcher.prepare()
    except OSError as error:
        sys.exit(f"sandbox launcher: {error}")
    try:
        launcher.serve()
    except (EOFError, ConnectionError):
        return
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        protocol.send(launcher._channel, {"kind": "failed", "reason": reason}, [])
        sys.exit(f"sandbox launcher: {reason}")
