"""What the sandbox is asked to run and what it says of it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from services.sandbox.box.limits import BoxLimits


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
class Program:
    """A program to run once."""

    source: bytes
    stdin: bytes
    arguments: list[str]
    limits: BoxLimits


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


@dataclass(frozen=True)
class StdioTest:
    """Input and the output that is expected for it."""

    stdin: bytes
    expected: bytes


@dataclass(frozen=True)
class FunctionTest:
    """Arguments as JSON, and the value that is expected for them."""

    arguments_json: bytes
    expected: Any


@dataclass(frozen=True)
class Submission:
    """A program or a function with its tests, all of one kind."""

    source: bytes
    function_name: str
    tests: list[StdioTest] | list[FunctionTest]
    limits: BoxLimits
    stop_at_first_failure: bool


@dataclass(frozen=True)
class TestOutcome:
    """The verdict of one test."""

    verdict: Verdict
    wall_ms: int = 0
    output: bytes = b""
    reason: str = ""


@dataclass(frozen=True)
class Judgement:
    """The verdicts of all tests."""

    verdict: Verdict
    results: list[TestOutcome]
    wall_ms: int = 0
    peak_bytes: int = 0
