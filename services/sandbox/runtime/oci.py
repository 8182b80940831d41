"""What a container runtime is to the sandbox: a command that runs a bundle, and the bundle itself (OCI runtime
specification 1.0.2).


crun, with its own control groups off: the launcher's is where the container lives."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from services.sandbox.runtime.cgroups import CgroupHost

# What the init needs to become the job's user; the job has none.
_INIT_CAPABILITIES = ["CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID"]
_DEV_OPTIONS = ["nosuid", "noexec", "size=64k", "mode=755"]


class OciRuntime(ABC):
    """A container runtime; a file per implementation.

    The slot's launcher, already in the slot's control group, starts it with the bundle's folder and the container's
    name. The job's limits are that group's, the process's own, and those of its mounts; nothing is left to the runtime
    but namespaces, mounts and the drop of all privileges.
    """

    name: ClassVar[str]
    debian_package: ClassVar[str]

    @property
    @abstractmethod
    def executable(self) -> str:
        """The program that must be installed."""

    @abstractmethod
    def run_command(self, folder: Path) -> list[str]:
        """The command that runs a container of the bundle in `folder` in the foreground; `--preserve-fds N NAME` is
        appended.
        """

    def state_path(self, folder: Path) -> Path:
        """Where the runtime keeps a folder per container."""
        return folder / "containers"

    def log_path(self, folder: Path) -> Path:
        """Where the runtime says why it failed; its standard error is the job's."""
        return folder / "runtime.log"

    def hidden_mounts(self, host: CgroupHost) -> tuple[str, ...]:
        """Control group mounts that the runtime must not see."""
        return ()

    def find(self) -> str | None:
        """The path of the executable, None when it is not installed."""
        return shutil.which(self.executable)

    def bundle(self, environment: dict[str, str]) -> dict[str, Any]:
        """What all containers of a slot have in common; root, arguments, limits and the job's own mounts are added for
        each.
        """
        return {
            "ociVersion": "1.0.2",
            "hostname": "box",
            "process": {
                "terminal": False,
                "user": {"uid": 0, "gid": 0, "umask": 0o077, "additionalGids": []},
                "env": [f"{name}={value}" for name, value in environment.items()],
                "cwd": "/",
                "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), _INIT_CAPABILITIES),
                "noNewPrivileges": True,
                "oomScoreAdj": 1000,
            },
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "nodev", "noexec"]},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": _DEV_OPTIONS},
            ],
            "linux": {
                "namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "network", "cgroup")],
                "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/acpi"],
                "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
            },
        }


class Crun(OciRuntime):
    """`crun run` in the foreground."""

    name: ClassVar[str] = "crun"
    debian_package: ClassVar[str] = "crun"

    @property
    def executable(self) -> str:
        """As Debian names it."""
        return "crun"

    def run_command(self, folder: Path) -> list[str]:
        """Everything but the container's name."""
        path = self.find()
        assert path is not None
        state, log = str(self.state_path(folder)), f"file:{self.log_path(folder)}"
        return [path, "--root", state, "--cgroup-manager", "disabled", "--log", log, "run", "--bundle", str(folder)]

    def hidden_mounts(self, host: CgroupHost) -> tuple[str, ...]:
        """crun refuses hosts that have cgroup v1 and v2 side by side."""
        return host.hybrid
