"""Isolation that this machine allows: for Python's own modes, and for every other command."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from perigee.errors import FailedPreconditionError
from services.kit.telemetry import get_logger
from services.sandbox.config import SandboxConfig
from services.sandbox.runtime.cgroups import CgroupHost, find_cgroups, instance_name
from services.sandbox.runtime.oci import OciRuntime

_SOURCE = Path(__file__).parents[1] / "agent" / "init.c"
_COMPILERS = ("cc", "gcc", "clang")
_COMPILE_S = 60


def find_init_problem(path: str | None) -> str | None:
    """Returns what is missing to have an init, and what to do; None when nothing is."""
    if path is not None:
        return None if os.access(path, os.X_OK) else f"sandbox.init_path: {path} is not an executable"
    return None if _find_compiler() else "install gcc and libc6-dev, or name a compiled init with sandbox.init_path"


def make_init(path: str | None, folder: Path) -> Path:
    """Compiles `agent/init.c`, statically linked so that it runs in every image, unless `path` names the executable.

    Raises FailedPreconditionError when it does not compile.
    """
    if path is not None:
        return Path(path)
    compiler = _find_compiler()
    assert compiler is not None
    target = folder / "init"
    command = [compiler, "-static", "-Os", "-s", "-Wl,-e,begin", "-o", str(target), str(_SOURCE)]
    try:
        subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_S, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        output = (getattr(error, "stderr", None) or str(error)).strip()
        raise FailedPreconditionError(f"the init of containers does not compile: {output}") from error
    target.chmod(0o755)
    return target


def _find_compiler() -> str | None:
    return next((path for name in _COMPILERS if (path := shutil.which(name))), None)


log = get_logger(__name__)

UNSAFE_LABEL = "process (unsafe)"
_CONTAINERS = "crun"
"""Name, in the configuration, of the isolation by containers, whatever runs them."""


@dataclass(frozen=True)
class Machine:
    """Means of isolation that this machine offers."""

    root: bool
    cgroups: CgroupHost | None
    instance: str


@dataclass(frozen=True)
class Isolation:
    """Isolation of programs: `warm` when Python runs in forks of zygotes, `container` for everything else, `unsafe`
    when nothing is isolated.
    """

    warm: bool
    container: OciRuntime | None
    unsafe: bool = False
    reasons: tuple[str, ...] = ()
    """Reasons why a part of it does not work here."""

    def label(self, python: bool) -> str:
        """Returns the name of the isolation that a runtime's programs have."""
        if self.unsafe:
            return UNSAFE_LABEL
        if python and self.warm:
            return "zygote"
        return self.container.name if self.container else "none"


def read_machine() -> Machine:
    """Reads what this machine offers."""
    return Machine(root=os.geteuid() == 0, cgroups=find_cgroups(), instance=instance_name())


def find_problem(name: str, machine: Machine, config: SandboxConfig | None = None) -> str | None:
    """Returns what this machine lacks for the zygote or for a container runtime, and what to do; None when nothing."""
    if platform.machine() not in ("x86_64", "aarch64"):
        return f"no system-call filter for {platform.machine()}"
    if not machine.root:
        return "start the service as root"
    if machine.cgroups is None:
        return "mount cgroup controllers memory, pids and cpu (in a container: make /sys/fs/cgroup writable)"
    if machine.cgroups.foreign:
        return "leave the host's /sys/fs/cgroup out of the container, which has a control group namespace of its own"
    if name == _CONTAINERS and (runtime := _oci_runtime(config)).find() is None:
        return f"install {runtime.name} (apt-get install crun), or set sandbox.oci_runtime to what is there"
    return find_init_problem(config.init_path if config else None)


def _oci_runtime(config: SandboxConfig | None) -> OciRuntime:
    return OciRuntime(config.oci_runtime if config else "crun")


def choose_isolation(config: SandboxConfig, machine: Machine) -> Isolation:
    """Returns the configured isolation, or the best that works.

    Raises FailedPreconditionError that says what to install or set.
    """
    if config.isolation == "process":
        log.warning(
            "unsafe_isolation", reason="process isolation leaves the host's files and network open to every program"
        )
        return Isolation(warm=True, container=None, unsafe=True)
    no_container = find_problem(_CONTAINERS, machine, config)
    no_zygote = find_problem("zygote", machine, config)
    container = None if no_container else _oci_runtime(config)
    reasons = [f"{name}: {why}" for name, why in (("zygote", no_zygote), (_CONTAINERS, no_container)) if why]
    warm = no_zygote is None and config.isolation in ("auto", "zygote")
    wanted = {"auto": warm or container, "zygote": warm}.get(config.isolation, container)
    if not wanted:
        advice = "; or set sandbox.isolation to process if every program is trusted"
        raise FailedPreconditionError(f"no safe isolation works here ({'; '.join(reasons)}){advice}")
    return Isolation(warm=warm, container=container, reasons=tuple(reasons))
