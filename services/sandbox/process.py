"""No isolation but rlimits and a process of its own, for machines where nothing better works and programs are
trusted.
"""

from __future__ import annotations

from typing import Any, ClassVar

from services.sandbox.isolation import Isolation, Machine, Place


class ProcessIsolation(Isolation):
    """A fork per job; the program sees the host's files and network, and daemons may outlive it."""

    name: ClassVar[str] = "process"

    @classmethod
    def missing(cls, machine: Machine) -> str | None:
        """Works everywhere; never chosen unless asked for."""
        return None

    @property
    def label(self) -> str:
        """Says what it is."""
        return "process (unsafe)"

    def launcher_options(self, place: Place) -> dict[str, Any]:
        """Warm like the zygote; no control group."""
        return {"preload": list(self.config.preload), "cgroup_procs": [], "cgroup_version": 0, "usage_paths": {}}
