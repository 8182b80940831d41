"""Isolation by crun: a container per job, in the slot's control group."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any, ClassVar

from services.sandbox.box.root import make_skeleton
from services.sandbox.cgroups import SlotCgroup
from services.sandbox.isolation import BOX_FOLDER, ENVIRONMENT, Isolation, Machine, Place

MIB = 1024 * 1024
_AGENT_FOLDER = "/perigee"
# What the agent needs to give a program fresh mounts and another user, and to end it; the program itself has none.
_AGENT_CAPABILITIES = ["CAP_KILL", "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID", "CAP_SYS_ADMIN"]
_OWN_MOUNTS = [
    {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "nodev", "noexec"]},
    {
        "destination": "/dev",
        "type": "tmpfs",
        "source": "tmpfs",
        "options": ["nosuid", "noexec", "size=64k", "mode=755"],
    },
    {"destination": "/dev/shm", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "nodev", "size=4k"]},
]
_PRESERVED_DESCRIPTORS = 4
_DELETE_S = 20


class CrunIsolation(Isolation):
    """`crun run` for each job; the bundle of a slot is written once."""

    name: ClassVar[str] = "crun"

    @classmethod
    def missing(cls, machine: Machine) -> str | None:
        """Needs crun, root and writable control groups."""
        if shutil.which("crun") is None:
            return "install crun (apt-get install crun)"
        if not machine.root:
            return "start the service as root"
        if machine.cgroups is None:
            return "mount cgroup controllers memory, pids and cpu (in a container: make /sys/fs/cgroup writable)"
        return None

    def memory_overhead_bytes(self, cgroup: SlotCgroup) -> int:
        """crun and the agent's interpreter start inside the group."""
        return 24 * MIB

    def launcher_options(self, place: Place) -> dict[str, Any]:
        """The command that runs a container; the launcher appends its name."""
        command = [
            *self._command(place),
            "run",
            "--preserve-fds",
            str(_PRESERVED_DESCRIPTORS),
            "--bundle",
            str(place.folder),
        ]
        hidden = list(self.machine.cgroups.hybrid) if self.machine.cgroups else []
        return {"crun_command": command, "hidden_cgroup_mounts": hidden}

    def prepare(self, place: Place) -> None:
        """Writes the bundle of the slot's containers."""
        make_skeleton(self._rootfs(place), list(self.python.folders), place.uid)
        (self._rootfs(place) / _AGENT_FOLDER.strip("/") / "box").mkdir(parents=True)
        (place.folder / "config.json").write_text(json.dumps(self._bundle(place)))

    def clean(self, place: Place) -> None:
        """Deletes containers of the slot whose `crun run` was killed."""
        containers = self._containers(place)
        for name in [path.name for path in containers.glob("*/")] if containers.exists() else []:
            subprocess.run(
                [*self._command(place), "delete", "--force", name], check=False, capture_output=True, timeout=_DELETE_S
            )
            shutil.rmtree(containers / name, ignore_errors=True)

    def _command(self, place: Place) -> list[str]:
        crun = shutil.which("crun")
        assert crun is not None
        return [crun, "--root", str(self._containers(place)), "--cgroup-manager", "disabled"]

    def _containers(self, place: Place) -> Path:
        return place.folder / "containers"

    def _rootfs(self, place: Place) -> Path:
        return place.folder / "rootfs"

    def _bundle(self, place: Place) -> dict[str, Any]:
        assert place.cgroup is not None
        start = f"import sys; sys.path.insert(0, {_AGENT_FOLDER!r}); from box.container import main; main()"
        return {
            "ociVersion": "1.0.2",
            "hostname": "box",
            "root": {"path": "rootfs", "readonly": True},
            "process": {
                "terminal": False,
                "user": {"uid": 0, "gid": 0, "umask": 0o077},
                "args": [self.python.path, "-I", "-c", start, str(place.uid), str(place.cgroup.version)],
                "env": [f"{name}={value}" for name, value in ENVIRONMENT.items()],
                "cwd": "/",
                "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), _AGENT_CAPABILITIES),
                "noNewPrivileges": True,
            },
            "mounts": [*self._host_mounts(), *_OWN_MOUNTS],
            "linux": {
                "namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "network", "cgroup")],
                "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/acpi"],
                "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
            },
        }

    def _host_mounts(self) -> list[dict[str, Any]]:
        folders = {path: path for path in self.python.folders if Path(path).is_dir() and not Path(path).is_symlink()}
        folders[f"{_AGENT_FOLDER}/box"] = str(BOX_FOLDER / "box")
        options = ["bind", "ro", "nosuid", "nodev"]
        return [
            {"destination": inside, "type": "bind", "source": path, "options": options}
            for inside, path in folders.items()
        ]
