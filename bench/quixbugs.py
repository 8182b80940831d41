"""QuixBugs (https://github.com/jkoppel/QuixBugs) judged by the sandbox: 40 programs, each right and with a bug, in
Python and Java. Right ones are to be accepted, buggy ones refused.

    python bench/quixbugs.py CHECKOUT [--only NAME] [--language NAME] [--address HOST:PORT]

Python programs with JSON cases are judged by function tests, the others, on graphs, by code tests that are QuixBugs'
own. Java programs run its JUnit tests, with a stand-in for JUnit. Cases that it marks as slow are left out.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from sandbox_service import sandbox_client

from perigee.sandbox.client import SandboxClient
from perigee.sandbox.v1 import sandbox_pb2 as pb

CALL_S = 600.0
LIMITS = pb.Limits(wall_ms=60_000, cpu_ms=10_000, memory_bytes=1 << 30)
AT_ONCE = 2
TEST_ANNOTATION = """package org.junit;
import java.lang.annotation.*;
@Retention(RetentionPolicy.RUNTIME)
public @interface Test {
    class None extends Throwable { }
    Class<? extends Throwable> expected() default None.class;
    long timeout() default 0;
}
"""
IGNORE_ANNOTATION = """package org.junit;
import java.lang.annotation.*;
@Retention(RetentionPolicy.RUNTIME)
public @interface Ignore { String value() default ""; }
"""
ASSERT = """package org.junit;
public class Assert {
    public static void assertEquals(Object expected, Object found) {
        if (!java.util.Objects.equals(expected, found)) throw new AssertionError(expected + " expected, not " + found);
    }
    public static void assertEquals(long expected, long found) { assertEquals((Object) expected, (Object) found); }
    public static void assertEquals(double expected, double found, double delta) {
        if (!(Math.abs(expected - found) <= delta)) throw new AssertionError(expected + " expected, not " + found);
    }
    public static void assertTrue(boolean found) { assertEquals((Object) true, (Object) found); }
    public static void assertFalse(boolean found) { assertEquals((Object) false, (Object) found); }
}
"""
RUN = """public class Run {
    public static void main(String[] names) throws Exception {
        java.io.PrintStream out = System.out;
        System.setOut(new java.io.PrintStream(java.io.OutputStream.nullOutputStream()));
        Class<?> tests = @TESTS@.class;
        for (java.lang.reflect.Method test : tests.getMethods()) {
            if (!test.isAnnotationPresent(org.junit.Test.class) || test.isAnnotationPresent(org.junit.Ignore.class)) {
                continue;
            }
            try {
                test.invoke(tests.getDeclaredConstructor().newInstance());
            } catch (java.lang.reflect.InvocationTargetException failure) {
                out.println(test.getName() + ": " + failure.getCause());
                System.exit(1);
            }
        }
        out.println("passed");
    }
}
"""


@dataclass(frozen=True)
class Case:
    """Submission of a program, and whether it is right."""

    name: str
    language: str
    is_right: bool
    request: pb.JudgeRequest


def python_case(checkout: Path, name: str, is_right: bool) -> Case:
    """Returns a Python program with QuixBugs' cases or tests."""
    folder = checkout / ("correct_python_programs" if is_right else "python_programs")
    tests = ast.parse((checkout / "python_testcases" / f"test_{name}.py").read_text())
    request = pb.JudgeRequest(
        language="python",
        source=(folder / f"{name}.py").read_bytes(),
        function_name=name,
        limits=LIMITS,
        stop_at_first_failure=True,
    )
    cases = checkout / "json_testcases" / f"{name}.json"
    if not cases.exists():
        shared = [
            node for node in tests.body if not isinstance(node, (ast.Import, ast.ImportFrom, ast.If, ast.FunctionDef))
        ]
        node_class = (checkout / "python_testcases" / "node.py").read_text()
        request.setup_code = "\n".join([node_class, *map(ast.unparse, shared)])
        functions = [node for node in tests.body if isinstance(node, ast.FunctionDef)]
        request.tests.extend(
            pb.TestCase(code=pb.CodeTest(code=f"{ast.unparse(function)}\n{function.name}()")) for function in functions
        )
        return Case(name, "python", is_right, request)
    slow = slow_arguments(tests)
    for line in filter(None, cases.read_text().splitlines()):
        arguments, expected = json.loads(line)
        arguments = arguments if isinstance(arguments, list) else [arguments]
        if arguments not in slow:
            test = pb.FunctionTest(arguments_json=json.dumps(arguments), expected_json=json.dumps(expected))
            request.tests.append(pb.TestCase(function=test))
    if name == "sqrt":
        request.checker.floats.absolute = 0.01
    return Case(name, "python", is_right, request)


def slow_arguments(tests: ast.Module) -> list[object]:
    """Returns the arguments with which QuixBugs' own tests run by request alone."""
    nodes = [node for node in ast.walk(tests) if isinstance(node, ast.Compare)]
    found = [node for node in nodes if ast.unparse(node.left) == "input_data"]
    return [ast.literal_eval(node.comparators[0]) for node in found]


def java_case(checkout: Path, name: str, is_right: bool) -> Case:
    """Returns a Java program with QuixBugs' JUnit tests, as a program that runs them all."""
    upper = name.upper()
    folder = checkout / ("correct_java_programs" if is_right else "java_programs")
    tests = checkout / "java_testcases" / "junit"
    contents = {
        "org/junit/Test.java": TEST_ANNOTATION,
        "org/junit/Ignore.java": IGNORE_ANNOTATION,
        "org/junit/Assert.java": ASSERT,
        f"java_programs/{upper}.java": read_java(folder / f"{upper}.java"),
        f"java_testcases/junit/{upper}_TEST.java": read_java(tests / f"{upper}_TEST.java"),
        "java_testcases/junit/QuixFixOracleHelper.java": read_java(tests / "QuixFixOracleHelper.java"),
    }
    for shared in ("Node", "WeightedEdge"):
        contents[f"java_programs/{shared}.java"] = read_java(checkout / "java_programs" / f"{shared}.java")
    request = pb.JudgeRequest(
        language="java",
        # a use of the tests' class, so that the compiler finds them
        source=RUN.replace("@TESTS@", f"java_testcases.junit.{upper}_TEST").encode(),
        files=[pb.File(path=path, content=text.encode()) for path, text in contents.items()],
        tests=[pb.TestCase(stdio=pb.StdioTest(expected_stdout=b"passed"))],
        limits=LIMITS,
        compile_limits=pb.Limits(wall_ms=100_000, cpu_ms=60_000),
    )
    return Case(name, "java", is_right, request)


def read_java(path: Path) -> str:
    """Returns a Java source in the package of the buggy programs, where the tests look for either."""
    return re.sub(r"\bcorrect_java_programs\b", "java_programs", path.read_text())


async def judge_all(client: SandboxClient, cases: list[Case]) -> list[tuple[Case, pb.JudgeResponse]]:
    """Judges the cases, a few at a time."""
    slots = asyncio.Semaphore(AT_ONCE)

    async def judge(case: Case) -> tuple[Case, pb.JudgeResponse]:
        async with slots:
            return case, await client.judge(case.request, timeout_s=CALL_S)

    return await asyncio.gather(*map(judge, cases))


async def main() -> int:
    """Prints the cases whose verdict is not the right one, and the figures; returns 1 when there is such a case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--only", default="", help="a program's name")
    parser.add_argument("--address", default="", help="a running sandbox; one is started unless given")
    parser.add_argument("--language", choices=("python", "java"), help="both unless given")
    options = parser.parse_args()
    paths = (options.checkout / "python_testcases").glob("test_*.py")
    names = sorted(path.stem.removeprefix("test_") for path in paths)
    makers = {"python": python_case, "java": java_case}
    cases = [
        make(options.checkout, name, is_right)
        for language, make in makers.items()
        if options.language in (None, language)
        for is_right in (True, False)
        for name in names
        if options.only in ("", name)
    ]
    async with sandbox_client(options.address, slots=2 * AT_ONCE) as client:
        judged = await judge_all(client, cases)
    figures: dict[tuple[str, bool], list[bool]] = {}
    for case, response in judged:
        is_accepted = response.verdict == pb.TEST_VERDICT_ACCEPTED
        is_refused = response.verdict in range(pb.TEST_VERDICT_WRONG_ANSWER, pb.TEST_VERDICT_COMPILE_ERROR)
        is_good = is_accepted if case.is_right else is_refused
        figures.setdefault((case.language, case.is_right), []).append(is_good)
        if not is_good:
            reason = next((result.reason for result in response.results if result.reason), "")
            verdict = pb.TestVerdict.Name(response.verdict).removeprefix("TEST_VERDICT_")
            print(f"{case.language} {case.name}, {'right' if case.is_right else 'buggy'}: {verdict} {reason[:300]}")
    for (language, is_right), good in figures.items():
        print(f"{language}: {'accepted' if is_right else 'refused'} {sum(good)} of {len(good)}")
    return 0 if all(all(good) for good in figures.values()) else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
