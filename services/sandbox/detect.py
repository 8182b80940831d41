"""Which isolation this machine allows."""

from __future__ import annotations

import os

from perigee.errors import FailedPreconditionError
from services.kit.telemetry import get_logger
from services.sandbox.cgroups import find_cgroups, instance_name
from services.sandbox.config import SandboxConfig
from services.sandbox.crun import CrunIsolation
from services.sandbox.isolation import Isolation, Machine, Python
from services.sandbox.process import ProcessIsolation
from services.sandbox.zygote import ZygoteIsolation

log = get_logger(__name__)

ISOLATIONS: dict[str, type[Isolation]] = {cls.name: cls for cls in (ZygoteIsolation, CrunIsolation, ProcessIsolation)}
# `process` keeps nothing apart and is therefore not among them.
AUTOMATIC: tuple[type[Isolation], ...] = (ZygoteIsolation, CrunIsolation)


def read_machine() -> Machine:
    """What this machine offers at this moment."""
    return Machine(root=os.geteuid() == 0, cgroups=find_cgroups(), instance=instance_name())


def choose_isolation(config: SandboxConfig, machine: Machine, python: Python) -> Isolation:
    """The configured isolation, or the first automatic one that works; raises FailedPreconditionError that says what
    to install or set.
    """
    if config.isolation == "process":
        log.warning(
            "unsafe_isolation", reason="process isolation leaves the host's files and network open to every program"
        )
        return ProcessIsolation(config, machine, python)
    candidates = AUTOMATIC if config.isolation == "auto" else (ISOLATIONS[config.isolation],)
    reasons = []
    for candidate in candidates:
        reason = candidate.missing(machine)
        if reason is None:
            return candidate(config, machine, python)
        reasons.append(f"{candidate.name}: {reason}")
    advice = "; or set sandbox.isolation to process if every program is trusted"
    raise FailedPreconditionError(f"no safe isolation works here ({'; '.join(reasons)}){advice}")
