"""OCI runtimes: the command that runs a bundle, and the bundle itself (OCI runtime specification 1.0.2)."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What the init needs to become the job's user; the job has none.
_INIT_CAPABILITIES = ["CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID"]
_DEV_OPTIONS = ["nosuid", "noexec", "size=64k", "mode=755"]
_OPTIONS = {"crun": ("--cgroup-manager", "disabled"), "runsc": ("--ignore-cgroups", "--network", "none")}
_RUN_OPTIONS = {"runsc": ("--pass-fd", "3:3", "--pass-fd", "4:4")}
"""By default the two descriptors after standard error are kept."""


@dataclass(frozen=True)
class OciRuntime:
    """crun, runc or runsc, run in the foreground.

    The launcher of a slot, already in the slot's control group, starts it with the bundle's folder and the container's
    name. Limits are those of the group, the process and its mounts; the runtime makes namespaces and mounts and drops
    all privileges. runc insists on control groups of its own, out of which the launcher takes the container.
    """

    name: str

    def run_command(self, folder: Path) -> list[str]:
        """Returns the command that runs the bundle in `folder`, but for the container's name."""
        path = self.find()
        assert path is not None
        log = f"file:{self.log_path(folder)}" if self.name == "crun" else str(self.log_path(folder))
        options = ["--root", str(self.state_path(folder)), "--log", log, *_OPTIONS.get(self.name, ())]
        kept = _RUN_OPTIONS.get(self.name, ("--preserve-fds", "2"))
        return [path, *options, "run", "--bundle", str(folder), *kept]

    def delete_command(self, folder: Path) -> list[str]:
        """Returns the command that removes what a killed container has left, but for the container's name.

        Empty where a container leaves nothing but its state.
        """
        path = self.find()
        assert path is not None
        return [] if self.name == "crun" else [path, "--root", str(self.state_path(folder)), "delete", "--force"]

    def state_path(self, folder: Path) -> Path:
        """Returns the folder in which the runtime keeps its state of containers."""
        return folder / "containers"

    def log_path(self, folder: Path) -> Path:
        """Returns the file to which the runtime logs errors; its standard error is the job's."""
        return folder / "runtime.log"

    def find(self) -> str | None:
        """Returns the path of the executable; None when it is not installed."""
        return shutil.which(self.name)

    def bundle(self, environment: dict[str, str], masked: Sequence[str], core_bytes: int) -> dict[str, Any]:
        """Returns the configuration that all containers of a slot share; root, arguments and the job's mounts are
        added.
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
                "rlimits": [{"type": "RLIMIT_CORE", "soft": core_bytes, "hard": core_bytes}],
                "oomScoreAdj": 1000,
            },
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "nodev", "noexec"]},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": _DEV_OPTIONS},
            ],
            "linux": {
                "namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "network", "cgroup")],
                "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/acpi", *masked],
                "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
            },
        }
