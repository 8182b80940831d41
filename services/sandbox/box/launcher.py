"""The resident process of a slot that runs containers: sits in the slot's control group, so that what it starts is born
there, and has each order run in a container that was made before the order came.

It is trusted and outside of every container: it lays out the working folder, starts the container runtime, watches the
job from beside it, and reads what the job left.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import control, kernel, root
from .collect import collect_files
from .container import Container, ContainerRuntime
from .control import Message
from .files import BoxFile, read_files
from .orders import read_order
from .supervise import Supervisor
from .usage import open_usage
from .workspace import Workspace

_FIRST_SPACE_BYTES = 16 << 20
_SMALL_BYTES = 4 << 20


@dataclass(frozen=True)
class Options:
    """What the service tells a launcher. `command` runs a container, its name to be appended; `bundle` is the
    configuration that all containers share.
    """

    control: int
    parent: int
    uid: int
    folder: str
    command: list[str]
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
        self._files: list[BoxFile] = []
        self._workspace = Workspace(options.folder, options.uid)
        self._spare: tuple[str, Container] | None = None
        self._space_bytes = _FIRST_SPACE_BYTES

    def prepare(self) -> None:
        """Everything that is the same for all jobs of the slot."""
        options = self._options
        usage = open_usage(options.cgroup_version, options.usage_paths)
        kernel.unshare(kernel.CLONE_NEWNS)
        kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
        for path in options.hidden_cgroup_mounts:  # crun refuses a host that has cgroup v1 and v2 side by side
            kernel.unmount_lazily(path)
        kernel.adopt_orphans()
        procs = options.cgroup_procs[0]
        self._runtime = ContainerRuntime(
            options.command, options.state, options.log, procs, options.folder, options.bundle
        )
        # late, so that the interpreter's own memory is not charged to the jobs
        for path in options.cgroup_procs:
            with open(path, "w") as file:
                file.write("0")
        self._supervisor = Supervisor(self._channel, usage)

    def serve(self) -> None:
        """Does what the service says, message by message; while nobody waits, the next container is made."""
        control.send(self._channel, {"kind": "ready", "version": platform.python_version()}, [])
        while True:
            message = control.receive(self._channel)
            match message.header["kind"]:
                case "begin":
                    self._begin(message)
                case "run":
                    self._run(message)
                case "end":
                    self._end()
                case "rest":
                    control.send(self._channel, {"kind": "resting"}, [])
            message.close()
            if self._root and self._spare is None:
                self._make_spare()

    def _begin(self, message: Message) -> None:
        """Takes the files of a job, and the root that its containers have."""
        header = message.header
        name = header["root_name"]
        if name not in self._roots:
            self._roots[name] = self._build_root(name, header["root"])
        self._root = self._roots[name]
        self._files = read_files(message.descriptors[0])

    def _build_root(self, name: str, fields: dict[str, Any]) -> str:
        folder = f"{self._options.folder}/roots/{name}"
        Path(folder).mkdir(parents=True, exist_ok=True)
        own = [[self._options.init, f"{root.OWN_FOLDER}/init"], [self._options.agent, f"{root.OWN_FOLDER}/box"]]
        built = root.build_root(root.RootOptions(**{**fields, "folder": folder, "mounts": [*fields["mounts"], *own]}))
        return str(built)

    def _end(self) -> None:
        """Forgets the job."""
        self._files = []
        if self._workspace.forget_kept():
            self._discard_spare()

    def _make_spare(self) -> None:
        self._workspace.lay_out(self._space_bytes)
        self._spare = (self._root, self._runtime.start(self._root, self._workspace.mounts))

    def _discard_spare(self) -> None:
        if self._spare is not None:
            container = self._spare[1]
            self._spare = None
            container.kill()
            self._supervisor.clear()
            container.close()
            self._workspace.take_down()

    def _take_spare(self) -> Container:
        if self._spare is not None and self._spare[0] != self._root:
            self._discard_spare()
        if self._spare is None:
            self._make_spare()
        assert self._spare is not None
        container = self._spare[1]
        self._spare = None
        return container

    def _run(self, message: Message) -> None:
        order = read_order(message.header)
        descriptors = message.descriptors[:-1] if order.brings_files else message.descriptors
        brought = read_files(message.descriptors[-1]) if order.brings_files else []
        container = self._take_spare()
        command = order.command if order.mode == "exec" else [*order.command, order.mode]

        def start(handed: list[int]) -> Container:
            container.begin(self._options.uid, order, command, handed)
            return container

        container.await_ready()
        self._workspace.fill([*self._files, *brought], order.limits.file_bytes)
        outcome = self._supervisor.run(order, descriptors, start, self._hear)
        found = [self._collect(order.collect, order.collect_bytes)] if order.collect else []
        small = self._supervisor.held_bytes() < _SMALL_BYTES and not order.keep
        if not small:  # before the end is told, so that the next job is not charged with this one's memory
            self._tidy(container, order.keep)
        control.send(self._channel, {"kind": "ended", **vars(outcome)}, found)
        for file in found:
            os.close(file)
        if small:
            self._tidy(container, keep=False)
        self._space_bytes = order.limits.file_bytes

    def _tidy(self, container: Container, keep: bool) -> None:
        """Waits until the container is gone, and unmounts what it worked on, or keeps it for the job's other runs."""
        self._supervisor.clear()
        container.close()
        if keep:
            self._workspace.keep()
            self._files = []
        else:
            self._workspace.take_down()

    def _collect(self, paths: list[str], most_bytes: int) -> int:
        folder = os.open(self._workspace.home, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return collect_files(folder, paths, most_bytes)
        finally:
            os.close(folder)

    def _hear(self, header: dict[str, Any]) -> None:
        """What the service asks while a container runs: to interrupt the job, or for files that it has written."""
        if header["kind"] == "interrupt":
            self._runtime.interrupt()
        elif header["kind"] == "collect":
            found = self._collect(header["paths"], header["bytes"])
            control.send(self._channel, {"kind": "collected"}, [found])
            os.close(found)


def main() -> None:
    """The launcher's process; its options are a JSON object in the first argument."""
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
        control.send(launcher._channel, {"kind": "failed", "reason": reason}, [])
        sys.exit(f"sandbox launcher: {reason}")
