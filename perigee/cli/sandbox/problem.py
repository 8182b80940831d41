"""Problem folders: `problem.yaml`, `tests/NAME.in` with `NAME.out`, and the programs beside them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from perigee.cli.sandbox.connection import MIB, language_of, read_bytes, read_input_file
from perigee.config import Model, read_yaml, validate
from perigee.errors import InvalidArgumentError
from perigee.sandbox.v1 import sandbox_pb2 as pb
from perigee.testgen.plan import Program

PROBLEM_FILE = "problem.yaml"
TESTS_FOLDER = "tests"


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


class CheckerSection(Model):
    """Comparator of outputs: one of the three."""

    comparison: Literal["exact", "tokens", "lines", "unordered_lines", "unordered_tokens"] = "tokens"
    """`checker: lines` is short for this."""
    floats: FloatsSection = FloatsSection()
    """By tokens, with a tolerance."""
    program: str = ""
    """Program beside problem.yaml: called as `checker input.txt output.txt answer.txt`, exit codes as testlib's."""

    @property
    def kind(self) -> str:
        """Returns which of the three it is."""
        return next(iter(self.model_fields_set), "comparison")


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
    interactor: str = ""
    """Program beside problem.yaml that talks with the solution."""
    function: str = ""
    """Function that tests call; NAME.in is then a JSON list of arguments, NAME.out the result as JSON."""
    files: list[str] = []
    """Files placed beside checker and interactor, testlib.h for one."""
    points: dict[str, float] = {}
    """Points of a test by its name, 1 unless set. Names such as 001 need quotes in YAML."""

    @field_validator("checker", mode="before")
    @classmethod
    def _read_short_form(cls, value: Any) -> Any:
        return {"comparison": value} if isinstance(value, str) else value

    @field_validator("points", mode="before")
    @classmethod
    def _read_names(cls, value: Any) -> Any:
        return {str(name): points for name, points in value.items()} if isinstance(value, dict) else value


@dataclass(frozen=True)
class Problem:
    """Folder of a problem and its validated `problem.yaml`."""

    folder: Path
    section: ProblemSection

    def read_program(self, path: Path) -> Program:
        """Reads a solution, named by its path below the folder if it is there."""
        language = self.section.language or language_of(path)
        name = path.relative_to(self.folder) if path.is_relative_to(self.folder) else path
        return Program(name.as_posix(), language, read_bytes(path))

    def read_helper(self, key: str, name: str) -> pb.Program:
        """Reads a checker or an interactor with its files. Raises InvalidArgumentError naming the key."""
        path = self.folder / name
        if not path.is_file():
            raise InvalidArgumentError.for_field(
                f"{self.folder / PROBLEM_FILE}: {key}", f"{name} is no file of this folder"
            )
        files = [
            read_input_file(f"{self.folder / PROBLEM_FILE}: files", file, self.folder) for file in self.section.files
        ]
        return pb.Program(language=language_of(path), source=read_bytes(path), files=files)

    def checker(self) -> pb.Checker | None:
        """Returns the checker of a request; None when `problem.yaml` names none."""
        section = self.section.checker
        if "checker" not in self.section.model_fields_set:
            return None
        match section.kind:
            case "floats":
                tolerance = pb.FloatTolerance(absolute=section.floats.absolute, relative=section.floats.relative)
                return pb.Checker(floats=tolerance)
            case "program":
                return pb.Checker(program=self.read_helper("checker.program", section.program))
        return pb.Checker(comparison=pb.Comparison.Value(f"COMPARISON_{section.comparison.upper()}"))

    def read_tests(self) -> list[pb.TestCase]:
        """Reads the tests by name, 2 before 10; raises InvalidArgumentError naming what is missing."""
        folder = self.folder / TESTS_FOLDER
        names = sorted((path.stem for path in folder.glob("*.in")), key=_natural)
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
                raise InvalidArgumentError.for_field(
                    f"{self.folder / PROBLEM_FILE}: points.{name}", f"no such test{hint}"
                )
        return [self._read_test(name) for name in names]

    def _read_test(self, name: str) -> pb.TestCase:
        folder = self.folder / TESTS_FOLDER
        content = read_bytes(folder / f"{name}.in")
        answer_path = folder / f"{name}.out"
        # a checker or an interactor may need no answer
        may_lack = self.section.interactor or self.section.checker.kind == "program"
        answer = b"" if may_lack and not answer_path.exists() else read_bytes(answer_path)
        test = pb.TestCase(name=name, points=self.section.points.get(name))
        if self.section.interactor:
            test.interactive.CopyFrom(pb.InteractiveTest(input=content, answer=answer))
        elif self.section.function:
            arguments, expected = _decode(folder / f"{name}.in", content), _decode(answer_path, answer)
            test.function.CopyFrom(pb.FunctionTest(arguments_json=arguments, expected_json=expected))
        else:
            test.stdio.CopyFrom(pb.StdioTest(stdin=content, expected_stdout=answer))
        return test


def load_problem(folder: Path) -> Problem:
    """Loads the problem of a folder; raises InvalidArgumentError naming the file and the key."""
    path = folder / PROBLEM_FILE
    if not path.is_file():
        hint = f"has no {PROBLEM_FILE}" if folder.is_dir() else "is no folder"
        raise InvalidArgumentError.for_field(str(folder), f"{hint}; name a problem's folder")
    values = {} if not read_bytes(path).strip() else read_yaml(path)
    section = validate(ProblemSection, values, str(path), "")
    _check_together(section, str(path))
    return Problem(folder, section)


def _check_together(section: ProblemSection, path: str) -> None:
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


def _natural(name: str) -> tuple[list[tuple[int, str]], str]:
    parts = re.split(r"([0-9]+)", name)  # numbers are at the odd indices
    return [(int(part), "") if index % 2 else (-1, part) for index, part in enumerate(parts)], name


def _decode(path: Path, content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise InvalidArgumentError.for_field(str(path), "is not UTF-8, which JSON must be") from error
