"""Packages of other judges, read into the form of a problem."""

from __future__ import annotations

import io
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from perigee.cli.sandbox import dmoj_graders, text_checker
from perigee.cli.sandbox.connection import Sandbox
from perigee.cli.sandbox.judge import known_to, make_requests, read_solutions
from perigee.cli.sandbox.packages import open_problem
from perigee.cli.sandbox.swe import print_tests
from perigee.errors import InvalidArgumentError
from perigee.sandbox.client import SandboxClient
from perigee.sandbox.v1 import sandbox_pb2 as pb
from perigee.testgen.plan import Program

SOLUTION = Program("a.cpp", "cpp", b"int main() {}")
MINIMUM, SUM = pb.GROUP_POLICY_MINIMUM, pb.GROUP_POLICY_SUM


def write(folder: Path, **files: str) -> Path:
    """Writes files, whose names have `__` for a slash and `_DOT_` for a dot."""
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def request_of(folder: Path) -> pb.JudgeRequest:
    problem = open_problem(folder)
    [request] = make_requests(problem, SOLUTION, problem.read_tests())
    return request


def test_an_own_problem_with_groups(tmp_path: Path) -> None:
    text = """
groups:
- {name: easy, tests: [1-*], points: 30}
- {name: hard, tests: ["2-1"], needs: [easy], policy: minimum, stop_at_first_failure: true}
checker: {program: {path: check.cpp, protocol: coci, args: [x], compile_args: [-O1], compile_limits: {wall_ms: 5}}}
passes: 2
extra_time: {python: {factor: 2, added_ms: 100}}
compile_args: [-DX]
"""
    tests = {f"tests__{name}_DOT_{kind}": name for name in ("2-1", "1-1", "1-2") for kind in ("in", "out")}
    write(tmp_path, problem_DOT_yaml=text, check_DOT_cpp="int main() {}", **tests)
    request = request_of(tmp_path)
    assert [(test.name, test.group) for test in request.tests] == [("1-1", "easy"), ("1-2", "easy"), ("2-1", "hard")]
    assert list(request.groups) == [
        pb.TestGroup(name="easy", points=30, policy=pb.GROUP_POLICY_ALL),
        pb.TestGroup(name="hard", needs=["easy"], policy=MINIMUM, stop_at_first_failure=True),
    ]
    assert request.checker.program == pb.Program(
        language="cpp",
        source=b"int main() {}",
        protocol=pb.CHECKER_PROTOCOL_COCI,
        args=["x"],
        compile_args=["-O1"],
        compile_limits=pb.Limits(wall_ms=5),
    )
    assert (request.passes, request.extra_time["python"].factor, list(request.compile_args)) == (2, 2.0, ["-DX"])


async def test_a_package_of_kattis(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(
        tmp_path,
        problem_DOT_yaml="name: Odd\ntype: scoring\nlimits: {time_limit: 2, memory: 256}\n",
        data__testdata_DOT_yaml="grader_flags: ignore_sample\non_reject: continue\n",
        data__sample__1_DOT_in="1",
        data__sample__1_DOT_ans="1",
        data__secret__a__testdata_DOT_yaml="accept_score: 40\ngrader_flags: min\non_reject: break\n",
        data__secret__a__2_DOT_in="2",
        data__secret__a__2_DOT_ans="2",
        data__secret__b__testdata_DOT_yaml="accept_score: 5\noutput_validator_flags: case_sensitive\n",
        data__secret__b__3_DOT_in="3",
        data__secret__b__3_DOT_ans="3",
        data__secret__b__10_DOT_in="4",
        data__secret__b__10_DOT_ans="4",
        submissions__accepted__a_DOT_py="print(input())",
        submissions__wrong_answer__b_DOT_cc="int main() {}",
        submissions__accepted__notes_DOT_txt="",
        submissions__accepted__old_DOT_py="#!/usr/bin/env python2\n",
        input_validators__check__check_DOT_cpp="int main() {}",
        input_validators__check__check_DOT_h="",
    )
    problem = open_problem(tmp_path)
    request = request_of(tmp_path)
    assert [test.name for test in request.tests] == ["sample/1", "secret/a/2", "secret/b/3", "secret/b/10"]
    assert [(group.name, group.policy, group.points, group.stop_at_first_failure) for group in request.groups] == [
        ("sample", SUM, 0, False),
        ("secret/a", MINIMUM, 40, True),
        ("secret/b", SUM, 10, False),
    ]
    assert list(request.tests[2].checker_args) == ["case_sensitive"]
    assert list(request.checker.program.args) == ["kattis"]
    assert request.limits == pb.Limits(cpu_ms=2000, wall_ms=5000, memory_bytes=256 << 20)
    assert problem.solutions == {
        "submissions/accepted/a.py": (pb.TEST_VERDICT_ACCEPTED,),
        "submissions/accepted/notes.txt": (pb.TEST_VERDICT_ACCEPTED,),
        "submissions/accepted/old.py": (pb.TEST_VERDICT_ACCEPTED,),
        "submissions/wrong_answer/b.cc": (pb.TEST_VERDICT_WRONG_ANSWER,),
    }
    assert [solution.language for solution in read_solutions(problem, [])] == ["python", "python2", "cpp"]
    assert "left out: submissions/accepted/notes.txt: the suffix .txt" in capsys.readouterr().err
    with pytest.raises(InvalidArgumentError, match="names no solution in a language of this sandbox"):
        known_to(Sandbox(SandboxClient("127.0.0.1:1"), pb.ListRuntimesResponse()), problem, [SOLUTION])
    [validator] = problem.section.validators
    assert [file.path for file in problem.read_helper("validators", validator).files] == ["check.h"]


def kattis(folder: Path, problem: str, **files: str) -> Path:
    tests = {f"data__secret__{group}__{name}_DOT_in": "" for group in "ab" for name in "12"}
    return write(folder, problem_DOT_yaml=problem, **tests, **files)


def test_groups_of_kattis_break_one_another(tmp_path: Path) -> None:
    folder = kattis(tmp_path, "type: scoring", data__sample__1_DOT_in="", data__testdata_DOT_yaml="accept_score: 0")
    write(folder, data__secret__testdata_DOT_yaml="accept_score: 3")
    groups = {group.name: list(group.needs) for group in request_of(folder).groups}
    assert groups == {"sample": [], "secret/a": [], "secret/b": ["secret/a"]}
    write(folder, data__secret__testdata_DOT_yaml="on_reject: continue\noutput_validator_args: [case_sensitive]")
    request = request_of(folder)
    assert not any(group.needs for group in request.groups)
    assert list(request.tests[-1].checker_args) == ["case_sensitive"]


def test_scores_of_kattis_are_added(tmp_path: Path) -> None:
    validator = {"output_validators__v_DOT_py": "", "data__testdata_DOT_yaml": "range: 0 10"}
    request = request_of(kattis(tmp_path, "validation: custom score", **validator))
    assert {test.points for test in request.tests} == {10}
    assert [group.points for group in request.groups] == [20, 20]  # 5 and 5 are 10
    write(tmp_path, data__testdata_DOT_yaml="range: -inf inf")
    assert {test.points for test in request_of(tmp_path).tests} == {1}


@pytest.mark.parametrize(
    ("problem", "settings", "reason"),
    [
        ("type: scoring", "grader_flags: max", "grader flag max"),
        ("type: scoring", "grading: custom", "grader of its own"),
        ("type: scoring", "grader_flags: min", "minimum of groups"),
        ("validation: custom", "", "is custom, and has no program"),
        ("type: [submit-answer]", "", "submit-answer"),
        ("limits: {memory: much}", "", "ValidationError: 1 validation error"),
        ("limits: {time_limit: soon}", "", "could not convert string to float"),
    ],
)
def test_what_is_not_read_of_kattis_is_refused(tmp_path: Path, problem: str, settings: str, reason: str) -> None:
    with pytest.raises(InvalidArgumentError, match=reason):
        open_problem(kattis(tmp_path, problem, data__testdata_DOT_yaml=settings))


def test_an_interactive_package_of_kattis(tmp_path: Path) -> None:
    write(
        tmp_path,
        problem_DOT_yaml="validation: custom interactive\nvalidator_flags: a b\n",
        data__secret__1_DOT_in="1",
        output_validators__v__main_DOT_py="",
        output_validators__v__lib_DOT_py="",
    )
    request = request_of(tmp_path)
    assert request.tests[0].interactive == pb.InteractiveTest(input=b"1")
    assert (request.interactor.protocol, list(request.interactor.args)) == (pb.CHECKER_PROTOCOL_KATTIS, ["a", "b"])
    assert [file.path for file in request.interactor.files] == ["lib.py"]
    assert not request.groups


POLYGON = """<problem short-name="p"><names><name language="english" value="Sum"/></names>
<judging input-file="{files}" output-file=""><testset name="tests">
<time-limit>1000</time-limit><memory-limit>268435456</memory-limit>
<input-path-pattern>tests/%02d</input-path-pattern><answer-path-pattern>tests/%02d.a</answer-path-pattern>
<tests><test method="manual" group="1" points="10"/><test method="generated" cmd="gen 5" group="2" points="20"/></tests>
<groups><group name="2" points-policy="each-test"><dependencies><dependency group="1"/></dependencies></group>
<group name="1" points-policy="complete-group"/></groups></testset></judging>
<files><resources><file path="files/testlib.h"/></resources>
<executables><executable><source path="files/gen.cpp" type="cpp.g++17"/></executable></executables></files>
<assets><checker type="testlib"><source path="files/check.cpp" type="cpp.g++17"/></checker>
<solutions><solution tag="main"><source path="solutions/a.py" type="python.3"/></solution>
<solution tag="wrong-answer"><source path="solutions/b.py" type="python.3"/></solution></solutions>
</assets></problem>"""


def test_a_package_of_polygon(tmp_path: Path) -> None:
    files = {"files__testlib_DOT_h": "//", "files__check_DOT_cpp": "//", "files__gen_DOT_cpp": "//"}
    own = {"solutions__a_DOT_py": "", "solutions__b_DOT_py": "", "tests__01": "1 2", "tests__01_DOT_a": "3"}
    write(tmp_path, problem_DOT_xml=POLYGON.replace("{files}", ""), **files, **own)
    problem = open_problem(tmp_path)
    assert problem.section.title == "Sum"
    assert problem.generated["2"].args == ("5",)
    assert problem.main_solution == tmp_path / "solutions/a.py"
    assert problem.solutions == {
        "solutions/a.py": (pb.TEST_VERDICT_ACCEPTED,),
        "solutions/b.py": (pb.TEST_VERDICT_WRONG_ANSWER,),
    }
    request = request_of(tmp_path)
    assert [file.path for file in request.checker.program.files] == ["testlib.h"]
    assert {group.name: group.policy for group in request.groups} == {"1": pb.GROUP_POLICY_ALL, "2": SUM}
    assert [group.name for group in request.groups] == ["1", "2"]  # a group comes after those that it needs
    assert request.limits == pb.Limits(cpu_ms=1000, wall_ms=3000, memory_bytes=256 << 20)
    talking = POLYGON.replace("<checker", '<interactor><source path="files/gen.cpp"/></interactor><checker')
    request = request_of(write(tmp_path, problem_DOT_xml=talking.replace("{files}", "")))
    assert request.HasField("checker")
    assert request.HasField("interactor")
    write(tmp_path, problem_DOT_xml=POLYGON.replace("{files}", "in.txt"))
    with pytest.raises(InvalidArgumentError, match="standard input and output alone"):
        open_problem(tmp_path)


def write_dmoj(folder: Path, text: str, **archived: str) -> Path:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in archived.items():
            archive.writestr(name.replace("_", "."), content)
    (folder / "cases.zip").write_bytes(buffer.getvalue())
    return write(folder, init_DOT_yml=text, gen_DOT_cpp="//", interact_DOT_py="//", entry_DOT_c="//", lib_DOT_h="//")


def test_batches_of_dmoj(tmp_path: Path) -> None:
    text = """
archive: cases.zip
checker: {name: bridged, args: {files: [gen.cpp, lib.h], lang: CPP17, type: testlib, flags: [-DX],
  args_format_string: "{answer_file} 'a b'"}}
test_cases:
- {in: 1.in, out: 1.out, points: 0}
- {batched: [{in: 1.in, out: 1.out}, {in: 2.in, out: 2.out}], points: 7}
- {batched: [{generator: gen.cpp, generator_args: [3]}], points: 5, dependencies: [1]}
"""
    folder = write_dmoj(tmp_path, text, **{"1_in": "a\r\nb", "1_out": "1", "2_in": "c\n", "2_out": ""})
    request = request_of(folder)
    assert [(group.name, list(group.needs), group.points) for group in request.groups] == [
        ("case 1", [], 0),
        ("batch 1", ["case 1"], 7),
        ("batch 2", ["case 1", "batch 1"], 5),
    ]
    assert all(group.policy == MINIMUM and group.stop_at_first_failure for group in request.groups)
    assert [test.stdio.stdin for test in request.tests] == [b"a\nb\n", b"a\nb\n", b"c\n", b""]
    program = request.checker.program
    assert (list(program.args), program.replace_args, list(program.compile_args)) == (
        ["{answer}", "a b"],
        True,
        ["-DX"],
    )
    assert program.points_scale == pb.POINTS_SCALE_POINTS
    assert open_problem(folder).generated["batch 2, case 1"].gives_answer


def test_names_of_cases_and_graders_of_dmoj(tmp_path: Path) -> None:
    text = "archive: cases.zip\nsignature_grader: {entry: entry.c, header: lib.h}\nchecker: linecount\npoints: 2\n"
    names = {"b.1.2.in": "", "b.1.2.out": "", "b.1.10.in": "", "b.1.10.out": "", "b.2.1.in": "", "b.2.1.out": ""}
    request = request_of(write_dmoj(tmp_path, text, **names))
    assert [test.name for test in request.tests] == ["batch 1, case 1", "batch 1, case 2", "batch 2, case 1"]
    assert list(request.compile_args) == ["solution.cpp", "-DSIGNATURE_GRADER"]
    assert {file.path: file.content for file in request.files}["solution.cpp"].startswith(
        b'#include "lib.h"\n#define main main_of_the_solution\nint main'
    )
    text = "custom_judge: interact.py\nunbuffered: true\ntest_cases: [{points: 1}]"
    custom = request_of(write_dmoj(tmp_path, text))
    assert list(custom.compile_args) == ["-include", "unbuffered.h"]
    assert custom.interactor.args[:2] == ["grader", "interact.py"]
    wrong = "test_cases: [{points: 1}]\nchecker: {name: bridged, args: {files: gen.cpp, type: mine}}"
    with pytest.raises(InvalidArgumentError, match="mine is not known"):
        open_problem(write_dmoj(tmp_path, wrong))
    unknown = "test_cases: [{points: 1}]\nchecker: {name: bridged, args: {files: check.f90}}"
    with pytest.raises(InvalidArgumentError, match=r"the suffix \.f90 stands for no known language"):
        open_problem(write_dmoj(tmp_path, unknown))


@pytest.mark.parametrize(
    ("name", "output", "answer", "options", "fraction"),
    [
        ("kattis", b"A  b", b"a B", [], 1.0),
        ("kattis", b"A b", b"a b", ["case_sensitive"], 0.0),
        ("kattis", b"1.01", b"1", ["float_tolerance", "0.02"], 1.0),
        ("kattis", b"nan", b"1", ["float_tolerance", "0.02"], 0.0),
        ("kattis", b"a  b", b"a b", ["space_change_sensitive"], 0.0),
        ("kattis", b"1_0", b"10", ["float_tolerance", "0.02"], 0.0),
        ("standard", b" 1  2 \n\n3", b"1 2\n \n3\n", [], 1.0),
        ("standard", b"1\n2\n3", b"1 2\n3", [], 0.0),
        ("floats", b"1.001 x\n\n2", b"1 x\n2", ["0.01", "default"], 1.0),
        ("floats", b"1.001 x 2", b"1 x\n2", ["0.01", "default"], 0.0),
        ("floats", b"100.5", b"100", ["0.01", "absolute"], 0.0),
        ("easy", b"b A", b"aB", [], 1.0),
        ("linecount", b"1\n3\n", b"1\n2\n", [], 0.5),
        ("linematches", b"1\nx", b"1\n2", ["3", "1"], 0.75),
        ("rstripped", b"a \nb", b"a\nb", [], 1.0),
        ("sorted", b"b a\nc", b"c\nb  a", [], 1.0),
    ],
)
def test_comparisons(name: str, output: bytes, answer: bytes, options: list[str], fraction: float) -> None:
    assert text_checker.COMPARISONS[name](output, answer, options) == fraction


def test_points_are_those_of_the_lines() -> None:
    with pytest.raises(ValueError, match="points of 2 lines"):
        text_checker.linematches(b"1\nx", b"1\n2", ["1"])


GRADER = """
from dmoj.graders.interactive import InteractiveGrader
from dmoj.utils.unicode import utf8text
class Grader(InteractiveGrader):
    def interact(self, case, interactor):
        interactor.writeln(utf8text(case.input_data()))
        return interactor.readint(1, 9) == 5
"""
PROCESS_GRADER = "from dmoj.graders.standard import StandardGrader\nclass Grader(StandardGrader): pass"
CHECKER = """
from dmoj.result import CheckerResult
def check(process_output, judge_output, *, point_value, half=False, **kwargs):
    return CheckerResult(True, point_value / 2, "half") if half else process_output == judge_output
"""


@pytest.mark.parametrize(
    ("kind", "module", "options", "said", "code", "words"),
    [
        ("grader", GRADER, "{}", b"5\n", 7, b"points 1"),
        ("grader", GRADER, "{}", b"x\n", 7, b'points 0 expected int, got "x"'),
        ("grader", GRADER, "{}", b"", 7, b"points 0 expected a line"),
        ("grader", PROCESS_GRADER, "{}", b"", 3, b"FAIL InternalError"),
        ("checker", CHECKER, '{"half": true}', b"", 7, b"points 0.5 half"),
        ("checker", CHECKER, "{}", b"", 7, b"points 1"),
    ],
)
def test_graders_in_python(
    tmp_path: Path, kind: str, module: str, options: str, said: bytes, code: int, words: bytes
) -> None:
    write(tmp_path, grader_DOT_py=module, input="1", output="", answer="")
    command = [sys.executable, dmoj_graders.__file__, "input", "output", "answer", kind, "grader.py", options]
    ended = subprocess.run(command, cwd=tmp_path, input=said, capture_output=True)
    assert (ended.returncode, ended.stderr[: len(words)]) == (code, words)


def test_names_of_parameters_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    print_tests(pb.JudgePatchRequest(fail_to_pass=["a"]), pb.JudgePatchResponse(tests=[pb.ReportedTest(id="t[a.b-1]")]))
    assert "t[a.b-1]" in capsys.readouterr().out
