"""What is left in a problem's folder: `tests/NNN.in` and `NNN.out`, and `make-tests.json`."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from perigee.errors import DataLossError, InvalidArgumentError
from perigee.files import sync
from perigee.testgen.plan import Plan, Program
from perigee.testgen.store import Store
from perigee.testgen.verdicts import AGREES, Case, Verdict

SUMMARY_FILE = "make-tests.json"
TESTS_FOLDER = "tests"
_OWNED_FILE = "owned.json"
_ENDINGS = (".in", ".out")
_NAME = re.compile(r"\d{3,}")


def check_names(folder: Path, plan: Plan, store: Store) -> None:
    """Raises InvalidArgumentError where a test of somebody else's has the name of a candidate."""
    owned = _read_owned(folder, store)
    for name in plan.names():
        for path in _paths(folder, name):
            if name not in owned and path.exists():
                raise InvalidArgumentError.of(str(path), "was not made by make-tests; rename or remove it")


def write_suite(folder: Path, known: Sequence[Program], plan: Plan, verdict: Verdict, store: Store) -> None:
    """Writes the test cases of a problem that is kept, removes those of earlier runs, and writes the summary.

    Killed at any moment and run again, it ends with the same files.
    """
    cases = verdict.test_cases if verdict.kept else []
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
    store.write(folder / SUMMARY_FILE, dump_json(summary(known, plan, verdict)))
    _write_owned(store, sorted(case.name for case in cases))


def summary(known: Sequence[Program], plan: Plan, verdict: Verdict) -> dict[str, Any]:
    """What was decided and why; nothing in it depends on time or on how often the run was taken up again."""
    cases = verdict.test_cases
    return {
        "verdict": "kept" if verdict.drop is None else "dropped",
        "dropped_because": verdict.drop,
        "reason": verdict.reason,
        "seed": plan.seed,
        "minimum": plan.minimum,
        "agree_share": str(plan.agree_share),
        "pass_share": str(plan.pass_share),
        "counts": {"candidates": len(verdict.cases), "cases": len(cases), "solutions": len(known)},
        "tests": [case.name for case in cases] if verdict.kept else [],
        "candidates": [_case_summary(case) for case in verdict.cases],
        "solutions": [
            {
                "name": solution.name,
                "language": solution.language,
                "passed": verdict.passes.get(solution.name, 0),
                "failed": {
                    case.name: case.results[solution.name] for case in cases if case.results[solution.name] != AGREES
                },
            }
            for solution in known
        ],
    }


def dump_json(values: dict[str, Any]) -> bytes:
    """JSON for people and programs."""
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
    """Names of the tests that were made here: by the store, and by the summary where the store was removed."""
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
