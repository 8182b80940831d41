"""Folders that belong to a running service: each is locked for as long as the service lives.

A lock ends with the process that holds it, however that ends, and holds across containers, in which the numbers of
processes mean nothing.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def claim(folder: Path) -> int:
    """Makes a folder and locks it; the descriptor that is returned holds the lock until it is closed."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = _open(folder)
        except FileNotFoundError:
            continue  # taken for a leftover before it was locked
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if _is_at(descriptor, folder):
            return descriptor
        os.close(descriptor)


@contextmanager
def held_if_abandoned(folder: Path) -> Iterator[bool]:
    """Whether nobody has claimed a folder; if so, nobody can before the block ends."""
    try:
        descriptor = _open(folder)
    except FileNotFoundError:
        yield False
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield False
    else:
        yield _is_at(descriptor, folder)
    finally:
        os.close(descriptor)


def _open(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _is_at(descriptor: int, folder: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), folder.stat())
    except FileNotFoundError:
        return False
