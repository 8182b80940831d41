"""Jobs of the sandbox and their results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from perigee.sandbox.compare import Comparison, Tolerance
from perigee.sandbox.v1 import sandbox_pb2 as pb
from services.sandbox.agent.protocol import Limits
from services.sandbox.languages.catalog import Runtime

Comparator = Comparison | Tolerance


class Status(Enum):
    """Status of a run or a test; the names are those of the protocol."""

    ACCEPTED = "ACCEPTED"
    WRONG_ANSWER = "WRONG_ANSWER"
    TIME_LIMIT = "TIME_LIMIT"
    MEMORY_LIMIT = "MEMORY_LIMIT"
    OUTPUT_LIMIT = "OUTPUT_LIMIT"
    RUNTIME_ERROR = "RUNTIME_ERROR"
    COMPILE_ERROR = "COMPILE_ERROR"
    INFRA_ERROR = "INFRA_ERROR"
    SKIPPED = "SKIPPED"

    @property
    def of_run(self) -> pb.Status.ValueType:
        """Status of a run in the protocol."""
        return pb.STATUS_OK if self is Status.ACCEPTED else pb.Status.Value(f"STATUS_{self.name}")


@dataclass(frozen=True)
class Program:
    """Source with all that it needs to be compiled and run."""

    runtime: Runtime
    source: bytes
    limits: Limits
    compile_limits: Limits
    files: Sequence[pb.File] = ()
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """Program to run once."""

    program: Program
    stdin: bytes = b""
    arguments: Sequence[str] = ()
    output_files: Sequence[str] = ()
    most_output_file_bytes: int = 0


@dataclass(frozen=True)
class CompileReport:
    """Result of a compilation."""

    ok: bool
    exit_code: int
    stdout: bytes
    stderr: bytes
    wall_ms: int
    reason: str = ""


@dataclass(frozen=True)
class Execution:
    """Result of a run; ACCEPTED stands for an exit code of 0."""

    status: Status
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
    files: Sequence[pb.OutputFile] = ()


@dataclass(frozen=True)
class StdioTest:
    """Input and its expected output."""

    stdin: bytes
    expected: bytes
    arguments: Sequence[str] = ()


@dataclass(frozen=True)
class FunctionTest:
    """Arguments as JSON and the expected result."""

    arguments_json: bytes
    expected: Any
    expected_json: bytes = b""


@dataclass(frozen=True)
class CodeTest:
    """Python that calls the submission's function and asserts."""

    code: bytes


@dataclass(frozen=True)
class InteractiveTest:
    """Input and answer that the interactor gets."""

    input: bytes
    answer: bytes


Test = StdioTest | FunctionTest | CodeTest | InteractiveTest


@dataclass(frozen=True)
class TestWeight:
    """Name and points of a test."""

    name: str = ""
    points: float = 1.0


@dataclass(frozen=True)
class Submission:
    """Program or function with its tests, all of one kind."""

    program: Program
    tests: Sequence[Test]
    weights: Sequence[TestWeight]
    comparator: Comparator
    function_name: str = ""
    checker: Program | None = None
    interactor: Program | None = None
    setup_code: bytes = b""
    stop_at_first_failure: bool = False


@dataclass(frozen=True)
class TestResult:
    """Result of one test, which earns a `fraction` of its points."""

    status: Status
    wall_ms: int = 0
    output: bytes = b""
    reason: str = ""
    fraction: float = 0.0
    cpu_ms: int = 0
    peak_bytes: int = 0
    exit_code: int = 0
    signal: int = 0
    stderr: bytes = b""
    output_truncated: bool = False


@dataclass(frozen=True)
class JudgeResult:
    """Results of all tests."""

    status: Status
    results: Sequence[TestResult]
    weights: Sequence[TestWeight]
    wall_ms: int = 0
    peak_bytes: int = 0
    compile: CompileReport | None = None

    @property
    def points(self) -> float:
        """Points earned."""
        return sum(result.fraction * weight.points for result, weight in zip(self.results, self.weights, strict=True))

    @property
    def most_points(self) -> float:
        """Points that could be earned."""
        return sum(weight.points for weight in self.weights)
