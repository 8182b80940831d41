"""The base of all isolations: what a slot's launcher is told, and what it needs of the machine."""

from __future__ import annotations

import os
import subprocess
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from perigee.errors import FailedPreconditionError
from services.sandbox.box.limits import BoxLimits
from services.sandbox.cgroups import CgroupHost, SlotCgroup
from services.sandbox.config import SandboxConfig

HOST_FOLDERS = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/lib32", "/etc/alternatives")
ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/box", "TMPDIR": "/tmp", "LANG": "C.UTF-8"}
BOX_FOLDER = Path(__file__).parent
_PROBE = "import platform, sys; print(platform.python_version()); print(sys.base_prefix)"
_PROBE_S = 30


@dataclass(frozen=True)
class Python:
    """The interpreter inside the box and the host folders that it needs there."""

    path: str
    version: str
    folders: tuple[str, ...]


def find_python(config: SandboxConfig) -> Python:
    """The configured interpreter, else Debian's, else the one under the service's own; raises FailedPreconditionError
    when it does not start.
    """
    candidates = (
        [config.python_path]
        if config.python_path
        else ["/usr/bin/python3", getattr(sys, "_base_executable", sys.executable)]
    )
    path = next((path for path in candidates if os.access(path, os.X_OK)), candidates[0])
    try:
        result = subprocess.run(
            [path, "-I", "-c", _PROBE], capture_output=True, text=True, timeout=_PROBE_S, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise FailedPreconditionError(
            f"sandbox.python_path: {path} does not run ({error}); name a Python 3.9 or later"
        ) from error
    version, prefix = result.stdout.split("\n")[:2]
    inside = any(prefix == folder or prefix.startswith(folder + "/") for folder in HOST_FOLDERS)
    return Python(path, version, HOST_FOLDERS if inside else (*HOST_FOLDERS, prefix))


@dataclass(frozen=True)
class Machine:
    """What this machine offers."""

    root: bool
    cgroups: CgroupHost | None
    instance: str


@dataclass(frozen=True)
class Place:
    """One slot: its number, user, folder and control group."""

    index: int
    uid: int
    folder: Path
    cgroup: SlotCgroup | None = field(default=None)


class Isolation(ABC):
    """One way of keeping programs apart; a file per implementation."""

    name: ClassVar[str]

    def __init__(self, config: SandboxConfig, machine: Machine, python: Python) -> None:
        self.config = config
        self.machine = machine
        self.python = python

    @property
    def label(self) -> str:
        """What callers are told of it."""
        return self.name

    @classmethod
    @abstractmethod
    def missing(cls, machine: Machine) -> str | None:
        """What this machine lacks for it, and what to install or set; None when nothing."""

    @abstractmethod
    def launcher_options(self, place: Place) -> dict[str, Any]:
        """The fields of the launcher's options that differ from `base_options`."""

    def prepare(self, place: Place) -> None:
        """Writes what launchers of the slot need on disk; most need nothing."""
        return

    def configure(self, place: Place, limits: BoxLimits) -> None:
        """Sets the limits that are not the agent's to set, before a job begins."""
        if place.cgroup is not None:
            place.cgroup.limit(limits.memory_bytes + self.memory_overhead_bytes(place.cgroup), limits.processes)

    def clean(self, place: Place) -> None:
        """Removes what a launcher that was killed may have left; most leave nothing."""
        return

    def memory_overhead_bytes(self, cgroup: SlotCgroup) -> int:
        """Memory of the slot's group that is not the program's."""
        return 0

    def launcher_command(self) -> list[str]:
        """The command that starts a launcher; its options follow as one argument."""
        start = f"import sys; sys.path.insert(0, {str(BOX_FOLDER)!r}); from box.launcher import main; main()"
        return [self.python.path, "-I", "-c", start]

    def base_options(self, place: Place) -> dict[str, Any]:
        """What every launcher is told."""
        cgroup = place.cgroup
        return {
            "isolation": self.name,
            "parent": os.getpid(),
            "uid": place.uid,
            "root": str(place.folder),
            "binds": list(self.python.folders),
            "preload": [],
            "cgroup_procs": cgroup.procs_paths if cgroup else [],
            "cgroup_version": cgroup.version if cgroup else 0,
            "usage_paths": cgroup.usage_paths if cgroup else {},
            "hidden_cgroup_mounts": [],
            "crun_command": [],
            **self.launcher_options(place),
        }
