"""Files in shared memory that hold weight images: created, mapped, locked while in use, and never left behind.

A file is locked (flock) as long as the process that created it lives, so that another process can tell a leftover of a
killed process from a file in use, even when process ids were used again.
"""

from __future__ import annotations

import atexit
import ctypes
import errno
import fcntl
import mmap
import os
import uuid
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from perigee.errors import FailedPreconditionError, ResourceExhaustedError

PREFIX = "perigee-weights-"


def create_shared_file(directory: str) -> tuple[Path, int]:
    """Creates an empty, locked file in `directory`; returns its path and descriptor.

    Raises FailedPreconditionError when the folder cannot be written.
    """
    path = Path(directory) / f"{PREFIX}{os.getpid()}-{uuid.uuid4().hex[:12]}"
    # The lock is taken under another name: under its own, a sweep could see the file before it is locked.
    unlocked_path = path.with_name(f".{path.name}")
    try:
        descriptor = os.open(unlocked_path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise FailedPreconditionError(
            f"weights.shared_memory_dir: {directory} cannot be written ({error.strerror}); name a writable tmpfs"
        ) from error
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return unlocked_path.rename(path), descriptor


def remove_leftovers(directory: str) -> list[Path]:
    """Removes the images of processes that died without cleaning up; returns what was removed."""
    removed = []
    for path in Path(directory).glob(f"{PREFIX}*"):
        try:
            descriptor = os.open(path, os.O_RDWR)
        except OSError:  # gone meanwhile, or another user's
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
            removed.append(path)
        except BlockingIOError:  # in use
            continue
        finally:
            os.close(descriptor)
    return removed


@contextmanager
def explain_full_memory(directory: str, size: int) -> Iterator[None]:
    """Turns "no space left" inside the block into a ResourceExhaustedError that says what to do; `size` in bytes."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG):
            raise
        free = os.statvfs(directory)
        raise ResourceExhaustedError(
            f"weights.shared_memory_dir: {directory} has no room for {size} more bytes of weights "
            f"({free.f_bavail * free.f_frsize} free); enlarge it (docker run --shm-size, an emptyDir of medium Memory)"
        ) from error


class SharedBuffer:
    """Mapped file in shared memory; `address` and `size` (bytes) are what a transport registers.

    While it is pinned (a write from it may be in flight) `close` removes the file but keeps the memory mapped until the
    last unpin.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.size = os.fstat(descriptor).st_size
        self._descriptor = descriptor
        self._map = mmap.mmap(descriptor, self.size)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._pins = 0
        self.closed = False
        _open_buffers.add(self)

    @classmethod
    def allocate(cls, directory: str, size: int) -> SharedBuffer:
        """Allocates `size` bytes of memory that is really there, so that no write into it can end in SIGBUS.

        Raises ResourceExhaustedError when the folder has no room.
        """
        path, descriptor = create_shared_file(directory)
        try:
            with explain_full_memory(directory, size):
                os.posix_fallocate(descriptor, 0, size)
            return cls(path, descriptor)
        except BaseException:
            discard_shared_file(path, descriptor)
            raise

    @contextmanager
    def view(self) -> Iterator[memoryview]:
        """Yields the buffer's bytes."""
        with memoryview(self._map) as view:
            yield view

    def pin(self) -> None:
        """Keeps the memory mapped until the matching `unpin`; raises FailedPreconditionError when it is unmapped."""
        if self.closed and self._pins == 0:
            raise FailedPreconditionError(f"{self.path} is closed: export the weights again")
        self._pins += 1

    def unpin(self) -> None:
        """Undoes one `pin`; unmaps the memory when the buffer was closed meanwhile."""
        self._pins -= 1
        self._release_if_unused()

    def close(self) -> None:
        """Removes the file and, unless pinned, unmaps the memory; a second call does nothing."""
        if self.closed:
            return
        self.closed = True
        self.path.unlink(missing_ok=True)
        self._release_if_unused()

    def _release_if_unused(self) -> None:
        if self.closed and self._pins == 0:
            self._map.close()
            os.close(self._descriptor)


def discard_shared_file(path: Path, descriptor: int) -> None:
    """Removes a file of `create_shared_file` that became no buffer."""
    path.unlink(missing_ok=True)
    os.close(descriptor)


_open_buffers: weakref.WeakSet[SharedBuffer] = weakref.WeakSet()


@atexit.register
def _unlink_open_buffers() -> None:
    for buffer in list(_open_buffers):
        # A forked child runs this too and must leave its parent's files alone.
        if not buffer.closed and buffer.path.name.startswith(f"{PREFIX}{os.getpid()}-"):
            buffer.path.unlink(missing_ok=True)
