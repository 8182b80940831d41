"""Results of a problem's folder: records of runs while they are computed, then the test cases and a summary.

Every record is durable before it counts, and keyed by what it was computed from.

.make-tests/journal.jsonl   a line for each record, locked while a process works on the problem
.make-tests/blobs/SHA256    inputs and outputs by their contents
.make-tests/owned.json      names of the test cases that were written to tests/
.make-tests/staging/        files that are being written
tests/NNN.in, NNN.out       the test cases
make-tests.json             the summary
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from perigee.errors import DataLossError, FailedPreconditionError, InvalidArgumentError
from perigee.files import Journal, sync, write_atomically
from perigee.testgen.plan import Plan, Program
from perigee.testgen.selection import AGREES, Case, Selection

FOLDER = ".make-tests"


@dataclass(frozen=True)
class RunRecord:
    """Record of one run of a program."""

    # Of the sandbox's contract, without the prefix: OK, TIME_LIMIT, ...
    status: str
    # SHA-256 of its standard output when the status is OK, else empty.
    output: str = ""
    # What failed, for people.
    reason: str = ""


class Store:
    """Results of one problem's folder; a context manager that keeps other processes out.

    Raises FailedPreconditionError when another process has the folder, DataLossError when the journal is damaged.
    """

    def __init__(self, problem_folder: Path) -> None:
        self.path = problem_folder / FOLDER
        self._blobs = self.path / "blobs"
        self._records: dict[str, RunRecord] = {}
        self._writing = threading.Lock()
        self._journal: Journal | None = None

    def __enter__(self) -> Self:
        self._blobs.mkdir(parents=True, exist_ok=True)
        (self.path / "staging").mkdir(exist_ok=True)
        path = self.path / "journal.jsonl"
        try:
            self._journal = Journal(path)
        except FailedPreconditionError as error:
            raise FailedPreconditionError(f"{self.path.parent}: another make-tests works on this problem") from error
        except DataLossError as error:
            raise DataLossError(f"{error.message}; remove the line, and the result is computed again") from error
        try:
            self._read_records(path, self._journal.lines)
            self.write(self.path / ".gitignore", b"*\n")
            sync(self.path)
        except BaseException:
            self._journal.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with self._writing:  # a thread that is still running writes nothing once another process may
            assert self._journal is not None
            self._journal.close()
            self._journal = None

    def __len__(self) -> int:
        return len(self._records)

    def find(self, key: str) -> RunRecord | None:
        """Returns the record with this key; None when there is none or its output is lost."""
        record = self._records.get(key)
        if record is None or (record.output and not self._has_blob(record.output)):
            return None
        return record

    def read(self, sha256: str) -> bytes:
        """Reads the contents with this digest; raises DataLossError when they are damaged."""
        content = (self._blobs / sha256).read_bytes()
        if hashlib.sha256(content).hexdigest() != sha256:
            raise DataLossError(f"{self._blobs / sha256} is damaged; remove it and run the same command again")
        return content

    def add(self, key: str, what: str, record: RunRecord, output: bytes) -> None:
        """Adds a durable record; `what` names the run for readers of the journal."""
        with self._writing:
            if self._journal is None:
                raise FailedPreconditionError(f"{self.path}: the store is closed")
            if record.output and not self._has_blob(record.output):
                self.write(self._blobs / record.output, output)
            self._journal.append([{"key": key, "what": what, **asdict(record)}])
            self._records[key] = record

    def write(self, path: Path, content: bytes) -> None:
        """Writes a file of the problem's folder: a crash leaves the old or the new contents, and nothing else."""
        write_atomically(path, content, staging=self.path / "staging" / path.name)

    def _has_blob(self, sha256: str) -> bool:
        return (self._blobs / sha256).is_file()

    def _read_records(self, path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
        for number, values in enumerate(lines, start=1):
            try:
                record = RunRecord(status=values["status"], output=values["output"], reason=values["reason"])
                self._records[values["key"]] = record
            except (KeyError, TypeError) as error:
                raise DataLossError(
                    f"{path}:{number} lacks a field; remove the line, and the result is computed again"
                ) from error


def sha256(content: bytes) -> str:
    """Returns the name of a blob."""
    return hashlib.sha256(content).hexdigest()


SUMMARY_FILE = "make-tests.json"
TESTS_FOLDER = "tests"
_OWNED_FILE = "owned.json"
_ENDINGS = (".in", ".out")
_NAME = re.compile(r"\d{3,}")


def check_names(folder: Path, plan: Plan, store: Store) -> None:
    """Raises InvalidArgumentError when a test that was not made here has the name of a candidate."""
    owned = _read_owned(folder, store)
    for name in plan.names():
        for path in _paths(folder, name):
            if name not in owned and path.exists():
                raise InvalidArgumentError.for_field(str(path), "was not made by make-tests; rename or remove it")


def write_suite(folder: Path, known: Sequence[Program], plan: Plan, selection: Selection, store: Store) -> None:
    """Writes the test cases of a problem that is kept, removes those of earlier runs, and writes the summary.

    Killed at any moment and run again, it ends with the same files.
    """
    cases = selection.test_cases if selection.kept else []
    stale = _read_owned(folder, store) - {case.name for case in cases}
    _write_owned(store, sorted(stale | {case.name for case in cases}))
    for case in cases:
        in_path, out_path = _paths(folder, case.name)
        store.write(in_path, store.read(case.input_sha256))
        store.write(out_path, case.expected)
    for name in stale:
        for path in _paths(folder, name):
            path.unlink(missing_ok=True)
    if stale and (folder / TESTS_FOLDER).is_dir():
        sync(folder / TESTS_FOLDER)
    store.write(folder / SUMMARY_FILE, dump_json(summary(known, plan, selection)))
    _write_owned(store, sorted(case.name for case in cases))


def summary(known: Sequence[Program], plan: Plan, selection: Selection) -> dict[str, Any]:
    """Summarizes the selection; nothing in it depends on time or on how often the run was continued."""
    cases = selection.test_cases
    return {
        "verdict": "kept" if selection.drop is None else "dropped",
        "dropped_because": selection.drop,
        "reason": selection.reason,
        "seed": plan.seed,
        "minimum": plan.minimum,
        "agree_fraction": str(plan.agree_fraction),
        "pass_fraction": str(plan.pass_fraction),
        "counts": {"candidates": len(selection.cases), "cases": len(cases), "solutions": len(known)},
        "tests": [case.name for case in cases] if selection.kept else [],
        "candidates": [_case_summary(case) for case in selection.cases],
        "solutions": [
            {
                "name": solution.name,
                "language": solution.language,
                "passed": selection.passes.get(solution.name, 0),
                "failed": {
                    case.name: case.results[solution.name] for case in cases if case.results[solution.name] != AGREES
                },
            }
            for solution in known
        ],
    }


def dump_json(values: dict[str, Any]) -> bytes:
    """Returns JSON for people and programs."""
    return json.dumps(values, indent=2).encode() + b"\n"


def _case_summary(case: Case) -> dict[str, Any]:
    return {
        "name": case.name,
        "seed": case.seed,
        "kept": case.kept,
        "dropped_because": case.dropped or None,
        "input_sha256": case.input_sha256 or None,
        "agreeing": sum(result == AGREES for result in case.results.values()),
        "disagreeing": {name: result for name, result in case.results.items() if result != AGREES},
    }


def _paths(folder: Path, name: str) -> list[Path]:
    return [folder / TESTS_FOLDER / f"{name}{ending}" for ending in _ENDINGS]


def _read_owned(folder: Path, store: Store) -> set[str]:
    """Returns the names of the tests that were made here, by the store and, if that was removed, by the summary."""
    return {*_read_names(store.path / _OWNED_FILE), *_read_names(folder / SUMMARY_FILE)}


def _read_names(path: Path) -> list[str]:
    try:
        names = json.loads(path.read_bytes())["tests"]
        if not all(_NAME.fullmatch(name) for name in names):
            raise ValueError("a name that no candidate has")
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise DataLossError(f"{path} is damaged; remove it, and the tests that make-tests made") from error
    return list(names)


def _write_owned(store: Store, names: Sequence[str]) -> None:
    store.write(store.path / _OWNED_FILE, dump_json({"tests": list(names)}))
