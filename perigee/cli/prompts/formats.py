"""Sets of programming problems, in the forms that they are published in, as lines of a prompt file with tests.

A record's columns tell its format. Readers take LeetCode (its own meta data with JSON cases, or assertions of a
`check(candidate)`), LiveCodeBench, APPS, TACO, HumanEval, MBPP, and EvalPlus's HumanEval+ and MBPP+.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perigee.cli.eval.suites import read_livecodebench, read_mbpp
from perigee.errors import InvalidArgumentError
from perigee.reward.items import read_object, read_prompt_line
from perigee.reward.sources import read_data

Record = Mapping[str, Any]
Line = dict[str, Any]
MOST_SOURCE_BYTES = 1 << 20
"""Largest code of a test that the sandbox takes, unless it is configured otherwise."""

CALL_FORM = "Complete this code in one Python code block:\n\n```python\n{}\n```"
STDIO_FORM = "Read from standard input, write to standard output, and answer with one Python code block."
FUNCTION_FORM = (
    "Complete this function. Answer with the whole function, its imports included, in one Python code block."
)
MBPP_FORM = (
    "Answer with the function and its imports in one Python code block. It must pass these tests:\n\n```python\n{}\n```"
)
# APPS and TACO write a result as itself or as the only item of a list, and their own judges take either.
EITHER = """
def accepts(result, expected):
    result = list(result) if isinstance(result, tuple) else result
    return result == expected or result == expected[0]
"""
# EvalPlus compares with what its solution returns, which stays in the test's sandbox.
REFERENCE = """
import copy, math
_reference = {{}}
exec({source!r}, _reference)
def _same(found, expected):
    if isinstance(expected, float):
        return found == expected or math.isclose(found, expected, rel_tol=1e-7, abs_tol={tolerance!r})
    if isinstance(expected, (list, tuple)) and type(found) is type(expected) and len(found) == len(expected):
        return all(map(_same, found, expected))
    return found == expected
"""
COMPARISON = """
for arguments in {inputs!r}:
    expected = _reference[{name!r}](*copy.deepcopy(arguments))
    assert _same({name}(*copy.deepcopy(arguments)), expected), arguments
"""


class NotTurnedError(Exception):
    """Record that becomes no prompt; its message says why, in words that many records share."""


@dataclass
class ImportedSet:
    """Lines of a prompt file, and why other records gave none."""

    lines: list[Line] = field(default_factory=list)
    places: dict[str, list[str]] = field(default_factory=dict)
    """Places of the records that were left out, by reason."""
    formats: Counter[str] = field(default_factory=Counter)
    tests_left_out: int = 0


def import_set(path: Path, name: str | None, split: str | None, most_tests: int) -> ImportedSet:
    """Reads the records of a file or folder; `name` is their format, found out for each unless given.

    Raises InvalidArgumentError when the file cannot be read or the format is unknown.
    """
    if name is not None and name not in FORMATS:
        raise InvalidArgumentError.for_field("--format", f"must be one of {', '.join(FORMATS)}, got {name!r}")
    found = ImportedSet()
    seen: set[str] = set()
    for place, row in read_data(path, split, "IN"):
        try:
            record = read_object(row, place) if isinstance(row, str) else row
            format_name = name or find_format(record)
            line = read_record(record, format_name)
            line = {"id": f"{format_name}-{line.pop('id')}", "domain": "code", "verifier": "code", **line}
            if line["id"] in seen:
                raise NotTurnedError("its id is that of an earlier record")
            found.tests_left_out += max(0, len(line["tests"]) - most_tests)
            line["tests"] = line["tests"][:most_tests]
            check_line(line, place)
        except (NotTurnedError, InvalidArgumentError) as error:
            found.places.setdefault(_reason(error, place), []).append(place)
            continue
        seen.add(line["id"])
        found.formats[format_name] += 1
        found.lines.append(line)
    return found


def read_record(record: Record, format_name: str) -> Line:
    """Reads a record of a format; raises NotTurnedError for one whose columns lack what the format has."""
    try:
        return FORMATS[format_name].read(record)
    except KeyError as error:
        raise NotTurnedError(f"it has no {error.args[0]}, which {format_name} has") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise NotTurnedError(f"a column is not as {format_name} has it: {error}") from error


def _reason(error: Exception, place: str) -> str:
    return str(error).replace(f"{place}: ", "")[:200]


def check_line(line: Line, place: str) -> None:
    """Raises NotTurnedError or InvalidArgumentError for a line that is no prompt or has no test."""
    if not line["tests"]:
        raise NotTurnedError("it has no tests")
    for test in line["tests"]:
        if len(test.get("code", "").encode()) > MOST_SOURCE_BYTES:
            raise NotTurnedError(f"a test has more than {MOST_SOURCE_BYTES} bytes of code")
    try:
        json.dumps(line, allow_nan=False)
    except ValueError as error:
        raise NotTurnedError("a test has a number that JSON does not have") from error
    read_prompt_line(line, place)


def find_format(record: Record) -> str:
    """Returns the format of a record by its columns; raises NotTurnedError."""
    for name, each in FORMATS.items():
        if all(column in record for column in each.columns):
            return name
    raise NotTurnedError("its columns are of no known format")


def read_json(value: Any, column: str) -> Any:
    """Returns a column that holds JSON, as text or as it is; raises NotTurnedError."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise NotTurnedError(f"its {column} is not JSON") from error


def read_apps(record: Record) -> Line:
    """Reads APPS and TACO: `input_output` has inputs and outputs, of a function where it has `fn_name`."""
    cases = read_json(record["input_output"] or "{}", "input_output")
    if not isinstance(cases, Mapping) or not cases.get("inputs"):
        raise NotTurnedError("it has no tests")
    inputs, outputs = cases["inputs"], cases.get("outputs") or []
    if len(inputs) != len(outputs):
        raise NotTurnedError("it has not as many outputs as inputs")
    question, starter = str(record["question"]), str(record.get("starter_code") or "").strip()
    identity = first_of(record, "problem_id", "id", "task_id")
    identity = digest(question) if identity is None else identity
    pairs = list(zip(inputs, outputs, strict=True))
    if name := cases.get("fn_name"):
        form = CALL_FORM.format(starter) if starter else f"Answer with a Python function `{name}` in one code block."
        return {"id": identity, "prompt": f"{question}\n\n{form}", "function": name, **call_tests(pairs, name, starter)}
    tests = [{"stdin": as_text(given), "expected_stdout": as_text(expected)} for given, expected in pairs]
    return {"id": identity, "prompt": f"{question}\n\n{STDIO_FORM}", "tests": tests}


def call_tests(pairs: Sequence[tuple[Any, Any]], name: str, starter: str) -> Line:
    """Returns the tests of a function; where each result could also be the only item of a list, either is taken."""
    if any(not isinstance(arguments, list) for arguments, _ in pairs):
        raise NotTurnedError("the arguments of a test are no list")
    if all(isinstance(expected, list) and len(expected) == 1 for _, expected in pairs):
        codes = [f"assert accepts(candidate(*{arguments!r}), {expected!r})" for arguments, expected in pairs]
        return {"tests": [{"code": code} for code in codes], "setup_code": EITHER}
    tests = [{"arguments": arguments, "expected": expected} for arguments, expected in pairs]
    signature = find_signature(starter, name)
    return {"tests": tests, **({"signature": signature} if signature else {})}


def find_signature(starter: str, name: str) -> str:
    """Returns the signature of a function in a starter's code, with `void` for None; empty if unknown."""
    lines = starter.rstrip()
    try:
        tree = ast.parse(f"{lines}\n        pass" if lines.endswith(":") else lines)
    except SyntaxError:
        return ""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == name:
            types = [ast.unparse(each.annotation) if each.annotation else "Any" for each in node.args.args]
            has_self = bool(node.args.args) and node.args.args[0].arg == "self"
            result = "" if node.returns is None else ast.unparse(node.returns)
            return f"({', '.join(types[has_self:])}) -> {'void' if result == 'None' else result or 'Any'}"
    return ""


def read_livecodebench_line(record: Record) -> Line:
    """Reads LiveCodeBench: public and hidden tests, those in whichever form they are packed."""
    try:
        columns = ("public_test_cases", "private_test_cases", "metadata")
        packed = {name: json.dumps(record[name]) for name in columns if not isinstance(record.get(name), str)}
        read = read_livecodebench({**record, **packed})
    except Exception as error:  # whatever base64, zlib, pickle and JSON make of what they are given
        raise NotTurnedError("its test cases cannot be unpacked") from error
    line: Line = {"id": record["question_id"], "prompt": f"{record['question_content']}\n\n{read['form']}"}
    if read["function"]:
        signature = find_signature(str(record["starter_code"]), read["function"])
        line |= {"function": read["function"], **({"signature": signature} if signature else {})}
    return line | {"tests": read["tests"]}


def read_evalplus(record: Record) -> Line:
    """Reads EvalPlus's own files, whose expected results are those of its solution."""
    name, tolerance = record["entry_point"], float(record.get("atol") or 1e-6)
    prompt = str(record["prompt"])
    solution = str(record["canonical_solution"])
    source = prompt + solution if f"def {name}" not in solution else solution
    inputs = [*(record.get("base_input") or ()), *(record.get("plus_input") or ())]
    if not inputs:
        raise NotTurnedError("it has no tests")
    return {
        "id": record["task_id"],
        "prompt": FUNCTION_FORM.format(prompt),
        "function": name,
        "setup_code": REFERENCE.format(source=source, tolerance=tolerance),
        "tests": [{"code": COMPARISON.format(inputs=inputs, name=name)}],
    }


def read_humaneval(record: Record) -> Line:
    """Reads HumanEval and those made like it: a prompt, an entry point, and a test that defines `check(candidate)`."""
    identity, prompt, name = record["task_id"], str(record["prompt"]), str(record["entry_point"])
    if not re.search(rf"\b(def|class) +{re.escape(name)}\b", prompt):
        raise NotTurnedError("its prompt does not begin the function that is its entry point")
    return {
        "id": identity,
        "prompt": FUNCTION_FORM.format(prompt),
        "function": name,
        "setup_code": prompt,
        "tests": [{"code": str(record["test"])}],
    }


def read_mbpp_line(record: Record) -> Line:
    """Reads MBPP and MBPP+, whose `test` has inputs and results where there is one."""
    read = read_mbpp(dict(record))
    if not read["function"]:
        raise NotTurnedError("its tests call no function of its solution")
    return {
        "id": record["task_id"],
        "prompt": f"{read['text']}\n{MBPP_FORM.format(read['tests'])}",
        "function": read["function"],
        "setup_code": read["test_setup_code"],
        "tests": [{"code": str(record.get("test") or "") or read["tests"]}],
    }


def read_leetcode_checks(record: Record) -> Line:
    """Reads LeetCode problems whose test defines `check(candidate)` and whose entry point is `Solution().name`.

    A query is a whole prompt; its `prompt` is code that the test and the solution need.
    """
    starter = str(record.get("starter_code") or "").strip()
    question = first_of(record, "problem_description", "content")
    if question is None:
        question = record["query"]
    return {
        "id": first_of(record, "task_id", "question_id"),
        "prompt": f"{question}\n\n{CALL_FORM.format(starter)}" if starter else str(question),
        "function": record["entry_point"],
        "setup_code": str(record.get("prompt") or ""),
        "tests": [{"code": str(record["test"])}],
    }


def read_leetcode(record: Record) -> Line:
    """Reads LeetCode problems with its meta data and cases: an argument's JSON on each line, the result as JSON."""
    meta = read_json(record[META if META in record else META_SNAKE], META)
    cases = read_json(first_of(record, "test_cases", "tests", "cases") or [], "test_cases")
    starter = str(first_of(record, "starter_code", "python3", "code") or "").strip()
    name = first_of(meta, "classname", "name")
    if not name:
        raise NotTurnedError("its meta data names no function")
    if (meta.get("output") or {}).get("paramindex"):
        raise NotTurnedError("its result is another argument than the first")
    question = first_of(record, "content", "question", "problem_description") or ""
    line: Line = {
        "id": first_of(record, "slug", "title_slug", "task_id", "id", "question_id") or digest(str(question)),
        "prompt": f"{question}\n\n{CALL_FORM.format(starter)}",
        "function": name,
        "tests": [read_case(case) for case in cases],
    }
    if "classname" in meta:
        return line
    types = ", ".join(str(each["type"]) for each in meta.get("params", ()))
    return line | {"signature": f"({types}) -> {(meta.get('return') or {}).get('type', 'Any')}"}


def read_case(case: Any) -> Line:
    """Returns a test of LeetCode's; raises NotTurnedError."""
    if not isinstance(case, Mapping) or "input" not in case:
        raise NotTurnedError("a test case has no input")
    given, expected = case["input"], [case[name] for name in ("output", "expected", "expected_output") if name in case]
    if not expected:
        raise NotTurnedError("a test case has no output")
    if isinstance(given, str):
        given = [read_json(each, "test_cases") for each in given.splitlines() if each.strip()]
    elif isinstance(given, Mapping):
        given = list(given.values())
    return {"arguments": given, "expected": read_json(expected[0], "test_cases")}


def first_of(record: Record, *names: str) -> Any:
    """Returns the first of some columns that has a value; None without one."""
    return next((record[name] for name in names if record.get(name) not in (None, "")), None)


def digest(text: str) -> str:
    """Returns a name for a record without one."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def as_text(value: Any) -> str:
    """Returns an input or an output, which may be a list of lines, as text."""
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


META, META_SNAKE = "metaData", "meta_data"


@dataclass(frozen=True)
class Format:
    """Published form of problems: the columns that tell it, and how its records are read."""

    columns: tuple[str, ...]
    read: Callable[[Record], Line]


# The first whose columns a record has is its format.
FORMATS: dict[str, Format] = {
    "livecodebench": Format(("question_id", "public_test_cases", "private_test_cases"), read_livecodebench_line),
    "evalplus": Format(("task_id", "entry_point", "base_input", "plus_input", "canonical_solution"), read_evalplus),
    "leetcode-checks": Format(("entry_point", "test", "starter_code"), read_leetcode_checks),
    "leetcode-queries": Format(("entry_point", "test", "query"), read_leetcode_checks),
    "humaneval": Format(("task_id", "prompt", "entry_point", "test"), read_humaneval),
    "mbpp": Format(("task_id", "code", "test_list"), read_mbpp_line),
    "taco": Format(("question", "input_output", "time_limit"), read_apps),
    "apps": Format(("question", "input_output"), read_apps),
    "leetcode": Format((META,), read_leetcode),
    "leetcode-meta": Format((META_SNAKE,), read_leetcode),
}
