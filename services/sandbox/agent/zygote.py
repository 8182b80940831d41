"""Zygote: the warm interpreter of one runtime imports what programs are likely to need, then forks a job supervisor for
each slot.

It never reads a job and never runs a program: a supervisor's socket and control group come from the service and go to
the fork, and each program is a fork of its supervisor, so nothing of one job is here for the next.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import platform
import select
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import HOME, kernel, protocol
from .confinement import Confinement, build_filter
from .job_supervisor import run_job_supervisor
from .modes import MODES, find_generators, hide_own_modules, load_mode
from .program import Begin
from .usage import UsageFiles

_REAP_MS = 1000


@dataclass(frozen=True)
class Options:
    """Options of a zygote; programs have no isolation unless `isolated`."""

    control: int
    parent: int
    isolated: bool
    preload: list[str]
    path: list[str]
    environment: dict[str, str]


class Zygote:
    """Forks job supervisors until the service closes the socket."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._channel = socket.socket(fileno=options.control)

    def prepare(self) -> None:
        """Does what all programs of the runtime have in common."""
        options = self._options
        _restore_signals()
        kernel.adopt_orphans()  # of supervisors that were killed: what is not reaped counts against their slots
        if options.isolated:
            kernel.drop_bounding_capabilities()
        os.environ.update(options.environment)
        sys.path += options.path
        for name in options.preload:
            importlib.import_module(name)
        find_generators()
        for mode in MODES:
            load_mode(mode)
        hide_own_modules()
        gc.collect()
        gc.freeze()

    def serve(self) -> None:
        """Forks a job supervisor for each message of the service."""
        protocol.send(self._channel, {"kind": "ready", "version": platform.python_version()}, [])
        poller = select.poll()
        poller.register(self._channel, select.POLLIN)
        while True:
            ready = poller.poll(_REAP_MS)
            _reap()
            if not ready:
                continue
            try:
                message = protocol.receive(self._channel)
            except (EOFError, ConnectionError):
                return
            self._fork_supervisor(message)
            message.close()

    def _fork_supervisor(self, message: protocol.Message) -> None:
        if os.fork():
            return
        channel = self._adopt(message)
        header = message.header
        isolated = self._options.isolated
        try:
            entries, usage = message.descriptors[1 : 1 + header["groups"]], message.descriptors[1 + header["groups"] :]
            for entry in entries:
                os.write(entry, b"0")
                os.close(entry)
        except OSError as error:
            with contextlib.suppress(OSError):  # the service has closed the sandbox
                protocol.send(channel, {"kind": "failed", "reason": f"cannot enter the control group: {error}"}, [])
            os._exit(4)
        uid = header["uid"] if os.geteuid() == 0 else None
        if isolated:
            confinement = Confinement(HOME, uid, build_filter(), bound_address_space=False)
        else:
            confinement = Confinement(header["home"], uid, b"", bound_address_space=True)
        files = UsageFiles(header["cgroup_version"], *usage) if usage else None
        run_job_supervisor(channel, confinement, files, isolated)

    def _adopt(self, message: protocol.Message) -> socket.socket:
        """Makes this process a job supervisor."""
        kernel.die_with_parent(signal.SIGKILL)
        self._channel.close()
        return socket.socket(fileno=message.descriptors[0])


def _restore_signals() -> None:
    """Restores signals that the service was started to ignore (nohup) or block, but for those that Python ignores."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in signal.valid_signals() - {signal.SIGPIPE, signal.SIGXFSZ}:
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return


def main() -> Callable[[], Any] | None:
    """Runs the zygote; its options are a JSON object in the first argument. In a process that is to become a program's
    it returns what goes on from there.
    """
    options = Options(**json.loads(sys.argv[1]))
    kernel.die_with_parent(signal.SIGKILL)
    if os.getppid() != options.parent:
        sys.exit("sandbox zygote: the service that started it has ended")
    zygote = Zygote(options)
    try:
        zygote.prepare()
    except (OSError, ImportError) as error:
        sys.exit(f"sandbox zygote: {error}")
    try:
        zygote.serve()
    except Begin as program:
        return program.run
    return None
