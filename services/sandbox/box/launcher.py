"""The resident process of a slot: waits for jobs and starts an agent in a fresh box for each.

Three ways to start one: `zygote` forks this warm interpreter into fresh namespaces, `crun` runs a container,
`process` only forks (no isolation). The launcher never reads a job: it hands the socket over, so nothing of one job
is left here for the next.
"""

from __future__ import annotations

import fcntl
import gc
import importlib
import json
import os
import platform
import select
import shutil
import signal
import socket
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from . import child, kernel, root, wire
from .agent import run_agent
from .limits import HOME
from .seccomp import build_filter
from .usage import UsageFiles, open_usage

_HIGH_DESCRIPTOR = 100


@dataclass(frozen=True)
class Options:
    """What the service tells a launcher; `usage_paths` empty means that no cgroup is there to measure with."""

    isolation: str
    control: int
    parent: int
    uid: int
    root: str
    binds: list[str]
    preload: list[str]
    cgroup_procs: list[str]
    cgroup_version: int
    usage_paths: dict[str, str]
    hidden_cgroup_mounts: list[str]
    crun_command: list[str]


class Launcher:
    """Serves one slot until the service closes the socket."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._control = socket.socket(fileno=options.control)
        self._usage: UsageFiles | None = None
        self._pid_namespace = -1
        self._seccomp = b""
        self._jobs = 0

    def prepare(self) -> None:
        """Everything that is the same for all jobs of the slot."""
        options = self._options
        for name in options.preload:
            importlib.import_module(name)
        self._seccomp = build_filter()
        if options.usage_paths:
            self._usage = open_usage(options.cgroup_version, options.usage_paths)
        if options.isolation == "zygote":
            self._pid_namespace = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
            kernel.unshare(kernel.CLONE_NEWNS | kernel.CLONE_NEWUTS | kernel.CLONE_NEWNET)
        elif options.isolation == "crun":
            kernel.unshare(kernel.CLONE_NEWNS)
            self._hide_cgroup_mounts()
        # last of all but the root, so that the interpreter's own memory is not charged to the jobs
        for path in options.cgroup_procs:
            with open(path, "w") as file:
                file.write("0")
        if options.isolation == "zygote":
            root.enter_root(Path(options.root), options.binds, options.uid)
            kernel.set_hostname("box")
            kernel.drop_bounding_capabilities()
        gc.collect()
        gc.freeze()

    def _hide_cgroup_mounts(self) -> None:
        """crun refuses a host that has cgroup v1 and v2 side by side; this namespace shows it only one."""
        kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
        for path in self._options.hidden_cgroup_mounts:
            kernel.unmount_lazily(path)

    def serve(self) -> None:
        """One job after another; a frame tells the end of each, when its box is empty."""
        self._send({"kind": "ready", "version": platform.python_version()})
        run = {"zygote": self._run_zygote, "crun": self._run_crun, "process": self._run_process}[
            self._options.isolation
        ]
        poller = select.poll()
        poller.register(self._control, select.POLLIN)
        while True:
            [(_, event)] = poller.poll()
            if event & (select.POLLHUP | select.POLLERR):
                return
            if not self._control.recv(1, socket.MSG_PEEK):
                return
            self._jobs += 1
            kills_before = self._usage.oom_kills() if self._usage else 0
            status, reason = run()
            killed_for_memory = self._usage is not None and self._usage.oom_kills() > kills_before
            self._send({"kind": "end", "status": status, "reason": reason, "killed_for_memory": killed_for_memory})

    def _run_zygote(self) -> tuple[int, str]:
        kernel.unshare(kernel.CLONE_NEWPID)  # of the children to come, not of this process
        pid = os.fork()
        if pid == 0:
            self._become_agent(HOME)
        kernel.enter_namespace(self._pid_namespace, kernel.CLONE_NEWPID)
        return os.waitpid(pid, 0)[1], ""

    def _run_process(self) -> tuple[int, str]:
        home = tempfile.mkdtemp(dir=self._options.root)
        try:
            pid = os.fork()
            if pid == 0:
                self._become_agent(home)
            return os.waitpid(pid, 0)[1], ""
        finally:
            shutil.rmtree(home)

    def _become_agent(self, home: str) -> NoReturn:
        uid = self._options.uid
        try:
            if home == HOME:
                kernel.unshare(kernel.CLONE_NEWNS | kernel.CLONE_NEWIPC)
                confinement = child.Confinement(home, uid, self._seccomp, bound_address_space=False)
                run_agent(
                    self._control, confinement, self._usage, lambda limits: root.mount_writable(uid, limits.file_bytes)
                )
            privileged = os.geteuid() == 0
            if privileged:
                os.chown(home, uid, uid)
            confinement = child.Confinement(home, uid if privileged else None, b"", bound_address_space=True)
            run_agent(self._control, confinement, None, lambda limits: None)
        except OSError as error:
            self._send({"kind": "failed", "reason": f"the box cannot be made: {error}"})
        finally:
            os._exit(4)

    def _run_crun(self) -> tuple[int, str]:
        assert self._usage is not None
        errors = os.memfd_create("crun-errors")
        pid = os.fork()
        if pid == 0:
            self._become_crun(errors)
        status = os.waitpid(pid, 0)[1]
        with os.fdopen(errors, "rb") as file:
            file.seek(0)
            return status, file.read(2000).decode(errors="replace")

    def _become_crun(self, errors: int) -> NoReturn:
        try:
            kernel.die_with_parent(signal.SIGKILL)
            usage = self._usage
            assert usage is not None
            descriptors = [self._control.fileno(), errors, errors, usage.cpu, usage.oom, usage.peak, usage.current]
            high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, _HIGH_DESCRIPTOR) for descriptor in descriptors]
            for target, descriptor in enumerate(high):
                os.dup2(descriptor, target)
            kernel.close_from(len(descriptors))
            command = [*self._options.crun_command, f"{Path(self._options.root).name}-{self._jobs}"]
            os.execv(command[0], command)
        finally:
            os._exit(127)

    def _send(self, header: dict[str, Any]) -> None:
        self._control.sendall(wire.encode(header, []))


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
    launcher.serve()
