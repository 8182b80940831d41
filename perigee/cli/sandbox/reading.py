"""Files that requests are made of."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

from perigee.errors import InvalidArgumentError
from perigee.rpc import MAX_MESSAGE_BYTES
from perigee.sandbox.v1 import sandbox_pb2 as pb

MIB = 1 << 20
# What a request may be wrapped in on its way.
ENVELOPE_BYTES = 1024


def read_bytes(path: Path) -> bytes:
    """The file's contents. Raises InvalidArgumentError naming it when it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidArgumentError.of(str(path), f"cannot be read: {error.strerror}") from error


def read_box_file(option: str, name: str, folder: Path = Path()) -> pb.File:
    """A file below `folder` as a file of the box, where it has the same relative path.

    Raises InvalidArgumentError when the path leaves the folder or cannot be read.
    """
    path = folder / name
    return pb.File(path=check_relative(option, name), content=read_bytes(path), executable=os.access(path, os.X_OK))


def check_relative(option: str, name: str) -> str:
    """The path in its shortest form. Raises InvalidArgumentError unless it stays below what it is relative to."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise InvalidArgumentError.of(option, f"{name!r} must be a relative path that does not leave its folder")
    return path.as_posix()


def check_size(request: pb.ExecuteRequest | pb.JudgeRequest, what: str) -> None:
    """Raises InvalidArgumentError when the request is larger than a message may be."""
    size = request.ByteSize()
    if size > MAX_MESSAGE_BYTES - ENVELOPE_BYTES:
        raise InvalidArgumentError.of(
            what, f"makes a request of {size:,} bytes; at most {MAX_MESSAGE_BYTES:,} can be sent"
        )


def make_limits(
    wall_ms: int | None = None,
    cpu_ms: int | None = None,
    memory_mb: int | None = None,
    processes: int | None = None,
    file_mb: int | None = None,
    output_mb: int | None = None,
) -> pb.Limits:
    """Limits of which the unset ones are the runtime's."""
    memory_bytes, file_bytes, output_bytes = (
        None if size_mb is None else size_mb * MIB for size_mb in (memory_mb, file_mb, output_mb)
    )
    return pb.Limits(
        wall_ms=wall_ms,
        cpu_ms=cpu_ms,
        memory_bytes=memory_bytes,
        processes=processes,
        file_bytes=file_bytes,
        output_bytes=output_bytes,
    )


def megabytes(count: int) -> str:
    """Bytes as MiB."""
    return f"{count / MIB:.1f} MiB"
