"""Names the machine that figures come from."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

GIB = 1 << 30
_VERSION_S = 20


def describe_machine(*tools: str) -> dict[str, object]:
    """Processor, cores that may be used, memory, kernel, load at this moment, and the versions of `tools`."""
    return {
        "processor": _processor(),
        "cores": count_cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": os.getloadavg(),
        "tools": {tool: _version(tool) for tool in tools},
    }


def count_cores() -> int:
    """Cores that this process, and what it starts, may use."""
    return len(os.sched_getaffinity(0))


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _version(tool: str) -> str | None:
    path = shutil.which(tool)
    if path is None:
        return None
    result = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=_VERSION_S, check=False)
    return next(iter((result.stdout or result.stderr).splitlines()), "")
