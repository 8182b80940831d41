"""Runs interactive graders and checkers that were written in Python for DMOJ's judge, as programs of the sandbox: it
stands in for those modules of the judge that they import. The standard library alone.

    dmoj_graders.py INPUT OUTPUT ANSWER grader|checker MODULE OPTIONS

Exits with 7 and the fraction of the points that was given. A grader that handles the submission's process itself cannot
be run so.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import types
from pathlib import Path
from typing import Any

MOST_DIGITS = 100


class InternalError(Exception):
    """Failure of a grader."""


class WrongAnswer(Exception):
    """What the submission wrote is wrong."""


class CheckerResult:
    """Decision of a checker."""

    def __init__(self, passed: bool, points: float, feedback: str | None = None, extended_feedback: str | None = None):
        self.passed = passed
        self.points = points
        self.feedback = feedback
        self.extended_feedback = extended_feedback


class Result:
    """Result of the submission's process, which is judged only when it ended well."""

    max_memory = 0
    execution_time = 0.0
    AC, WA, RTE, TLE, MLE, IR, SC, OLE, IE = 0, 1, 2, 4, 8, 16, 32, 64, 1 << 30

    def __init__(self, output: bytes) -> None:
        self.result_flag = self.AC
        self.proc_output = output


class Case:
    """Test; its points are 1, so that points are fractions."""

    points = 1.0
    position = 0
    batch = 0

    def __init__(self, content: bytes, answer: bytes) -> None:
        self._content = content
        self._answer = answer

    def input_data(self) -> bytes:
        """Returns the input."""
        return self._content

    def output_data(self) -> bytes:
        """Returns the answer."""
        return self._answer


class Interactor:
    """The submission's end of a dialogue, as graders see it."""

    def __init__(self) -> None:
        self._words: bytes | None = None

    def read(self) -> bytes:
        """Reads all that the submission has yet to say."""
        return sys.stdin.buffer.read()

    def readln(self, strip_newline: bool = True) -> bytes:
        """Reads a line."""
        line = sys.stdin.buffer.readline()
        if not line:
            raise WrongAnswer("expected a line, got the end of the output")
        return line.rstrip() if strip_newline else line

    def readtoken(self, delim: bytes | None = None) -> bytes:
        """Reads the next word of a line."""
        if not self._words:
            self._words = self.readln()
        word, *rest = self._words.split(delim, 1) or [b""]
        self._words = rest[0] if rest else None
        return word

    def readint(self, lo: float = -math.inf, hi: float = math.inf, delim: bytes | None = None) -> int:
        """Reads a whole number within a range."""
        return int(self._number(int, lo, hi, delim))

    def readfloat(self, lo: float = -math.inf, hi: float = math.inf, delim: bytes | None = None) -> float:
        """Reads a number within a range."""
        return self._number(float, lo, hi, delim)

    def _number(self, kind: type, lo: float, hi: float, delim: bytes | None) -> float:
        word = self.readtoken(delim)
        try:
            number = kind(word[:MOST_DIGITS])
        except ValueError:
            raise WrongAnswer(f'expected {kind.__name__}, got "{word[:20].decode(errors="replace")}"') from None
        if len(word) > MOST_DIGITS or not lo <= number <= hi:
            raise WrongAnswer(f"expected {kind.__name__} from {lo:.0f} to {hi:.0f}, got {word[:20].decode()}")
        return float(number) if kind is float else number

    def write(self, value: object) -> None:
        """Writes to the submission."""
        sys.stdout.write(str(value))
        sys.stdout.flush()

    def writeln(self, value: object) -> None:
        """Writes a line to the submission."""
        self.write(f"{value}\n")

    def close(self) -> None:
        """Ends what the submission reads."""
        sys.stdout.close()


class StandardGrader:
    """Grader that handles the submission's process."""

    def interact(self, case: Case, interactor: Interactor) -> Any:
        """Raises InternalError: only a dialogue can be held here."""
        raise InternalError("the grader handles the submission's process, which only DMOJ's own judge lets it")


class InteractiveGrader(StandardGrader):
    """Grader that holds a dialogue."""


def same_words(process_output: bytes, judge_output: bytes, **_: Any) -> bool:
    """Compares as the standard checker does."""
    return process_output.split() == judge_output.split()


def as_bytes(text: str | bytes) -> bytes:
    """Returns text as UTF-8."""
    return text if isinstance(text, bytes) else text.encode()


def as_text(text: str | bytes, errors: str = "strict") -> str:
    """Returns UTF-8 as text."""
    return text if isinstance(text, str) else text.decode(errors=errors)


def add_modules() -> None:
    """Makes the modules that graders import."""
    standard = types.SimpleNamespace(check=same_words)
    contents: dict[str, dict[str, Any]] = {
        "dmoj": {},
        "dmoj.result": {"CheckerResult": CheckerResult, "Result": Result},
        "dmoj.error": {"InternalError": InternalError},
        "dmoj.checkers": {"standard": standard},
        "dmoj.utils": {},
        "dmoj.utils.unicode": {"utf8bytes": as_bytes, "utf8text": as_text},
        "dmoj.graders": {"InteractiveGrader": InteractiveGrader, "StandardGrader": StandardGrader},
        "dmoj.graders.standard": {"StandardGrader": StandardGrader},
        "dmoj.graders.interactive": {
            "InteractiveGrader": InteractiveGrader,
            "Interactor": Interactor,
            "WrongAnswer": WrongAnswer,
        },
    }
    for name, values in contents.items():
        module = types.ModuleType(name)
        module.__dict__.update(values, __path__=[])
        sys.modules[name] = module


def load(path: str) -> types.ModuleType:
    """Loads the grader's module."""
    specification = importlib.util.spec_from_file_location("grader", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def decide(kind: str, module: types.ModuleType, contents: list[bytes], options: dict[str, Any]) -> Any:
    """Returns what the grader or the checker decides: a truth value or a CheckerResult."""
    content, output, answer = contents
    case = Case(content, answer)
    if kind == "grader":
        try:
            return module.Grader().interact(case, Interactor())
        except WrongAnswer as error:
            return CheckerResult(False, 0.0, str(error))
        except OSError:
            return False
    known = {
        "judge_input": content,
        "point_value": case.points,
        "case_position": case.position,
        "batch": case.batch,
        "submission_source": b"",
        "submission_language": "",
        "binary_data": False,
        "execution_time": 0.0,
        "problem_id": "",
        "case": case,
        "result": Result(output),
    }
    return module.check(output, answer, **{**known, **options})


def main(arguments: list[str]) -> int:
    """Runs a grader or a checker; returns the exit code."""
    *paths, kind, module, options = arguments
    add_modules()
    contents = [Path(path).read_bytes() for path in paths]
    try:
        outcome = decide(kind, load(module), contents, json.loads(options))
    except Exception as error:
        print(f"FAIL {type(error).__name__}: {error}", file=sys.stderr)
        return 3
    if not isinstance(outcome, CheckerResult):
        outcome = CheckerResult(bool(outcome), float(bool(outcome)))
    print(f"points {outcome.points:g} {outcome.feedback or ''}", file=sys.stderr)
    return 7


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
