"""The resident process of a slot that runs containers: sits in the slot's control group, so that what it starts is born
there, and runs a container for each order.

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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import control, kernel, root
from .collect import collect_files
from .container import Container, ContainerRuntime
from .control import Message
from .files import read_files
from .orders import Order, read_order
from .supervise import Supervisor
from .usage import UsageFiles, open_usage
from .workspace import Workspace


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
        self._workspace = Workspace(options.folder, options.uid)

    def prepare(self) -> None:
        """Everything that is the same for all jobs of the slot."""
        options = self._options
        self._usage: UsageFiles = open_usage(options.cgroup_version, options.usage_paths)
        kernel.unshare(kernel.CLONE_NEWNS)
        kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
        for path in options.hidden_cgroup_mounts:  # crun refuses a host that has cgroup v1 and v2 side by side
            kernel.unmount_lazily(path)
        kernel.adopt_orphans()
        self._runtime = ContainerRuntime(
            options.command, options.state, options.log, options.cgroup_procs[0], options.folder, options.uid
        )
        # late, so that the interpreter's own memory is not charged to the jobs
        for path in options.cgroup_procs:
            with open(path, "w") as file:
                file.write("0")
        self._supervisor = Supervisor(self._channel, self._usage)

    def serve(self) -> None:
        """Does what the service says, message by message."""
        control.send(self._channel, {"kind": "ready", "version": platform.python_version()}, [])
        while True:
            message = control.receive(self._channel)
            match message.header["kind"]:
                case "begin":
                    self._begin(message)
                case "run":
                    self._run(message)
                case "end":
                    self._workspace.clear()
                    control.send(self._channel, {"kind": "cleared"}, [])
            message.close()

    def _begin(self, message: Message) -> None:
        """Takes the files of a job, and the root that its containers have."""
        header = message.header
        name = header["root_name"]
        if name not in self._roots:
            self._roots[name] = self._build_root(name, header["root"])
        self._root = self._roots[name]
        self._workspace.begin(read_files(message.descriptors[0]), header["kept_bytes"])

    def _build_root(self, name: str, fields: dict[str, Any]) -> str:
        folder = f"{self._options.folder}/roots/{name}"
        Path(folder).mkdir(parents=True, exist_ok=True)
        own = [[self._options.init, f"{root.OWN_FOLDER}/init"], [self._options.agent, f"{root.OWN_FOLDER}/box"]]
        built = root.build_root(root.RootOptions(**{**fields, "folder": folder, "mounts": [*fields["mounts"], *own]}))
        return str(built)

    def _run(self, message: Message) -> None:
        order = read_order(message.header)
        descriptors = message.descriptors[:-1] if order.brings_files else message.descriptors
        brought = read_files(message.descriptors[-1]) if order.brings_files else []
        self._workspace.lay_out(order.keep, order.limits.file_bytes, brought)
        try:
            outcome = self._supervisor.run(order, descriptors, lambda handed: self._start(order, handed), self._hear)
            self._supervisor.clear()
            found = collect_files(self._workspace.home, order.collect, order.collect_bytes)
        finally:
            self._workspace.take_down()
        control.send(self._channel, {"kind": "ended", **asdict(outcome)}, [] if found is None else [found])
        if found is not None:
            os.close(found)

    def _start(self, order: Order, descriptors: list[int]) -> Container:
        bundle = self._options.bundle
        command = order.command
        if order.mode != "exec":
            command = [*order.command, order.mode]
        return self._runtime.start(bundle, self._root, self._workspace.mounts, order, command, descriptors)

    def _hear(self, header: dict[str, Any]) -> None:
        """What the service asks while a container runs: to interrupt the job, or for files that it has written."""
        if header["kind"] == "interrupt":
            self._runtime.interrupt()
        elif header["kind"] == "collect":
            found = collect_files(self._workspace.home, header["paths"], header["bytes"])
            assert found is not None
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
