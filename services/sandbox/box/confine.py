"""Gives up every privilege of a process that is about to become a submission's."""

from __future__ import annotations

import fcntl
import os
import resource
import signal
from dataclasses import dataclass

from . import kernel
from .limits import BoxLimits

_HIGH_DESCRIPTOR = 100
_GRACE_CPU_S = 1
_OPEN_FILES = 256


@dataclass(frozen=True)
class Confinement:
    """How a program's process is confined; `uid` None leaves the user as it is, `seccomp` empty installs no filter."""

    home: str
    uid: int | None
    seccomp: bytes
    bound_address_space: bool


def give_up_privileges(confinement: Confinement) -> None:
    """What does not depend on the job: a session of its own, another user, no way back, the filter."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.umask(0o077)
    os.chdir(confinement.home)
    if confinement.uid is not None:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
        os.setgroups([])
        os.setresgid(confinement.uid, confinement.uid, confinement.uid)
        os.setresuid(confinement.uid, confinement.uid, confinement.uid)
    kernel.set_dumpable(True)
    kernel.forbid_new_privileges()
    if confinement.seccomp:
        kernel.install_filter(confinement.seccomp)


def take_limits(confinement: Confinement, limits: BoxLimits, runs: int) -> None:
    """The limits of a job, with CPU time for `runs` answers."""
    for name, value in resource_limits(limits, runs).items():
        resource.setrlimit(getattr(resource, name), (value, value))
    if confinement.bound_address_space:
        resource.setrlimit(resource.RLIMIT_AS, (limits.memory_bytes, limits.memory_bytes))
    if confinement.uid is not None:
        resource.setrlimit(resource.RLIMIT_NPROC, (limits.processes, limits.processes))


def place_descriptors(descriptors: list[int]) -> None:
    """Makes `descriptors[i]` descriptor i, kept by an execve, and closes all others."""
    high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, _HIGH_DESCRIPTOR) for descriptor in descriptors]
    for target, descriptor in enumerate(high):
        os.dup2(descriptor, target, inheritable=True)
    kernel.close_from(len(descriptors))


def resource_limits(limits: BoxLimits, runs: int) -> dict[str, int]:
    """The limits of every isolation that are a process's own, by name; the number of processes is set beside them."""
    return {
        "RLIMIT_CPU": -(-limits.cpu_ms // 1000) * max(1, runs) + _GRACE_CPU_S,
        "RLIMIT_NOFILE": _OPEN_FILES,
        "RLIMIT_FSIZE": max(limits.file_bytes, limits.output_bytes + 1),
        "RLIMIT_CORE": 0,
        "RLIMIT_MEMLOCK": 0,
        "RLIMIT_MSGQUEUE": 0,
    }
