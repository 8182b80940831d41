"""Values read from files that are replaced while the process runs: certificates, tokens, callers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Generic, TypeVar

from perigee.errors import InvalidArgumentError

log = logging.getLogger(__name__)

ValueT = TypeVar("ValueT")


class Reloaded(Generic[ValueT]):
    """Value that `read` makes of `files`, made anew when one of them has changed; the first read may raise.

    A change that `read` refuses, such as one of two files that belong together, is logged once and leaves the value as
    it was.
    """

    def __init__(self, files: Iterable[str | None], read: Callable[[], ValueT]) -> None:
        self._files = [file for file in files if file is not None]
        self._read = read
        self._stamp = self._take_stamp()
        self._value = read()

    @property
    def value(self) -> ValueT:
        """Returns the value of the files as they are."""
        # Taken before the read: what changes after it is found by the next call.
        stamp = self._take_stamp()
        if stamp != self._stamp:
            self._stamp = stamp
            try:
                self._value = self._read()
            except InvalidArgumentError as error:
                log.warning("%s; what was read before is kept", error.message)
        return self._value

    def _take_stamp(self) -> list[tuple[int, int, int] | None]:
        return [_take_stamp(file) for file in self._files]


def read_file(path: str) -> bytes:
    """Returns the file's contents; raises InvalidArgumentError naming it when it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InvalidArgumentError.for_field(path, f"cannot be read: {error.strerror}") from error


def read_tokens(path: str) -> list[str]:
    """Returns the tokens of a file, one a line; raises InvalidArgumentError when there is none."""
    tokens = read_file(path).decode("utf-8", "replace").split()
    if not tokens:
        raise InvalidArgumentError.for_field(path, "holds no token; write one a line")
    return tokens


def _take_stamp(file: str) -> tuple[int, int, int] | None:
    try:
        status = Path(file).stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size
