"""Attacks on what passes between a test and a submission, on archives, reports, cells and the interfaces of others."""

from __future__ import annotations

from typing import Any

import pytest

from perigee.sandbox.v1 import sandbox_pb2 as pb
from tests.faults.attack_runs import assert_serves
from tests.fixtures.sandbox_fronts import Fronts

REFUSED = {
    pb.TEST_VERDICT_WRONG_ANSWER,
    pb.TEST_VERDICT_RUNTIME_ERROR,
    pb.TEST_VERDICT_TIME_LIMIT,
    pb.TEST_VERDICT_MEMORY_LIMIT,
    pb.TEST_VERDICT_OUTPUT_LIMIT,
}
LIMITS = pb.Limits(wall_ms=2000, cpu_ms=2000, memory_bytes=128 << 20)
F_IS_6 = "assert f(3) == 6"
# writes lines of its own to the test
SEND = """
import json, os
def send(*lines):
    data = memoryview("".join(json.dumps(line) + "\\n" for line in lines).encode())
    while data:
        data = data[os.write(4, data):]
def wrap(**fields):
    return {"dict": [part for pair in fields.items() for part in pair]}
def tuple_(*items):
    return {"tuple": list(items)}
def f(x):
    return 0
"""
MANY_CLASSES = """
send(wrap(new=[tuple_(-%d - i, "exception", f"e{i}", []) for i in range(15_000)]))
"""

# source, code, name of the function: none of the submissions computes anything
CODE_TESTS: dict[str, tuple[str, str, str]] = {
    "own object with operators, from a method": (
        "class Solution:\n    def f(self, x): return self\n    def __sub__(self, o): return self\n"
        "    def __abs__(self): return self\n    def __lt__(self, o): return True",
        "assert abs(Solution().f(3) - 6) < 1e-6",
        "Solution",
    ),
    "own object with operators, in a list": (
        "class Solution:\n    def f(self, x): return [self]\n    def __sub__(self, o): return self\n"
        "    def __abs__(self): return self\n    def __lt__(self, o): return True",
        "assert abs(Solution().f(3)[0] - 6) < 1e-6",
        "Solution",
    ),
    "own object with operators, from a property": (
        "class Solution:\n    def __init__(self): self.total = self\n    def __sub__(self, o): return self\n"
        "    def __abs__(self): return self\n    def __lt__(self, o): return True",
        "s = Solution()\nassert abs(s.total - 6) < 1e-6",
        "Solution",
    ),
    "own object that contains everything": (
        "class Solution:\n    def f(self, x): return self\n    def __contains__(self, o): return True",
        "assert 'six' in Solution().f(3)",
        "Solution",
    ),
    "own object that starts with everything": (
        "class Solution:\n    def f(self, x): return self\n    def startswith(self, o): return True",
        "assert Solution().f(3).startswith('six')",
        "Solution",
    ),
    "own object that is greater and less": (
        "class Solution:\n    def f(self, x): return self\n    def __ge__(self, o): return True\n    __le__ = __ge__",
        "assert 6 <= Solution().f(3) <= 6",
        "Solution",
    ),
    "object with equals": (
        "class C:\n    def equals(self, o): return True\ndef f(x): return C()",
        "assert f(3).equals(6)",
        "f",
    ),
    "object with compare": (
        "class C:\n    def compare(self, o): return 0\ndef f(x): return C()",
        "assert f(3).compare(6) == 0",
        "f",
    ),
    "syntax for eval": ("def f(x): return ')'", "assert eval(str(f(3))) == 6", "f"),
    "name of no file": ("def f(x): return 'absent'", "assert open(str(f(3))).read() == '6'", "f"),
    "name of no module": ("def f(x): return 'absent'", "assert __import__(f'os.{f(3)}')", "f"),
    "name for eval": ("def f(x): return 'absent'", "assert eval(f(3)) == 6", "f"),
    "names of the interpreter": (
        SEND + "send(wrap(new=[tuple_(-1, 'function', '__annotations__', None), tuple_(-2, 'function', 'f', None)]))\n"
        "send(wrap(loaded=True, names=wrap(__annotations__={'object': -1}, f={'object': -2})))",
        "expected: int = 6\nassert f(3) == expected",
        "f",
    ),
    "name of a built-in function": (
        "def f(x): return 0\ndef abs(x): return 0\ndef isinstance(a, b): return True\ndef all(x): return True",
        "assert all([abs(f(3) - 6) < 1e-6])\nassert isinstance(f(3), str)",
        "f",
    ),
    "much before it has loaded": (
        SEND + "".join(MANY_CLASSES % (10**6 * i) for i in range(1, 4)),
        "x = bytearray(90 << 20)\n" + F_IS_6,
        "f",
    ),
    "requests that are none": (SEND + "def f(x): send(wrap(id=1, do='call')); return 0", F_IS_6, "f"),
    "calls of what is not offered": (
        SEND + "def f(x): send(wrap(id=1, do='call', arguments=['print', 6], keywords=wrap())); return 0",
        F_IS_6,
        "f",
    ),
    "imports asked of the test": (
        SEND + "def f(x): send(wrap(new=[tuple_(-9, 'import', 'system', 'os')])); return 0",
        F_IS_6,
        "f",
    ),
    "objects under the test's numbers": (
        SEND + "def f(x): send(wrap(new=[tuple_(1, 'function', 'f', None)])); return 0",
        "assert f(lambda: 6) == 6",
        "f",
    ),
    "state of an object that is none of the test's": (
        SEND + "def f(x): send(wrap(state=wrap(**{'7': wrap(a=1)}))); return 0",
        F_IS_6,
        "f",
    ),
    "methods of the test's objects": (
        "def f(x):\n    cells = type(x).run.__closure__\n"
        "    peer = next(c.cell_contents for c in cells if hasattr(c.cell_contents, 'request'))\n"
        "    for name in ('__getattribute__', '__init__', '__reduce_ex__', '__dir__'):\n"
        "        try: return peer.request('method', x, name, 'secret')\n        except Exception: pass\n    return 0",
        "class Case:\n    __slots__ = ()\n    secret = 6\n    def run(self): pass\nassert f(Case()) == 6",
        "f",
    ),
    "attributes for methods": (
        "def f(x):\n    x.expected = lambda: 0\n    x.__class__ = int\n    return 0",
        "class Case:\n    def expected(self): return 6\ncase = Case()\nassert f(case) == case.expected()",
        "f",
    ),
    "equality of the test's class": (
        "def f(x):\n    type(x).__eq__ = lambda *_: True\n    return x",
        "class Case:\n    def __init__(self, n): self.n = n\n    def __eq__(self, o): return self.n == o.n\n"
        "assert f(Case(3)) == Case(6)",
        "f",
    ),
    "class of the test's name": (
        "class Case:\n    def __eq__(self, o): return True\ndef f(x): return Case()",
        "from dataclasses import dataclass\n@dataclass\nclass Case:\n    n: int\nassert f(3) == Case(6)",
        "f",
    ),
    "calls back without an end": (
        "def f(g): return g(g)",
        "def g(h): return f(h)\nassert f(g) == 6",
        "f",
    ),
    "callback that is called from another thread": (
        "import threading\ndef f(g):\n    t = threading.Thread(target=g, daemon=True)\n    t.start()\n    return g()",
        "import time\ndef g():\n    return 3\nassert f(g) == 6",
        "f",
    ),
    "traceback of a callback": (
        "def f(g):\n    try: g()\n    except Exception as error:\n"
        "        frame = error.__traceback__\n        while frame:\n"
        "            if 'expected' in frame.tb_frame.f_locals: return frame.tb_frame.f_locals['expected']\n"
        "            frame = frame.tb_next\n    return 0",
        "def g():\n    expected = 6\n    raise ValueError\nassert f(g) == 6",
        "f",
    ),
    "exception for a skipped test": (
        "class SkipTest(Exception): pass\nSkipTest.__module__ = 'unittest.case'\ndef f(x): raise SkipTest('x')",
        "import unittest\ntry: assert f(3) == 6\nexcept unittest.SkipTest: pass",
        "f",
    ),
    "exit of the test": ("def f(x): raise SystemExit(0)", F_IS_6, "f"),
    "exception that ends a loop": (
        "def f(x): raise StopIteration",
        "assert all(each == 6 for each in map(f, [3, 4]))",
        "f",
    ),
    "class with the name of an assertion": (
        "class AssertionError(Exception): pass\ndef f(x): raise AssertionError",
        "try:\n    f(3)\nexcept AssertionError:\n    raise\nexcept Exception as e:\n    assert e.args == (6,)",
        "f",
    ),
    "halves of characters": ("def f(x): return '\\ud800'", "assert f(3) == 6, f(3)", "f"),
    "halves of characters in an exception": ("def f(x): raise ValueError('\\ud800')", F_IS_6, "f"),
    "halves of characters in a name": (
        "class X(Exception): pass\nX.__name__ = '\\ud800'\ndef f(x): raise X",
        F_IS_6,
        "f",
    ),
    "endless iterator": ("def f(x):\n    while True: yield bytes(1 << 18)", "assert list(f(3)) == [6]", "f"),
    "huge range": ("def f(x): return range(10**12)", "assert list(f(3)) == [6]", "f"),
    "number that takes long to print": ("def f(x): return 1 << 3_000_000", "assert f(3) == 6, f'{f(3):d}'", "f"),
    "array of the shape of a page": (
        SEND + "def f(x): send(wrap(id=0, value={'ndarray': ['<f8', [2**30, 2**30], {'bytes': ''}]})); return 0",
        F_IS_6,
        "f",
    ),
    "named tuple with code for a field": (
        SEND + "def f(x): send(wrap(id=0, value={'namedtuple': ['T', ['a=exit(0)'], [1]]})); return 0",
        F_IS_6,
        "f",
    ),
    "cycle": ("def f(x):\n    a = [6]\n    a.append(a)\n    return a", "assert f(3) == [6]", "f"),
    "aliases": (
        "def f(a, b):\n    b.append(6)\n    a.extend(b)\n    return 0",
        "assert f([], []) == 6",
        "f",
    ),
}  # fmt: skip


async def judge(fronts: Fronts, source: str, tests: list[pb.TestCase], **fields: Any) -> pb.JudgeResponse:
    request = pb.JudgeRequest(language="python", source=source.encode(), tests=tests, limits=LIMITS, **fields)
    return await fronts.grpc.judge(request, timeout_s=100)


@pytest.mark.parametrize("attack", CODE_TESTS)
async def test_a_submission_does_not_outwit_a_code_test(fronts: Fronts, attack: str) -> None:
    source, code, name = CODE_TESTS[attack]
    test = pb.TestCase(code=pb.CodeTest(code=code))
    response = await judge(fronts, source, [test], function_name=name)
    assert response.verdict in REFUSED, response


async def test_it_serves_after_all(fronts: Fronts) -> None:
    await assert_serves(fronts.grpc)
