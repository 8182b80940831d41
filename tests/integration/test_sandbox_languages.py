"""Every runtime that comes with the service: streams, arguments, exit codes, compilers, further files, versions."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field

import pytest

from perigee.sandbox.v1 import sandbox_pb2 as pb
from services.sandbox.languages.catalog import OWN_RUNTIMES
from tests.fixtures.sandbox_fronts import Fronts

NAMES = sorted(path.stem for path in OWN_RUNTIMES.glob("*.yaml"))
CALL_S = 110.0
PATIENT = pb.Limits(wall_ms=60_000, cpu_ms=60_000)
PYTHON = """
import sys
print(input(), *sys.argv[1:])
print("wrong", file=sys.stderr)
sys.exit(3)
"""


@dataclass(frozen=True)
class Example:
    """A program that prints its input and its argument, says `wrong` on standard error and exits with 3; one that does
    not compile, with a word of the compiler's; and one that prints 42 with the help of a further file."""

    program: str
    broken: str = ""
    compiler_word: str = ""
    main: str = ""
    files: dict[str, str] = field(default_factory=dict)
    argument: str = "an argument"


FURTHER = {
    "ada": Example(
        """with Ada.Text_IO; use Ada.Text_IO;
with Ada.Command_Line; use Ada.Command_Line;
procedure Main is
begin
   Put_Line (Get_Line & " " & Argument (1));
   Put_Line (Standard_Error, "wrong");
   Set_Exit_Status (3);
end Main;""",
        broken="procedure Main is begin Missing; end Main;",
        compiler_word="undefined",
        main="""with Ada.Text_IO; with More;
procedure Main is begin Ada.Text_IO.Put_Line (Integer'Image (More.Answer) (2 .. 3)); end Main;""",
        files={"more.ads": "package More is Answer : constant Integer := 42; end More;"},
    ),
    "clojure": Example(
        """(println (read-line) (first *command-line-args*))
(flush)
(binding [*out* *err*] (println "wrong"))
(System/exit 3)""",
        main='(load-file "more.clj")\n(println answer)',
        files={"more.clj": "(def answer 42)"},
    ),
    "common-lisp": Example(
        """(format t "~a ~a~%" (read-line) (car (last *posix-argv*)))
(finish-output)
(format *error-output* "wrong~%")
(exit :code 3)""",
        main='(load "more.lisp")\n(format t "~a~%" *answer*)',
        files={"more.lisp": "(defvar *answer* 42)"},
    ),
    "csharp": Example(
        """using System;
class Program {
    static int Main(string[] arguments) {
        Console.WriteLine(Console.ReadLine() + " " + arguments[0]);
        Console.Error.WriteLine("wrong");
        return 3;
    }
}""",
        broken="class Program { static int Main() { return missing; } }",
        compiler_word="does not exist",
        main='class P { static void Main() { System.Console.WriteLine(System.IO.File.ReadAllText("more.txt")); } }',
        files={"more.txt": "42"},
    ),
    "d": Example(
        """import std.stdio, std.string;
int main(string[] arguments) {
    writeln(readln().chomp, " ", arguments[1]);
    stderr.writeln("wrong");
    return 3;
}""",
        broken="int main() { return missing; }",
        compiler_word="undefined identifier",
        main='import std.file, std.stdio;\nvoid main() { writeln(readText("more.txt")); }',
        files={"more.txt": "42"},
    ),
    "elixir": Example(
        """line = IO.gets("") |> String.trim()
IO.puts("#{line} #{hd(System.argv())}")
IO.puts(:stderr, "wrong")
System.halt(3)""",
        main='Code.require_file("more.exs")\nIO.puts(More.answer())',
        files={"more.exs": "defmodule More do\n  def answer, do: 42\nend"},
    ),
    "go-test": Example(
        """package main
import ("bufio"; "fmt"; "os"; "testing")
func TestMain(m *testing.M) {
    line, _ := bufio.NewReader(os.Stdin).ReadString('\\n')
    fmt.Println(line[:5], os.Args[1])
    fmt.Fprintln(os.Stderr, "wrong")
    os.Exit(3)
}""",
        broken='package main\nimport "testing"\nfunc TestIt(t *testing.T) { missing() }',
        compiler_word="undefined: missing",
    ),
    "junit": Example(
        "",
        broken="import org.junit.jupiter.api.Test;\nclass A { @Test void t() { missing(); } }",
        compiler_word="cannot find symbol",
    ),
    "pytest": Example(""),
    "jest": Example(""),
    "haskell": Example(
        """import System.Environment
import System.Exit
import System.IO
main :: IO ()
main = do
  line <- getLine
  [argument] <- getArgs
  putStrLn (line ++ " " ++ argument)
  hPutStrLn stderr "wrong"
  exitWith (ExitFailure 3)""",
        broken="main :: IO ()\nmain = missing",
        compiler_word="not in scope",
        main="import More\nmain :: IO ()\nmain = print answer",
        files={"More.hs": "module More where\nanswer :: Int\nanswer = 42"},
    ),
    "julia": Example(
        """println(readline(), " ", ARGS[1])
println(stderr, "wrong")
exit(3)""",
        main='include("more.jl")\nprintln(answer)',
        files={"more.jl": "answer = 42"},
    ),
    "kotlin": Example(
        """import kotlin.system.exitProcess
fun main(arguments: Array<String>) {
    println("${readLine()} ${arguments[0]}")
    System.err.println("wrong")
    exitProcess(3)
}""",
        broken="fun main() { missing() }",
        compiler_word="unresolved reference",
        main='fun main() { println(java.io.File("more.txt").readText()) }',
        files={"more.txt": "42"},
    ),
    "kotlin-script": Example(
        """println("${readLine()} ${args[0]}")
System.err.println("wrong")
kotlin.system.exitProcess(3)""",
    ),
    "lean4": Example(
        """def main (arguments : List String) : IO UInt32 := do
  let line ← (← IO.getStdin).getLine
  IO.println s!"{line.trim} {arguments.head!}"
  IO.eprintln "wrong"
  return 3""",
        broken="theorem wrong : 1 = 2 := by sorry",
        compiler_word="sorry",
        main='def main : IO Unit := do IO.println (← IO.FS.readFile "more.txt")',
        files={"more.txt": "42"},
    ),
    "ocaml": Example(
        """let () =
  print_endline (read_line () ^ " " ^ Sys.argv.(1));
  prerr_endline "wrong";
  exit 3""",
        broken="let () = missing ()",
        compiler_word="Unbound value",
        main='let () = print_endline (input_line (open_in "more.txt"))',
        files={"more.txt": "42"},
    ),
    "pascal": Example(
        """program Main;
var line: string;
begin
  ReadLn(line);
  WriteLn(line, ' ', ParamStr(1));
  WriteLn(StdErr, 'wrong');
  Halt(3);
end.""",
        broken="program Main; begin Missing; end.",
        compiler_word="not found",
        main="program Main;\nuses more;\nbegin WriteLn(Answer); end.",
        files={"more.pas": "unit more;\ninterface\nconst Answer = 42;\nimplementation\nend."},
    ),
    "r": Example(
        """line <- readLines(file("stdin"), n = 1)
cat(line, commandArgs(trailingOnly = TRUE)[1], "\\n", sep = c(" ", ""))
write("wrong", stderr())
quit(status = 3)""",
        main='source("more.R")\ncat(answer, "\\n", sep = "")',
        files={"more.R": "answer <- 42"},
    ),
    "racket": Example(
        """#lang racket
(printf "~a ~a\\n" (read-line) (vector-ref (current-command-line-arguments) 0))
(eprintf "wrong\\n")
(exit 3)""",
        main='#lang racket\n(require "more.rkt")\n(displayln answer)',
        files={"more.rkt": "#lang racket\n(provide answer)\n(define answer 42)"},
    ),
    "scala": Example(
        """object Program {
  def main(arguments: Array[String]): Unit = {
    println(scala.io.StdIn.readLine() + " " + arguments(0))
    System.err.println("wrong")
    sys.exit(3)
  }
}""",
        broken="object Program extends App { missing() }",
        compiler_word="not found: value missing",
        main='object Program extends App { println(scala.io.Source.fromFile("more.txt").mkString) }',
        files={"more.txt": "42"},
    ),
    "scheme": Example(
        """(use-modules (ice-9 rdelim))
(format #t "~a ~a\\n" (read-line) (cadr (command-line)))
(display "wrong\\n" (current-error-port))
(exit 3)""",
        main='(load "more.scm")\n(display answer)\n(newline)',
        files={"more.scm": "(define answer 42)"},
    ),
    "swift": Example(
        """import Foundation
print(readLine()!, CommandLine.arguments[1])
FileHandle.standardError.write("wrong\\n".data(using: .utf8)!)
exit(3)""",
        broken="missing()",
        compiler_word="cannot find 'missing'",
        main='import Foundation\nprint(try! String(contentsOfFile: "more.txt", encoding: .utf8))',
        files={"more.txt": "42"},
    ),
    "typescript": Example(
        """const line: string = require('fs').readFileSync(0, 'utf8').split('\\n')[0];
console.log(line, process.argv[2]);
console.error('wrong');
process.exit(3);""",
        broken="const answer: number = 'a word';",
        compiler_word="not assignable",
        main="import { answer } from './more';\nconsole.log(answer);",
        files={"more.ts": "export const answer: number = 42;"},
    ),
    "verilog": Example(
        """module main;
  string line, argument;
  integer read;
  initial begin
    read = $fscanf(32'h8000_0000, "%s", line);
    read = $value$plusargs("argument=%s", argument);
    $display("%s %s", line, argument);
    $fdisplay(32'h8000_0002, "wrong");
    $finish_and_return(3);
  end
endmodule""",
        broken="module main; initial missing(); endmodule",
        compiler_word="missing",
        main='module main;\n`include "more.vh"\ninitial $display("%0d", answer);\nendmodule',
        files={"more.vh": "parameter answer = 42;"},
        argument="+argument=an argument",
    ),
}
EXAMPLES = {
    **FURTHER,
    "bash": Example(
        'read -r line\necho "$line $1"\necho wrong >&2\nexit 3',
        main=". ./more.sh\necho $answer",
        files={"more.sh": "answer=42"},
    ),
    "c": Example(
        r"""#include <stdio.h>
int main(int count, char **arguments) {
    char line[99];
    if (!fgets(line, 99, stdin)) return 1;
    printf("%.5s %s\n", line, arguments[1]);
    fputs("wrong\n", stderr);
    return 3;
}""",
        broken="int main(void) { return missing; }",
        compiler_word="undeclared",
        main='#include <stdio.h>\n#include "more.h"\nint main(void) { printf("%d\\n", ANSWER); }',
        files={"more.h": "#define ANSWER 42"},
    ),
    "cpp": Example(
        r"""#include <iostream>
#include <string>
int main(int count, char **arguments) {
    std::string line;
    std::getline(std::cin, line);
    std::cout << line << " " << arguments[1] << std::endl;
    std::cerr << "wrong" << std::endl;
    return 3;
}""",
        broken="int main() { return missing; }",
        compiler_word="not declared",
        main='#include <cstdio>\n#include "parts/more.hpp"\nint main() { std::printf("%d\\n", answer()); }',
        files={"parts/more.hpp": "inline int answer() { return 42; }"},
    ),
    "go": Example(
        """package main
import ("bufio"; "fmt"; "os")
func main() {
    line, _ := bufio.NewReader(os.Stdin).ReadString('\\n')
    fmt.Println(line[:5], os.Args[1])
    fmt.Fprintln(os.Stderr, "wrong")
    os.Exit(3)
}""",
        broken="package main\nfunc main() { missing() }",
        compiler_word="undefined: missing",
    ),
    "java": Example(
        """package some.words;
import java.util.Scanner;
public class Echo {
    public static void main(String[] arguments) {
        boolean asserts = false;
        assert asserts = true;
        if (!asserts) System.exit(4);
        System.out.println(new Scanner(System.in).nextLine() + " " + arguments[0]);
        System.err.println("wrong");
        System.exit(3);
    }
}""",
        broken="public class Main { int answer() { return missing; } }",
        compiler_word="cannot find symbol",
        main="public class Main { public static void main(String[] a) { System.out.println(More.answer()); } }",
        files={"More.java": "class More { static int answer() { return 42; } }"},
    ),
    "javascript": Example(
        """const line = require('fs').readFileSync(0, 'utf8').split('\\n')[0];
console.log(line, process.argv[2]);
console.error('wrong');
process.exit(3);""",
        main="console.log(require('./more').answer)",
        files={"more.js": "exports.answer = 42"},
    ),
    "lua": Example(
        'print(io.read("l") .. " " .. arg[1])\nio.stderr:write("wrong\\n")\nos.exit(3)',
        main='print((require("more")))',
        files={"more.lua": "return 42"},
    ),
    "perl": Example(
        'my $line = <STDIN>; chomp $line; print "$line $ARGV[0]\\n"; print STDERR "wrong\\n"; exit 3;',
        main='require "./more.pl"; print answer(), "\\n";',
        files={"more.pl": "sub answer { 42 } 1;"},
    ),
    "php": Example(
        '<?php echo trim(fgets(STDIN)), " ", $argv[1], "\\n"; fwrite(STDERR, "wrong\\n"); exit(3);',
        main='<?php require "more.php"; echo answer(), "\\n";',
        files={"more.php": "<?php function answer() { return 42; }"},
    ),
    "ruby": Example(
        'puts "#{STDIN.gets.chomp} #{ARGV[0]}"\nSTDERR.puts "wrong"\nexit 3',
        main='require_relative "more"\nputs answer',
        files={"more.rb": "def answer = 42"},
    ),
    "rust": Example(
        """fn main() {
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
    println!("{} {}", line.trim(), std::env::args().nth(1).unwrap());
    eprintln!("wrong");
    std::process::exit(3);
}""",
        broken="fn main() { missing(); }",
        compiler_word="cannot find function",
        main='mod more;\nfn main() { println!("{}", more::ANSWER); }',
        files={"more.rs": "pub const ANSWER: i32 = 42;"},
    ),
    **{
        name: Example(
            PYTHON,
            broken="def f(:\n  pass",
            compiler_word="SyntaxError",
            main="from parts.more import answer\nprint(answer)",
            files={"parts/more.py": "answer = 42"},
        )
        for name in ("python", "python-science", "python-test", "python-generator", "jupyter")
    },
}


# Calls that cannot be made a loop; those of C take 100 MB of stack.
DEEP = {
    "c": """
#include <stdio.h>
struct frame { struct frame *below; char space[2000]; };
static int depth(struct frame *below, int left) {
    struct frame own = {.below = below};
    if (left) return depth(&own, left - 1);
    int found = 0;
    for (struct frame *each = below; each; each = each->below) found++;
    return found;
}
int main(void) { printf("%d\\n", depth(NULL, 50000)); }
""",
    "javascript": "const depth = left => left ? 1 + depth(left - 1) : 0; console.log(depth(50000))",
}
FAILED_ASSERTIONS = {
    "csharp": "class P { static void Main() { System.Diagnostics.Debug.Assert(1 > 2); } }",
    "d": "unittest { assert(1 > 2); }\nvoid main() {}",
    "go-test": 'package main\nimport "testing"\nfunc TestIt(t *testing.T) { t.Error("no") }',
    "junit": "import org.junit.jupiter.api.*;\nclass A { @Test void t() { Assertions.assertEquals(1, 2); } }",
    "jest": 'test("it", () => { const one: number = 1; expect(one).toBe(2); });',
    "java": "class P { public static void main(String[] a) { assert 1 > 2; } }",
    "racket": "#lang racket\n(require rackunit)\n(check-equal? 1 2)",
}


async def find_runtime(fronts: Fronts, name: str) -> pb.Runtime:
    """The runtime; skips the test where it is missing."""
    if name in FURTHER and "PERIGEE_TEST_LANGUAGES" not in os.environ:
        pytest.skip("of `make test-languages`")
    listed = await fronts.grpc.list_runtimes(pb.ListRuntimesRequest())
    for missing in listed.missing:
        if missing.language == name:
            pytest.skip(f"needs {name} in the sandbox: {missing.reason}")
    [runtime] = [runtime for runtime in listed.runtimes if runtime.language == name]
    return runtime


@pytest.mark.parametrize("name", [name for name in NAMES if EXAMPLES[name].program])
async def test_streams_arguments_and_exit_code(fronts: Fronts, name: str) -> None:
    runtime = await find_runtime(fronts, name)
    request = pb.ExecuteRequest(
        language=name, source=EXAMPLES[name].program.encode(), stdin=b"input\nmore\n", args=[EXAMPLES[name].argument]
    )
    response = await fronts.grpc.execute(request, timeout_s=CALL_S)
    assert (response.status, response.exit_code, response.signal) == (pb.STATUS_RUNTIME_ERROR, 3, 0), response
    assert (response.stdout, response.stderr) == (b"input an argument\n", b"wrong\n")
    assert response.HasField("compile") == runtime.compiled
    if name in ("java", "javascript"):  # others need less than their container did before they took its place
        assert response.peak_memory_bytes > 0


@pytest.mark.parametrize(("name", "imported"), [("python", b"False False\n"), ("python-science", b"True True\n")])
async def test_modules_that_a_runtime_names_are_there_before_the_program(
    fronts: Fronts, name: str, imported: bytes
) -> None:
    await find_runtime(fronts, name)
    source = b"import sys; print(*(name in sys.modules for name in ('numpy', 'sympy'))); import numpy, sympy"
    response = await fronts.grpc.execute(pb.ExecuteRequest(language=name, source=source))
    assert (response.status, response.stdout) == (pb.STATUS_OK, imported), response


@pytest.mark.parametrize("name", NAMES)
async def test_the_version_is_reported(fronts: Fronts, name: str) -> None:
    runtime = await find_runtime(fronts, name)
    assert runtime.version[0].isdigit()
    assert runtime.title


@pytest.mark.parametrize("name", [name for name in NAMES if EXAMPLES[name].broken])
async def test_a_compile_error_comes_with_the_compiler_s_words(fronts: Fronts, name: str) -> None:
    await find_runtime(fronts, name)
    broken = EXAMPLES[name].broken.encode()
    request = pb.ExecuteRequest(language=name, source=broken, compile_limits=PATIENT)
    response = await fronts.grpc.execute(request, timeout_s=CALL_S)
    assert response.status == pb.STATUS_COMPILE_ERROR
    assert EXAMPLES[name].compiler_word in (response.compile.stderr + response.compile.stdout).decode()
    assert response.compile.exit_code != 0
    assert (response.stdout, response.stderr) == (b"", b"")


@pytest.mark.parametrize("name", [name for name in NAMES if EXAMPLES[name].main])
async def test_a_program_of_several_files(fronts: Fronts, name: str) -> None:
    await find_runtime(fronts, name)
    files = [pb.File(path=path, content=text.encode()) for path, text in EXAMPLES[name].files.items()]
    request = pb.ExecuteRequest(language=name, source=EXAMPLES[name].main.encode(), files=files)
    response = await fronts.grpc.execute(request, timeout_s=CALL_S)
    assert (response.status, response.stdout, response.stderr) == (pb.STATUS_OK, b"42\n", b""), response


@pytest.mark.parametrize("name", DEEP)
async def test_recursion_is_as_deep_as_memory_allows(fronts: Fronts, name: str) -> None:
    await find_runtime(fronts, name)
    limits = pb.Limits(memory_bytes=256 << 20)
    request = pb.ExecuteRequest(language=name, source=DEEP[name].encode(), limits=limits)
    response = await fronts.grpc.execute(request, timeout_s=CALL_S)
    assert (response.status, response.stdout) == (pb.STATUS_OK, b"50000\n"), response


@pytest.mark.parametrize("name", FAILED_ASSERTIONS)
async def test_a_failed_assertion_fails_the_program(fronts: Fronts, name: str) -> None:
    await find_runtime(fronts, name)
    request = pb.ExecuteRequest(language=name, source=FAILED_ASSERTIONS[name].encode(), compile_limits=PATIENT)
    response = await fronts.grpc.execute(request, timeout_s=CALL_S)
    assert (response.status, response.exit_code > 0) == (pb.STATUS_RUNTIME_ERROR, True), response


async def test_junit_runs_the_tests_of_further_files(fronts: Fronts) -> None:
    await find_runtime(fronts, "junit")
    test = FAILED_ASSERTIONS["junit"].replace("class A", "class ATest").replace("(1, 2)", "(1, A.one())")
    files = [
        pb.File(path="A.java", content=b"class A { static int one() { return 1; } }"),
        pb.File(path="ATest.java", content=test.encode()),
    ]
    response = await fronts.grpc.execute(pb.ExecuteRequest(language="junit", files=files), timeout_s=CALL_S)
    assert (response.status, b"1 tests successful" in response.stdout) == (pb.STATUS_OK, True), response


async def test_jest_runs_typescript(fronts: Fronts) -> None:
    await find_runtime(fronts, "jest")
    test = 'import { expect, test } from "@jest/globals";\n' + FAILED_ASSERTIONS["jest"].replace("toBe(2)", "toBe(1)")
    request = pb.ExecuteRequest(language="jest", source=test.encode(), output_files=["jest-report.json"])
    response = await fronts.grpc.execute(request, timeout_s=CALL_S)
    assert (response.status, b"1 passed" in response.stderr) == (pb.STATUS_OK, True), response
    [report] = response.files
    [suite] = json.loads(report.content)["testResults"]
    assert suite["testFilePath"] == "/box/main.test.ts"
    assert [(case["fullName"], case["status"]) for case in suite["testResults"]] == [("it", "passed")]


async def test_jest_reports_values_that_json_has_not(fronts: Fronts) -> None:
    await find_runtime(fronts, "jest")
    source = b"""test("it", () => expect(1n).toBe(2n));
test("self", () => { const a: any = {}; a.a = a; expect(a).toEqual({}); });
"""
    request = pb.ExecuteRequest(language="jest", source=source, output_files=["jest-report.json"])
    response = await fronts.grpc.execute(request, timeout_s=CALL_S)
    assert (response.status, response.exit_code) == (pb.STATUS_RUNTIME_ERROR, 1), response
    [suite] = json.loads(response.files[0].content)["testResults"]
    assert [case["status"] for case in suite["testResults"]] == ["failed", "failed"]


def test_every_runtime_has_an_example() -> None:
    assert set(EXAMPLES) == set(NAMES)


async def test_a_submission_is_compiled_once(fronts: Fronts) -> None:
    """The compiler writes the time into the program, and a second passes between the tests."""
    await find_runtime(fronts, "c")
    source = b"#include <stdio.h>\n#include <unistd.h>\nint main(void) { puts(__TIME__); usleep(1100000); }"
    tests = [pb.TestCase(stdio=pb.StdioTest(expected_stdout=b"never")) for _ in range(3)]
    response = await fronts.grpc.judge(pb.JudgeRequest(language="c", source=source, tests=tests), timeout_s=CALL_S)
    outputs = {result.output for result in response.results}
    assert len(outputs) == 1
    assert response.compile.exit_code == 0
    assert response.wall_ms >= 3 * 1100 + response.compile.wall_ms
