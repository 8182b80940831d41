"""Which isolation this machine allows: for Python's own modes, and for every other command."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass

from perigee.errors import FailedPreconditionError
from services.kit.telemetry import get_logger
from services.sandbox.cgroups import CgroupHost, find_cgroups, instance_name
from services.sandbox.config import SandboxConfig
from services.sandbox.init import find_init_problem
from services.sandbox.oci.base import OciRuntime
from services.sandbox.oci.crun import Crun

log = get_logger(__name__)

CONTAINER_RUNTIMES: dict[str, type[OciRuntime]] = {cls.name: cls for cls in (Crun,)}
UNSAFE_LABEL = "process (unsafe)"


@dataclass(frozen=True)
class Machine:
    """What this machine offers."""

    root: bool
    cgroups: CgroupHost | None
    instance: str


@dataclass(frozen=True)
class Isolation:
    """How programs are kept apart: `warm` says that Python runs in boxes forked from zygotes, `container` what runs
    everything else, and `unsafe` that nothing is kept apart.
    """

    warm: bool
    container: OciRuntime | None
    unsafe: bool = False
    reasons: tuple[str, ...] = ()
    """Why a part of it does not work here."""

    def label(self, python: bool) -> str:
        """What callers are told of the isolation of a runtime."""
        if self.unsafe:
            return UNSAFE_LABEL
        if python and self.warm:
            return "zygote"
        return self.container.name if self.container else "none"


def read_machine() -> Machine:
    """What this machine offers at this moment."""
    return Machine(root=os.geteuid() == 0, cgroups=find_cgroups(), instance=instance_name())


def find_problem(name: str, machine: Machine, config: SandboxConfig | None = None) -> str | None:
    """What this machine lacks for the zygote or for a container runtime, and what to do; None when nothing."""
    if platform.machine() not in ("x86_64", "aarch64"):
        return f"no system-call filter for {platform.machine()}"
    if not machine.root:
        return "start the service as root"
    if machine.cgroups is None:
        return "mount cgroup controllers memory, pids and cpu (in a container: make /sys/fs/cgroup writable)"
    if name in CONTAINER_RUNTIMES and (container := CONTAINER_RUNTIMES[name]()).find() is None:
        return f"install {container.executable} (apt-get install {container.debian_package})"
    return find_init_problem(config.init_path if config else None)


def choose_isolation(config: SandboxConfig, machine: Machine) -> Isolation:
    """The configured isolation, or the best that works; raises FailedPreconditionError that says what to install or
    set.
    """
    if config.isolation == "process":
        log.warning(
            "unsafe_isolation", reason="process isolation leaves the host's files and network open to every program"
        )
        return Isolation(warm=True, container=None, unsafe=True)
    container_name = config.isolation if config.isolation in CONTAINER_RUNTIMES else Crun.name
    no_container = find_problem(container_name, machine, config)
    no_zygote = find_problem("zygote", machine, config)
    container = None if no_container else CONTAINER_RUNTIMES[container_name]()
    reasons = [f"{name}: {why}" for name, why in (("zygote", no_zygote), (container_name, no_container)) if why]
    warm = no_zygote is None and config.isolation in ("auto", "zygote")
    wanted = {"auto": warm or container, "zygote": warm}.get(config.isolation, container)
    if not wanted:
        advice = "; or set sandbox.isolation to process if every program is trusted"
        raise FailedPreconditionError(f"no safe isolation works here ({'; '.join(reasons)}){advice}")
    return Isolation(warm=warm, container=container, reasons=tuple(reasons))
