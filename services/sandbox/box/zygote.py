"""The warm interpreter of one runtime: imports what programs are likely to need, then forks a box for every job.

It never reads a job and never runs a program: a box's socket and control group come from the service and go to the
fork, so nothing of one job is here for the next.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import platform
import select
import signal
import socket
import sys
from dataclasses import dataclass
from typing import NoReturn

from . import control, kernel, root
from .box import become_box
from .confine import Confinement
from .limits import HOME
from .modes import hide_own_modules
from .seccomp import build_filter
from .usage import UsageFiles

_REAP_MS = 1000
_NAMESPACES = kernel.CLONE_NEWNS | kernel.CLONE_NEWUTS | kernel.CLONE_NEWNET


@dataclass(frozen=True)
class Options:
    """What the service tells a zygote; not `isolated` means forks without a box around them."""

    control: int
    parent: int
    isolated: bool
    preload: list[str]
    path: list[str]
    environment: dict[str, str]


class Zygote:
    """Forks boxes until the service closes the socket."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._channel = socket.socket(fileno=options.control)
        self._own_pids = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)

    def prepare(self) -> None:
        """Everything that is the same for all boxes of the runtime."""
        options = self._options
        if options.isolated:
            kernel.drop_bounding_capabilities()
        os.environ.update(options.environment)
        sys.path += options.path
        for name in options.preload:
            importlib.import_module(name)
        hide_own_modules()
        gc.collect()
        gc.freeze()

    def serve(self) -> None:
        """Forks a box for each message of the service."""
        control.send(self._channel, {"kind": "ready", "version": platform.python_version()}, [])
        poller = select.poll()
        poller.register(self._channel, select.POLLIN)
        while True:
            ready = poller.poll(_REAP_MS)
            _reap()
            if not ready:
                continue
            try:
                message = control.receive(self._channel)
            except (EOFError, ConnectionError):
                return
            self._fork_box(message)
            message.close()

    def _fork_box(self, message: control.Message) -> None:
        if not self._options.isolated:
            if os.fork() == 0:
                self._become_plain_box(message)
            return
        kernel.unshare(kernel.CLONE_NEWPID)  # of the next child, not of this process
        pid = os.fork()
        if pid == 0:
            self._become_isolated_box(message)
        kernel.enter_namespace(self._own_pids, kernel.CLONE_NEWPID)  # so that the next child can have its own again

    def _become_isolated_box(self, message: control.Message) -> NoReturn:
        channel = self._adopt(message)
        header = message.header
        try:
            entries, usage = message.descriptors[1 : 1 + header["groups"]], message.descriptors[1 + header["groups"] :]
            for entry in entries:
                os.write(entry, b"0")
                os.close(entry)
            kernel.unshare(_NAMESPACES)
            kernel.mount("proc", "/proc", "proc", root.PROC_FLAGS)
            kernel.set_hostname("box")
            confinement = Confinement(HOME, header["uid"], build_filter(), bound_address_space=False, fresh_ipc=True)
            files = UsageFiles(header["cgroup_version"], *usage)
        except OSError as error:
            _fail(channel, error)
        become_box(channel, confinement, files)

    def _become_plain_box(self, message: control.Message) -> NoReturn:
        channel = self._adopt(message)
        uid = message.header["uid"] if os.geteuid() == 0 else None
        confinement = Confinement(message.header["home"], uid, b"", bound_address_space=True, fresh_ipc=False)
        become_box(channel, confinement, None)

    def _adopt(self, message: control.Message) -> socket.socket:
        """This process is a box's from here on."""
        kernel.die_with_parent(signal.SIGKILL)
        self._channel.close()
        os.close(self._own_pids)
        return socket.socket(fileno=message.descriptors[0])


def _fail(channel: socket.socket, error: OSError) -> NoReturn:
    control.send(channel, {"kind": "failed", "reason": f"cannot make a box: {error}"}, [])
    os._exit(4)


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return


def main() -> None:
    """The zygote's process; its options are a JSON object in the first argument."""
    options = Options(**json.loads(sys.argv[1]))
    kernel.die_with_parent(signal.SIGKILL)
    if os.getppid() != options.parent:
        sys.exit("sandbox zygote: the service that started it has ended")
    zygote = Zygote(options)
    try:
        zygote.prepare()
    except (OSError, ImportError) as error:
        sys.exit(f"sandbox zygote: {error}")
    zygote.serve()
