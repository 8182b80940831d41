"""Archives of a job's files, which go into and out of a sandbox, and the replies of a function.

An archive is `u32 header length, header (JSON), blobs`; the header lists the blobs' lengths. An input of a function is
`u32 length, payload`, a reply `u32 length, kind, payload`. All integers are big-endian; nothing is escaped.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

_ARCHIVE_PREFIX = struct.Struct(">I")
INPUT_PREFIX = struct.Struct(">I")
REPLY_PREFIX = struct.Struct(">Ic")
VALUE, NOT_JSON, EXCEPTION, LOADED, COMPILE_ERROR, TOO_LONG = b"v", b"n", b"e", b"l", b"c", b"o"


class Archive(NamedTuple):
    """Header and the blobs that it describes."""

    header: dict[str, Any]
    blobs: list[bytes]


class Reply(NamedTuple):
    """One answer of a loaded submission."""

    kind: bytes
    payload: bytes


def encode_archive(header: dict[str, Any], blobs: Sequence[bytes]) -> bytes:
    """Returns an archive as the contents of a file."""
    text = json.dumps({**header, "lengths": [len(blob) for blob in blobs]}).encode()
    return b"".join([_ARCHIVE_PREFIX.pack(len(text)), text, *blobs])


def read_archive(descriptor: int) -> Archive:
    """Reads the archive in a file; raises ValueError when its parts do not fill it."""
    size = os.fstat(descriptor).st_size
    contents = read_start(descriptor, size)
    [header_length] = _ARCHIVE_PREFIX.unpack_from(contents)
    offset = _ARCHIVE_PREFIX.size + header_length
    header = json.loads(contents[_ARCHIVE_PREFIX.size : offset])
    blobs = []
    for length in header.pop("lengths"):
        blobs.append(contents[offset : offset + length])
        offset += length
    if offset != size:
        raise ValueError(f"the archive's parts end at {offset} of {size} bytes")
    return Archive(header, blobs)


def read_start(descriptor: int, size: int) -> bytes:
    """Reads the first `size` bytes of a file, in parts: one read gives at most 2 GiB less a page."""
    parts: list[bytes] = []
    offset = 0
    while offset < size and (part := os.pread(descriptor, size - offset, offset)):
        parts.append(part)
        offset += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def encode_inputs(inputs: Iterable[bytes]) -> bytes:
    """Returns inputs as the contents of a file, from which they are handed out one at a time."""
    return b"".join(part for payload in inputs for part in (INPUT_PREFIX.pack(len(payload)), payload))


def encode_reply(kind: bytes, payload: bytes) -> bytes:
    """Returns a reply as it is sent."""
    return REPLY_PREFIX.pack(len(payload), kind) + payload


def read_replies(descriptor: int, count: int) -> list[Reply]:
    """Reads the first `count` replies of a file, which are complete."""
    replies: list[Reply] = []
    offset = 0
    for _ in range(count):
        length, kind = REPLY_PREFIX.unpack(os.pread(descriptor, REPLY_PREFIX.size, offset))
        replies.append(Reply(kind, os.pread(descriptor, length, offset + REPLY_PREFIX.size)))
        offset += REPLY_PREFIX.size + length
    return replies


File = tuple[str, bytes, bool]
"""Path below the working folder, content, executable."""


def read_files(descriptor: int) -> list[File]:
    """Reads the files of an archive that holds nothing else."""
    header, blobs = read_archive(descriptor)
    return list(zip(header["paths"], blobs, header["executable"], strict=True))


def own_files(home: str, uid: int) -> None:
    """Gives everything below `home` to a user."""
    for folder, folders, names in os.walk(home):
        for name in (*folders, *names):
            os.chown(f"{folder}/{name}", uid, uid, follow_symlinks=False)


FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


def make_folders(home: str, path: str, opened: int | None = None) -> int:
    """Makes a folder below `home` and those above it, through no link; opens and returns it.

    `opened` is a descriptor of `home`, used instead of its path.
    """
    folder = os.open(home, FOLDER_FLAGS) if opened is None else os.dup(opened)
    for name in filter(None, path.split("/")):
        above = folder
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o777, dir_fd=above)
            folder = os.open(name, FOLDER_FLAGS | os.O_NOFOLLOW, dir_fd=above)
        finally:
            os.close(above)
    return folder


def write_files(home: str, files: Iterable[File], appended: Collection[str] = ()) -> None:
    """Writes files below `home`, or adds to those of the paths `appended`; makes folders, follows no links."""
    for path, content, executable in files:
        parent, _, name = path.rpartition("/")
        folder = make_folders(home, parent)
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | (os.O_APPEND if path in appended else os.O_TRUNC)
        try:
            descriptor = os.open(name, flags, 0o700 if executable else 0o600, dir_fd=folder)
        finally:
            os.close(folder)
        try:
            rest = memoryview(content)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        finally:
            os.close(descriptor)
