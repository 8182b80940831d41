"""Code tests of classes, several functions, callbacks, iterators and objects that cross."""

# ruff: noqa: E501

from __future__ import annotations

import textwrap

import pytest

from services.sandbox.agent.code_tests import FAILED, PASSED, SUBMISSION_ERROR, TEST_ERROR
from tests.fixtures.sandbox_code_tests import RunCodeTest

STACK = """
class Stack:
    limit = 3
    def __init__(self, items=()): self.items = list(items)
    def push(self, x):
        self.items.append(x)
        return self
    def pop(self):
        if not self.items: raise Empty("nothing")
        return self.items.pop()
    def __len__(self): return len(self.items)
    def __contains__(self, x): return x in self.items
    def __getitem__(self, i): return self.items[i]
    def __iter__(self): return iter(self.items)
    def __str__(self): return f"Stack{self.items}"
    @classmethod
    def of(cls, *items): return cls(items)
    @property
    def top(self): return self.items[-1]
class Empty(LookupError): pass
"""
VECTOR = """
from dataclasses import dataclass
@dataclass(order=True)
class V:
    x: int
    y: int = 0
    def __add__(self, o): return V(self.x + o.x, self.y + o.y)
    def __rmul__(self, k): return V(k * self.x, k * self.y)
    def __neg__(self): return V(-self.x, -self.y)
def f(x): return V(x)
"""
NODE = "class Node:\n    def __init__(self, v, next=None): self.v, self.next = v, next\n"


@pytest.mark.parametrize(
    ("source", "name", "code"),
    [
        (STACK, "Stack", "s = Stack()\ns.push(1)\ns.push([2])\nassert s.pop() == [2] and len(s) == 1 and s.items == [1]"),
        (STACK, "Stack", "s = Stack([1, 2])\nassert 2 in s and 3 not in s and s[0] == 1 and list(s) == [1, 2]"),
        (STACK, "Stack", "s = candidate.of(1, 2)\nassert str(s) == 'Stack[1, 2]' and s.top == 2 and Stack.limit == 3"),
        (STACK, "Stack", "s = Stack()\nassert not s\ns.items = [4]\nassert s and s.pop() == 4 and isinstance(s, Stack)"),
        (STACK, "Stack", "s = Stack()\nassert s.push(1) is s and hasattr(s, 'push') and not hasattr(s, 'gone')"),
        (STACK, "Stack", "try:\n    Stack().pop()\n    assert False\nexcept Empty as e: assert 'nothing' in str(e)"),
        (STACK, "Stack", "try:\n    Stack().pop()\n    assert False\nexcept LookupError: pass"),
        (STACK, "Stack", "def check(candidate):\n    s = candidate([3])\n    assert s.pop() == 3"),
        (VECTOR, "V", "assert V(1, 2) == V(1, 2) != V(2, 2) and V(1) < V(2) and {V(1)} and -V(1) == V(-1)"),
        (VECTOR, "V", "assert V(1) + V(2, 3) == V(3, 3) and 2 * V(1, 2) == V(2, 4) and (V(1) + V(1)).x == 2"),
        (VECTOR, "f", "assert f(3) == V(3) and f(3).x == 3 and [f(1)] == [V(1)] and f(1) != V(2)"),
        (VECTOR, "f", "@dataclass\nclass V:\n    x: int\n    y: int = 0\nassert f(3) == V(3) and V(3) == f(3) != V(4)"),
        ("def f(x): return g(x) + 1\ndef g(x): return 2 * x", "f", "assert f(1) == 3 and g(f(1)) == 6"),
        ("def enc(x): return x[::-1]\ndef dec(x): return x[::-1]", "enc, dec", "assert dec(enc('ab')) == 'ab'"),
        ("class Solution:\n    def f(self, x: List[int]) -> int: return max(x)", "Solution().f", "assert candidate([1, 2]) == 2"),
        ("class Solution:\n    def f(self, x): return x", "f", "assert f(1) == 1 and Solution().f(2) == 2"),
        ("def f(x):\n    for i in range(x): yield i", "f", "assert list(f(300)) == list(range(300)) and next(f(1)) == 0"),
        ("def f():\n    i = 0\n    while True:\n        yield i\n        i += 1", "f", "g = f()\nassert [next(g), next(g)] == [0, 1]"),
        ("def f(x):\n    yield 1\n    raise ValueError('a')", "f", "g = f(1)\nnext(g)\ntry: next(g)\nexcept ValueError: pass\nelse: assert 0"),
        ("def f(x): return map(str, x)", "f", "assert [*f([1, 2])] == ['1', '2']"),
        ("def f(g, x): return [g(i) for i in x]", "f", "assert f(lambda i: i + 1, [1, 2]) == [2, 3] and f(str, [1]) == ['1']"),
        ("def f(g, *x): return g(*x)", "f",
         "import operator, functools\nfrom decimal import Decimal\nassert f(operator.add, 1, 2) == 3 == f(functools.reduce, max, [1, 3])\n"
         "assert f(str.upper, 'a') == 'A' and f(Decimal, '0.5') == Decimal('0.5') and f([1].__len__) == 1"),
        ("def f(a, b):\n    print(a.readline(), *a, file=b, sep='|')\n    return a", "f",
         "from io import StringIO\na, b, c = StringIO('1\\n2\\n3'), StringIO(), object()\nassert f(a, b) is a and b.getvalue() == '1\\n|2\\n|3\\n'"),
        ("def f(x): return {x: [x]}", "f", "x = object()\nassert f(x) == {x: [x]} and f(x) != {object(): [x]}"),
        ("import asyncio\nasync def f(x):\n    await asyncio.sleep(0)\n    return x", "f",
         "import asyncio\nasync def g(): return await asyncio.gather(f(1), f([2]))\nassert asyncio.run(g()) == [1, [2]] and asyncio.run(f(3)) == 3"),
        ("def f(g): return lambda x: g(g(x))", "f", "assert f(lambda x: 2 * x)(3) == 12 and f(abs)(-1) == 1"),
        ("def f(g):\n    try: g()\n    except KeyError as e: return e.args", "f", "def g(): raise KeyError('k')\nassert f(g) == ('k',)"),
        ("def f(g, n): return n if n == 0 else g(n - 1)", "f", "def g(n): return f(g, n)\nassert f(g, 9) == 0"),
        ("def f(x): return sum(x)", "f", "assert f(iter([1, 2])) == 3 and f(i for i in (1, 2)) == 3"),
        ("def f(x): x.append(1)", "f", "def g(x): f(x); return x\nassert g([]) == [1]"),
        ("def f(n):\n    last = None\n    while n: n.next, last, n = last, n, n.next\n    return last", "f",
         "a = Node(1)\nb = Node(2, a)\nr = f(b)\nassert r is a and a.next is b and b.next is None and r == a"),
        ("def f(n):\n    n.v = Made(n.v)\n    n.new = [n]\nclass Made:\n    def __init__(s, v): s.v = v", "f",
         "n = Node(1)\nf(n)\nassert n.v.v == 1 and n.new == [n]"),
        ("def f(d, a, b): return d[a, b] + d[b, a]", "f", "a, b = Node(1), Node(2)\nassert f({(a, b): 1, (b, a): 2}, a, b) == 3"),
        ("def f(n): return n.double() + n.twice", "f",
         "class N(Node):\n    def double(self): return 2 * self.v\n    twice = property(lambda s: 2 * s.v)\nassert f(N(4)) == 16"),
        ("class Node:\n    def __init__(s, v): s.v = v\n    def up(s): return s.v + 1\ndef f(n): return n.up()", "f", "assert f(Node(1)) == 2"),
        ("def f(x): return ListNode(x, ListNode(x + 1))", "f", "r = f(1)\nassert (r.val, r.next.val, r.next.next) == (1, 2, None)"),
        ("from collections import *\ndef f(x): return Counter(x)", "f",
         "from collections import Counter, deque\nassert f('aab') == Counter('aab') == f(deque('aab')) == {'a': 2, 'b': 1}"),
        ("import numpy as np\ndef f(x): return np.array(x) * 2", "f",
         "import numpy as np\nassert (f([1, 2]) == [2, 4]).all() and np.allclose(f(np.ones(2)), 2) and f([1]).shape == (1,)"),
        ("from enum import Enum\nclass C(Enum):\n    A = 1\ndef f(): return C.A", "f", "assert f() is C.A and f() == C.A and f().value == 1"),
    ],
)  # fmt: skip
def test_tests_that_pass(code_test: RunCodeTest, source: str, name: str, code: str) -> None:
    setup = f"from dataclasses import dataclass\n{NODE}" if "Node" in code and "class Node" not in source else ""
    run = code_test(source, code, name=name, setup=setup or "from dataclasses import dataclass")
    assert (run.ending, run.message) == (PASSED, "")


SLY = """
class Sly:
    def __init__(self, *a): pass
    def always(self, *a): return True
    __eq__ = __contains__ = __lt__ = __gt__ = __le__ = __ge__ = startswith = issubset = isdigit = always
    def nothing(self, *a): return 0
    __sub__ = __rsub__ = __abs__ = __mod__ = __hash__ = __neg__ = nothing
    def __getattr__(self, name): return self.always
    def __bool__(self): return False
class Number(int, metaclass=type("M", (type,), {})):
    __eq__ = lambda self, other: True
    __hash__ = None
def f(*x): return Sly()
"""


@pytest.mark.parametrize(
    "code",
    [
        "assert f(1) == 4",
        "assert 4 == f(1)",
        "assert [f(1)] == [4]",
        "assert {'k': f(1)} == {'k': 4}",
        "assert f(1) in [4, 5]",
        "assert 4 in f(1)",
        "assert abs(f(1) - 4) < 1e-6",
        "assert abs(4 - f(1)) < 1e-6",
        "assert f(1) < 4",
        "assert 3 < f(1) < 5",
        "assert f(1) % 2 == 0",
        "assert f(1).startswith('a')",
        "assert f(1).issubset({1})",
        "assert f(1).isdigit()",
        "assert not f(1)",
        "assert f(1) == (1, 2)",
        "assert f(1) == {4}",
        "assert all(a == b for a, b in zip([f(1)], [4]))",
        "assert set([f(1)]) == {4}",
        "assert sorted([f(1)]) == [4]",
        "from unittest import TestCase\nTestCase().assertEqual(f(1), 4)",
        "from unittest import TestCase\nTestCase().assertAlmostEqual(f(1), 4)",
        "import math\nassert math.isclose(f(1), 4)",
        "import numpy as np\nassert np.isclose(f(1), 4)",
        "class Other:\n    def __eq__(self, o): return False\nassert f(1) == Other()",
        "from dataclasses import dataclass\n@dataclass\nclass Sly:\n    x: int\nassert f(1) == Sly(4)",
        "assert f(1).x == 4",
        "assert f(1)() == 4",
        "assert f(1) == Number(4)",
    ],
)
def test_objects_forge_no_result(code_test: RunCodeTest, code: str) -> None:
    assert code_test(SLY, code).ending in (FAILED, SUBMISSION_ERROR)


@pytest.mark.parametrize("body", ["import os; os._exit(0)", "raise SystemExit", "return 3", "return 'x' * (1 << 20)"])
def test_an_object_that_cannot_be_printed_is_the_submission_s_fault(code_test: RunCodeTest, body: str) -> None:
    source = f"class Trap:\n    def __str__(self): {body}\n    __repr__ = __str__\ndef f(): return Trap()"
    assert code_test(source, "result = f()\nassert result == 4, result").ending == FAILED


@pytest.mark.parametrize("code", ["assert enc(1) == 1", "assert dec(1) == 1"])
def test_each_of_several_functions_must_be_there(code_test: RunCodeTest, code: str) -> None:
    run = code_test("def enc(x): return x", code, name="enc, dec")
    assert run.loaded == ("load_error", "the function dec is not defined")


@pytest.mark.parametrize(
    ("source", "code", "ending"),
    [
        ("def helper(x): return True\ndef f(x): return x", "def helper(x): return x == 2\nassert helper(f(1))", FAILED),
        ("def len(x): return 2\ndef f(x): return x", "assert len(f([1])) == 2", FAILED),
        ("def setup(x): return True\ndef f(x): return x", "assert setup(f(1))", FAILED),
        (
            "def isclose(*x): return True\ndef f(x): return x",
            "from math import isclose\nassert isclose(f(1), 2)",
            FAILED,
        ),
        (
            "def f(g): return g.__globals__['expected']",
            "expected = 4\nassert f(lambda: 0) == expected",
            SUBMISSION_ERROR,
        ),
        ("def f(n): return n._secret()", "class N:\n    def go(self): return 1\nassert f(N()) == 1", SUBMISSION_ERROR),
        (
            "def f(g):\n    g('globals().update(expected=5)')\n    return 5",
            "expected = 4\nassert f(exec) == expected",
            FAILED,
        ),
        ("def f(x): return x", "import threading\nf(threading.Lock())", TEST_ERROR),
    ],
)
def test_what_belongs_to_the_test_stays_the_test_s(code_test: RunCodeTest, source: str, code: str, ending: str) -> None:
    assert code_test(source, code, setup="def setup(x): return x == 2").ending == ending


FORGE = textwrap.dedent("""
    import os
    def send(text): os.write(int(os.environ["REPLIES"]), text.encode() + b"\\n")
    def ask(do, *arguments):
        items = ",".join(arguments)
        send('{"dict":["id",1,"do","%s","arguments",[%s],"keywords",{"dict":[]}]}' % (do, items))
""")


@pytest.mark.parametrize(
    "body",
    [
        'ask("call", "{\\"object\\":1}", "1")',
        'ask("getattr", "{\\"object\\":1}", "\\"__globals__\\"")',
        'ask("method", "{\\"object\\":1}", "\\"__init__\\"")',
        'ask("call", "1")',
        'ask("call")',
        'ask("call", "{\\"object\\":7}")',
        'send(\'{"dict":["id",1,"do",7,"arguments",7,"keywords",7]}\')',
        'send(\'{"dict":["new",[{"tuple":[1,"function","f",null]}]]}\')',
        'send(\'{"dict":["new",[{"tuple":[-9,"module","os",null]}]]}\')',
        'send(\'{"dict":["new",[7]]}\')',
        'send(\'{"dict":["id",1,"state",{"dict":[1,{"dict":["v",4]}]}]}\')',
        'send(\'{"dict":["id",1,"state",{"dict":[-1,{"dict":["v",4]}]}]}\')',
    ],
)
def test_forged_requests_reach_nothing(code_test: RunCodeTest, body: str) -> None:
    run = code_test(f"{FORGE}\ndef f(n):\n    {body}\n    return 5", f"{NODE}assert f(Node(1)) == 4")
    assert run.ending in (FAILED, SUBMISSION_ERROR)


def test_methods_of_the_test_s_objects_cannot_be_replaced(code_test: RunCodeTest) -> None:
    code = "class N:\n    v = 1\n    def ok(self): return self.v == 5\nn = N()\nn.v = 1\nf(n)\nassert n.v == 4 and not n.ok()"
    assert code_test("def f(n):\n    n.ok = True\n    n.v = 4", code).ending == PASSED
