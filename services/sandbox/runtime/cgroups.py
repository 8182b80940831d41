"""Control groups of the worker slots, on hosts with cgroup v1, v2, or both (v1 controllers beside an empty v2)."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from perigee.errors import InternalError

FOLDER = "perigee-sandbox"
NEEDED = ("memory", "pids", "cpuacct")
_REMOVAL_S = 5.0
# A launcher with its container runtime, or a job supervisor with the process that it has prepared, live in the group
# beside the job; the job's own number is bounded by its user's limit, too.
_OWN_PROCESSES = 16
_PERIOD_US = 100_000
_SOCKET_BYTES = 16 << 20
"""Memory of a slot's TCP and UDP sockets."""
_UNLIMITED = 2**63
CONTROLLERS = "+memory +pids +cpu"
# The kernel's weight of one process, and the largest of a group, by version.
_WEIGHTS = {1: ("cpu.shares", 1024, 1 << 18), 2: ("cpu.weight", 100, 10_000)}


@dataclass(frozen=True)
class CgroupHost:
    """Mounts of this host's controllers; `hybrid` lists v2 mounts beside v1 ones.

    `foreign` is a v2 mount from outside of this process's control group namespace, whose groups no process here enters.
    """

    version: int
    mounts: dict[str, Path]
    hybrid: tuple[str, ...]
    foreign: bool = False


def find_cgroups(mountinfo: str | None = None) -> CgroupHost | None:
    """Finds the host's controllers in /proc/self/mountinfo; None unless memory, processes and CPU time can be
    controlled.
    """
    text = Path("/proc/self/mountinfo").read_text() if mountinfo is None else mountinfo
    v1: dict[str, Path] = {}
    v2: list[str] = []
    foreign = False
    for line in text.splitlines():
        fields, _, tail = line.partition(" - ")
        root, target = fields.split()[3:5]
        kind, _, options = tail.split(" ", 2)
        if kind == "cgroup":
            for name in options.split(","):
                v1.setdefault(name, Path(target))
        elif kind == "cgroup2":
            foreign = root.startswith("/..") if not v2 else foreign
            v2.append(target)
    if all(name in v1 for name in NEEDED):
        return CgroupHost(1, {name: v1[name] for name in (*NEEDED, "cpu") if name in v1}, tuple(v2))
    if not v2:
        return None
    available = (Path(v2[0]) / "cgroup.controllers").read_text().split() if Path(v2[0]).exists() else []
    if not {"memory", "pids", "cpu"} <= set(available):
        return None
    return CgroupHost(2, {"unified": Path(v2[0])}, (), foreign)


def instance_name() -> str:
    """Returns a name for a pool that no other has."""
    return f"{os.getpid()}-{secrets.token_hex(4)}"


class SlotCgroup:
    """Control group of one worker slot."""

    def __init__(self, host: CgroupHost, instance: str, name: str) -> None:
        self.version = host.version
        self._paths = {controller: mount / FOLDER / instance / name for controller, mount in host.mounts.items()}
        self._memory_bytes = _UNLIMITED
        self._processes = 0

    def create(self) -> None:
        """Makes the group, with at most one core's worth of CPU time; raises OSError when this process may not."""
        for path in self._paths.values():
            if self.version == 2:
                _enable_controllers(path)
            path.mkdir(parents=True, exist_ok=True)
        if self.version == 2:
            path = self._paths["unified"]
            (path / "cpu.max").write_text(f"{_PERIOD_US} {_PERIOD_US}")
            _write_if_there(path / "memory.swap.max", "0")
            return
        # v2 charges what sockets hold to the group's memory; v1 counts it apart, and only under a limit
        _write_if_there(self._paths["memory"] / "memory.kmem.tcp.limit_in_bytes", str(_SOCKET_BYTES))
        if "cpu" in self._paths:
            _write_if_there(self._paths["cpu"] / "cpu.cfs_quota_us", str(_PERIOD_US))

    def limit(self, memory_bytes: int, processes: int) -> None:
        """Sets the limits of the next job."""
        pids = self._paths["pids" if self.version == 1 else "unified"]
        if processes != self._processes:
            (pids / "pids.max").write_text(str(processes + _OWN_PROCESSES))
            self._processes = processes
        self.limit_memory(memory_bytes)

    def limit_memory(self, memory_bytes: int) -> None:
        """Sets the limit of memory; the kernel first reclaims what it can of the memory above it."""
        memory = self._paths["memory" if self.version == 1 else "unified"]
        if memory_bytes != self._memory_bytes:
            self._set_memory(memory, memory_bytes)
            self._memory_bytes = memory_bytes

    def _set_memory(self, path: Path, memory_bytes: int) -> None:
        if self.version == 2:
            (path / "memory.max").write_text(str(memory_bytes))
            return
        names = ["memory.limit_in_bytes", "memory.memsw.limit_in_bytes"]
        if memory_bytes > self._memory_bytes:
            names.reverse()  # memory may never exceed memory and swap, not even between the two writes
        for name in names:
            _write_if_there(path / name, str(memory_bytes))

    @property
    def procs_paths(self) -> list[str]:
        """Files to which a process writes 0 to enter the group."""
        return [str(path / "cgroup.procs") for path in dict.fromkeys(self._paths.values())]

    @property
    def usage_paths(self) -> dict[str, str]:
        """Files with CPU time, memory kills, peak and current memory, and memory statistics."""
        if self.version == 2:
            names = {
                "cpu": "cpu.stat",
                "oom": "memory.events",
                "peak": "memory.peak",
                "current": "memory.current",
                "statistics": "memory.stat",
            }
            return {key: str(self._paths["unified"] / name) for key, name in names.items()}
        memory = self._paths["memory"]
        return {
            "cpu": str(self._paths["cpuacct"] / "cpuacct.usage"),
            "oom": str(memory / "memory.oom_control"),
            "peak": str(memory / "memory.max_usage_in_bytes"),
            "current": str(memory / "memory.usage_in_bytes"),
            "statistics": str(memory / "memory.stat"),
        }

    def processes(self) -> list[int]:
        """Returns the processes in the group."""
        path = next(iter(self._paths.values()))
        return processes_in(path) if path.exists() else []


def processes_in(path: Path) -> list[int]:
    """Returns the processes of a group; 0 is one without an id in this namespace."""
    return [int(pid) for pid in (path / "cgroup.procs").read_text().split()]


def _enable_controllers(path: Path) -> None:
    """Enables the controllers in each ancestor, as v2 requires."""
    for parent in (path.parents[2], path.parents[1], path.parents[0]):
        parent.mkdir(exist_ok=True)
        (parent / "cgroup.subtree_control").write_text(CONTROLLERS)


def _write_if_there(path: Path, text: str) -> None:
    if path.exists():
        path.write_text(text)


def group_folders(host: CgroupHost, instance: str) -> list[Path]:
    """Returns the folders of an instance's groups, one for each mount."""
    return [mount / FOLDER / instance for mount in dict.fromkeys(host.mounts.values())]


def weigh_jobs(host: CgroupHost, instance: str, slots: int) -> None:
    """Has the jobs of an instance weigh as much beside other processes as one process for each slot.

    Raises OSError when this process may not.
    """
    name, one, most = _WEIGHTS[host.version]
    if (folder := _cpu_folder(host)) is not None:
        _write_if_there(folder / instance / name, str(min(one * slots, most)))
    weigh_instances(host)


def weigh_instances(host: CgroupHost) -> None:
    """Has the group of all instances weigh as much as they do; raises OSError when this process may not.

    Instances do so one after another: one that has read the weights before another came would write too little.
    """
    name, one, most = _WEIGHTS[host.version]
    if (folder := _cpu_folder(host)) is None:
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        weights = [_read_number(path) for path in folder.glob(f"*-*/{name}")]
        _write_if_there(folder / name, str(min(max(one, sum(weights)), most)))
    finally:
        os.close(descriptor)


def _read_number(path: Path) -> int:
    """Returns the number in a file of a group; 0 when the group has been removed meanwhile."""
    try:
        return int(path.read_text())
    except FileNotFoundError:
        return 0


def _cpu_folder(host: CgroupHost) -> Path | None:
    mount = host.mounts.get("cpu" if host.version == 1 else "unified")
    return None if mount is None else mount / FOLDER


def find_groups(host: CgroupHost) -> list[Path]:
    """Returns the folders of all instances, of services alive or not."""
    return sorted(path for mount in dict.fromkeys(host.mounts.values()) for path in (mount / FOLDER).glob("*-*/"))


def remove_group(top: Path) -> None:
    """Kills what is left in an instance's groups below one mount and removes them.

    Raises InternalError when they cannot be removed within 5 s.
    """
    deadline = time.monotonic() + _REMOVAL_S
    for folder in (*top.glob("*/*/"), *top.glob("*/"), top):  # a container runtime may have made groups in a slot's
        while folder.exists():
            for pid in processes_in(folder):
                _kill(pid)
            try:
                folder.rmdir()
            except OSError as error:
                if time.monotonic() > deadline:
                    raise InternalError(f"{folder} cannot be removed: {error.strerror}") from error
                time.sleep(0.005)  # a killed process leaves its group a moment later


def remove_strays(instance: str) -> None:
    """Removes groups that a container runtime has made for an instance in hierarchies that are not those of its slots,
    below the group of this process.
    """
    top = Path("/sys/fs/cgroup")
    for path in {line.split(":", 2)[2].lstrip("/") for line in Path("/proc/self/cgroup").read_text().splitlines()}:
        for group in [each for mount in (top, *top.glob("*/")) for each in (mount / path).glob(f"{instance}-*/")]:
            with contextlib.suppress(OSError):
                group.rmdir()


def _kill(pid: int) -> None:
    if pid == 0:  # a process without an id in this namespace; kill(0) would kill the own process group
        return
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
