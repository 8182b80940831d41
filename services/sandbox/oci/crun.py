"""crun, with its own control groups off: the launcher's is where the container lives."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from services.sandbox.cgroups import CgroupHost
from services.sandbox.oci.base import OciRuntime


class Crun(OciRuntime):
    """`crun run` in the foreground."""

    name: ClassVar[str] = "crun"
    debian_package: ClassVar[str] = "crun"

    @property
    def executable(self) -> str:
        """As Debian names it."""
        return "crun"

    def run_command(self, folder: Path) -> list[str]:
        """Everything but the container's name."""
        path = self.find()
        assert path is not None
        state, log = str(self.state_path(folder)), f"file:{self.log_path(folder)}"
        return [path, "--root", state, "--cgroup-manager", "disabled", "--log", log, "run", "--bundle", str(folder)]

    def hidden_mounts(self, host: CgroupHost) -> tuple[str, ...]:
        """crun refuses hosts that have cgroup v1 and v2 side by side."""
        return host.hybrid
