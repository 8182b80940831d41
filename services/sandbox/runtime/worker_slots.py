"""The users as which programs run: numbers without names, which belong to nobody else.

Room for the descriptors of all places: those of their control groups, their boxes, and the files of their jobs.

A place where one program runs at a time: its user, its folder, its control group, and who attends to it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import secrets
import shutil
import signal
from pathlib import Path

from perigee.errors import FailedPreconditionError
from services.kit.telemetry import get_logger
from services.sandbox.agent.monitor import MUCH_BYTES, UsageFiles, open_usage
from services.sandbox.runtime.cgroups import SlotCgroup
from services.sandbox.runtime.helper_process import BoxFailedError, finish

_RANGE = 4096
_FIRST, _END = 1 << 20, 1 << 31
_FIRST_MAPPED = 60001
_ALL_USERS = 2**32 - 1


def choose_first_uid(uid_map: str | None = None) -> int:
    """The first of a range of users, given /proc/self/uid_map.

    The kernel counts the processes of a user over the whole machine: services beside each other must not share one, or
    a program of the one meets its limit of processes because of the other's. So the range is one of half a million, by
    chance. A user namespace that has only some of the numbers counts for itself.
    """
    text = Path("/proc/self/uid_map").read_text() if uid_map is None else uid_map
    lengths = [int(line.split()[2]) for line in text.splitlines()]
    if lengths != [_ALL_USERS]:
        return _FIRST_MAPPED
    return _FIRST + _RANGE * secrets.randbelow((_END - _FIRST) // _RANGE)


_OWN = 512
_PER_PLACE = 24


def make_room(places: int, calls: int) -> None:
    """Raises this process's limit of open files as far as the places need, and the calls where it may be; raises
    FailedPreconditionError when it is too low for the places: the service would run, and fail once all are busy.
    """
    needed = _OWN + _PER_PLACE * places
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


class Place:
    """One user id with one control group; whatever runs under either belongs to the job that has the place."""

    def __init__(self, name: str, uid: int, folder: Path, cgroup: SlotCgroup | None) -> None:
        self.name = name
        self.uid = uid
        self.folder = folder
        self.cgroup = cgroup
        self.entries: list[int] = []
        self.usage: UsageFiles | None = None
        self.is_empty = True
        """False once what runs here could not be ended: no other job may have the place."""

    def open(self) -> None:
        """Makes folder and control group; raises FailedPreconditionError where this process may not."""
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
        """Descriptors by which a process enters the group, then those by which it reads what the group uses."""
        usage = self.usage
        return (
            [] if usage is None else [*self.entries, usage.cpu, usage.oom, usage.peak, usage.current, usage.statistics]
        )

    async def make_room(self, memory_bytes: int) -> None:
        """Has the kernel take pages of files back that have no room beside such a job, which takes long; to be done
        before the job begins. Raises BoxFailedError.
        """
        if self.cgroup is not None and self.usage is not None:
            try:
                held, limit = self._weigh(self.usage, memory_bytes)
                if held > limit:
                    await finish(asyncio.to_thread(self.cgroup.limit_memory, limit))
            except OSError as error:
                raise BoxFailedError(f"the limits of {self.name} cannot be set: {error.strerror}") from error

    def limit(self, memory_bytes: int, processes: int) -> None:
        """Sets the limits of the next job. Raises BoxFailedError."""
        if self.cgroup is not None and self.usage is not None:
            try:
                self.cgroup.limit(self._weigh(self.usage, memory_bytes)[1], processes)
            except OSError as error:  # more was charged meanwhile than the new limit allows
                raise BoxFailedError(f"the limits of {self.name} cannot be set: {error.strerror}") from error

    def _weigh(self, usage: UsageFiles, memory_bytes: int) -> tuple[int, int]:
        """What the group holds, and its limit with such a job: what it holds already is not the job's, but for pages of
        files, which make room as soon as a program wants it.
        """
        held = usage.current_bytes()
        stays = held - usage.cached_bytes() if held >= MUCH_BYTES else held
        return held, memory_bytes + (stays // _MARGIN_BYTES + 1) * _MARGIN_BYTES

    def oom_kills(self) -> int:
        """How many processes the kernel has killed here for want of memory; raises BoxFailedError."""
        try:
            return 0 if self.usage is None else self.usage.oom_kills()
        except OSError as error:
            raise BoxFailedError(f"the control group of {self.name} cannot be read: {error.strerror}") from error

    async def empty(self) -> None:
        """Kills everything in the control group and returns when it is gone, or after a while without success."""
        cgroup, self.is_empty = self.cgroup, False
        try:
            async with asyncio.timeout(_EMPTY_S):
                while cgroup is not None and (processes := cgroup.processes()):
                    for pid in processes:
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)
                    await asyncio.sleep(0.002)  # a killed process leaves its group a moment later and tells nobody
        except TimeoutError:
            log.error("place_not_empty", place=self.name)
        else:
            self.is_empty = True

    def close(self) -> None:
        """Closes the descriptors and removes the folder."""
        for descriptor in self.group_descriptors:
            os.close(descriptor)
        self.entries, self.usage = [], None
        shutil.rmtree(self.folder, ignore_errors=True)
