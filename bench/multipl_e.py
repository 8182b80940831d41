"""MultiPL-E in the sandbox: the verdict of each program there against that of the language's own command outside of it.

    python bench/multipl_e.py --data FOLDER --human-eval HumanEval.jsonl.gz [--falsified 4] [LANGUAGE ...]

FOLDER holds humaneval-LANGUAGE.jsonl in MultiPL-E's format, with solutions under `gpt_solution`, as SandboxFusion's
samples have them. The first solutions run with their tests, and some of them again with their tests falsified: what
fails outside must fail inside. A command is that of MultiPL-E's own evaluators, whose rules decide what passes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import multipl_e_more
from rich.console import Console
from rich.table import Table
from sandbox_service import Service, sandbox_service

from perigee.sandbox.v1 import sandbox_pb2 as pb

NATIVE_S = 100
LIMITS = pb.Limits(wall_ms=60_000, cpu_ms=60_000, memory_bytes=1 << 30)
COMPILE_LIMITS = pb.Limits(wall_ms=100_000, cpu_ms=100_000, memory_bytes=2 << 30, processes=256, file_bytes=1 << 28)
JARS = ".:/usr/share/java/javatuples.jar"
CLOJURE = "/usr/share/java/clojure.jar:/usr/share/java/spec.alpha.jar:/usr/share/java/core.specs.alpha.jar"
PATH = "/usr/local/bin:/usr/bin:/bin"


@dataclass(frozen=True)
class Language:
    """Language of MultiPL-E: the runtime here, and the file and the command of its evaluator outside."""

    runtime: str
    file: str
    command: str
    quiet: bool = False
    """Whether anything on standard error is a failure."""


LANGUAGES = {
    "clj": Language(
        "clojure", "a.clj", f"java -Dclojure.main.report=stderr -cp {CLOJURE} clojure.main a.clj", quiet=True
    ),
    "cpp": Language("cpp", "a.cpp", "g++ -std=c++17 a.cpp -o a && ./a"),
    "cs": Language(
        "csharp", "a.cs", "mcs -d:DEBUG -r:System.Numerics.dll a.cs && MONO_TRACE_LISTENER=Console.Error mono a.exe"
    ),
    "d": Language("d", "a.d", "gdc -funittest a.d -o a && ./a"),
    "exs": Language("elixir", "a.exs", "elixir a.exs"),
    "go": Language("go-test", "a_test.go", "HOME=$PWD GO111MODULE=off GOPATH=/usr/share/gocode go test a_test.go"),
    "hs": Language("haskell", "a.hs", "runghc a.hs"),
    "java": Language("java", "Main.java", f"javac -cp {JARS} Main.java && java -ea -cp {JARS} Main"),
    "js": Language("javascript", "a.js", "node a.js"),
    "lua": Language("lua", "a.lua", "lua5.4 a.lua"),
    "ml": Language("ocaml", "a.ml", "ocaml a.ml"),
    "php": Language("php", "a.php", "php a.php"),
    "pl": Language("perl", "a.pl", "perl a.pl"),
    "py": Language("python", "a.py", "python3 a.py"),
    "r": Language("r", "a.R", "Rscript a.R"),
    "rb": Language("ruby", "a.rb", "ruby a.rb"),
    "rkt": Language("racket", "a.rkt", "racket a.rkt", quiet=True),
    "rs": Language("rust", "a.rs", "rustc --edition 2021 a.rs -o a && ./a"),
    "scala": Language("scala", "a.scala", "scalac a.scala && scala Problem"),
    "sh": Language("bash", "a.sh", "bash a.sh"),
    "ts": Language("typescript", "a.ts", "tsc --target es2020 --module commonjs a.ts && node a.js"),
}


def read_programs(arguments: argparse.Namespace, language: str, falsified: bool) -> Iterator[str]:
    """Yields the first programs of a language."""
    count = arguments.falsified if falsified else arguments.problems
    if language in multipl_e_more.WRITERS:
        yield from list(multipl_e_more.programs(language, arguments.human_eval, arguments.problems, falsified))[:count]
        return
    name = "open_humaneval_python.jsonl" if language == "py" else f"humaneval-{language}.jsonl"
    for line in (arguments.data / name).read_text().splitlines()[:count]:
        row = json.loads(line)
        if language == "py":
            tests = f"{row['test']}\ncheck({row['entry_point']})\n"
            solution = row["prompt"] + row["canonical_solution"]
        else:
            tests, solution = row["tests"], read_solution(row)
        program = solution + "\n" + (falsify(tests) if falsified else tests)
        yield program.replace("class Problem", "class Main") if language == "java" else program


def read_solution(row: dict[str, str]) -> str:
    """Returns the code of a solution up to the end of the function that was asked for, without the brace that the tests
    bring, with those lines of the prompt's head that it lacks.
    """
    code = row["gpt_solution"].partition("```")[2].partition("\n")[2].partition("```")[0]
    name = row["name"].split("_", 2)[2].replace("_", "").lower()
    lines = code.splitlines(keepends=True)
    flat = [re.sub(r"[\W_]", "", line).lower() for line in lines]
    begin = next(
        number
        for number, line in enumerate(flat)
        if name in line and "(" in lines[number] and lines[number][0] not in "#/-;"
    )
    if row["language"] not in ("rkt", "rb", "lua"):
        begin_at = sum(map(len, lines[:begin]))
        code = code[: end_of_braces(code, begin_at)]
        if row["tests"].lstrip().startswith("}"):
            code = code[: code.rindex("}")]
    elif row["language"] in ("rb", "lua"):
        end = next(i for i, line in enumerate(lines) if i > begin and line.startswith("end"))
        code = "".join(lines[: end + 1])
    if row["language"] == "go":
        package, _, rest = code.partition("\n")
        return package + ("\n" if '"fmt"' in rest else '\nimport "fmt"\n') + rest
    head = [line for line in row["prompt"].splitlines() if re.match(r"(#include|import|using|<\?php|#lang|#!)", line)]
    if row["language"] == "d":
        head += ["import std.algorithm, std.array;"]
    return "\n".join([*(line for line in head if line not in code), code])


def end_of_braces(code: str, begin: int) -> int:
    """Returns the end of the first block in braces after `begin`."""
    depth = 0
    quote = ""
    for index in range(code.index("{", begin), len(code)):
        char = code[index]
        if quote:
            quote = "" if char == quote and code[index - 1] != "\\" else quote
        elif char == '"':
            quote = char
        elif char in "{}" and code[index - 1 : index + 2] not in ("'{'", "'}'"):
            depth += 1 if char == "{" else -1
            if depth == 0:
                return index + 1
    return len(code)


def falsify(tests: str) -> str:
    """Changes what each line of the tests expects: true and false change places, else the last digit, else a string."""

    def change(line: str) -> str:
        if (
            "candidate(" not in line.replace("$", "").replace("->", "")
            and "ssert" not in line
            and "candidate " not in line
        ):
            return line
        line, racket, rest = line.partition(" 0.001)")
        words = {"True": "False", "False": "True", "TRUE": "FALSE", "FALSE": "TRUE", "true": "false", "false": "true"}
        swapped = re.sub(r"\b(True|False|TRUE|FALSE|true|false)\b", lambda m: words[m[0]], line)
        swapped = re.sub(r"#([tf])\b", lambda m: "#f" if m[1] == "t" else "#t", swapped)
        if swapped == line:
            swapped = re.sub(r"\d(?=\D*$)", lambda m: str((int(m[0]) + 1) % 10), line)
        if swapped == line:
            swapped = re.sub(r"(['\"])(?=[^'\"]*$)", r"x\1", line)
        return swapped + racket + rest

    return "\n".join(map(change, tests.split("\n")))


def passes_outside(language: Language, program: str) -> bool:
    """Runs the command of a language in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, language.file).write_text(program)
        try:
            result = subprocess.run(
                ["bash", "-c", language.command],
                cwd=folder,
                env={"PATH": PATH, "HOME": folder, "LANG": "C.UTF-8"},
                capture_output=True,
                text=True,
                timeout=NATIVE_S,
            )
        except subprocess.TimeoutExpired:
            return False
    return result.returncode == 0 and not (language.quiet and result.stderr) and "Fail:" not in result.stderr


async def passes_inside(service: Service, language: Language, program: str) -> bool:
    """Runs the same program in the sandbox."""
    request = pb.ExecuteRequest(
        language=language.runtime, source=program.encode(), limits=LIMITS, compile_limits=COMPILE_LIMITS
    )
    response = await service.client.execute(request, timeout_s=400)
    if response.status == pb.STATUS_INFRA_ERROR:
        raise RuntimeError(f"{language.runtime}: {response.reason}")
    return response.status == pb.STATUS_OK and not (language.quiet and response.stderr)


async def main() -> None:
    """Prints a row for each language."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("languages", nargs="*", metavar="LANGUAGE", help=f"of {' '.join(LANGUAGES)}; all by default")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--human-eval", type=Path, required=True)
    parser.add_argument("--problems", type=int, default=12)
    parser.add_argument("--falsified", type=int, default=4)
    parser.add_argument("--show", action="store_true", help="print programs whose verdicts differ")
    arguments = parser.parse_args()
    table = Table("language", "pass, of the right", "fail, of the falsified", "same verdict", title="MultiPL-E")
    with tempfile.TemporaryDirectory() as folder:
        async with sandbox_service(Path(folder), "auto", slots=2) as service:
            for name in arguments.languages or LANGUAGES:
                language = LANGUAGES[name]
                if language.runtime not in service.runtimes:
                    table.add_row(name, "not there", "", "")
                    continue
                counts = [0, 0, 0, 0, 0]
                for falsified in (False, True):
                    for program in read_programs(arguments, name, falsified):
                        outside, inside = await asyncio.gather(
                            asyncio.to_thread(passes_outside, language, program),
                            passes_inside(service, language, program),
                        )
                        counts[0] += outside and not falsified
                        counts[1] += not falsified
                        counts[2] += falsified and not outside
                        counts[3] += falsified
                        counts[4] += outside == inside
                        if arguments.show and outside != inside:
                            print(f"{name}: {'passes' if outside else 'fails'} outside alone\n{program}", flush=True)
                right, falsified_row = f"{counts[0]} of {counts[1]}", f"{counts[2]} of {counts[3]}"
                table.add_row(name, right, falsified_row, f"{counts[4]} of {counts[1] + counts[3]}")
                print(name, right, falsified_row, counts[4], flush=True)
    Console(width=100).print(table)


if __name__ == "__main__":
    asyncio.run(main())
