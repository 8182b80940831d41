"""Files that survive a crash: whole or not there, folders that appear complete, and journals of JSON lines."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any, Self

from perigee.errors import DataLossError, FailedPreconditionError

_BLOCK_BYTES = 64 << 10


def write_atomically(
    path: Path, content: bytes | Iterable[bytes], staging: Path | None = None, mode: int = 0o644
) -> None:
    """Writes a staging file, syncs it and renames it to `path`, whose folder is made where there is none.

    `staging` is a path on the same file system that only this writer uses; one beside `path` unless given.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = staging or _staging_path(path)
    try:
        with open(staging, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.writelines([content] if isinstance(content, bytes) else content)
            file.flush()
            os.fsync(file.fileno())
        staging.replace(path)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextmanager
def staging_folder(target: Path) -> Iterator[Path]:
    """Yields a new folder beside `target` that becomes `target` when the block ends, and is removed when it raises.

    Every file in it is synced first; a folder that is at `target` is replaced.
    """
    staging = _staging_path(target)
    try:
        staging.mkdir(parents=True)
        yield staging
        for folder, _, names in os.walk(staging):
            for name in names:
                sync(Path(folder, name))
            sync(Path(folder))
        _replace_folder(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def remove_stale_staging(folder: Path, name: str = "*") -> None:
    """Removes the staging folders that killed writers left in `folder`: all, or those of a target's name."""
    for path in folder.glob(f".{name}.????????"):
        if path.is_dir():
            shutil.rmtree(path)


@contextmanager
def exclusive(target: Path) -> Iterator[None]:
    """Keeps other writers from `target` while the block runs, by a lock file beside it that is removed at the end.

    Raises FailedPreconditionError when another one is at work; a lock that a killed writer left is none.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    path = target.parent / f".{target.name}.lock"
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken = os.fstat(file.fileno()).st_nlink == 0  # removed by a writer that ended since it was opened
        except BlockingIOError:
            taken = True
        if taken:
            raise FailedPreconditionError(f"{target} is being written by another process: wait until it ends")
        try:
            yield
        finally:
            path.unlink()


def sync(path: Path) -> None:
    """Syncs a file's contents, or what was renamed, made or removed in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Journal:
    """File of JSON lines, open for appending by one process. `lines` is what it held when it was opened.

    Raises DataLossError naming the line when another line than the last is no JSON object, FailedPreconditionError when
    another process has it open.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _cut_torn_line(self._file)
            self.lines = read_lines(path)
        except BlockingIOError as error:
            self._file.close()
            raise FailedPreconditionError(f"{path} is in use by another process") from error
        except BaseException:
            self._file.close()
            raise

    def append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Writes the lines and returns when they are on disk."""
        _append(self._file, lines)

    def close(self) -> None:
        """Closes the file and lets other processes open it."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def append_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Appends JSON lines to a file that this process alone writes, and syncs them; what a crash left of a line goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b", buffering=0) as file:
        _cut_torn_line(file)
        _append(file, lines)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the JSON lines of a file; none where there is no file.

    A last line without an end was cut by a crash, or is being written, and is left out. Raises DataLossError naming any
    other line that is no JSON object.
    """
    if not path.is_file():
        return []
    whole = path.read_bytes().split(b"\n")[:-1]
    return [_parse_line(path, number, text) for number, text in enumerate(whole, start=1)]


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Replaces a file of JSON lines: readers see the old one or the whole new one, also after a crash."""
    write_atomically(path, (dump_line(line) for line in lines))


def dump_line(values: Mapping[str, Any]) -> bytes:
    """Returns one JSON line, its end included; raises ValueError for NaN and infinities."""
    return json.dumps(values, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _parse_line(path: Path, number: int, text: bytes) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise DataLossError(f"{path}:{number} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise DataLossError(f"{path}:{number} is no JSON object")
    return values


def _append(file: FileIO, lines: Iterable[Mapping[str, Any]]) -> None:
    left = memoryview(b"".join(dump_line(line) for line in lines))
    size = file.seek(0, os.SEEK_END)
    try:
        while left:
            left = left[file.write(left) :]
        os.fsync(file.fileno())
    except OSError:
        file.truncate(size)  # the next line must begin where a line begins
        raise


def _cut_torn_line(file: FileIO) -> None:
    """Truncates the file after its last line end."""
    size = end = file.seek(0, os.SEEK_END)
    while end > 0:
        begin = max(0, end - _BLOCK_BYTES)
        file.seek(begin)
        found = file.read(end - begin).rfind(b"\n")
        if found >= 0:
            end = begin + found + 1
            break
        end = begin
    if end < size:
        file.truncate(end)
        os.fsync(file.fileno())
    file.seek(0, os.SEEK_END)


def _replace_folder(staging: Path, target: Path) -> None:
    if target.exists():
        # rename(2) replaces no folder that holds files: the old one is moved out of the way first.
        old = _staging_path(target)
        target.rename(old)
        staging.rename(target)
        shutil.rmtree(old)
    else:
        staging.rename(target)
    sync(target.parent)


def _staging_path(target: Path) -> Path:
    return target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}"
