"""Reports of test frameworks: ids, outcomes, durations and failures; nothing forged raises anything else."""

from __future__ import annotations

import io
import json
import tarfile
from xml.sax.saxutils import quoteattr

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perigee.sandbox.v1 import sandbox_pb2 as pb
from services.sandbox.judge.reports import ReportError, read_report
from services.sandbox.judge.suites import make_suite, read_suite

PYTEST, GO, JEST, JUNIT = (
    pb.TEST_FRAMEWORK_PYTEST,
    pb.TEST_FRAMEWORK_GO_TEST,
    pb.TEST_FRAMEWORK_JEST,
    pb.TEST_FRAMEWORK_JUNIT,
)
PASSED, FAILED, ERROR, SKIPPED = (
    pb.TEST_OUTCOME_PASSED,
    pb.TEST_OUTCOME_FAILED,
    pb.TEST_OUTCOME_ERROR,
    pb.TEST_OUTCOME_SKIPPED,
)


def outcomes(framework: pb.TestFramework.ValueType, content: bytes) -> dict[str, pb.TestOutcome.ValueType]:
    return {test.id: test.outcome for test in read_report(framework, content)}


@pytest.mark.timeout(30)  # comparing each test with each takes minutes
def test_a_report_of_many_tests_is_read() -> None:
    suite = make_suite(pb.TestRun(framework=PYTEST), "python3")
    cases = "".join(f'<testcase name="t{number}"/>' for number in range(50_000))
    report = pb.OutputFile(path=suite.report, content=f"<testsuite>{cases}</testsuite>".encode())
    result = read_suite(suite, 1, b"", [report])
    assert (len(result.tests), result.problem) == (
        50_000,
        "a test that fails in every repository is not reported as such",
    )


def test_pytest_ids_are_its_own() -> None:
    report = b"""<?xml version="1.0" encoding="utf-8"?><testsuites><testsuite name="pytest" errors="1" tests="5">
<testcase classname="tests.test_a" name="test_one" file="tests/test_a.py" line="1" time="0.0015"/>
<testcase classname="tests.test_a.TestX.TestY" name="test_two[a.b-1]" file="tests/test_a.py" time="2">
  <failure message="assert 1 == 2">def test_two():
&gt;   assert 1 == 2</failure></testcase>
<testcase classname="tests.test_a" name="test_skip" file="tests/test_a.py"><skipped message="no"/></testcase>
<testcase classname="t" name="x"><skipped type="pytest.xfail" message=""/></testcase>
<testcase classname="tests.test_a" name="test_torn" file="tests/test_a.py" time="0.1"/>
<testcase classname="tests.test_a" name="test_torn" file="tests/test_a.py"><error message="torn">x</error></testcase>
<testcase classname="" name="tests.test_b" file="tests/test_b.py"><error message="collection">Import</error></testcase>
</testsuite></testsuites>"""
    tests = {test.id: test for test in read_report(PYTEST, report)}
    assert {name: test.outcome for name, test in tests.items()} == {
        "tests/test_a.py::test_one": PASSED,
        "tests/test_a.py::TestX::TestY::test_two[a.b-1]": FAILED,
        "tests/test_a.py::test_skip": SKIPPED,
        "t::x": PASSED,
        "tests/test_a.py::test_torn": ERROR,
        "tests/test_b.py": ERROR,
    }
    failed = tests["tests/test_a.py::TestX::TestY::test_two[a.b-1]"]
    assert (failed.duration_ms, tests["tests/test_a.py::test_one"].duration_ms) == (2000, 2)
    assert failed.message.startswith("assert 1 == 2\ndef test_two():")


def test_a_folder_of_junit_files_is_one_report() -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, failure in (("TEST-A.xml", ""), ("TEST-B.xml", "<failure message='m' type='T'>at</failure>")):
            case = f"<testsuite><testcase name='adds' classname='org.{name[5]}'>{failure}</testcase></testsuite>"
            member = tarfile.TarInfo(name)
            member.size = len(case)
            tar.addfile(member, io.BytesIO(case.encode()))
    assert outcomes(JUNIT, file.getvalue()) == {"org.A::adds": PASSED, "org.B::adds": FAILED}


def test_what_a_report_claims_takes_no_room() -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo("TEST-A.xml")
        member.pax_headers = {"GNU.sparse.map": "0,4", "GNU.sparse.size": str(1 << 40)}
        member.size = 4
        tar.addfile(member, io.BytesIO(b"<a/>"))
    assert outcomes(JUNIT, file.getvalue()) == {}
    assert outcomes(JUNIT, "\ufeff<t><testcase name='a'/></t>".encode()) == {"a": PASSED}
    report = '{"testResults": [{"assertionResults": [{"status": "passed", "duration": 1' + "0" * 400 + "}]}]}"
    assert outcomes(JEST, report.encode()) == {"::": PASSED}


def test_go_tests_that_do_not_end_are_errors() -> None:
    events = [
        {"Action": "run", "Package": "m/a", "Test": "TestOne"},
        {"Action": "output", "Package": "m/a", "Test": "TestOne", "Output": "--- FAIL\n"},
        {"Action": "fail", "Package": "m/a", "Test": "TestOne", "Elapsed": 0.25},
        {"Action": "pass", "Package": "m/a", "Test": "TestOne", "Elapsed": 0},
        {"Action": "run", "Package": "m/a", "Test": "TestTwo/sub"},
        {"Action": "skip", "Package": "m/a", "Test": "TestThree"},
        {"Action": "fail", "Package": "m/a"},
        {"Action": "output", "Package": "m/b", "Output": "undefined: x\n"},
        {"Action": "fail", "Package": "m/b"},
    ]
    content = b"# m/b\n" + b"\n".join(json.dumps(event).encode() for event in events)
    assert outcomes(GO, content) == {
        "m/a::TestOne": FAILED,
        "m/a::TestTwo/sub": ERROR,
        "m/a::TestThree": SKIPPED,
        "m/b": ERROR,
    }
    assert [test.message for test in read_report(GO, content)][-1] == "undefined: x\n"


def test_jest_files_that_do_not_run_are_errors() -> None:
    tests = [
        {"fullName": "sum adds", "status": "passed", "duration": 3},
        {"fullName": "sum fails", "status": "failed", "failureMessages": ["Error: 1", "at x"], "duration": None},
        {"fullName": "later", "status": "todo"},
    ]
    report = {
        "testResults": [
            {"name": "/box/a.test.js", "status": "failed", "assertionResults": tests},
            {"name": "/box/b.test.js", "status": "failed", "message": "SyntaxError", "assertionResults": []},
        ]
    }
    assert outcomes(JEST, json.dumps(report).encode()) == {
        "a.test.js::sum adds": PASSED,
        "a.test.js::sum fails": FAILED,
        "a.test.js::later": SKIPPED,
        "b.test.js": ERROR,
    }


BOMB = b'<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;">]><testsuite>&b;</testsuite>'


@pytest.mark.parametrize(
    ("framework", "content"),
    [
        (PYTEST, b""),
        (PYTEST, b"<testsuite><testcase>"),
        (PYTEST, BOMB),
        (PYTEST, BOMB.decode().encode("utf-16")),
        (JUNIT, b"junk"),
        (JEST, b"[]"),
        (JEST, b'{"testResults": 1}'),
        (JEST, b"[" * 100_000),
        (GO, b"{]"),
    ],
)
def test_what_is_no_report_is_refused(framework: pb.TestFramework.ValueType, content: bytes) -> None:
    with pytest.raises(ReportError):
        read_report(framework, content)


@given(st.lists(st.tuples(st.text("ab[]<&\"' é", min_size=1, max_size=5), st.sampled_from(["", "failure", "error"]))))
def test_of_several_results_of_a_test_the_worst_counts(cases: list[tuple[str, str]]) -> None:
    elements = [f"<testcase name={quoteattr(name)}>{f'<{kind}/>' if kind else ''}</testcase>" for name, kind in cases]
    rank = {"": PASSED, "failure": FAILED, "error": ERROR}
    expected: dict[str, int] = {}
    for name, kind in cases:
        expected[name] = max(expected.get(name, 0), rank[kind], key=[0, PASSED, FAILED, ERROR].index)
    assert outcomes(PYTEST, f"<testsuite>{''.join(elements)}</testsuite>".encode()) == expected


JSON = st.recursive(
    st.none() | st.text(max_size=5) | st.integers() | st.floats(), lambda each: st.lists(each, max_size=3)
)


@settings(max_examples=30)
@given(
    st.sampled_from([GO, JEST]),
    st.dictionaries(st.sampled_from(["Action", "Package", "Test", "Elapsed", "testResults", "name"]), JSON),
)
def test_forged_fields_are_reports_or_refused(framework: pb.TestFramework.ValueType, fields: dict[str, object]) -> None:
    try:
        read_report(framework, json.dumps(fields).encode())
    except ReportError:
        return
