"""Polygon problem packages (https://polygon.codeforces.com): `problem.xml` with tests, groups, checker, interactor,
validators and solutions.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from perigee.cli.sandbox.connection import MIB, read_bytes
from perigee.cli.sandbox.problem import (
    CRASHES,
    CheckerSection,
    Expected,
    Generation,
    GroupSection,
    LimitsSection,
    Problem,
    ProblemSection,
    ProgramSection,
    make_test,
    wall_of,
)
from perigee.errors import InvalidArgumentError
from perigee.sandbox.v1 import sandbox_pb2 as pb

PROBLEM_XML = "problem.xml"
_LANGUAGES = {"c": "c", "cpp": "cpp", "python": "python", "java": "java", "java8": "java", "go": "go", "rust": "rust"}
_EXPECTED: dict[str, Expected] = {
    "main": (pb.TEST_VERDICT_ACCEPTED,),
    "accepted": (pb.TEST_VERDICT_ACCEPTED,),
    "wrong-answer": (pb.TEST_VERDICT_WRONG_ANSWER,),
    "presentation-error": (pb.TEST_VERDICT_WRONG_ANSWER,),
    "time-limit-exceeded": (pb.TEST_VERDICT_TIME_LIMIT,),
    "time-limit-exceeded-or-accepted": (pb.TEST_VERDICT_TIME_LIMIT, pb.TEST_VERDICT_ACCEPTED),
    "time-limit-exceeded-or-memory-limit-exceeded": (pb.TEST_VERDICT_TIME_LIMIT, pb.TEST_VERDICT_MEMORY_LIMIT),
    "memory-limit-exceeded": (pb.TEST_VERDICT_MEMORY_LIMIT,),
    "runtime-error": (pb.TEST_VERDICT_RUNTIME_ERROR,),
    "failed": (pb.TEST_VERDICT_RUNTIME_ERROR,),
    "rejected": (pb.TEST_VERDICT_WRONG_ANSWER, pb.TEST_VERDICT_TIME_LIMIT, *CRASHES),
}
Element = ElementTree.Element


def is_polygon(folder: Path) -> bool:
    """Returns whether a folder is a package."""
    return (folder / PROBLEM_XML).is_file()


def load_polygon(folder: Path) -> Problem:
    """Loads a package; raises InvalidArgumentError naming the file and what is wrong."""
    path = folder / PROBLEM_XML
    try:
        root = ElementTree.fromstring(read_bytes(path))
    except ElementTree.ParseError as error:
        raise InvalidArgumentError.for_field(str(path), f"is not XML: {error}") from error
    judging, testset = root.find("judging"), root.find("judging/testset")
    if judging is None or testset is None:
        raise InvalidArgumentError.for_field(str(path), "has no judging/testset")
    if judging.get("input-file") or judging.get("output-file"):
        raise InvalidArgumentError.for_field(
            f"{path}: judging", "names files; standard input and output alone are read"
        )
    interactor = root.find("assets/interactor/source")
    resources = [each.get("path", "") for each in root.findall("files/resources/file")]
    helpers = [name for name in resources if name.endswith(".h")]
    checker = root.find("assets/checker/source")
    checking = {} if checker is None else {"checker": CheckerSection(program=_program(checker, helpers))}
    section = ProblemSection(
        title=next((name.get("value", "") for name in root.findall("names/name")), ""),
        limits=_limits(testset),
        groups=_in_order(list(_groups(testset))),
        interactor=None if interactor is None else _program(interactor, helpers),
        validators=[_program(source, helpers) for source in root.findall("assets/validators/validator/source")],
        **checking,
    )
    solutions = {
        source.get("path", ""): _EXPECTED[solution.get("tag", "")]
        for solution in root.findall("assets/solutions/solution")
        if (source := solution.find("source")) is not None and solution.get("tag") in _EXPECTED
    }
    main = root.find("assets/solutions/solution[@tag='main']/source")
    generators = {Path(source.get("path", "")).stem: source for source in root.findall("files/executables/*/source")}
    tests, generated = _tests(folder, testset, section, generators, helpers)
    return Problem(
        folder,
        section,
        PROBLEM_XML,
        tests=tests,
        generated=generated,
        solutions=solutions,
        main_solution=None if main is None else folder / main.get("path", ""),
    )


def _limits(testset: Element) -> LimitsSection:
    time_ms, memory_bytes = testset.findtext("time-limit"), testset.findtext("memory-limit")
    cpu_ms = None if time_ms is None else int(time_ms)
    return LimitsSection(
        cpu_ms=cpu_ms,
        wall_ms=wall_of(cpu_ms),
        memory_mb=None if memory_bytes is None else max(1, int(memory_bytes) // MIB),
    )


def _program(source: Element, helpers: list[str]) -> ProgramSection:
    kind = source.get("type", "").split(".")[0]
    return ProgramSection(path=source.get("path", ""), language=_LANGUAGES.get(kind, ""), files=helpers)


def _groups(testset: Element) -> Iterator[GroupSection]:
    for group in testset.findall("groups/group"):
        points = group.get("points")
        yield GroupSection(
            name=group.get("name", ""),
            needs=[each.get("group", "") for each in group.findall("dependencies/dependency")],
            policy="sum" if group.get("points-policy") == "each-test" else "all",
            points=None if points is None else float(points),
        )


def _in_order(groups: list[GroupSection]) -> list[GroupSection]:
    """Returns the groups, each after those that it needs; ones that need each other are left as they are."""
    ordered: list[GroupSection] = []
    while len(ordered) < len(groups):
        known = {group.name for group in ordered}
        left = [group for group in groups if group.name not in known]
        ordered.append(next((group for group in left if known.issuperset(group.needs)), left[0]))
    return ordered


def _tests(
    folder: Path, testset: Element, section: ProblemSection, generators: dict[str, Element], helpers: list[str]
) -> tuple[list[pb.TestCase], dict[str, Generation]]:
    """Returns the tests, and how those are made whose input is no file of the package."""
    label = f"{folder / PROBLEM_XML}: judging"
    pattern, answers = testset.findtext("input-path-pattern"), testset.findtext("answer-path-pattern")
    if pattern is None or answers is None:
        raise InvalidArgumentError.for_field(label, "must name input-path-pattern and answer-path-pattern")
    groups = {group.name: index for index, group in enumerate(section.groups)}
    tests, generated = [], {}
    for index, test in enumerate(testset.findall("tests/test"), start=1):
        path, answer, name = folder / (pattern % index), folder / (answers % index), str(index)
        if not path.is_file():
            command = shlex.split(test.get("cmd", ""))
            if not command or command[0] not in generators:
                raise InvalidArgumentError.for_field(str(path), "is not there, and no generator makes it")
            generated[name] = Generation(_program(generators[command[0]], helpers), tuple(command[1:]))
        points = test.get("points")
        tests.append(
            make_test(
                section.interactor is not None,
                name,
                read_bytes(path) if path.is_file() else b"",
                read_bytes(answer) if answer.is_file() else b"",
                # a problem without points is judged by its verdict; one with them has none for the other tests
                points=float(points) if points else 0.0 if any(t.get("points") for t in testset.iter("test")) else None,
                group=test.get("group", "") if test.get("group") in groups else "",
            )
        )
    return sorted(tests, key=lambda test: groups.get(test.group, -1)), generated
