"""Code tests, with the submission and the test in processes of their own."""

from __future__ import annotations

import io
import textwrap
from typing import Any

import pytest

from services.sandbox.agent.calls import serve_submission
from services.sandbox.agent.code_tests import (
    FAILED,
    PASSED,
    SUBMISSION_ERROR,
    TEST_ERROR,
    run_code_test,
    wait_until_loaded,
)
from services.sandbox.agent.peers import ChannelBrokenError, SubmissionError
from services.sandbox.agent.stand_ins import CallerPeer
from services.sandbox.agent.values import decode, encode
from tests.fixtures.sandbox_code_tests import RunCodeTest

DOUBLE = "def f(x): return 2 * x"


@pytest.mark.parametrize(
    ("source", "code", "ending"),
    [
        (DOUBLE, "assert f(2) == 4", PASSED),
        (DOUBLE, "assert candidate(x='a') == 'aa'", PASSED),
        (DOUBLE, "def check(candidate):\n    assert candidate(2) == 4", PASSED),
        (DOUBLE, "def check(candidate):\n    assert candidate(2) == 5", FAILED),
        (DOUBLE, "assert f(2) == 4\nassert f(3) == 7", FAILED),
        (DOUBLE, "assert f((1, {2.5: None})) == (1, {2.5: None}) * 2", PASSED),
        ("def f(x): return (x,)", "assert f(1) == [1]", FAILED),
        ("def f(x): return True", "assert f(1) is True and f(2) == 1", PASSED),
        ("def f(x): return 1.0", "assert f(1) == 1", PASSED),
        ("def f(x): print('noise'); return x", "assert f(1) == 1", PASSED),
        ("import sys\ndef f(n): return n if n == 0 else f(n - 1)", "assert f(500) == 0", PASSED),
        ("n = 0\ndef f():\n    global n\n    n += 1\n    return n", "assert [f(), f(), f()] == [1, 2, 3]", PASSED),
        ("class F:\n    def __call__(self, x): return x\nf = F()", "assert f(1) == 1", PASSED),
    ],
)
def test_endings(code_test: RunCodeTest, source: str, code: str, ending: str) -> None:
    run = code_test(source, code)
    assert (run.loaded, run.ending) == (("loaded", ""), ending)
    assert run.status == 0
    assert (run.message == "") == (ending == PASSED)


KEYWORDS = "self, cls, target, kind, name, operation, instance, method, arguments, keywords"
NAMES = KEYWORDS.split(", ")
GIVEN = ", ".join(f"{name}={number}" for number, name in enumerate(NAMES))
TAKES_ALL = f"""
def f(**given): return given
class Box:
    def __init__(box, {KEYWORDS}): box.sum = self + method
    def add(box, {KEYWORDS}): return box.sum + keywords
def run(caller): return caller.take({GIVEN})
"""
CALLER = """
class Caller:
    def take(caller, **given): return given
"""


@pytest.mark.parametrize(
    "code",
    [
        f"assert f({GIVEN}) == dict(zip({NAMES}, range({len(NAMES)})))",
        f"assert Box({GIVEN}).add({GIVEN}) == {NAMES.index('method') + NAMES.index('keywords')}",
        f"assert run(Caller()) == dict(zip({NAMES}, range({len(NAMES)})))",
    ],
)
def test_keyword_arguments_may_have_any_name(code_test: RunCodeTest, code: str) -> None:
    run = code_test(TAKES_ALL, code, name="f, Box, run", setup=CALLER)
    assert (run.ending, run.message) == (PASSED, "")


def test_a_failed_assertion_is_reported_with_its_line(code_test: RunCodeTest) -> None:
    run = code_test(DOUBLE, "x = 1\ndef check(c):\n    assert c(2) == 5, 'two\\nlines'")
    assert run.message == "AssertionError: two\nlines at `assert c(2) == 5, 'two\\nlines'`, line 3"
    assert run.calls == 1
    assert len(code_test(DOUBLE, "assert f(2) == 5, 'x' * 5000").message) == 1000
    assert code_test(DOUBLE, "assert f(2) == 5, f(10 ** 5000)").message.startswith("AssertionError at ")


SETUP = """
import math
def helper(x):
    return x + 1
def f(x):
    '''Doubles; the body is left to the submission.'''
def check(wrong, number, of, arguments):
    pass
"""


def test_the_setup_s_helpers_are_there_and_its_function_is_not(code_test: RunCodeTest) -> None:
    run = code_test(DOUBLE, "assert f(helper(1)) == math.floor(4.5)", setup=SETUP)
    assert (run.ending, run.calls) == (PASSED, 1)


def test_check_that_the_test_defines_wins_over_the_setup_s(code_test: RunCodeTest) -> None:
    run = code_test(DOUBLE, "def check(candidate):\n    assert candidate(1) == 3", setup=SETUP)
    assert run.ending == FAILED


def test_a_function_may_be_named_check(code_test: RunCodeTest) -> None:
    run = code_test("def check(x): return x", "assert check(1) == 1", name="check")
    assert (run.ending, run.calls) == (PASSED, 1)


@pytest.mark.parametrize(
    ("raised", "caught"),
    [
        ("ValueError('a', 2)", "ValueError as e: assert e.args == ('a', 2)"),
        ("KeyError('a')", "KeyError as e: assert str(e) == \"'a'\""),
        ("ZeroDivisionError()", "ArithmeticError as e: assert e.args == ()"),
        ("FileNotFoundError(2, 'gone')", "FileNotFoundError as e: assert e.errno == 2"),
        ("type('Mine', (ValueError,), {})('a')", "ValueError as e: assert str(e) == 'a'"),
        ("type('Mine', (Exception,), {})('a')", "RuntimeError as e: assert 'Mine: a' in str(e)"),
        ("type('Mine', (BaseException,), {})('a')", "RuntimeError as e: assert 'Mine: a' in str(e)"),
        ("UnicodeDecodeError('utf-8', b'a', 0, 1, 'b')", "UnicodeDecodeError as e: assert e.object == b'a'"),
        ("ValueError(object())", "ValueError as e: assert 'object at' in str(e)"),
        ("ValueError('x' * 10000)", "ValueError as e: assert len(str(e)) == 1000"),
        ("ExceptionGroup('a', [ValueError()])", "RuntimeError as e: assert 'ExceptionGroup: a' in str(e)"),
        ("SystemExit(3)", "SystemExit as e: assert e.code == 3"),
        ("KeyboardInterrupt", "KeyboardInterrupt: pass"),
        ("StopIteration(1)", "RuntimeError as e: assert 'StopIteration' in str(e)"),
        ("GeneratorExit", "RuntimeError: pass"),
        ("AssertionError('a')", "AssertionError as e: assert str(e) == 'a'"),
    ],
)
def test_tests_catch_what_a_submission_raises(code_test: RunCodeTest, raised: str, caught: str) -> None:
    source = f"def f(x): raise {raised}"
    run = code_test(source, f"try:\n    f(1)\n    assert False\nexcept {caught}")
    assert (run.ending, run.message) == (PASSED, "")
    uncaught = code_test(source, "f(1)")
    assert uncaught.ending == SUBMISSION_ERROR
    assert uncaught.message
    other = code_test(source, "try:\n    f(1)\nexcept BufferError: pass\nassert True")
    assert other.ending == SUBMISSION_ERROR


def test_a_loop_of_the_test_cannot_be_ended_by_an_exception(code_test: RunCodeTest) -> None:
    """An iterator that raises StopIteration looks like one that has run through."""
    run = code_test("def f(x): raise StopIteration", "assert all(map(f, [1, 2])) and list(map(f, [1])) == []")
    assert run.ending == SUBMISSION_ERROR


@pytest.mark.parametrize(
    ("value", "code"),
    [
        ("None", "assert abs(f(1) - 3) < 1e-6"),
        ("None", "assert f(1)[0] == 1"),
        ("[]", "assert f(1)[0] == 1"),
        ("'a'", "assert int(f(1)) == 1"),
        ("0", "assert 1 / f(1) == 1"),
        ("{}", "assert f(1)['k'] == 1"),
        ("10 ** 5000", "assert str(f(1)) == '1'"),
        ("1 << 60", "assert len('x' * f(1)) == 1"),
    ],
)
def test_values_that_the_test_cannot_go_on_with_are_the_submission_s_fault(
    code_test: RunCodeTest, value: str, code: str
) -> None:
    """Else returning nonsense would be better than returning what is wrong."""
    run = code_test(f"def f(x): return {value}", code)
    assert run.ending == FAILED
    assert run.message.startswith("what was returned led to ")


def test_a_function_that_nobody_defines_is_the_submission_s_to_define(code_test: RunCodeTest) -> None:
    for code in ("assert undefined(f(1)) == 2", "undefined.name", "x = undefined ()"):
        run = code_test(DOUBLE, code)
        assert run.ending == SUBMISSION_ERROR
        assert "NameError" in run.message


def test_what_an_answer_leads_to_is_no_fault_of_the_test(code_test: RunCodeTest) -> None:
    source = "def f(x): return ['missing', '/missing', 'import missing'][x]"
    for code in ("eval(f(0))", "open(f(1))", "exec(f(2))", "assert f(0) == 4, unknown_name"):
        run = code_test(source, code)
        assert (run.ending, run.calls) == (FAILED, 1)


@pytest.mark.parametrize(
    ("setup", "code", "message"),
    [
        (
            "",
            "assert f(1) == undefined",
            "is not defined at `assert f(1) == undefined`, line 1",
        ),
        ("", "f(1)\nimport nothing_like_it", "ModuleNotFoundError"),
        ("", "f(1)\nopen('/nothing/like/it')", "FileNotFoundError"),
        ("", "f(1)\nraise SystemExit", "SystemExit"),
        ("", "f(1", "SyntaxError"),
        ("", "f(1)\n\0", "null bytes"),
        ("", "assert len(3) == f(1)", "TypeError: object of type 'int' has no len()"),
        ("", "assert False, 'always'", "AssertionError: always"),
        ("", "", "the test does not call f"),
        ("", "def check(candidate): pass", "the test does not call f"),
        ("", "def f(x): return 2 * x\nassert f(1) == 2", "the test does not call f"),
        ("", "def check(): f(1)", "TypeError: check() takes 0 positional arguments"),
        ("", "f(open('/dev/null'))", "an argument cannot be handed over: TextIOWrapper is not a plain type"),
        ("import sys", "try: f(sys)\nexcept BaseException: pass", "module is not a plain type"),
        ("", "x = []\nx.append(x)\nf(x)", "nested deeper"),
        ("import nothing_like_it", "f(1)", "the setup code raised ModuleNotFoundError"),
        ("1 +", "f(1)", "the setup code raised SyntaxError"),
        ("raise SystemExit(0)", "f(1)", "the setup code raised SystemExit"),
    ],
)
def test_faults_of_the_test_say_nothing_of_the_submission(
    code_test: RunCodeTest, setup: str, code: str, message: str
) -> None:
    run = code_test(DOUBLE, code, setup=setup)
    assert run.ending == TEST_ERROR
    assert message in run.message


@pytest.mark.parametrize(
    ("source", "kind", "message"),
    [
        ("def f(x:", "compile_error", "SyntaxError"),
        ("def f(x): \0", "compile_error", "null bytes"),
        ("x = 1 / 0", "load_error", "ZeroDivisionError: division by zero"),
        ("raise SystemExit(0)", "load_error", "SystemExit: 0"),
        ("def g(x): pass", "load_error", "the function f is not defined"),
        ("f = 3", "load_error", "the function f is not defined"),
        ("class E(Exception):\n    def __str__(self): raise self\nraise E", "load_error", "E"),
    ],
)
def test_submissions_that_do_not_load(code_test: RunCodeTest, source: str, kind: str, message: str) -> None:
    run = code_test(source, "assert f(1) == 2")
    assert run.loaded[0] == kind
    assert message in run.loaded[1]
    assert (run.ending, run.status) == ("", 0)


def test_submissions_have_a_module_and_no_features_of_ours(code_test: RunCodeTest) -> None:
    source = """
    from dataclasses import dataclass
    @dataclass
    class Point:
        x: int
    def f():
        import inspect, sys
        return [Point.__annotations__["x"] is int, sys.modules[__name__].f is f, "def f" in inspect.getsource(f)]
    """
    assert code_test(textwrap.dedent(source), "assert f() == [True, True, True]").ending == PASSED


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("object()", "object is not a plain type"),
        ("[__import__('sys')]", "module is not a plain type"),
        ("'x' * (1 << 20)", "takes more than"),
        ("nested(200)", "nested deeper than 100 levels"),
        ("type('numpy_like', (), {'__module__': 'numpy', 'tolist': lambda self: 1 / 0})()", "ZeroDivisionError"),
    ],
)
def test_values_that_are_not_plain_do_not_pass(code_test: RunCodeTest, value: str, reason: str) -> None:
    source = f"""
def nested(n): return [nested(n - 1)] if n else 1
def f(x): return {value}
"""
    run = code_test(source, "assert f(1) == 4")
    assert run.ending == SUBMISSION_ERROR
    assert run.message.startswith("the submission returned a value that cannot be compared: ")
    assert reason in run.message
    assert code_test(source, "try: f(1)\nexcept RuntimeError: pass").ending == PASSED


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("x.sort()", "x = [3, 1, 2]\nf(x)\nassert x == [1, 2, 3]"),
        ("x.update(b=2); del x['a']", "x = {'a': 1}\nf(x)\nassert x == {'b': 2}"),
        ("x.add(2); x.remove(1)", "x = {1}\nf(x=x)\nassert x == {2}"),
        ("x[0].append(1); x[1]['k'].pop()", "a, b = [], [5]\nx = [a, {'k': b}]\nf(x)\nassert (a, b) == ([1], [])"),
        ("x.reverse()", "a, b = [1], [2]\nx = [a, b, 3]\nf(x)\nassert x == [3, [2], [1]]"),
        ("x[0].append(1)", "a = []\nx = (a, 2)\nf(x)\nassert a == [1]"),
        ("x.clear()", "a = [1]\nx = {'k': a}\nf(x)\nassert x == {} and a == [1]"),
        ("x[0] = 1.0", "x = [1]\nf(x)\nassert type(x[0]) is float"),
        ("x = [1]", "x = [2]\nf(x)\nassert x == [2]"),
        ("x.append(__import__('sys'))", "x = [1]\nf(x)\nassert x == [1]"),
        ("x.append(1); return x", "x = []\nassert f(x) == [1] == x"),
    ],
)
def test_arguments_change_as_the_submission_changes_them(code_test: RunCodeTest, body: str, code: str) -> None:
    run = code_test(f"def f(x):\n    {body}", code)
    assert (run.ending, run.message) == (PASSED, "")


FORGE = "import os\nwrite = lambda data: os.write(int(os.environ['REPLIES']), data)\n"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import os\ndef f(x): os._exit(0)", "the submission's process has ended"),
        ("import os, signal\ndef f(x): os.kill(os.getpid(), signal.SIGKILL)", "the submission's process has ended"),
        (FORGE + "def f(x): write(b'nonsense\\n'); return 4", "a reply is malformed"),
        (FORGE + "def f(x): write(b'[]\\n'); return 4", "a reply is malformed"),
        (FORGE + "def f(x): write(b'\\xff\\n'); return 4", "a reply is malformed"),
        (FORGE + "def f(x): write(b'x' * 60000 + b'x' * 60000); return 4", "a reply is too long"),
        (FORGE + "def f(x): write(b'{\"dict\":['); os._exit(0)", "the submission's process has ended"),
    ],
)
def test_a_broken_channel_passes_no_test(code_test: RunCodeTest, source: str, message: str) -> None:
    for code in ("assert f(2) == 4", "try: f(2)\nexcept Exception: pass", "try: f(2)\nexcept BaseException: pass"):
        run = code_test(source, code)
        assert run.ending == SUBMISSION_ERROR
        assert run.message.startswith(message)


def test_what_a_submission_defines_is_no_fault_of_the_test(code_test: RunCodeTest) -> None:
    """Else one could have it that it is never judged."""
    check = "def check(candidate):\n    assert candidate(2) == 4"
    assert code_test("class f(Exception): pass", check).ending == FAILED
    nothing = encode({"loaded": True, "names": {}}).encode() + b"\n"
    assert code_test(FORGE + f"write({nothing!r})\nos._exit(0)", check).ending == FAILED
    new = encode({"new": [(-1, "function", "f", None)]}).encode() + b"\n"
    names = b'{"dict":["loaded",true,"names",{"dict":["f",{"object":-1},"__annotations__",{"object":-1}]}]}\n'
    run = code_test(FORGE + f"write({new + names!r})\nos._exit(0)", "y: int = 4\nassert f(2) == y")
    assert run.ending == SUBMISSION_ERROR


def test_a_test_may_exit_where_an_answer_is_wrong(code_test: RunCodeTest) -> None:
    code = "if f(2) != 4:\n    raise SystemExit(1)"
    assert [code_test(source, code).ending for source in (DOUBLE, "def f(x): return x")] == [PASSED, FAILED]


def test_forged_replies_to_other_calls_are_skipped(code_test: RunCodeTest) -> None:
    forged = encode({"id": 1, "value": 4, "changed": {}}) + "\n"
    source = FORGE + f"def f(x): write({forged.encode()!r}); return 5"
    assert code_test(source, "assert f(2) == 4").ending == FAILED
    assert code_test(source, "assert f(2) == 5").ending == PASSED


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"raised": 3},
        {"raised": [], "message": 10**5000, "arguments": 4},
        {"raised": ["__import__", "eval", "print", None, 10**5000], "message": None, "arguments": ("os",)},
        {"raised": ["SubmissionError"], "message": "a", "arguments": ()},
        {"raised": ["UnicodeDecodeError"], "message": "a", "arguments": (1, 2, 3, 4, 5)},
        {"refused": ["a"]},
    ],
)
def test_any_reply_without_a_value_is_an_exception(fields: dict[str, Any]) -> None:
    class Replies(io.BytesIO):
        """Answers the request that was written last."""

        def readline(self, size: int | None = -1, /) -> bytes:
            identity = decode(requests.getvalue().decode().splitlines()[-1])["id"]
            return (encode({"id": identity, **fields}) + "\n").encode()

    requests = io.BytesIO()
    peer = CallerPeer(requests, Replies(), max_reply_bytes=1 << 16)
    with pytest.raises(SubmissionError):
        peer.request("call", 1)


@pytest.mark.parametrize(
    "changed", [{5: [1]}, {0: "text"}, {0: {"a": 1}}, {"x": [1]}, {None: 1}, {0.5: []}, [1], None, {1: [7]}]
)
def test_changes_that_do_not_fit_change_nothing(changed: Any) -> None:
    class Replies(io.BytesIO):
        """Answers the request that was written last."""

        def readline(self, size: int | None = -1, /) -> bytes:
            identity = decode(requests.getvalue().decode().splitlines()[-1])["id"]
            return (encode({"id": identity, "value": 1, "changed": changed}) + "\n").encode()

    requests = io.BytesIO()
    arguments: tuple[Any, ...] = ([3], "text")
    assert CallerPeer(requests, Replies(), max_reply_bytes=1 << 16).request("call", *arguments, k=1) == 1
    assert arguments == ([3], "text")


@pytest.mark.parametrize(
    "greeting", [b"", b"{}\n", b'{"dict":[]}\n', b'{"dict":["loaded"]}\n', b"[1]\n", b'"loaded"\n']
)
def test_a_process_that_does_not_tell_whether_it_has_loaded(greeting: bytes) -> None:
    with pytest.raises(ChannelBrokenError):
        wait_until_loaded(CallerPeer(io.BytesIO(), io.BytesIO(greeting), max_reply_bytes=1 << 16))


def test_calls_from_threads_come_one_at_a_time(code_test: RunCodeTest) -> None:
    code = """
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(8) as pool:
    assert list(pool.map(f, range(200))) == [2 * x for x in range(200)]
"""
    run = code_test(DOUBLE, code)
    assert (run.ending, run.message, run.calls) == (PASSED, "", 200)


def test_the_channel_s_end_ends_the_submission_s_side() -> None:
    replies = io.BytesIO()
    serve_submission(b"def f(x): return x", "f", io.BytesIO(), replies, path="x.py", max_reply_bytes=1 << 16)
    new, loaded = replies.getvalue().decode().splitlines()
    assert decode(new) == {"new": [(-1, "function", "f", None)]}
    assert decode(loaded, {-1: "f"}.__getitem__) == {"loaded": True, "names": {"f": "f"}}


def test_a_deep_value_that_is_handed_back_is_no_fault_of_the_test() -> None:
    deep: Any = 1
    for _ in range(99):
        deep = [deep]

    class Replies(io.BytesIO):
        """Answers each request with the value."""

        def readline(self, size: int | None = -1, /) -> bytes:
            identity = decode(requests.getvalue().decode().splitlines()[-1], lambda number: number)["id"]
            return (encode({"id": identity})[:-2] + f',"value",{encode(deep)}]}}\n').encode()

    requests = io.BytesIO()
    peer = CallerPeer(requests, Replies(), max_reply_bytes=1 << 16)
    report = run_code_test("", "f([f(1)])", "f", peer, {"f": lambda x: peer.request("call", x)})
    assert (report.ending, report.calls) == (FAILED, 2)
