"""Worker slots: a slot runs one program at a time, under a user id, in a folder and in a control group of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import secrets
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

from perigee.errors import FailedPreconditionError
from services.kit.tasks import finish
from services.kit.telemetry import get_logger
from services.sandbox.agent.usage import MUCH_BYTES, UsageFiles, open_usage
from services.sandbox.runtime.cgroups import SlotCgroup
from services.sandbox.runtime.failure import SandboxFailedError

_RANGE = 4096
_FIRST, _END = 1 << 20, 1 << 31
_FIRST_MAPPED = 60001
_ALL_USERS = 2**32 - 1


def choose_first_uid(uid_map: str | None = None) -> int:
    """Returns the first of a range of user ids that nobody else has, given /proc/self/uid_map.

    The kernel counts the processes of a user over the whole machine: with a user in common, programs of one service
    would meet their limit of processes because of another's. So the range is one of half a million, by chance. A user
    namespace that has only some of the ids counts for itself.
    """
    text = Path("/proc/self/uid_map").read_text() if uid_map is None else uid_map
    lengths = [int(line.split()[2]) for line in text.splitlines()]
    if lengths != [_ALL_USERS]:
        return _FIRST_MAPPED
    return _FIRST + _RANGE * secrets.randbelow((_END - _FIRST) // _RANGE)


_OWN = 512
_PER_SLOT = 24


def raise_open_file_limit(slots: int, calls: int) -> None:
    """Raises this process's limit of open files to what the slots need, and as far as possible to what calls need.

    Raises FailedPreconditionError when the hard limit is too low for the slots: the service would fail once all are
    busy.
    """
    needed = _OWN + _PER_SLOT * slots
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = needed + calls
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise FailedPreconditionError(
            f"sandbox.slots and max_sessions need {needed} open files, and the limit is {hard}: raise it (ulimit -n, "
            "LimitNOFILE) or set fewer"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


log = get_logger(__name__)

_EMPTY_S = 10.0
_MARGIN_BYTES = 2 << 20


class WorkerSlot:
    """One user id with one control group: what runs under either belongs to the job in the slot."""

    def __init__(self, name: str, uid: int, folder: Path, cgroup: SlotCgroup | None) -> None:
        self.name = name
        self.uid = uid
        self.folder = folder
        self.cgroup = cgroup
        self.entries: list[int] = []
        self.usage: UsageFiles | None = None
        self.is_empty = True
        """False while processes of a job may be left: no other job may have the slot."""

    def open(self) -> None:
        """Makes folder and control group; raises FailedPreconditionError when this process may not."""
        self.folder.mkdir(mode=0o711)
        if self.cgroup is None:
            return
        try:
            self.cgroup.create()
            self.entries = [os.open(path, os.O_WRONLY | os.O_CLOEXEC) for path in self.cgroup.procs_paths]
            self.usage = open_usage(self.cgroup.version, self.cgroup.usage_paths)
        except OSError as error:
            raise FailedPreconditionError(f"sandbox.isolation: control groups cannot be made: {error}") from error

    @property
    def group_descriptors(self) -> list[int]:
        """Descriptors by which a process enters the group, then those from which it reads what the group uses."""
        usage = self.usage
        return (
            [] if usage is None else [*self.entries, usage.cpu, usage.oom, usage.peak, usage.current, usage.statistics]
        )

    async def reclaim_memory(self, memory_bytes: int) -> None:
        """Has the kernel drop cached pages of files that have no room beside a job of this size.

        It takes long, so it is done before the job begins. Raises SandboxFailedError.
        """
        if self.cgroup is not None and self.usage is not None:
            try:
                held, limit = self._measure(self.usage, memory_bytes)
                if held > limit:
                    await finish(asyncio.to_thread(self.cgroup.limit_memory, limit))
            except OSError as error:
                raise SandboxFailedError(f"the limits of {self.name} cannot be set: {error.strerror}") from error

    def limit(self, memory_bytes: int, processes: int) -> None:
        """Sets the limits of the next job. Raises SandboxFailedError."""
        if self.cgroup is not None and self.usage is not None:
            try:
                self.cgroup.limit(self._measure(self.usage, memory_bytes)[1], processes)
            except OSError as error:  # more was charged meanwhile than the new limit allows
                raise SandboxFailedError(f"the limits of {self.name} cannot be set: {error.strerror}") from error

    def _measure(self, usage: UsageFiles, memory_bytes: int) -> tuple[int, int]:
        """Returns the memory that the group holds, and its limit with such a job on top of it.

        Cached pages of files do not raise the limit: they make room as soon as a program wants it.
        """
        held = usage.current_bytes()
        stays = held - usage.cached_bytes() if held >= MUCH_BYTES else held
        return held, memory_bytes + (stays // _MARGIN_BYTES + 1) * _MARGIN_BYTES

    def oom_kills(self) -> int:
        """Returns how many processes the kernel has killed here for want of memory; raises SandboxFailedError."""
        try:
            return 0 if self.usage is None else self.usage.oom_kills()
        except OSError as error:
            raise SandboxFailedError(f"the control group of {self.name} cannot be read: {error.strerror}") from error

    async def kill_all(self) -> None:
        """Kills every process of the control group; `is_empty` is false when some are left after 10 s."""
        cgroup, self.is_empty = self.cgroup, False
        try:
            async with asyncio.timeout(_EMPTY_S):
                while cgroup is not None and (processes := cgroup.processes()):
                    for pid in processes:
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)
                    await asyncio.sleep(0.002)  # a killed process leaves its group a moment later, without a signal
        except TimeoutError:
            log.error("slot_not_empty", slot=self.name)
        else:
            self.is_empty = True

    def close(self) -> None:
        """Closes the descriptors and removes the folder."""
        for descriptor in self.group_descriptors:
            os.close(descriptor)
        self.entries, self.usage = [], None
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass(eq=False)
class SlotPair:
    """Two slots for one job: one for its program, one for the program that judges it."""

    program: WorkerSlot
    judge: WorkerSlot
