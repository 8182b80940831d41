"""DMOJ's own test suite (https://github.com/DMOJ/judge-server, testsuite/) judged by the sandbox: its problems are read
as packages, and each of its submissions is to get the codes and the points that the suite names.

    python bench/dmoj.py TESTSUITE [--only PROBLEM/CASE] [--address HOST:PORT]

Submissions in Python 2 are translated with lib2to3. Memory limits below 16 MiB are 16 MiB; Java has 192 MiB more, which
DMOJ does not count. Cases in languages that the sandbox lacks, or that test DMOJ's own sandbox, are listed with the
reason.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from sandbox_service import sandbox_client

from perigee.cli.sandbox.connection import Sandbox
from perigee.cli.sandbox.judge import make_requests
from perigee.cli.sandbox.packages import open_problem, prepare_tests
from perigee.errors import InvalidArgumentError
from perigee.sandbox.v1 import sandbox_pb2 as pb
from perigee.testgen.plan import Program

CALL_S = 300.0
CONFIGS = ("test.yml", "test.posix.yml", "test.linux.yml")
MIB = 1 << 20
LEAST_MEMORY, JAVA_MEMORY = 16 * MIB, 192 * MIB
LANGUAGES = {
    "PY2": "python",
    "PY3": "python",
    "PYPY3": "python",
    "C": "c",
    "CPP11": "cpp",
    "JAVA": "java",
    "JAVA8": "java",
    "GO": "go",
    "RUST": "rust",
    "MONOCS": "csharp",
    "PAS": "pascal",
}
CODES = {
    pb.TEST_VERDICT_ACCEPTED: {"AC"},
    pb.TEST_VERDICT_WRONG_ANSWER: {"WA"},
    pb.TEST_VERDICT_TIME_LIMIT: {"TLE"},
    pb.TEST_VERDICT_MEMORY_LIMIT: {"MLE"},
    pb.TEST_VERDICT_OUTPUT_LIMIT: {"OLE"},
    pb.TEST_VERDICT_COMPILE_ERROR: {"CE"},
    pb.TEST_VERDICT_UNJUDGEABLE: {"IE"},
    pb.TEST_VERDICT_INFRA_ERROR: {"IE"},
    pb.TEST_VERDICT_SKIPPED: {"SC"},
}
# Cases that are about DMOJ's own judge, not about judging.
OWN = {
    "aplusb/cpp_io_symlinks": "links of DMOJ's own beside the program",
    "aplusb/java_bigdecimal": "DMOJ's agent in the JVM forbids a class",
    "aplusb/java_biginteger": "DMOJ's agent in the JVM forbids a class",
    "helloworld/java_unsafe": "DMOJ's agent in the JVM forbids a class",
    "helloworld/java8_ce_with_package": "packages are right here",
    "helloworld/java_no_public_class": "a class that is not public is right here",
    "helloworld/sandbox_py3_bad_file": "DMOJ's sandbox hides /dev/full",
    "generator_test_mle/cpp_ie": "memory that is reserved and not touched counts there",
    "generator_test_sandbox/cpp_ie": "a generator that is told not to trace itself goes on here",
    "helloworld/c_failinit": "memory that is reserved and not touched counts there",
    "helloworld/cpp_badalloc": "memory that is reserved and not touched counts there",
    "rust_generator/AC": "crates that DMOJ brings with its runtime of Rust",
    "scroll/c_rte_protection_fault_linux": "a refused system call ends a program there",
    "check_memory_limit/cpp_too_much_memory": "a checker in Python that reads the submission's memory in DMOJ's judge",
    "shortest1/custom_grader_ac": "a grader in Python that handles the submission's process in DMOJ's judge",
}


@dataclass(frozen=True)
class Case:
    """Submission of the suite with what it should get."""

    name: str
    problem: Path
    source: Path
    config: dict[str, Any]

    @property
    def left_out(self) -> str:
        """Why it is not run; empty for one that is."""
        if self.config["language"] not in LANGUAGES:
            return f"the language {self.config['language']}"
        if self.config.get("expect") == "MLE" and int(self.config["memory"]) * 1024 < LEAST_MEMORY:
            return "a memory limit below 16 MiB, the least here"
        return OWN.get(self.name, "")


def read_cases(suite: Path) -> list[Case]:
    """Returns all cases of the suite but those for other systems."""
    cases = []
    for folder in sorted(suite.glob("*/tests/*")):
        config: dict[str, Any] = {}
        for name in CONFIGS:
            if (folder / name).is_file():
                config.update(yaml.safe_load((folder / name).read_text()))
        if config:
            problem = folder.parents[1]
            cases.append(Case(f"{problem.name}/{folder.name}", problem, folder / config["source"], config))
    return cases


def read_source(case: Case) -> bytes:
    """Returns the source, Python 2 as Python 3."""
    source = case.source.read_bytes()
    if case.config["language"] != "PY2":
        return source
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lib2to3.pgen2.parse import ParseError
        from lib2to3.refactor import RefactoringTool, get_fixers_from_package
    try:
        tool = RefactoringTool(get_fixers_from_package("lib2to3.fixes"))
        return str(tool.refactor_string(source.decode() + "\n", case.name)).encode()
    except ParseError:  # Python 3 already
        return source


def limits_of(case: Case, language: str) -> pb.Limits:
    """Returns the limits of the submission."""
    cpu_ms = round(float(case.config["time"]) * 1000)
    memory = max(LEAST_MEMORY, int(case.config["memory"]) * 1024)
    if language == "java" and int(case.config["memory"]) * 1024 >= LEAST_MEMORY:
        memory += JAVA_MEMORY
    return pb.Limits(cpu_ms=cpu_ms, wall_ms=3 * cpu_ms + 2000, memory_bytes=memory)


def codes_of(result: pb.TestResult) -> set[str]:
    """Returns DMOJ's codes for a result; a checker there says whether one with some points is right."""
    if result.verdict == pb.TEST_VERDICT_RUNTIME_ERROR:
        return {"RTE"} if result.signal else {"IR"}
    if result.verdict == pb.TEST_VERDICT_WRONG_ANSWER and (result.points or result.reason.startswith("partial ")):
        return {"AC", "WA"}
    return CODES.get(result.verdict, set())


def as_set(value: Any) -> set[str]:
    """Returns the codes that a case allows."""
    return {value} if isinstance(value, str) else set(value)


def find_difference(case: Case, results: list[pb.TestResult]) -> str:
    """Returns how the results differ from what the suite expects; empty when they do not."""
    listed = case.config.get("cases") or []
    for index, result in enumerate(results):
        expected = listed[index] if index < len(listed) else case.config.get("expect", "AC")
        if not codes_of(result) & as_set(expected):
            verdict = pb.TestVerdict.Name(result.verdict).removeprefix("TEST_VERDICT_")
            return f"{result.name}: {verdict} instead of {expected}: {' '.join(result.reason.split())[:200]}"
        score = case.config.get("score")
        if score is not None and result.points != float(score):
            return f"{result.name}: {result.points:g} points instead of {score}: {result.reason[:200]}"
    return ""


async def run_case(sandbox: Sandbox, case: Case) -> str:
    """Judges a submission; returns how it differs from what the suite expects."""
    language = LANGUAGES[case.config["language"]]
    try:
        problem = open_problem(case.problem)
        sandbox.find_runtime(language, case.name)
        tests = await prepare_tests(sandbox, problem, validate=False)
        [request] = make_requests(problem, Program(case.name, language, read_source(case)), tests)
        request.limits.MergeFrom(limits_of(case, language))
        response = await sandbox.client.judge(request, timeout_s=CALL_S)
    except InvalidArgumentError as error:
        return "" if "IE" in as_set(case.config.get("expect", "AC")) else f"refused: {error.message[:300]}"
    return find_difference(case, list(response.results))


async def main() -> int:
    """Prints the cases that differ and those that are left out, and the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", type=Path)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--address", default="", help="a running sandbox; one is started unless given")
    options = parser.parse_args()
    cases = [case for case in read_cases(options.suite) if options.only in case.name]
    agreeing = 0
    async with sandbox_client(options.address, slots=2) as client:
        sandbox = Sandbox(client, await client.list_runtimes(pb.ListRuntimesRequest()))
        for case in cases:
            difference = f"left out: {case.left_out}" if case.left_out else await run_case(sandbox, case)
            agreeing += not difference
            if difference:
                print(f"{case.name}: {difference}", flush=True)
    print(f"{agreeing} of {len(cases)} cases as the suite expects")
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
