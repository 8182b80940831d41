"""Runs of a repository's tests: the command of a framework, the report that it leaves, and probes.

A probe is a test of the service's own under a name by chance. One of them must fail: code that has every test pass, or
that ends the run early, is found out by it.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from perigee.sandbox.v1 import sandbox_pb2 as pb
from services.sandbox.judge.reports import ReportError, read_report

# Imports pytest before the repository's folder is on the path.
_PYTEST = (
    "import sys; sys.path = [path for path in sys.path if path]; import pytest; sys.path.insert(0, ''); "
    "raise SystemExit(pytest.main())"
)
_GO = ["env", "GO111MODULE=auto", "GOFLAGS=", "GOPROXY=off", "GOTOOLCHAIN=local"]
_JEST = 'PATH="$PWD/node_modules/.bin:$PATH"; exec jest "$@"'
_PYTEST_PROBE = """def test_passes():
    pass


def test_fails():
    assert [1, 2] == [2, 1]


def test_raises():
    raise LookupError
"""
_JEST_PROBE = """test("test_passes", () => {});
test("test_fails", () => { expect([1, 2]).toEqual([2, 1]); });
test("test_raises", () => { throw new Error(); });
"""
_PROBES = {
    "test_passes": pb.TEST_OUTCOME_PASSED,
    "test_fails": pb.TEST_OUTCOME_FAILED,
    "test_raises": pb.TEST_OUTCOME_FAILED,
}
PROTECTED: dict[int, tuple[str, ...]] = {
    pb.TEST_FRAMEWORK_PYTEST: (
        "conftest.py",
        "pytest.ini",
        ".pytest.ini",
        "pytest.toml",
        ".pytest.toml",
        "*.pyc",
        "tox.ini",
        "setup.cfg",
        "pyproject.toml",
        "sitecustomize.py",
        "usercustomize.py",
        "*.pth",
        "*.dist-info/*",
        "*.egg-info/*",
        "pytest.py",
        "_pytest",
        "_pytest/*",
        "pluggy",
        "pluggy/*",
    ),
    pb.TEST_FRAMEWORK_GO_TEST: ("*_test.go", "go.work", "vendor/*"),
    pb.TEST_FRAMEWORK_JEST: ("jest.config.*", "babel.config.*", ".babelrc*", "package.json", "node_modules/*"),
}
"""Files that decide how a framework runs, which a submission's patch does not change."""


@dataclass(frozen=True)
class Suite:
    """Command of a run of tests, files placed for it, and where its report is; empty for standard output."""

    run: pb.TestRun
    command: list[str]
    report: str = ""
    probe: str = ""
    files: list[pb.File] = field(default_factory=list)

    def protected(self, targets: Sequence[str]) -> list[str]:
        """Returns patterns of the files that hold the tests of some targets."""
        if self.run.framework not in (pb.TEST_FRAMEWORK_PYTEST, pb.TEST_FRAMEWORK_JEST):
            return []
        return [target.replace("[", "[[]") for target in targets]


def make_suite(run: pb.TestRun, python: str, targets: Sequence[str] = (), with_probe: bool = True) -> Suite:
    """Returns the command of a run, with `targets` where it has none of its own."""
    chosen = list(run.targets) or list(targets)
    if run.command:
        return Suite(run, [*run.command, *run.targets], run.report)
    token = secrets.token_hex(8)
    match run.framework:
        case pb.TEST_FRAMEWORK_PYTEST:
            probe, report = f"test_{token}.py", f".report-{token}.xml"
            options = [
                "-p",
                "no:cacheprovider",
                "--continue-on-collection-errors",
                "-o",
                "junit_family=xunit1",
                f"--junitxml={report}",
            ]
            command = [python, "-B", "-c", _PYTEST, *options, *(chosen or ["."])]
            files = [pb.File(path=probe, content=_PYTEST_PROBE.encode())]
        case pb.TEST_FRAMEWORK_JEST:
            probe, report = f"{token}.test.js", f".report-{token}.json"
            command = ["sh", "-c", _JEST, "jest", "--json", f"--outputFile={report}", *(chosen or ["."])]
            files = [pb.File(path=probe, content=_JEST_PROBE.encode())]
        case _:
            return Suite(run, [*_GO, "go", "test", "-json", *(chosen or ["./..."])])
    return Suite(run, [*command, probe], report, probe, files) if with_probe else Suite(run, command, report)


@dataclass
class SuiteResult:
    """Result of a run of tests; `problem` says why its report does not count."""

    tests: list[pb.ReportedTest]
    problem: str = ""

    def outcomes(self) -> dict[str, pb.ReportedTest]:
        """Returns the tests by id."""
        return {test.id: test for test in self.tests}


def read_suite(suite: Suite, exit_code: int | None, stdout: bytes, files: Iterable[pb.OutputFile]) -> SuiteResult:
    """Reads the report of a run that has ended, and checks its probes."""
    content = stdout
    if suite.report:
        found = [file for file in files if not file.error]
        if not found:
            return SuiteResult([], "the tests left no report")
        content = found[0].content
        if found[0].truncated:
            return SuiteResult([], "the report of the tests is too large")
    try:
        tests = read_report(suite.run.framework, content)
    except ReportError as error:
        return SuiteResult([], f"the report of the tests {error}")
    if not suite.probe:
        return SuiteResult(tests, "" if tests else "the report has no tests")
    prefix = f"{suite.probe}::"
    kept = [test for test in tests if not test.id.startswith(prefix)]
    probes = {test.id.removeprefix(prefix): test.outcome for test in tests if test.id.startswith(prefix)}
    if probes != _PROBES or exit_code != 1:
        return SuiteResult(kept, "a test that fails in every repository is not reported as such")
    return SuiteResult(kept, "" if kept else "the report has no tests")


def pick(result: SuiteResult, ids: Iterable[str]) -> list[pb.ReportedTest]:
    """Returns the tests of some ids; one that was not reported is MISSING."""
    found = result.outcomes()
    return [found.get(each) or pb.ReportedTest(id=each, outcome=pb.TEST_OUTCOME_MISSING) for each in ids]
