"""Starts containers by an OCI runtime's command, and ends them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
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

_STATUS = struct.Struct("=i")
_KILLED_STATUS = signal.SIGKILL
_END_S = 10.0
_REPORTS_BYTES = 64


class Container(Process):
    """A running container: `pid` is the runtime's own command, `events` the pipe of the init inside."""

    def __init__(self, pid: int, name: str, reports: int, runtime: ContainerRuntime) -> None:
        self.pid = pid
        self.events = reports
        self._name = name
        self._told = b""
        self._runtime = runtime

    def note_events(self) -> bool:
        """True when the init tells that the job begins."""
        began = not self._told
        self._take()
        return began and self._told.startswith(b"s")

    def _take(self) -> None:
        assert self.events is not None
        with contextlib.suppress(BlockingIOError):  # nothing more has been told
            while told := os.read(self.events, _REPORTS_BYTES):
                self._told += told

    def kill(self) -> None:
        """Ends every process of the slot but the launcher."""
        self._runtime.kill_all()

    def settle(self, status: int, stopped: bool) -> int:
        """The status that the init told; raises OSError when the command could not be executed, and RuntimeError when
        the runtime did not get as far as the job.
        """
        self._take()
        assert self.events is not None
        os.close(self.events)
        self._runtime.forget(self._name)
        told = self._told.removeprefix(b"s")
        if told.startswith(b"x"):
            [number] = _STATUS.unpack_from(told, 1)
            raise OSError(number, os.strerror(number))
        if told.startswith(b"w"):
            return int(_STATUS.unpack_from(told, 1)[0])
        if stopped:
            return _KILLED_STATUS
        raise RuntimeError(f"the container ended with status {status:#x}: {self._runtime.last_words() or 'no message'}")


class ContainerRuntime:
    """One slot's way to start containers, one at a time."""

    def __init__(self, command: list[str], state: str, log: str, procs: str, folder: str, uid: int) -> None:
        self._command = command
        self._state = Path(state)
        if self._state.exists():  # of a launcher that was killed with its containers
            shutil.rmtree(self._state)
        self._log = Path(log)
        self._procs = procs
        self._config = Path(folder) / "config.json"
        self._uid = uid
        self._filter = memory_file(build_filter())
        self._written = ""
        self._count = 0

    def start(
        self,
        bundle: dict[str, Any],
        root_path: str,
        mounts: list[tuple[str, str]],
        order: Order,
        command: list[str],
        descriptors: list[int],
    ) -> Container:
        """Starts a container whose job is `command` with the given descriptors."""
        self._write_config(bundle, root_path, mounts, order, command, len(descriptors))
        reports, told = os.pipe()
        os.set_blocking(reports, False)
        self._count += 1
        name = f"job-{self._count}"
        arguments = [*self._command, "--preserve-fds", str(len(descriptors) + 2 - 3), name]
        pid = os.fork()
        if pid:
            os.close(told)
            return Container(pid, name, reports, self)
        try:
            kernel.die_with_parent(signal.SIGKILL)
            place_descriptors([*descriptors, told, self._filter])
            os.execv(arguments[0], arguments)
        finally:
            os._exit(127)

    def _write_config(
        self,
        bundle: dict[str, Any],
        root_path: str,
        mounts: list[tuple[str, str]],
        order: Order,
        command: list[str],
        descriptors: int,
    ) -> None:
        process = bundle["process"]
        environment = {**dict(pair.split("=", 1) for pair in process["env"]), **order.environment}
        limits = {**resource_limits(order.limits, order.answers), "RLIMIT_NPROC": order.limits.processes}
        config = {
            **bundle,
            "root": {"path": root_path, "readonly": True},
            "process": {
                **process,
                "args": [f"{root.OWN_FOLDER}/init", str(descriptors), str(self._uid), *command],
                "env": [f"{name}={value}" for name, value in environment.items()],
                "rlimits": [{"type": name, "soft": value, "hard": value} for name, value in limits.items()],
            },
            "mounts": [
                *bundle["mounts"],
                *(
                    {"destination": inside, "type": "bind", "source": path, "options": ["bind", "nosuid", "nodev"]}
                    for path, inside in mounts
                ),
            ],
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


def _is_zombie(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] == b"Z"
    except (FileNotFoundError, ProcessLookupError):
        return True
