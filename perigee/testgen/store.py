"""What was computed for a problem so far: every result is durable before it counts, and keyed by what it came from.

.make-tests/lock            held while a process works on the problem
.make-tests/journal.jsonl   a line per result, appended and synced
.make-tests/blobs/SHA256    inputs and outputs by their contents
.make-tests/owned.json      names of the test cases that were written to tests/
.make-tests/aside/          files that are being written
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from perigee.errors import DataLossError, FailedPreconditionError
from perigee.files import sync, write_atomically

FOLDER = ".make-tests"


@dataclass(frozen=True)
class Outcome:
    """How one run of a program ended."""

    # Of the sandbox's contract, without the prefix: OK, TIME_LIMIT, ...
    status: str
    # Its standard output's SHA-256 where the status is OK, else nothing.
    output: str = ""
    # What failed, for people.
    reason: str = ""


class Store:
    """The results of one problem's folder; a context manager that keeps other processes out.

    Raises FailedPreconditionError when another process has the folder, DataLossError when the journal is damaged.
    """

    def __init__(self, problem_folder: Path) -> None:
        self.path = problem_folder / FOLDER
        self._blobs = self.path / "blobs"
        self._journal = self.path / "journal.jsonl"
        self._outcomes: dict[str, Outcome] = {}
        self._writing = threading.Lock()
        self._lock = -1

    def __enter__(self) -> Self:
        self._blobs.mkdir(parents=True, exist_ok=True)
        (self.path / "aside").mkdir(exist_ok=True)
        self._lock = os.open(self.path / "lock", os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.write(self.path / ".gitignore", b"*\n")
            self._read_journal()
        except BlockingIOError as error:
            os.close(self._lock)
            raise FailedPreconditionError(f"{self.path.parent}: another make-tests works on this problem") from error
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._writing:  # a thread that was left behind writes nothing once others may
            os.close(self._lock)
            self._lock = -1

    def __len__(self) -> int:
        return len(self._outcomes)

    def find(self, key: str) -> Outcome | None:
        """The result with this key; None when it is not there or its output is lost."""
        outcome = self._outcomes.get(key)
        if outcome is None or (outcome.output and not self._has_blob(outcome.output)):
            return None
        return outcome

    def read(self, sha256: str) -> bytes:
        """The contents with this digest; raises DataLossError when they are damaged."""
        content = (self._blobs / sha256).read_bytes()
        if hashlib.sha256(content).hexdigest() != sha256:
            raise DataLossError(f"{self._blobs / sha256} is damaged; remove it and run the same command again")
        return content

    def add(self, key: str, what: str, outcome: Outcome, output: bytes) -> None:
        """Keeps a result for good; `what` tells readers of the journal which it is."""
        line = json.dumps({"key": key, "what": what, **asdict(outcome)}).encode() + b"\n"
        with self._writing:
            if self._lock < 0:
                raise FailedPreconditionError(f"{self.path}: the store is closed")
            if outcome.output and not self._has_blob(outcome.output):
                self.write(self._blobs / outcome.output, output)
            self._append(line)
            self._outcomes[key] = outcome

    def write(self, path: Path, content: bytes) -> None:
        """Writes a file of the problem's folder so that a crash leaves the old or the new contents, and no litter."""
        write_atomically(path, content, staging=self.path / "aside" / path.name)

    def _has_blob(self, sha256: str) -> bool:
        return (self._blobs / sha256).is_file()

    def _append(self, line: bytes) -> None:
        with open(self._journal, "ab", buffering=0) as file:
            size = file.tell()
            try:
                if file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._journal))
                os.fsync(file.fileno())
            except OSError:
                file.truncate(size)  # the next line must begin where a line begins
                raise

    def _read_journal(self) -> None:
        """Reads the results; what a crash left of a last line goes."""
        with open(self._journal, "a+b") as file:
            file.seek(0)
            held = file.read()
            whole = held.rfind(b"\n") + 1
            if whole < len(held):
                file.truncate(whole)
                os.fsync(file.fileno())
        sync(self.path)
        for number, line in enumerate(held[:whole].splitlines(), start=1):
            try:
                values = json.loads(line)
                outcome = Outcome(status=values["status"], output=values["output"], reason=values["reason"])
                self._outcomes[values["key"]] = outcome
            except (ValueError, KeyError, TypeError) as error:
                raise DataLossError(
                    f"{self._journal}:{number} is damaged; remove the line, and the result is computed again"
                ) from error


def sha256(content: bytes) -> str:
    """The name of a blob."""
    return hashlib.sha256(content).hexdigest()
