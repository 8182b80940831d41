"""JSON lines that survive a crash: appended whole and synced; what a crash left of a line goes."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from perigee.errors import DataLossError, FailedPreconditionError


class Journal:
    """A file of JSON lines, open for appending by one process. `lines` is what it held when it was opened.

    Raises DataLossError naming the line when another line than the last is not JSON, FailedPreconditionError when
    another process has it open.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise FailedPreconditionError(f"{path} is in use by another process") from error
        self._file.seek(0)
        held = self._file.read()
        whole = held[: held.rfind(b"\n") + 1]
        self._file.truncate(len(whole))
        self.lines = [_read_line(path, number, text) for number, text in enumerate(whole.splitlines(), start=1)]

    def append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Writes the lines and returns when they are on disk."""
        self._file.write(b"".join(dump_line(line) for line in lines))
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def dump_line(values: Mapping[str, Any]) -> bytes:
    """One line, its end included."""
    return json.dumps(values, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Replaces a file of JSON lines: readers see the old one or the whole new one, also after a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("wb") as file:
            for line in lines:
                file.write(dump_line(line))
            file.flush()
            os.fsync(file.fileno())
        aside.rename(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _read_line(path: Path, number: int, text: bytes) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise DataLossError(f"{path}:{number} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise DataLossError(f"{path}:{number} is no JSON object")
    return values
