"""What the sandbox is asked to run and what it says of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from perigee.sandbox.compare import Comparison, Tolerance
from services.sandbox.agent.protocol import BoxLimits
from services.sandbox.languages.catalog import Runtime

How = Comparison | Tolerance


class Verdict(Enum):
    """How a run or a test ended; the names are those of the protocol."""

    ACCEPTED = "ACCEPTED"
    WRONG_ANSWER = "WRONG_ANSWER"
    TIME_LIMIT = "TIME_LIMIT"
    MEMORY_LIMIT = "MEMORY_LIMIT"
    OUTPUT_LIMIT = "OUTPUT_LIMIT"
    RUNTIME_ERROR = "RUNTIME_ERROR"
    COMPILE_ERROR = "COMPILE_ERROR"
    INFRA_ERROR = "INFRA_ERROR"
    SKIPPED = "SKIPPED"


@dataclass(frozen=True)
class InputFile:
    """A file of the working folder, by a path that stays in it."""

    path: str
    content: bytes
    executable: bool = False


@dataclass(frozen=True)
class Program:
    """A source with all that it needs to be compiled and run."""

    runtime: Runtime
    source: bytes
    limits: BoxLimits
    compile_limits: BoxLimits
    files: Sequence[InputFile] = ()
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """A program to run once."""

    program: Program
    stdin: bytes = b""
    arguments: Sequence[str] = ()
    output_files: Sequence[str] = ()
    most_output_file_bytes: int = 0


@dataclass(frozen=True)
class OutputFile:
    """A file that a program left; `error` says why there is no content."""

    path: str
    content: bytes
    truncated: bool
    error: str


@dataclass(frozen=True)
class CompileReport:
    """What a compiler said."""

    ok: bool
    exit_code: int
    stdout: bytes
    stderr: bytes
    wall_ms: int
    reason: str = ""


@dataclass(frozen=True)
class Execution:
    """How a program's run ended; ACCEPTED stands for an exit code of 0."""

    verdict: Verdict
    exit_code: int = 0
    signal: int = 0
    stdout: bytes = b""
    stderr: bytes = b""
    stdout_truncated: bool = False
    stderr_truncated: bool = False
    wall_ms: int = 0
    cpu_ms: int = 0
    peak_bytes: int = 0
    reason: str = ""
    compile: CompileReport | None = None
    files: Sequence[OutputFile] = ()


@dataclass(frozen=True)
class StdioTest:
    """Input and the output that is expected for it."""

    stdin: bytes
    expected: bytes
    arguments: Sequence[str] = ()


@dataclass(frozen=True)
class FunctionTest:
    """Arguments as JSON, and the value that is expected for them."""

    arguments_json: bytes
    expected: Any
    expected_json: bytes = b""


@dataclass(frozen=True)
class CodeTest:
    """Python that calls the submission's function and asserts."""

    code: bytes


@dataclass(frozen=True)
class InteractiveTest:
    """What the interactor is given."""

    input: bytes
    answer: bytes


Test = StdioTest | FunctionTest | CodeTest | InteractiveTest


@dataclass(frozen=True)
class Worth:
    """A test's name and points."""

    name: str = ""
    points: float = 1.0


@dataclass(frozen=True)
class Submission:
    """A program or a function with its tests, all of one kind."""

    program: Program
    tests: Sequence[Test]
    worths: Sequence[Worth]
    how: How
    function_name: str = ""
    checker: Program | None = None
    interactor: Program | None = None
    setup_code: bytes = b""
    stop_at_first_failure: bool = False


@dataclass(frozen=True)
class TestOutcome:
    """The verdict of one test; `share` of its points is earned."""

    verdict: Verdict
    wall_ms: int = 0
    output: bytes = b""
    reason: str = ""
    share: float = 0.0
    cpu_ms: int = 0
    peak_bytes: int = 0
    exit_code: int = 0
    signal: int = 0
    stderr: bytes = b""
    output_truncated: bool = False


@dataclass(frozen=True)
class Judgement:
    """The verdicts of all tests."""

    verdict: Verdict
    results: Sequence[TestOutcome]
    worths: Sequence[Worth]
    wall_ms: int = 0
    peak_bytes: int = 0
    compile: CompileReport | None = None

    @property
    def points(self) -> float:
        """Points earned."""
        return sum(result.share * worth.points for result, worth in zip(self.results, self.worths, strict=True))

    @property
    def most_points(self) -> float:
        """Points that could be earned."""
        return sum(worth.points for worth in self.worths)
