"""Reads the files that a program left, whatever it made of their names.

A path is opened below the working folder by openat2 without following a link or crossing a mount, then checked to be a
regular file: links, pipes and devices are told by an error, and nothing outside is ever reached.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence

from . import kernel
from .archive import encode_parcel
from .protocol import memory_file

_ERRORS = {
    errno.ENOENT: "not found",
    errno.ENOTDIR: "not found",
    errno.ELOOP: "reached through a link",
    errno.EXDEV: "leads out of the working folder",
}


def collect_files(folder: int, paths: Sequence[str], most_bytes: int) -> int:
    """A file in memory that holds a parcel with the contents, each cut to what is left of `most_bytes`; `folder` is the
    working folder, open.
    """
    entries, blobs = [], []
    for path in paths:
        content, truncated, error = _read_file(folder, path, most_bytes)
        most_bytes -= len(content)
        entries.append({"path": path, "truncated": truncated, "error": error})
        blobs.append(content)
    return memory_file(encode_parcel({"files": entries}, blobs))


def _read_file(folder: int, path: str, most_bytes: int) -> tuple[bytes, bool, str]:
    try:
        descriptor = kernel.open_beneath(folder, path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        return b"", False, _ERRORS.get(error.errno or 0, os.strerror(error.errno or 0))
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            return b"", False, "not a regular file"
        content = _read_up_to(descriptor, min(status.st_size, most_bytes))
        return content, len(content) < status.st_size, ""
    finally:
        os.close(descriptor)


def _read_up_to(descriptor: int, size: int) -> bytes:
    parts: list[bytes] = []
    left = size
    while left and (part := os.read(descriptor, min(left, 1 << 24))):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)
