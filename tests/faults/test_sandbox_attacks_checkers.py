"""Attacks of submissions on checkers and interactors that are written without care, of checkers and interactors on the
service, and by what a program says of its own end.
"""

# ruff: noqa: E501

from __future__ import annotations

from typing import Any

import pytest

from perigee.sandbox.v1 import sandbox_pb2 as pb
from tests.faults.attack_runs import assert_serves
from tests.fixtures.sandbox import skip_without_kernel, stdio_tests
from tests.fixtures.sandbox_fronts import Fronts

WRONG, RIGHT, BROKEN = pb.TEST_VERDICT_WRONG_ANSWER, pb.TEST_VERDICT_ACCEPTED, pb.TEST_VERDICT_UNJUDGEABLE
LIMITS = pb.Limits(wall_ms=3000, cpu_ms=2000, memory_bytes=128 << 20, output_bytes=1 << 20, file_bytes=4 << 20)
SHORT = pb.Limits(wall_ms=400, cpu_ms=400, memory_bytes=64 << 20, output_bytes=1 << 16, file_bytes=1 << 20)
READ = "import sys, time\noutput = open('output.txt').read()\nright = output.split() == ['42']\n"
PASS = "sys.exit(0 if right else 1)"
# a checker without care, and what a submission prints that computes nothing
SUBMISSIONS: dict[str, tuple[str, str]] = {
    "words of points": (READ + "print(output, file=sys.stderr)\n" + PASS, "print('points 1')"),
    "words of a percentage": (READ + "print(output, file=sys.stderr)\n" + PASS, "print('partially correct (100)')"),
    "words of an uncaught exception": (
        READ + "print(output, file=sys.stderr)\n" + PASS,
        "print('Traceback (most recent call last):')",
    ),
    "half a character": (READ + PASS, "import os; os.write(1, b'42 \\xff\\xfe')"),
    "characters that are no text": (READ + PASS, "import os; os.write(1, b'42\\0')"),
    "number that is none": ("out = float(open('output.txt').read())\nraise SystemExit(abs(out - 42) > 1)", "print('x')"),
    "not a number": ("out = float(open('output.txt').read())\nraise SystemExit(not abs(out - 42) < 1)", "print('nan')"),
    "number of a million digits": ("raise SystemExit(int(open('output.txt').read()) != 42)", "print('9' * 999_999)"),
    "index that is none": ("xs = range(99)\nraise SystemExit(xs[int(open('output.txt').read())] != 42)", "print(99)"),
    "brackets for a parser": (
        "import ast\nraise SystemExit(ast.literal_eval(open('output.txt').read()) != 42)",
        "print('[' * 100_000)",
    ),
    "pattern that takes long": (
        "import re\nout = open('output.txt').read()\nraise SystemExit(not re.fullmatch('(a+)+b|42\\n', out))",
        "print('a' * 40)",
    ),
    "size of an array": (READ + "bytes(int(output) << 20)\n" + PASS, "print(4000)"),
    "time to sleep": (READ + "time.sleep(int(output) - 42)\n" + PASS, "print(1000)"),
    "name of a device": (READ + "open(output.strip()).read() if not right else 0\n" + PASS, "print('/dev/zero')"),
    "number of a process": (READ + "import os\nos.kill(int(output), 9) if not right else 0\n" + PASS, "print(0)"),
    "code for a format": (READ + "print(output.format(sys), file=sys.stderr)\n" + PASS, "print('{0.exit}')"),
    "files of the checker's names": (
        READ + PASS,
        "import os\nos.mkdir('feedback')\nfor n in ('output.txt', 'answer.txt', 'feedback/score.txt', 'nextpass.in'):\n"
        "    open(n, 'w').write('42')",
    ),
    "message on standard error": (READ + PASS, "import sys\nprint('points 1', file=sys.stderr)"),
    "output after the end": (
        READ + PASS,
        "import os, time\nif os.fork() == 0:\n    time.sleep(0.05)\n    os.write(1, b'42')\nos._exit(0)",
    ),
}  # fmt: skip
SLOW = ("pattern that takes long", "time to sleep", "name of a device")


def program(source: str, limits: pb.Limits = LIMITS, **fields: Any) -> pb.Program:
    return pb.Program(language="python", source=source.encode(), limits=limits, **fields)


async def check(fronts: Fronts, source: str, checker: pb.Checker, **fields: Any) -> pb.JudgeResponse:
    request = pb.JudgeRequest(language="python", source=source.encode(), checker=checker, limits=LIMITS, **fields)
    request.tests.extend(stdio_tests([(b"21", b"42")]))
    return await fronts.grpc.judge(request, timeout_s=100)


@pytest.mark.parametrize("attack", SUBMISSIONS)
async def test_a_submission_does_not_outwit_a_checker(fronts: Fronts, attack: str) -> None:
    checker, source = SUBMISSIONS[attack]
    limits = SHORT if attack in SLOW else LIMITS
    response = await check(fronts, source, pb.Checker(program=program(checker, limits)))
    assert (response.verdict, response.points) == (WRONG, 0), response


async def test_the_same_checkers_accept_what_is_right(fronts: Fronts) -> None:
    for attack in ("words of points", "not a number", "pattern that takes long", "size of an array"):
        checker = SUBMISSIONS[attack][0]
        response = await check(fronts, "print(42)", pb.Checker(program=program(checker)))
        assert response.verdict == RIGHT, (attack, response)


LEFT = "import os, sys\nos.makedirs('feedback', exist_ok=True)\n"
KATTIS = pb.CHECKER_PROTOCOL_KATTIS
# a checker of its own that attacks, its protocol, and the verdicts that it may have
CHECKERS: dict[str, tuple[str, pb.CheckerProtocol.ValueType, set[int]]] = {
    "score by a link": (LEFT + "os.symlink('/etc/passwd', 'feedback/score.txt')\nsys.exit(42)", KATTIS, {RIGHT, BROKEN}),
    "score by a pipe": (LEFT + "os.mkfifo('feedback/score.txt')\nsys.exit(42)", KATTIS, {RIGHT, BROKEN}),
    "score by a folder": (LEFT + "os.mkdir('feedback/score.txt')\nsys.exit(42)", KATTIS, {RIGHT, BROKEN}),
    "score without bounds": (LEFT + "open('feedback/score.txt', 'w').write('1e999')\nsys.exit(42)", KATTIS, {BROKEN}),
    "score below 0": (LEFT + "open('feedback/score.txt', 'w').write('-1')\nsys.exit(42)", KATTIS, {BROKEN}),
    "message with holes": (
        LEFT + "os.truncate(os.open('feedback/judgemessage.txt', os.O_RDWR | os.O_CREAT), 3 << 20)\nsys.exit(43)",
        KATTIS,
        {WRONG},
    ),
    "message by a link to the folder": (
        LEFT + "os.unlink('feedback/judgemessage.txt'); os.rmdir('feedback'); os.symlink('/', 'feedback')\nsys.exit(43)",
        KATTIS,
        {WRONG},
    ),
    "points that are none": ("import sys\nprint('points nan', file=sys.stderr)\nsys.exit(7)", 0, {BROKEN}),
    "points without bounds": ("import sys\nprint('points 1e400', file=sys.stderr)\nsys.exit(7)", 0, {BROKEN}),
    "more points than there are": ("import sys\nprint('points 5', file=sys.stderr)\nsys.exit(7)", 0, {BROKEN}),
    "message of a megabyte": ("import sys\nprint('x' * 1_000_000, file=sys.stderr)\nsys.exit(1)", 0, {WRONG}),
    "message of half characters": ("import os\nos.write(2, b'\\xed\\xa0\\x80' * 9999)\nos._exit(1)", 0, {WRONG}),
    "children that stay": (
        "import os\nfor _ in range(9):\n    if os.fork() == 0:\n        os.setsid()\n        while True: pass\nos._exit(1)",
        0,
        {WRONG},
    ),
    "working folder that is gone": ("import shutil, sys\nshutil.rmtree('/box', True)\nsys.exit(1)", 0, {WRONG}),
    "folders in each other": (
        "import os, sys\nfor _ in range(900):\n    os.mkdir('d'); os.chdir('d')\nsys.exit(1)",
        0,
        {WRONG},
    ),
}  # fmt: skip


@pytest.mark.parametrize("attack", CHECKERS)
async def test_a_checker_that_attacks_fails_alone(fronts: Fronts, attack: str) -> None:
    source, protocol, verdicts = CHECKERS[attack]
    checker = pb.Checker(program=program(source, protocol=protocol))
    response = await check(fronts, "print(42)", checker)
    assert response.verdict in verdicts, response
    assert "root:" not in response.results[0].reason
    assert len(response.results[0].reason) <= 2000


@pytest.mark.parametrize(
    "leave",
    [
        "os.symlink('answer.txt', 'nextpass.in')",
        "os.mkfifo('nextpass.in')",
        "os.truncate(os.open('nextpass.in', os.O_RDWR | os.O_CREAT), 4 << 20)",
        "open('nextpass.in', 'w').write('21')",
    ],
)
async def test_passes_end(fronts: Fronts, leave: str) -> None:
    """A checker that always asks for another pass, by whatever it leaves, is bounded by the request."""
    checker = pb.Checker(program=program(f"import os\n{leave}\nos._exit(0)"))
    response = await check(fronts, "import sys\nprint(len(sys.stdin.read()))", checker, passes=3)
    assert response.verdict in (RIGHT, WRONG, BROKEN), response


TRUSTS = "import sys\nsaid = sys.stdin.readline()\n"
# an interactor without care, and a submission that computes nothing
DIALOGUES: dict[str, tuple[str, str]] = {
    "half a line": (TRUSTS + "sys.exit(said != '42\\n')", "print('42', end='')"),
    "line without an end": (TRUSTS + "sys.exit(said != '42\\n')", "while True: print('4' * 9999, end='')"),
    "child that talks on": (
        TRUSTS + "sys.exit(said != '42\\n')",
        "import os\nif os.fork() == 0:\n    while True: os.write(1, b'41\\n')\nos._exit(0)",
    ),
    "number that is none": (TRUSTS + "sys.exit(int(said) != 42)", "print('x')"),
    "words of an exit code": (TRUSTS + "sys.exit(said)", "print(0)"),
    "end of the input": (TRUSTS + "sys.exit(said != '42\\n')", "import os\nos.close(1)\nos.read(0, 1)"),
    "own pipe for another": (TRUSTS + "sys.exit(said != '42\\n')", "import os\nos.dup2(0, 1)\nos.write(1, b'42\\n')"),
    "time to sleep": (TRUSTS + "import time\ntime.sleep(int(said))\nsys.exit(1)", "print(1000)"),
}


@pytest.mark.parametrize("attack", DIALOGUES)
async def test_a_submission_does_not_outwit_an_interactor(fronts: Fronts, attack: str) -> None:
    interactor, source = DIALOGUES[attack]
    tests = [pb.TestCase(interactive=pb.InteractiveTest(input=b"21", answer=b"42"))]
    request = pb.JudgeRequest(language="python", source=source.encode(), tests=tests, limits=SHORT)
    request.interactor.CopyFrom(program(interactor, SHORT))
    response = await fronts.grpc.judge(request, timeout_s=100)
    held = {WRONG, pb.TEST_VERDICT_RUNTIME_ERROR, pb.TEST_VERDICT_TIME_LIMIT, pb.TEST_VERDICT_OUTPUT_LIMIT}
    assert response.verdict in held, response


# says that the program ends, as what runs it does, while it goes on
END = "import os, sys\nsys._getframe(1).f_globals['_ending'][:2] = b'\\x01\\x00'\n"
ENDINGS = {
    "goes on without a word": (END + "os.closerange(1, 3)\nwhile True: pass", b""),
    "goes on to write": (END + "while True: os.write(1, b'x')", None),
    "leaves children": (END + "for _ in range(4):\n    if os.fork() == 0:\n        while True: pass\nos.closerange(1, 3)", b""),
    "holds memory": ("x = bytearray(64 << 20)\n" + END + "os.closerange(1, 3)\nwhile True: pass", b""),
    "ignores signals": (
        "import signal\nfor n in range(1, 32):\n    try: signal.signal(n, signal.SIG_IGN)\n    except (OSError, ValueError): pass\n"
        + END + "os.closerange(1, 3)\nwhile True: pass",
        b"",
    ),
}  # fmt: skip


@pytest.mark.parametrize("attack", ENDINGS)
async def test_a_program_that_says_it_ends_is_ended(fronts: Fronts, attack: str) -> None:
    source, stdout = ENDINGS[attack]
    request = pb.ExecuteRequest(language="python", source=source.encode(), limits=LIMITS, output_files=["f"])
    for _ in range(5):  # its end by itself comes in some of them before it is ended
        response = await fronts.grpc.execute(request)
        assert (response.status, response.exit_code) == (pb.STATUS_OK, 0), response
        assert stdout is None or response.stdout == stdout
    await assert_serves(fronts.grpc)


# cells of a notebook, the last of them an honest one where the kernel is alive
NOTEBOOKS: dict[str, list[str]] = {
    "kernel that stays": ["import os\nif os.fork() == 0:\n    os.setsid()\n    while True: pass", "print(6 * 7)"],
    "flood": ["while True: print('x' * 9999)", "print(6 * 7)"],
    "flood of displays": ["from IPython.display import display\nwhile True: display({'a/b': 'x' * 9999}, raw=True)"],
    "displays that are none": [
        "from IPython.display import display\nclass D:\n    def _repr_mimebundle_(self, **_): return {'a': object(), 1: b'x'}\n"
        "display(D())",
        "print(6 * 7)",
    ],
    "representation that ends it": ["class R:\n    def __repr__(self):\n        import os\n        os._exit(0)\nR()"],
    "shell that stays": ["!sleep 1000 >/dev/null 2>&1 &", "print(6 * 7)"],
    "hooks of the kernel": [
        "get_ipython().events.register('post_run_cell', lambda *_: 1 / 0)\nget_ipython().run_cell = None",
        "print(6 * 7)",
    ],
    "files without an end": ["with open('f', 'wb') as f:\n    while True: f.write(bytes(1 << 20))", "print(6 * 7)"],
}  # fmt: skip


@pytest.mark.parametrize("attack", NOTEBOOKS)
async def test_a_notebook_harms_itself_alone(fronts: Fronts, attack: str) -> None:
    await skip_without_kernel(fronts.grpc)
    body = {"cells": NOTEBOOKS[attack], "cell_timeout": 3, "total_timeout": 10, "memory_limit_MB": 512}
    answered = await fronts.http.post("/run_jupyter", json=body)
    assert answered.status_code == 200, answered.text
    assert answered.json()["status"] in ("Success", "Failed"), answered.text
    assert len(answered.content) < 64 << 20
    await assert_serves(fronts.grpc)
