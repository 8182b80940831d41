"""The working folder of a container's job: an overlay whose upper layer is a tmpfs, bounded in space and files.

What a compiler has left is the lower layer of the runs that follow, and never written to again.
"""

from __future__ import annotations

import os
from pathlib import Path

from . import kernel
from .files import BoxFile, own_files, write_files
from .limits import HOME
from .root import WRITABLE_FLAGS, sized

_UNPACKED_BYTES = 8192


class Workspace:
    """Mounts below a slot's folder, in the launcher's own mount namespace."""

    def __init__(self, folder: str, uid: int) -> None:
        self._uid = uid
        self.home = f"{folder}/box"
        self._tmp = f"{folder}/tmp"
        self._top = f"{folder}/top"
        self._kept = f"{folder}/kept"
        self._nothing = f"{folder}/nothing"
        self._has_kept = False
        self._space_bytes = (0, 0)
        for path in (self.home, self._tmp, self._top, self._kept, self._nothing):
            Path(path).mkdir(exist_ok=True)

    @property
    def mounts(self) -> list[tuple[str, str]]:
        """Host folders and where a container has them."""
        return [(self.home, HOME), (self._tmp, "/tmp"), (self._tmp, "/dev/shm")]

    def lay_out(self, space_bytes: int) -> None:
        """Mounts the working folder and /tmp of one run."""
        self._space_bytes = (space_bytes, space_bytes)
        kernel.mount("tmpfs", self._top, "tmpfs", WRITABLE_FLAGS, sized(space_bytes))
        for name in ("upper", "work"):
            Path(f"{self._top}/{name}").mkdir(0o700)
        os.chown(f"{self._top}/upper", self._uid, self._uid)
        below = f"{self._kept}/upper" if self._has_kept else self._nothing
        options = f"lowerdir={below},upperdir={self._top}/upper,workdir={self._top}/work,volatile"
        kernel.mount("overlay", self.home, "overlay", WRITABLE_FLAGS, options)
        kernel.mount("tmpfs", self._tmp, "tmpfs", WRITABLE_FLAGS, f"{sized(space_bytes)},mode=1777")

    def fill(self, files: list[BoxFile], space_bytes: int) -> None:
        """Gives the run its space, beside that of its files, and the files."""
        wanted = (space_bytes + sum(len(content) + _UNPACKED_BYTES for _, content, _ in files), space_bytes)
        for path, had, wants in zip((self._top, self._tmp), self._space_bytes, wanted, strict=True):
            if had != wants:
                kernel.mount("tmpfs", path, "tmpfs", WRITABLE_FLAGS | kernel.MS_REMOUNT, sized(wants))
        self._space_bytes = wanted
        if files:
            write_files(self.home, files)
            own_files(self.home, self._uid)

    def keep(self) -> None:
        """Makes what the run that has just ended left the lower layer of those that follow."""
        kernel.unmount_lazily(self.home)
        kernel.unmount_lazily(self._tmp)
        kernel.move_mount(self._top, self._kept)
        self._has_kept = True

    def take_down(self) -> None:
        """Unmounts what `lay_out` mounted."""
        for path in (self._tmp, self.home, self._top):
            if os.path.ismount(path):
                kernel.unmount_lazily(path)

    def forget_kept(self) -> bool:
        """Drops the lower layer; whether there was one."""
        had, self._has_kept = self._has_kept, False
        if had:
            kernel.unmount_lazily(self._kept)
        return had
