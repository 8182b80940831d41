"""Problem folders: `problem.yaml`, `tests/NAME.in` with `NAME.out`, and the programs beside them.

Packages of other judges are read into the same form.
"""

from __future__ import annotations

import difflib
import io
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from perigee.cli.sandbox.connection import MIB, check_relative, language_of, read_bytes
from perigee.config import Model, read_yaml, validate
from perigee.errors import InvalidArgumentError
from perigee.sandbox.v1 import sandbox_pb2 as pb
from perigee.testgen.plan import Program

# Verdicts of which a solution should get one.
Expected = tuple[pb.TestVerdict.ValueType, ...]
# Those that packages of other judges mean by a runtime error.
CRASHES: Expected = (pb.TEST_VERDICT_RUNTIME_ERROR, pb.TEST_VERDICT_MEMORY_LIMIT, pb.TEST_VERDICT_OUTPUT_LIMIT)
PROBLEM_FILE = "problem.yaml"
TESTS_FOLDER = "tests"
_PYTHON_2 = re.compile(rb"#!.*python2\b")
# Languages of solutions that a grader's program can be linked with, and their suffixes.
_LINKED = {"c": ".c", "cpp": ".cpp"}
_UNBUFFERED_TEXT = b"""#include <stdio.h>
__attribute__((constructor)) static void leave_output_unbuffered(void) { setvbuf(stdout, NULL, _IONBF, 0); }
"""
# File and arguments of a compiler by which C and C++ write their output at once.
_UNBUFFERED = ([pb.File(path="unbuffered.h", content=_UNBUFFERED_TEXT)], ["-include", "unbuffered.h"])


class LimitsSection(Model):
    """Limits of one run of a program; unset ones are the sandbox's defaults."""

    wall_ms: int | None = Field(None, ge=1)
    """Wall-clock time."""
    cpu_ms: int | None = Field(None, ge=1)
    """CPU time of all its processes."""
    memory_mb: int | None = Field(None, ge=1)
    """Memory of all its processes and files, in MiB."""
    processes: int | None = Field(None, ge=1)
    """Processes and threads at once."""
    file_mb: int | None = Field(None, ge=1)
    """Space for its files, in MiB."""
    output_mb: int | None = Field(None, ge=1)
    """Its output, in MiB."""

    def to_proto(self) -> pb.Limits:
        """Returns the limits of a request."""
        values = self.model_dump(exclude_none=True)
        return pb.Limits(
            **{
                name.replace("_mb", "_bytes"): value * MIB if name.endswith("_mb") else value
                for name, value in values.items()
            }
        )


class FloatsSection(Model):
    """Numbers within either tolerance are the same; other words must be equal."""

    absolute: float = Field(0.0, ge=0)
    """Largest difference."""
    relative: float = Field(0.0, ge=0)
    """Largest difference, as a fraction of the expected number."""


def _read_path(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


class ProgramSection(Model):
    """Checker, interactor, generator or validator; `checker.cpp` is short for `{path: checker.cpp}`."""

    path: str
    """Source beside problem.yaml."""
    language: str = ""
    """Runtime; by the suffix unless set."""
    files: list[str] = []
    """Files placed beside it."""
    args: list[str] = []
    """Arguments after the protocol's."""
    replace_args: bool = False
    """`args` are all arguments; {input}, {output}, {answer} and {feedback} stand for the files."""
    compile_args: list[str] = []
    """Arguments of the compiler."""
    unbuffered: bool = False
    """Standard output is not buffered, of C and C++ alone."""
    protocol: Literal["unspecified", "testlib", "kattis", "coci", "peg", "exit_code"] = "unspecified"
    """How it is started and what its end says; testlib's unless set."""
    points_scale: Literal["unspecified", "fraction", "points"] = "unspecified"
    """What its points mean: a fraction, points of the test, or a fraction up to 1 and points above."""
    limits: LimitsSection = LimitsSection()
    """Limits of one run."""
    compile_limits: LimitsSection = LimitsSection()
    """Limits of its compiler."""


ProgramField = Annotated[ProgramSection, BeforeValidator(_read_path)]


def text_checker(name: str, *options: str) -> ProgramSection:
    """Returns the checker that makes one of the comparisons of other judges."""
    path = Path(__file__).with_name("text_checker.py")
    return ProgramSection(path=str(path), language="python", args=[name, *options])


class CheckerSection(Model):
    """Comparator of outputs: one of the three."""

    comparison: Literal["exact", "tokens", "lines", "unordered_lines", "unordered_tokens"] = "tokens"
    """`checker: lines` is short for this."""
    floats: FloatsSection = FloatsSection()
    """By tokens, with a tolerance."""
    program: ProgramField | None = None
    """Program that decides."""

    @property
    def kind(self) -> str:
        """Returns which of the three it is."""
        return next(iter(self.model_fields_set), "comparison")


class GroupSection(Model):
    """Tests that are scored together."""

    name: str
    """Name."""
    tests: list[str] = []
    """Names of its tests, or patterns such as 2-*."""
    needs: list[str] = []
    """Groups without which it is not run: one of their tests failed."""
    policy: Literal["all", "minimum", "sum"] = "all"
    """Its points for all tests or none, for the worst test, or for each test."""
    points: float | None = Field(None, ge=0)
    """Those of its tests added, unless set."""
    stop_at_first_failure: bool = False
    """Skips the rest after a test that failed."""

    def to_proto(self) -> pb.TestGroup:
        """Returns the group of a request."""
        return pb.TestGroup(
            name=self.name,
            needs=self.needs,
            policy=pb.GroupPolicy.Value(f"GROUP_POLICY_{self.policy.upper()}"),
            points=self.points,
            stop_at_first_failure=self.stop_at_first_failure,
        )


class ExtraTimeSection(Model):
    """Time that solutions in one language have beyond the limits."""

    factor: float = Field(1.0, ge=1)
    """Factor of `wall_ms` and `cpu_ms`."""
    added_ms: int = Field(0, ge=0)
    """Added to both then."""


class GraderSection(Model):
    """Program of C or C++ that calls functions of the solution, which has no main of its own."""

    entry: str
    """Source with main."""
    header: str
    """Header that declares the functions; the solution includes it without saying so."""
    allow_main: bool = False
    """Keeps a main of the solution instead of renaming it."""


class ProblemSection(Model):
    """Contents of `problem.yaml`."""

    title: str = ""
    """For readers."""
    language: str = ""
    """Runtime of all solutions; by their suffixes unless set."""
    limits: LimitsSection = LimitsSection()
    """Limits of a solution on one test; unset ones are the sandbox's defaults."""
    checker: CheckerSection = CheckerSection()
    """Comparator of outputs; by tokens unless set."""
    interactor: ProgramField | None = None
    """Program that talks with the solution and decides."""
    grader: GraderSection | None = None
    """Program that the solution is linked with."""
    function: str = ""
    """Function that tests call; NAME.in is then a JSON list of arguments, NAME.out the result as JSON."""
    signature: str = ""
    """Types of the function's arguments and result, such as `(ListNode, integer) -> ListNode`."""
    files: list[str] = []
    """Files placed beside checker and interactor, testlib.h for one."""
    points: dict[str, float] = {}
    """Points of a test by its name, 1 unless set. Names such as 001 need quotes in YAML."""
    groups: list[GroupSection] = []
    """Subtasks in their order."""
    passes: int | None = Field(None, ge=1, le=100)
    """Most runs of a solution for one test, each on the nextpass.in that the judging program left."""
    compile_args: list[str] = []
    """Arguments of a solution's compiler."""
    unbuffered: bool = False
    """Standard output of solutions is not buffered, of C, C++ and Python alone."""
    extra_time: dict[str, ExtraTimeSection] = {}
    """Extra time by language."""
    validators: list[ProgramField] = []
    """Programs that read each input and end with 0 (kattis: 42) when it is valid; run by --validate."""

    @field_validator("checker", mode="before")
    @classmethod
    def _read_short_form(cls, value: Any) -> Any:
        return {"comparison": value} if isinstance(value, str) else value

    @field_validator("points", mode="before")
    @classmethod
    def _read_names(cls, value: Any) -> Any:
        return {str(name): points for name, points in value.items()} if isinstance(value, dict) else value


@dataclass(frozen=True)
class Generation:
    """Program that prints the input of a test; standard error is the answer where `gives_answer`."""

    program: ProgramSection
    args: tuple[str, ...] = ()
    stdin: bytes = b""
    gives_answer: bool = False


@dataclass(frozen=True)
class Problem:
    """Folder of a problem and its validated description."""

    folder: Path
    section: ProblemSection
    file: str = PROBLEM_FILE
    """File that describes it, for errors."""
    archive: bytes = b""
    """ZIP archive in which files are looked for that the folder lacks."""
    tests: Sequence[pb.TestCase] | None = None
    """Tests of a package; those of tests/ unless set."""
    generated: Mapping[str, Generation] = field(default_factory=dict)
    """Tests, by name, whose input a program makes."""
    solutions: Mapping[str, Expected] | None = None
    """Solutions of a package with what they should get; those of solutions/ by their names unless set."""
    main_solution: Path | None = None
    """Solution whose outputs are the answers of tests that have none."""

    @property
    def label(self) -> str:
        """Path of the file that describes it."""
        return str(self.folder / self.file)

    def read_file(self, name: str, key: str) -> bytes:
        """Reads a file of the folder or of its archive; raises InvalidArgumentError naming the key."""
        path = self.folder / name
        if path.is_file():
            return read_bytes(path)
        if self.archive:
            with zipfile.ZipFile(io.BytesIO(self.archive)) as archive:
                if name in archive.namelist():
                    return archive.read(name)
        raise InvalidArgumentError.for_field(f"{self.label}: {key}", f"{name} is no file of this folder")

    def read_program(self, path: Path) -> Program:
        """Reads a solution, named by its path below the folder if it is there."""
        source = read_bytes(path)
        language = self.section.language or language_of(path)
        if language == "python" and not self.section.language and _PYTHON_2.match(source):
            language = "python2"
        name = path.relative_to(self.folder) if path.is_relative_to(self.folder) else path
        return Program(name.as_posix(), language, source)

    def read_helper(self, key: str, program: ProgramSection) -> pb.Program:
        """Reads a checker or an interactor with its files. Raises InvalidArgumentError naming the key."""
        source = self.read_file(program.path, key)
        files = []
        for name in dict.fromkeys([*self.section.files, *program.files]):
            content = self.read_file(check_relative(f"{self.label}: files", name), "files")
            files.append(pb.File(path=PurePath(name).name if name in program.files else name, content=content))
        language = program.language or language_of(Path(program.path))
        unbuffered = _UNBUFFERED if program.unbuffered and language in _LINKED else ([], [])
        return pb.Program(
            language=language,
            source=source,
            files=[*files, *unbuffered[0]],
            limits=program.limits.to_proto() if program.limits.model_fields_set else None,
            compile_limits=program.compile_limits.to_proto() if program.compile_limits.model_fields_set else None,
            compile_args=[*program.compile_args, *unbuffered[1]],
            protocol=pb.CheckerProtocol.Value(f"CHECKER_PROTOCOL_{program.protocol.upper()}"),
            points_scale=pb.PointsScale.Value(f"POINTS_SCALE_{program.points_scale.upper()}"),
            args=program.args,
            replace_args=program.replace_args,
        )

    def request(self, solution: Program) -> pb.JudgeRequest:
        """Returns the request that judges a solution, without tests."""
        section = self.section
        request = pb.JudgeRequest(
            language=solution.language,
            source=solution.source,
            function_name=section.function,
            function_signature=section.signature,
            limits=section.limits.to_proto(),
            checker=self.checker(),
            groups=[group.to_proto() for group in section.groups],
            compile_args=section.compile_args,
            passes=section.passes,
        )
        for language, extra in section.extra_time.items():
            request.extra_time[language].CopyFrom(pb.ExtraTime(factor=extra.factor, added_ms=extra.added_ms))
        if section.interactor is not None:
            request.interactor.CopyFrom(self.read_helper("interactor", section.interactor))
        if section.unbuffered and request.language in _LINKED:
            request.files.extend(_UNBUFFERED[0])
            request.compile_args.extend(_UNBUFFERED[1])
        elif section.unbuffered:
            request.env["PYTHONUNBUFFERED"] = "1"
        if section.grader is not None:
            self._link(request, section.grader)
        return request

    def _link(self, request: pb.JudgeRequest, grader: GraderSection) -> None:
        """Makes the grader's program the one that is compiled, together with the solution."""
        if request.language not in _LINKED:
            raise InvalidArgumentError.for_field(
                f"{self.label}: grader", f"links {' and '.join(_LINKED)} alone, not {request.language}"
            )
        head = f'#include "{grader.header}"\n'
        if not grader.allow_main:
            head += "#define main main_of_the_solution\n"
        name = f"solution{_LINKED[request.language]}"
        request.files.add(path=grader.header, content=self.read_file(grader.header, "grader.header"))
        request.files.add(path=name, content=head.encode() + request.source)
        request.source = self.read_file(grader.entry, "grader.entry")
        request.compile_args.extend([name, "-DSIGNATURE_GRADER"])

    def checker(self) -> pb.Checker | None:
        """Returns the checker of a request; None when `problem.yaml` names none."""
        section = self.section.checker
        if "checker" not in self.section.model_fields_set:
            return None
        match section.kind:
            case "floats":
                tolerance = pb.FloatTolerance(absolute=section.floats.absolute, relative=section.floats.relative)
                return pb.Checker(floats=tolerance)
            case "program" if section.program is not None:
                return pb.Checker(program=self.read_helper("checker.program", section.program))
        return pb.Checker(comparison=pb.Comparison.Value(f"COMPARISON_{section.comparison.upper()}"))

    def read_tests(self) -> list[pb.TestCase]:
        """Reads the tests by group and name, 2 before 10; raises InvalidArgumentError naming what is missing."""
        if self.tests is not None:
            return list(self.tests)
        folder = self.folder / TESTS_FOLDER
        names = sorted((path.stem for path in folder.glob("*.in")), key=natural_order)
        if not names:
            raise InvalidArgumentError.for_field(str(folder), "holds no test; a test is NAME.in and NAME.out")
        if lonely := sorted({path.stem for path in folder.glob("*.out")} - set(names)):
            raise InvalidArgumentError.for_field(
                str(folder / f"{lonely[0]}.out"), f"there is no {lonely[0]}.in beside it"
            )
        for name in self.section.points:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise InvalidArgumentError.for_field(f"{self.label}: points.{name}", f"no such test{hint}")
        tests = [self._read_test(name) for name in names]
        order = {group.name: index for index, group in enumerate(self.section.groups)}
        return sorted(tests, key=lambda test: order.get(test.group, len(order)))

    def _group_of(self, name: str) -> str:
        """Returns the first group that names a test or has a pattern for it; empty where none does."""
        groups = (group.name for group in self.section.groups if any(fnmatchcase(name, each) for each in group.tests))
        return next(groups, "")

    def _read_test(self, name: str) -> pb.TestCase:
        folder = self.folder / TESTS_FOLDER
        content = read_bytes(folder / f"{name}.in")
        answer_path = folder / f"{name}.out"
        # a checker or an interactor may need no answer
        may_lack = self.section.interactor or self.section.checker.kind == "program"
        answer = b"" if may_lack and not answer_path.exists() else read_bytes(answer_path)
        if self.section.function:
            arguments, expected = _decode(folder / f"{name}.in", content), _decode(answer_path, answer)
            function = pb.FunctionTest(arguments_json=arguments, expected_json=expected)
            return pb.TestCase(
                name=name, points=self.section.points.get(name), group=self._group_of(name), function=function
            )
        return make_test(
            self.section.interactor is not None,
            name,
            content,
            answer,
            points=self.section.points.get(name),
            group=self._group_of(name),
        )


def make_test(
    is_dialogue: bool,
    name: str,
    content: bytes,
    answer: bytes,
    *,
    points: float | None = None,
    group: str = "",
    checker_args: Sequence[str] = (),
) -> pb.TestCase:
    """Returns a test of a program: a dialogue with an interactor, or input and output."""
    test = pb.TestCase(name=name, points=points, group=group, checker_args=checker_args)
    if is_dialogue:
        test.interactive.CopyFrom(pb.InteractiveTest(input=content, answer=answer))
    else:
        test.stdio.CopyFrom(pb.StdioTest(stdin=content, expected_stdout=answer))
    return test


def wall_of(cpu_ms: int | None) -> int | None:
    """Returns the wall-clock limit of a run in ms, where a package limits its CPU time alone."""
    return None if cpu_ms is None else 2 * cpu_ms + 1000


def load_problem(folder: Path) -> Problem:
    """Loads the problem of a folder; raises InvalidArgumentError naming the file and the key."""
    path = folder / PROBLEM_FILE
    if not path.is_file():
        hint = f"has no {PROBLEM_FILE}" if folder.is_dir() else "is no folder"
        raise InvalidArgumentError.for_field(str(folder), f"{hint}; name a problem's folder")
    values = {} if not read_bytes(path).strip() else read_yaml(path)
    section = validate(ProblemSection, values, str(path), "")
    check_together(section, str(path))
    return Problem(folder, section)


def check_together(section: ProblemSection, path: str) -> None:
    """Raises InvalidArgumentError where keys exclude each other."""
    if len(section.checker.model_fields_set) > 1:
        raise InvalidArgumentError.for_field(
            f"{path}: checker", f"must be one of {', '.join(sorted(section.checker.model_fields_set))}"
        )
    if section.interactor and (section.function or "checker" in section.model_fields_set):
        raise InvalidArgumentError.for_field(f"{path}: interactor", "decides by itself; leave out checker and function")


def list_programs(folder: Path, what: str) -> Sequence[Path]:
    """Lists the programs of a folder by name, without hidden files and folders.

    Raises InvalidArgumentError when there is none.
    """
    found = [path for path in sorted(folder.glob("*")) if path.is_file() and not path.name.startswith(".")]
    if not found:
        raise InvalidArgumentError.for_field(str(folder), f"holds no {what}")
    return found


def natural_order(name: str) -> tuple[list[tuple[int, str]], str]:
    """Returns a key that sorts 2 before 10."""
    parts = re.split(r"([0-9]+)", name)  # numbers are at the odd indices
    return [(int(part), "") if index % 2 else (-1, part) for index, part in enumerate(parts)], name


def _decode(path: Path, content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise InvalidArgumentError.for_field(str(path), "is not UTF-8, which JSON must be") from error
