"""The resident process of a slot: starts the agents that run its jobs.

Three ways: `zygote` forks this warm interpreter once into a box of its own, where it forks a program's process for each
job; `crun` runs a container per job; `process` only forks (no isolation). The launcher never reads a job: it hands the
socket over, so nothing of one job is left here for the next.
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
from typing import NoReturn

from . import child, control, kernel, root
from .agent import become_agent
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
        self._channel = socket.socket(fileno=options.control)
        self._usage: UsageFiles | None = None
        self._jobs = 0

    def prepare(self) -> None:
        """Everything that is the same for all jobs of the slot."""
        options = self._options
        for name in options.preload:
            importlib.import_module(name)
        if options.usage_paths:
            self._usage = open_usage(options.cgroup_version, options.usage_paths)
        if options.isolation == "crun":
            kernel.unshare(kernel.CLONE_NEWNS)
            self._hide_cgroup_mounts()
            self._enter_cgroup()

    def _enter_cgroup(self) -> None:
        for path in self._options.cgroup_procs:
            with open(path, "w") as file:
                file.write("0")

    def _hide_cgroup_mounts(self) -> None:
        """crun refuses a host that has cgroup v1 and v2 side by side; this namespace shows it only one."""
        kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
        for path in self._options.hidden_cgroup_mounts:
            kernel.unmount_lazily(path)

    def serve_resident(self) -> None:
        """The zygote: one agent, warm, PID 1 of the slot's box, for all jobs; this process only waits for its end."""
        kernel.unshare(kernel.CLONE_NEWPID)  # of the children to come, not of this process
        pid = os.fork()
        if pid == 0:
            try:
                self._become_zygote()
            except OSError as error:
                sys.stderr.write(f"sandbox launcher: {error}\n")
            finally:
                os._exit(4)
        self._channel.close()
        os.waitpid(pid, 0)

    def _become_zygote(self) -> NoReturn:
        options = self._options
        kernel.die_with_parent(signal.SIGKILL)
        kernel.unshare(kernel.CLONE_NEWNS | kernel.CLONE_NEWUTS | kernel.CLONE_NEWNET)
        # late, so that the interpreter's own memory is not charged to the jobs
        self._enter_cgroup()
        root.enter_root(Path(options.root), options.binds, options.uid)
        kernel.set_hostname("box")
        kernel.drop_bounding_capabilities()
        confinement = child.Confinement(HOME, options.uid, build_filter(), bound_address_space=False, fresh_mounts=True)
        gc.collect()
        gc.freeze()
        self._tell_ready()
        become_agent(self._channel, confinement, self._usage, resident=True)

    def serve_one_by_one(self) -> None:
        """A fresh box per job; a message tells the end of each, when its box is gone."""
        run = {"crun": self._run_crun, "process": self._run_process}[self._options.isolation]
        poller = select.poll()
        poller.register(self._channel, select.POLLIN)
        self._tell_ready()
        while True:
            [(_, event)] = poller.poll()
            if event & (select.POLLHUP | select.POLLERR) or not self._channel.recv(1, socket.MSG_PEEK):
                return
            self._jobs += 1
            kills_before = self._usage.oom_kills() if self._usage else 0
            status, reason = run()
            killed = self._usage is not None and self._usage.oom_kills() > kills_before
            header = {"kind": "end", "status": status, "reason": reason, "killed_for_memory": killed}
            control.send(self._channel, header, [])

    def _tell_ready(self) -> None:
        control.send(self._channel, {"kind": "ready", "version": platform.python_version()}, [])

    def _run_process(self) -> tuple[int, str]:
        home = tempfile.mkdtemp(dir=self._options.root)
        try:
            pid = os.fork()
            if pid == 0:
                self._become_unconfined(home)
            return os.waitpid(pid, 0)[1], ""
        finally:
            shutil.rmtree(home)

    def _become_unconfined(self, home: str) -> NoReturn:
        try:
            uid = self._options.uid if os.geteuid() == 0 else None
            if uid is not None:
                os.chown(home, uid, uid)
            confinement = child.Confinement(home, uid, b"", bound_address_space=True, fresh_mounts=False)
            become_agent(self._channel, confinement, None, resident=False)
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
            descriptors = [self._channel.fileno(), errors, errors, usage.cpu, usage.oom, usage.peak, usage.current]
            high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, _HIGH_DESCRIPTOR) for descriptor in descriptors]
            for target, descriptor in enumerate(high):
                os.dup2(descriptor, target)
            kernel.close_from(len(descriptors))
            command = [*self._options.crun_command, f"{Path(self._options.root).name}-{self._jobs}"]
            os.execv(command[0], command)
        finally:
            os._exit(127)


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
    if options.isolation == "zygote":
        launcher.serve_resident()
    else:
        launcher.serve_one_by_one()
