"""What a control group has used, read through descriptors that were opened before the host's file system went out of
sight.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

MUCH_BYTES = 8 << 20
"""Below this a group that rests holds too few pages of files for them to matter."""


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
        """CPU time of everything that ran in the cgroup, in nanoseconds."""
        text = os.pread(self.cpu, 512, 0)
        return int(text) if self.version == 1 else _field(text, b"usage_usec") * 1000

    def oom_kills(self) -> int:
        """How many processes the kernel has killed for want of memory."""
        text = os.pread(self.oom, 512, 0)
        return _field(text, b"oom_kill")

    def peak_bytes(self) -> int:
        """The most memory charged since the last reset."""
        return int(os.pread(self.peak, 64, 0))

    def current_bytes(self) -> int:
        """The memory charged at this moment."""
        return int(os.pread(self.current, 64, 0))

    def cached_bytes(self) -> int:
        """Memory that holds pages of files, tmpfs aside: the kernel takes it back as soon as a program wants it.

        To be asked only where much is held: the kernel adds many figures up for it.
        """
        text = os.pread(self.statistics, 1 << 14, 0)
        names = (b"total_cache", b"total_shmem") if self.version == 1 else (b"file", b"shmem")
        return _field(text, names[0]) - _field(text, names[1])

    def reset_peak(self) -> bool:
        """Forgets the peak; false on kernels that cannot (cgroup v2 before 6.12)."""
        try:
            os.pwrite(self.peak, b"0", 0)
        except OSError:
            return False
        return True


def open_usage(version: int, paths: dict[str, str]) -> UsageFiles:
    """Opens the files of a cgroup; `paths` has the keys cpu, oom, peak, current and
    statistics.
    """
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
