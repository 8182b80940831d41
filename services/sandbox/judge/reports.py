"""Reports of test frameworks: JUnit's XML (as pytest, Surefire and the console launcher write it), Jest's JSON, and the
events of `go test -json`.

The process that writes a report also runs the code under test, so that a report is untrusted: of several results of one
test the worst counts, and what cannot be read raises ReportError.
"""

from __future__ import annotations

import codecs
import io
import json
import math
import tarfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from xml.parsers import expat

from perigee.sandbox.v1 import sandbox_pb2 as pb

MOST_TESTS = 100_000
_MESSAGE_CHARACTERS = 4096
_ID_CHARACTERS = 2048
_HOME = "/box/"
_SEVERITY = (
    pb.TEST_OUTCOME_PASSED,
    pb.TEST_OUTCOME_SKIPPED,
    pb.TEST_OUTCOME_FAILED,
    pb.TEST_OUTCOME_ERROR,
)


class ReportError(Exception):
    """Report that is no such report; the sentence says why."""


def read_report(framework: pb.TestFramework.ValueType, content: bytes) -> list[pb.ReportedTest]:
    """Returns the tests of a report, each once, in its order; raises ReportError.

    JUnit's may be a tar of several files.
    """
    readers: dict[int, Callable[[bytes], Iterable[pb.ReportedTest]]] = {
        pb.TEST_FRAMEWORK_PYTEST: read_junit,
        pb.TEST_FRAMEWORK_JUNIT: read_junit_files,
        pb.TEST_FRAMEWORK_GO_TEST: read_go_test,
        pb.TEST_FRAMEWORK_JEST: read_jest,
    }
    tests: dict[str, pb.ReportedTest] = {}
    try:
        for test in readers[framework](content):
            before = tests.get(test.id)
            if before is None or _SEVERITY.index(before.outcome) < _SEVERITY.index(test.outcome):
                tests[test.id] = test
            if len(tests) > MOST_TESTS:
                raise ReportError(f"has more than {MOST_TESTS} tests")
    except (RecursionError, LookupError) as error:  # headers of a tar after headers
        raise ReportError(f"cannot be read: {error}") from error
    return list(tests.values())


def reported(
    name: str, outcome: pb.TestOutcome.ValueType, duration: object = 0.0, message: str = "", unit_ms: float = 1000.0
) -> pb.ReportedTest:
    """Returns a test with its texts cut, and its duration in units of `unit_ms` as milliseconds."""
    return pb.ReportedTest(
        id=_clean(name)[:_ID_CHARACTERS],
        outcome=outcome,
        duration_ms=_milliseconds(duration, unit_ms),
        message=_clean(message)[:_MESSAGE_CHARACTERS],
    )


def _clean(text: str) -> str:
    return text.encode(errors="replace").decode()


def _milliseconds(duration: object, unit_ms: float) -> int:
    try:
        value = float(duration) * unit_ms  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return 0
    return min(math.ceil(value), 2**32 - 1) if 0 <= value < math.inf else 0


_JUNIT_OUTCOMES = {
    "failure": pb.TEST_OUTCOME_FAILED,
    "error": pb.TEST_OUTCOME_ERROR,
    "skipped": pb.TEST_OUTCOME_SKIPPED,
}


_EXPECTED = "pytest.xfail"
"""Of a test that should fail and did."""


class _JUnitReader:
    """Collects the tests of one XML file as its parser goes."""

    def __init__(self) -> None:
        self.tests: list[pb.ReportedTest] = []
        self._path: list[str] = []
        self._case: dict[str, str] = {}
        self._outcome: pb.TestOutcome.ValueType = pb.TEST_OUTCOME_PASSED
        self._message: list[str] = []

    def start(self, name: str, attributes: dict[str, str]) -> None:
        """Begins an element."""
        self._path.append(name)
        if name == "testcase":
            self._case, self._outcome, self._message = attributes, pb.TEST_OUTCOME_PASSED, []
        elif name in _JUNIT_OUTCOMES and self._path[-2:-1] == ["testcase"] and attributes.get("type") != _EXPECTED:
            self._outcome = max(self._outcome, _JUNIT_OUTCOMES[name], key=_SEVERITY.index)
            self._message.append(attributes.get("message", ""))

    def text(self, text: str) -> None:
        """Reads text, of which that of a failure is kept."""
        if self._path[-1:] and self._path[-1] in _JUNIT_OUTCOMES and len(self._message) < _MESSAGE_CHARACTERS:
            self._message.append(text)

    def end(self, name: str) -> None:
        """Ends an element."""
        self._path.pop()
        if name == "testcase":
            message = "\n".join(filter(str.strip, ["".join(self._message[:1]), "".join(self._message[1:])]))
            self.tests.append(reported(junit_id(self._case), self._outcome, self._case.get("time"), message))
            if len(self.tests) > MOST_TESTS:
                raise ReportError(f"has more than {MOST_TESTS} tests")


def junit_id(case: dict[str, str]) -> str:
    """Returns the id of a test: pytest's node id where the report names the file, else `class::name`."""
    name, owner, file = case.get("name", ""), case.get("classname", ""), case.get("file", "")
    if not file:
        return f"{owner}::{name}" if owner else name
    module = file.removesuffix(".py").replace("/", ".")
    classes = owner.removeprefix(module).strip(".") if owner.startswith(module) else owner
    if not owner and name == module:  # a file that cannot be imported
        return file
    return "::".join([file, *filter(None, classes.split(".")), name])


def read_junit(content: bytes) -> list[pb.ReportedTest]:
    """Reads one file of JUnit's XML; entities and document types are refused."""
    reader = _JUnitReader()
    parser = expat.ParserCreate()
    parser.buffer_text = True
    parser.StartElementHandler, parser.EndElementHandler = reader.start, reader.end
    parser.CharacterDataHandler = reader.text
    parser.StartDoctypeDeclHandler = _refuse_doctype
    try:
        parser.Parse(content, True)
    except (expat.ExpatError, ValueError, LookupError) as error:
        raise ReportError(f"is no XML: {error}") from error
    return reader.tests


def _refuse_doctype(*_: object) -> None:
    raise ReportError("has a document type")


def read_junit_files(content: bytes) -> Iterator[pb.ReportedTest]:
    """Reads one file of JUnit's XML, or those in a tar."""
    if content.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"<":
        yield from read_junit(content)
        return
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            for member in tar:
                # holes take no room in the tar, and as much memory as they claim
                if member.isreg() and not member.issparse() and member.name.endswith(".xml"):
                    file = tar.extractfile(member)
                    assert file is not None
                    yield from read_junit(file.read())
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise ReportError(f"is neither XML nor a folder: {error}") from error


_JEST_OUTCOMES = {"passed": pb.TEST_OUTCOME_PASSED, "failed": pb.TEST_OUTCOME_FAILED}


def read_jest(content: bytes) -> Iterator[pb.ReportedTest]:
    """Reads Jest's JSON; ids are `path::full name`. A file that did not run is an error with the path for its id."""
    files = _fields(_read_json(content)).get("testResults")
    if not isinstance(files, list):
        raise ReportError("has no testResults")
    for file in map(_fields, files):
        path = str(file.get("name", "")).removeprefix(_HOME)
        tests = file.get("assertionResults")
        if file.get("status") == "failed" and not tests:
            yield reported(path, pb.TEST_OUTCOME_ERROR, 0.0, str(file.get("message", "")))
        for test in map(_fields, tests if isinstance(tests, list) else []):
            outcome = _JEST_OUTCOMES.get(str(test.get("status")), pb.TEST_OUTCOME_SKIPPED)
            messages = test.get("failureMessages")
            message = "\n".join(map(str, messages)) if isinstance(messages, list) else ""
            yield reported(f"{path}::{test.get('fullName', '')}", outcome, test.get("duration"), message, unit_ms=1.0)


def _read_json(content: bytes) -> object:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ReportError(f"is no JSON: {error}") from error


def _fields(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


_GO_OUTCOMES = {"pass": pb.TEST_OUTCOME_PASSED, "fail": pb.TEST_OUTCOME_FAILED, "skip": pb.TEST_OUTCOME_SKIPPED}


def read_go_test(content: bytes) -> Iterator[pb.ReportedTest]:
    """Reads the events of `go test -json`; ids are `package::test`.

    A test that began and did not end is an error, and so is a package that failed without one of its tests.
    """
    ended: dict[tuple[str, str], tuple[pb.TestOutcome.ValueType, object]] = {}
    output: dict[tuple[str, str], list[str]] = {}
    for line in content.splitlines():
        if not line.startswith(b"{"):  # of the compiler
            continue
        event = _fields(_read_json(line))
        key = str(event.get("Package") or event.get("ImportPath") or ""), str(event.get("Test") or "")
        action = str(event.get("Action"))
        if action in ("output", "build-output"):
            output.setdefault(key, []).append(str(event.get("Output", "")))
        elif action == "run":
            ended.setdefault(key, (pb.TEST_OUTCOME_ERROR, 0.0))
        elif action in _GO_OUTCOMES:
            before = ended.get(key, (pb.TEST_OUTCOME_PASSED, 0.0))[0]
            outcome = _GO_OUTCOMES[action]
            if before == pb.TEST_OUTCOME_FAILED:  # the worst of several counts
                outcome = pb.TEST_OUTCOME_FAILED
            ended[key] = outcome, event.get("Elapsed")
        if len(ended) > MOST_TESTS:
            raise ReportError(f"has more than {MOST_TESTS} tests")
    failed = (pb.TEST_OUTCOME_FAILED, pb.TEST_OUTCOME_ERROR)
    blamed = {package for (package, test), (outcome, _) in ended.items() if test and outcome in failed}
    for (package, test), (outcome, seconds) in ended.items():
        message = "".join(output.get((package, test), [])) if outcome in failed else ""
        if test:
            yield reported(f"{package}::{test}", outcome, seconds, message)
        elif outcome in failed and package not in blamed:
            yield reported(package, pb.TEST_OUTCOME_ERROR, seconds, message)
