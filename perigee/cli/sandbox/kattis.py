"""Kattis problem packages (https://icpc.io/problem-package-format, legacy and 2023-07): `problem.yaml`,
`data/sample` and `data/secret` with groups, `output_validators/`, `input_validators/`, `submissions/`.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from perigee.cli.sandbox.connection import LANGUAGES, read_bytes
from perigee.cli.sandbox.problem import (
    CRASHES,
    CheckerSection,
    Expected,
    GroupSection,
    LimitsSection,
    Problem,
    ProblemSection,
    ProgramSection,
    make_test,
    natural_order,
    text_checker,
    wall_of,
)
from perigee.config import read_yaml
from perigee.errors import InvalidArgumentError
from perigee.sandbox.v1 import sandbox_pb2 as pb

DATA, SECRET, SAMPLE = "data", "secret", "sample"
_GROUP_FILES = ("testdata.yaml", "test_group.yaml")
_VALIDATOR_FOLDERS = ("output_validators", "output_validator")
_DEFAULT_PASSES = 2
_EXPECTED: dict[str, Expected] = {
    "accepted": (pb.TEST_VERDICT_ACCEPTED,),
    "slow_accepted": (pb.TEST_VERDICT_ACCEPTED, pb.TEST_VERDICT_TIME_LIMIT),
    "wrong_answer": (pb.TEST_VERDICT_WRONG_ANSWER,),
    "partially_accepted": (pb.TEST_VERDICT_WRONG_ANSWER,),
    "time_limit_exceeded": (pb.TEST_VERDICT_TIME_LIMIT,),
    "run_time_error": CRASHES,
    "brute_force": (pb.TEST_VERDICT_TIME_LIMIT, *CRASHES),
    "rejected": (pb.TEST_VERDICT_WRONG_ANSWER, pb.TEST_VERDICT_TIME_LIMIT, *CRASHES),
}


def is_kattis(folder: Path) -> bool:
    """Returns whether a folder is a package."""
    return (folder / "problem.yaml").is_file() and (folder / DATA / SECRET).is_dir()


def load_kattis(folder: Path) -> Problem:
    """Loads a package; raises InvalidArgumentError naming the file and what is wrong."""
    values = read_yaml(folder / "problem.yaml")
    kinds = _kinds(values)
    flags = shlex.split(str(values.get("validator_flags") or ""))
    own = next((folder / name for name in _VALIDATOR_FOLDERS if (folder / name).is_dir()), None)
    limits = values.get("limits") or {}
    has_own = own is not None and "default" not in kinds
    judging = _validator(folder, own, flags, limits, "scoring" in kinds) if own is not None and has_own else None
    interactive = "interactive" in kinds
    if judging is None and (lacking := kinds & {"interactive", "custom"}):
        raise InvalidArgumentError.for_field(
            str(folder / "problem.yaml"), f"is {lacking.pop()}, and has no program in output_validators/"
        )
    if "submit-answer" in kinds:
        raise InvalidArgumentError.for_field(
            f"{folder / 'problem.yaml'}: type", "is submit-answer, which is not read: its submissions are no programs"
        )
    custom = judging is not None and judging.points_scale == "points"
    reader = _Reader(folder / DATA, "scoring" in kinds, interactive, custom, "score" in kinds)
    tests = list(reader.read())
    section = ProblemSection(
        title=_title(values),
        limits=_limits(folder, limits),
        interactor=judging if interactive else None,
        passes=int(limits.get("validation_passes", _DEFAULT_PASSES)) if "multi-pass" in kinds else None,
        validators=[ProgramSection(**_program(folder, path)) for path in _programs(folder / "input_validators")],
        groups=reader.groups,
        **({} if interactive else {"checker": CheckerSection(program=judging or text_checker("kattis", *flags))}),
    )
    return Problem(folder, section, tests=tests, solutions=dict(_solutions(folder)))


def _kinds(values: dict[str, Any]) -> set[str]:
    """Returns what kind of problem it is, in the words of either version of the format."""
    named = values.get("type") or []
    kinds = set(named.split() if isinstance(named, str) else named)
    kinds |= set(str(values.get("validation") or "").split())
    return kinds | {"scoring"} if "score" in kinds else kinds


def _title(values: dict[str, Any]) -> str:
    name = values.get("name") or ""
    return str(next(iter(name.values()), "")) if isinstance(name, dict) else str(name)


def _limits(folder: Path, limits: dict[str, Any]) -> LimitsSection:
    seconds = limits.get("time_limit")
    if seconds is None and (folder / ".timelimit").is_file():
        seconds = read_bytes(folder / ".timelimit").decode()
    cpu_ms = None if seconds is None else round(float(seconds) * 1000)
    memory, output = limits.get("memory"), limits.get("output")
    return LimitsSection(cpu_ms=cpu_ms, wall_ms=wall_of(cpu_ms), memory_mb=memory, output_mb=output)


def _programs(folder: Path) -> list[Path]:
    """Lists the programs of a folder: files and folders; what is in no known language is left out."""
    entries = sorted(folder.glob("*")) if folder.is_dir() else []
    return [path for path in entries if (path.is_dir() and _sources(path)) or path.suffix in LANGUAGES]


def _sources(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if path.suffix in LANGUAGES]


def _program(folder: Path, path: Path) -> dict[str, Any]:
    """Returns the description of a file's program, or of a folder's, whose first source is compiled with the others."""
    if path.is_file():
        return {"path": path.relative_to(folder).as_posix(), "protocol": "kattis"}
    sources = _sources(path)
    main = next((source for source in sources if source.stem == "main"), sources[0])
    others = [each for each in sorted(path.iterdir()) if each.is_file() and each != main]
    linked = [source.name for source in sources if source != main and source.suffix in (".c", ".cc", ".cpp", ".cxx")]
    return {
        "path": main.relative_to(folder).as_posix(),
        "files": [each.relative_to(folder).as_posix() for each in others],
        "compile_args": linked,
        "protocol": "kattis",
    }


def _validator(folder: Path, own: Path, flags: list[str], limits: dict[str, Any], is_scoring: bool) -> ProgramSection:
    found = _programs(own)
    whole = [own] if _sources(own) and own.name == "output_validator" else found
    if len(whole) != 1:
        raise InvalidArgumentError.for_field(str(own), f"must hold one program, got {len(whole)}")
    seconds = limits.get("validation_time")
    time_ms = None if seconds is None else round(float(seconds) * 1000)
    return ProgramSection(
        **_program(folder, whole[0]),
        args=flags,
        points_scale="points" if is_scoring else "unspecified",
        limits=LimitsSection(wall_ms=time_ms, cpu_ms=time_ms, memory_mb=limits.get("validation_memory")),
    )


def _solutions(folder: Path) -> Iterator[tuple[str, Expected]]:
    for kind in sorted((folder / "submissions").glob("*")):
        for path in sorted(kind.glob("*")):
            if kind.name in _EXPECTED and not path.name.startswith("."):
                yield path.relative_to(folder).as_posix(), _EXPECTED[kind.name]


@dataclass
class _Settings:
    """Settings of a group, which those inside it have, too, unless they say otherwise."""

    stops: bool = True
    accept_score: float = 1.0
    minimum: bool = False
    flags: tuple[str, ...] = ()
    most: float | None = None


class _Reader:
    """Reads the tests of a package, and the groups that a scoring problem makes of them."""

    def __init__(
        self, data: Path, is_scoring: bool, is_interactive: bool, has_scores: bool, needs_scores: bool
    ) -> None:
        self._data = data
        self._is_scoring = is_scoring
        self._is_interactive = is_interactive
        self._has_scores = has_scores
        self._needs_scores = needs_scores
        self.groups: list[GroupSection] = []

    def read(self) -> Iterator[pb.TestCase]:
        """Yields all tests, the samples first."""
        top = self._settings(self._data, _Settings())
        ignores_sample = "ignore_sample" in self._grader_flags(self._data) or not self._is_scoring
        folders = [self._data / name for name in (SAMPLE, SECRET) if (self._data / name).is_dir()]
        for folder, needs in self._in_turn(folders, top, []):
            yield from self._read_folder(folder, top, folder.name == SECRET or not ignores_sample, needs)

    def _in_turn(self, folders: list[Path], outer: _Settings, needs: list[str]) -> Iterator[tuple[Path, list[str]]]:
        """Yields folders and the groups that each needs: where a rejection breaks, those of the folders before it."""
        first = len(self.groups)
        for folder in folders:
            yield folder, [*needs, *(group.name for group in self.groups[first:] if outer.stops and group.points)]

    def _read_folder(self, folder: Path, outer: _Settings, earns: bool, needs: list[str]) -> Iterator[pb.TestCase]:
        settings = self._settings(folder, outer)
        name = folder.relative_to(self._data).as_posix()
        inputs = sorted(folder.glob("*.in"), key=lambda path: natural_order(path.stem))
        if inputs and self._is_scoring:
            self.groups.append(self._group(name, settings, len(inputs), earns, needs))
        for path in inputs:
            answer = path.with_suffix(".ans")
            yield make_test(
                self._is_interactive,
                f"{name}/{path.stem}",
                read_bytes(path),
                read_bytes(answer) if answer.is_file() else b"",
                points=self._points(settings, earns),
                group=name if self._is_scoring else "",
                checker_args=settings.flags,
            )
        folders = sorted(
            (path for path in folder.iterdir() if path.is_dir()), key=lambda path: natural_order(path.name)
        )
        if self._is_scoring and folders and settings.minimum:
            raise self._refuse(folder, "takes the minimum of groups, which is not read: that of tests alone is")
        for inner, needed in self._in_turn(folders, settings, needs):
            yield from self._read_folder(inner, settings, earns, needed)

    def _points(self, settings: _Settings, earns: bool) -> float | None:
        if not self._is_scoring:
            return None
        if not earns:
            return 0.0
        return settings.most if self._has_scores and settings.most is not None else settings.accept_score

    def _group(self, name: str, settings: _Settings, count: int, earns: bool, needs: list[str]) -> GroupSection:
        points = self._points(settings, earns) or 0.0
        whole = points if settings.minimum else points * count
        if not self._needs_scores and settings.most:  # tests that are accepted make the range together
            whole = min(whole, settings.most)
        policy = "minimum" if settings.minimum else "sum"
        return GroupSection(name=name, needs=needs, policy=policy, points=whole, stop_at_first_failure=settings.stops)

    def _settings(self, folder: Path, outer: _Settings) -> _Settings:
        values = self._values(folder)
        flags = self._grader_flags(folder)
        settings = replace(outer, most=outer.most if self._needs_scores else None)
        if unread := {"max", "avg"}.intersection(flags):
            raise self._refuse(folder, f"has the grader flag {unread.pop()}, which is not read: min and sum are")
        if values.get("grading") == "custom":
            raise self._refuse(folder, "has a grader of its own, which is not read")
        if "on_reject" in values:
            settings.stops = values["on_reject"] == "break"
        if "accept_score" in values:
            settings.accept_score = float(values["accept_score"])
        if "min" in flags or values.get("score_aggregation") in ("min", "pass-fail"):
            settings.minimum = True
        elif "sum" in flags or values.get("score_aggregation") == "sum":
            settings.minimum = False
        for key in ("output_validator_flags", "output_validator_args"):
            if key in values:
                given = values[key]
                settings.flags = tuple(map(str, given)) if isinstance(given, list) else tuple(shlex.split(str(given)))
        if "range" in values:
            most = float(str(values["range"]).split()[1])
            settings.most = most if math.isfinite(most) else None
        return settings

    def _values(self, folder: Path) -> dict[str, Any]:
        found = (folder / name for name in _GROUP_FILES if (folder / name).is_file())
        path = next(found, None)
        values = {} if path is None or not read_bytes(path).strip() else read_yaml(path)
        grading = values.get("grading")
        return {**values, **grading} if isinstance(grading, dict) else values

    def _refuse(self, folder: Path, description: str) -> InvalidArgumentError:
        return InvalidArgumentError.for_field(str(folder), description)

    def _grader_flags(self, folder: Path) -> list[str]:
        return str(self._values(folder).get("grader_flags") or "").split()
