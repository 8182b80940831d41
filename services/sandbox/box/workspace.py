"""The working folder of a container's jobs: the job's files below, what a compiler made of them above, and on top a
layer that each run gets anew.

The lower layers are shared by all runs of a job and never written to; the top one is a tmpfs with bounded space and
number of files.
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
        self._job = f"{folder}/job"
        self._top = f"{folder}/top"
        self._begun = False
        self._kept = False
        for path in (self.home, self._tmp, self._job, self._top):
            Path(path).mkdir(exist_ok=True)

    @property
    def mounts(self) -> list[tuple[str, str]]:
        """Host folders and where a container has them."""
        return [(self.home, HOME), (self._tmp, "/tmp"), (self._tmp, "/dev/shm")]

    def begin(self, files: list[BoxFile], kept_bytes: int) -> None:
        """Lays down the files of a job, with room for `kept_bytes` of what its compiler makes."""
        self.clear()
        space = kept_bytes + _space(files)
        kernel.mount("tmpfs", self._job, "tmpfs", WRITABLE_FLAGS, f"{sized(space)},mode=0755")
        self._begun, self._kept = True, False
        for name in ("files", "kept", "work"):
            self._make_own(f"{self._job}/{name}")
        write_files(f"{self._job}/files", files)
        own_files(f"{self._job}/files", self._uid)

    def lay_out(self, keep: bool, space_bytes: int, files: list[BoxFile]) -> None:
        """Mounts the working folder and /tmp of one run, with files for it alone; what a run with `keep` writes stays
        for the later ones.
        """
        below = f"{self._job}/kept:{self._job}/files" if self._kept else f"{self._job}/files"
        if keep:
            upper, work = f"{self._job}/kept", f"{self._job}/work"
            self._kept = True
        else:
            kernel.mount("tmpfs", self._top, "tmpfs", WRITABLE_FLAGS, sized(space_bytes + _space(files)))
            upper, work = f"{self._top}/upper", f"{self._top}/work"
            self._make_own(upper)
            Path(work).mkdir()
            if files:
                write_files(upper, files)
                own_files(upper, self._uid)
        options = f"lowerdir={below},upperdir={upper},workdir={work},volatile"
        kernel.mount("overlay", self.home, "overlay", WRITABLE_FLAGS, options)
        kernel.mount("tmpfs", self._tmp, "tmpfs", WRITABLE_FLAGS, f"{sized(space_bytes)},mode=1777")

    def take_down(self) -> None:
        """Unmounts what `lay_out` mounted."""
        for path in (self._tmp, self.home, self._top):
            if os.path.ismount(path):
                kernel.unmount_lazily(path)

    def clear(self) -> None:
        """Forgets the job."""
        if self._begun:
            kernel.unmount_lazily(self._job)
            self._begun = False

    def _make_own(self, path: str) -> None:
        Path(path).mkdir(0o700)
        os.chown(path, self._uid, self._uid)


def _space(files: list[BoxFile]) -> int:
    return sum(len(content) + _UNPACKED_BYTES for _, content, _ in files)
