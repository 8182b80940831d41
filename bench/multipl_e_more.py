"""The first 12 problems of HumanEval in languages for which MultiPL-E has no solutions at hand.

The solutions, called `f`, are ours; the tests are HumanEval's own calls, with the results of its canonical solutions.
"""

from __future__ import annotations

import ast
import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SOLUTIONS = Path(__file__).parent / "multipl_e_solutions"
SEPARATOR = "=====\n"


def _writer(true: str, false: str, opening: str, separator: str, closing: str, pair: str) -> Callable[[Any], str]:
    def write(value: Any) -> str:
        if isinstance(value, bool):
            return true if value else false
        if isinstance(value, list):
            return opening + separator.join(map(write, value)) + closing
        if isinstance(value, tuple):
            return pair.format(*map(write, value))
        if isinstance(value, str):
            return json.dumps(value)
        return f"({value})" if value < 0 and pair.startswith("(") else repr(value)

    return write


def _haskell(solution: str, calls: list[tuple[Any, ...]]) -> str:
    write = _writer("True", "False", "[", ", ", "]", "({}, {})")
    tests = [
        f'  if f {" ".join(map(write, inputs))} == {write(result)} then pure () else error "assertion failed"'
        for *inputs, result in calls
    ]
    return "\n".join([solution, "main :: IO ()", "main = do", *tests, ""])


def _ocaml(solution: str, calls: list[tuple[Any, ...]]) -> str:
    write = _writer("true", "false", "[", "; ", "]", "({}, {})")
    tests = [f"let () = assert (f {' '.join(map(write, inputs))} = {write(result)})" for *inputs, result in calls]
    return "\n".join([solution, *tests, ""])


def _clojure(solution: str, calls: list[tuple[Any, ...]]) -> str:
    write = _writer("true", "false", "[", " ", "]", "[{} {}]")
    tests = [f"  (is (= {write(result)} (f {' '.join(map(write, inputs))})))" for *inputs, result in calls]
    head = ["(use 'clojure.test)", solution, "(deftest test-humaneval"]
    return "\n".join([*head, *tests, ")", "(when-not (successful? (run-tests)) (System/exit 1))", ""])


def _elixir(solution: str, calls: list[tuple[Any, ...]]) -> str:
    write = _writer("true", "false", "[", ", ", "]", "{{{}, {}}}")
    tests = [f"    assert Solution.f({', '.join(map(write, inputs))}) == {write(result)}" for *inputs, result in calls]
    head = ["defmodule Solution do", solution, "end", "ExUnit.start()", "defmodule HumanEval do", "  use ExUnit.Case"]
    return "\n".join([*head, '  test "calls" do', *tests, "  end", "end", ""])


WRITERS = {"hs": _haskell, "ml": _ocaml, "clj": _clojure, "exs": _elixir}


def read_calls(path: Path, problems: int) -> Iterator[list[tuple[Any, ...]]]:
    """Yields the calls of each problem's tests, (argument, ..., result)."""
    with gzip.open(path) as file:
        for _, line in zip(range(problems), file, strict=False):
            row = json.loads(line)
            names: dict[str, Any] = {}
            exec(row["prompt"] + row["canonical_solution"], names)
            calls = []
            for node in ast.walk(ast.parse(row["test"])):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "candidate":
                    inputs = [ast.literal_eval(argument) for argument in node.args]
                    calls.append((*inputs, names[row["entry_point"]](*inputs)))
            yield calls


def falsify_result(value: Any) -> Any:
    """Returns another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, tuple):
        return (value[0] + 1, *value[1:])
    if isinstance(value, list):
        return value + value[-1:] if value else value
    return value + type(value)(1)


def programs(language: str, path: Path, problems: int, falsified: bool) -> Iterator[str]:
    """Yields the programs of a language, all of whose tests hold unless `falsified`."""
    solutions = (SOLUTIONS / f"{language}.txt").read_text().split(SEPARATOR)
    for solution, calls in zip(solutions, read_calls(path, problems), strict=False):
        if falsified:
            calls = [(*inputs, falsify_result(result)) for *inputs, result in calls]
        yield WRITERS[language](solution, calls)
