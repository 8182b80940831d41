"""Isolation by a warm interpreter: each job is a fork into fresh namespaces, in the slot's control group."""

from __future__ import annotations

import platform
from typing import Any, ClassVar

from services.sandbox.cgroups import SlotCgroup
from services.sandbox.isolation import Isolation, Machine, Place

MIB = 1024 * 1024
# The last job's memory may not be freed yet; the next one must not be given it on top.
_MOST_OVERHEAD_BYTES = 24 * MIB


class ZygoteIsolation(Isolation):
    """A resident Python per slot that forks a prepared child for each job."""

    name: ClassVar[str] = "zygote"

    @classmethod
    def missing(cls, machine: Machine) -> str | None:
        """Needs root, a known architecture and writable control groups."""
        if platform.machine() not in ("x86_64", "aarch64"):
            return f"no system-call filter for {platform.machine()}"
        if not machine.root:
            return "start the service as root"
        if machine.cgroups is None:
            return "mount cgroup controllers memory, pids and cpu (in a container: make /sys/fs/cgroup writable)"
        return None

    def memory_overhead_bytes(self, cgroup: SlotCgroup) -> int:
        """What the resident agent has been charged with so far."""
        return min(_MOST_OVERHEAD_BYTES, (cgroup.current_bytes() // MIB + 2) * MIB)

    def launcher_options(self, place: Place) -> dict[str, Any]:
        """The modules to import ahead."""
        return {"preload": list(self.config.preload)}
