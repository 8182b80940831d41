"""A container's own control group made one that holds the groups of jobs, with cgroup v2."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from perigee.errors import FailedPreconditionError
from services.sandbox.agent import kernel
from services.sandbox.runtime.cgroups import CONTROLLERS, CgroupHost, processes_in

SERVICE_FOLDER = "perigee-service"
_MOVES = 100
_MOUNT_FLAGS = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC


def delegate_own_group(host: CgroupHost, remount: Callable[[Path], None] | None = None) -> None:
    """Makes the group at the mount's top one that can have groups for jobs below it, where it is a container's.

    In cgroup v2 a group has either processes or controllers for its children; only the hierarchy's own top has both.
    So the processes of the container, this one among them, move to a group below, whose limits stay the container's.
    Raises FailedPreconditionError when this process may not.
    """
    top = host.mounts.get("unified")
    if top is None or not (top / "cgroup.type").exists():  # the hierarchy's top has no such file
        return
    try:
        if not os.access(top, os.W_OK):
            (remount or _make_writable)(top)
        service = top / SERVICE_FOLDER
        service.mkdir(exist_ok=True)
        for _ in range(_MOVES):  # a process may have forked meanwhile
            for pid in (pids := processes_in(top)):
                with contextlib.suppress(ProcessLookupError):
                    (service / "cgroup.procs").write_text(str(pid))
            if not pids:
                break
        (top / "cgroup.subtree_control").write_text(CONTROLLERS)
    except OSError as error:
        raise FailedPreconditionError(
            f"sandbox.isolation: the container's control group cannot hold groups for jobs ({error}): "
            "give the container the capability SYS_ADMIN and a control group namespace of its own"
        ) from error


def _make_writable(mount: Path) -> None:
    """Mounts a container's /sys/fs/cgroup anew without its read-only flag."""
    kernel.mount("none", str(mount), None, kernel.MS_REMOUNT | kernel.MS_BIND | _MOUNT_FLAGS)
    if not os.access(mount, os.W_OK):
        kernel.mount("none", str(mount), None, kernel.MS_REMOUNT | _MOUNT_FLAGS)
