"""Reads the files that a program left.

A path is opened below the working folder by openat2 without following a link or crossing a mount, then checked to be a
regular file: links, pipes and devices give an error, and nothing outside is ever reached.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence

from . import kernel
from .archive import encode_archive, read_start
from .protocol import memory_file
from .unpack import pack_in_fork

_ERRORS = {
    errno.ENOENT: "not found",
    errno.ENOTDIR: "not found",
    errno.ELOOP: "reached through a link",
    errno.EXDEV: "leads out of the working folder",
}


def collect_files(folder: int, paths: Sequence[str], packed: Sequence[str], most_bytes: int) -> int:
    """Returns a file in memory that holds an archive of the files below `folder`, a descriptor of the working folder,
    and of tars of the folders `packed`.

    Contents are cut to `most_bytes` in all; a tar is there as a whole or not at all.
    """
    entries, blobs = [], []
    for path in packed:
        content, error = _pack_folder(folder, path, most_bytes)
        most_bytes -= len(content)
        entries.append({"path": path, "truncated": False, "error": error})
        blobs.append(content)
    for path in paths:
        content, truncated, error = _read_file(folder, path, most_bytes)
        most_bytes -= len(content)
        entries.append({"path": path, "truncated": truncated, "error": error})
        blobs.append(content)
    return memory_file(encode_archive({"files": entries}, blobs))


def _pack_folder(folder: int, path: str, most_bytes: int) -> tuple[bytes, str]:
    output = memory_file(b"")
    try:
        error = pack_in_fork(folder, path, output, most_bytes)
        return read_start(output, os.fstat(output).st_size), error
    finally:
        os.close(output)


def collect_tree(home: str, most_bytes: int) -> int | None:
    """Returns a file in memory that holds an archive of all files below `home`, as programs are sent.

    None when it holds a link, a pipe or a device, or more than `most_bytes`.
    """
    paths, executable, blobs = [], [], []
    for path, folders, names, folder in os.fwalk(home):
        if any(stat.S_ISLNK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode) for name in folders):
            return None
        for name in sorted(names):
            content, truncated, error = _read_file(folder, name, most_bytes)
            most_bytes -= len(content)
            if truncated or error:
                return None
            paths.append(os.path.relpath(f"{path}/{name}", home))
            executable.append(bool(os.stat(name, dir_fd=folder).st_mode & stat.S_IXUSR))
            blobs.append(content)
    return memory_file(encode_archive({"paths": paths, "executable": executable}, blobs))


def _read_file(folder: int, path: str, most_bytes: int) -> tuple[bytes, bool, str]:
    try:
        descriptor = kernel.open_beneath(folder, path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        return b"", False, _ERRORS.get(error.errno or 0, os.strerror(error.errno or 0))
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            return b"", False, "not a regular file"
        content = read_start(descriptor, min(status.st_size, most_bytes))
        return content, len(content) < status.st_size, ""
    finally:
        os.close(descriptor)
