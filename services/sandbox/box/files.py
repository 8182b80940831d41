"""A job's files, from a parcel into its working folder."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from .payload import read_parcel

BoxFile = tuple[str, bytes, bool]
"""Path below the working folder, content, executable."""


def read_files(descriptor: int) -> list[BoxFile]:
    """The files of a parcel that holds nothing else."""
    header, blobs = read_parcel(descriptor)
    return list(zip(header["paths"], blobs, header["executable"], strict=True))


def own_files(home: str, uid: int) -> None:
    """Gives everything below `home` to a user."""
    for folder, folders, names in os.walk(home):
        for name in (*folders, *names):
            os.chown(f"{folder}/{name}", uid, uid, follow_symlinks=False)


def write_files(home: str, files: Iterable[BoxFile]) -> None:
    """Writes files below `home`; folders are made, links are never followed."""
    for path, content, executable in files:
        target = f"{home}/{path}"
        if "/" in path:
            Path(target).parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
        descriptor = os.open(target, flags, 0o700 if executable else 0o600)
        try:
            rest = memoryview(content)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        finally:
            os.close(descriptor)
