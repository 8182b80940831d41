"""Usage of a control group, read through descriptors that were opened before the host's files went out of sight."""

from __future__ import annotations

import os
from dataclasses import dataclass

MUCH_BYTES = 8 << 20
"""Below this an idle group holds too few cached pages of files for them to matter."""


@dataclass(frozen=True)
class UsageFiles:
    """Open descriptors of the cgroup's CPU time, OOM kill count, peak memory, current memory and statistics files."""

    version: int
    cpu: int
    oom: int
    peak: int
    current: int
    statistics: int

    def cpu_ns(self) -> int:
        """Returns the CPU time of everything that ran in the cgroup, in nanoseconds."""
        text = os.pread(self.cpu, 512, 0)
        return int(text) if self.version == 1 else _field(text, b"usage_usec") * 1000

    def oom_kills(self) -> int:
        """Returns how many processes the kernel has killed for want of memory."""
        text = os.pread(self.oom, 512, 0)
        return _field(text, b"oom_kill")

    def peak_bytes(self) -> int:
        """Returns the most memory charged since the last reset."""
        return int(os.pread(self.peak, 64, 0))

    def current_bytes(self) -> int:
        """Returns the memory charged at this moment."""
        return int(os.pread(self.current, 64, 0))

    def cached_bytes(self) -> int:
        """Returns the memory of cached pages of files, tmpfs aside, which the kernel reclaims when a program wants it.

        Call it only when much is held: the kernel adds many figures up for it.
        """
        text = os.pread(self.statistics, 1 << 14, 0)
        names = (b"total_cache", b"total_shmem") if self.version == 1 else (b"file", b"shmem")
        return _field(text, names[0]) - _field(text, names[1])

    def reset_peak(self) -> bool:
        """Resets the peak; returns false on kernels that cannot (cgroup v2 before 6.12)."""
        try:
            os.pwrite(self.peak, b"0", 0)
        except OSError:
            return False
        return True


def open_usage(version: int, paths: dict[str, str]) -> UsageFiles:
    """Opens the files of a cgroup; `paths` has the keys cpu, oom, peak, current and statistics."""
    opened = {name: os.open(path, os.O_RDONLY | os.O_CLOEXEC) for name, path in paths.items() if name != "peak"}
    try:
        peak = os.open(paths["peak"], os.O_RDWR | os.O_CLOEXEC)
    except PermissionError:  # read-only in cgroup v2 before 6.12
        peak = os.open(paths["peak"], os.O_RDONLY | os.O_CLOEXEC)
    return UsageFiles(version=version, peak=peak, **opened)


def _field(text: bytes, name: bytes) -> int:
    for line in text.splitlines():
        key, _, value = line.partition(b" ")
        if key == name:
            return int(value)
    raise ValueError(f"no {name.decode()} in {text!r}")
