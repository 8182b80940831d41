"""The codec of plain values."""

from __future__ import annotations

import enum
import json
import math
import subprocess
import sys
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from services.sandbox.agent.values import MAX_DEPTH, decode, encode

ROOT = Path(__file__).parents[2]
TEXTS = st.text(st.characters(exclude_categories=[]), max_size=8)
HASHABLE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**200), 2**200)
    | st.floats()
    | st.complex_numbers()
    | TEXTS
    | st.binary(max_size=8)
    | st.builds(range, st.integers(), st.integers(), st.integers(1, 9))
    | st.decimals(allow_nan=False)
    | st.fractions(),
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.frozensets(inner, max_size=3),
    max_leaves=8,
)
VALUES = st.recursive(
    HASHABLE | st.sets(HASHABLE, max_size=3),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(HASHABLE, inner, max_size=4)
    ),
    max_leaves=20,
)
NAMES = {"deque", "Counter", "OrderedDict", "defaultdict", "dict_keys", "date", "timedelta", "type"}
PLAIN = {type(None), bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict, range, Decimal, Fraction}


def hex_length(value: int) -> str:
    return str(len(hex(value)))


def canonical(value: Any) -> Any:
    """A value that equals another one's only where types and contents are the same, nan and -0.0 included."""
    kind = type(value)
    if kind in (list, tuple):
        return (kind, [canonical(item) for item in value])
    if kind in (set, frozenset):
        return (kind, sorted(repr(canonical(item)) for item in value))
    if kind is dict:
        return (kind, [(canonical(key), canonical(item)) for key, item in value.items()])
    if kind is int and abs(value) >> 64:
        return (kind, hex(value))
    return (kind, repr(value))


@settings(deadline=None)
@given(VALUES)
@example("\ud800")
@example("\ud83d\ude00")  # two halves, which are not the character
@example({-0.0: [math.nan, -math.inf]})
@example({math.nan, float("nan"), 1})
@example(complex(-0.0, math.nan))
@example({1: True, (1, (True, 1.0)): {frozenset({1})}})
def test_values_come_out_as_they_went_in(value: Any) -> None:
    line = encode(value)
    assert line.isascii()
    assert "\n" not in line
    assert canonical(decode(line)) == canonical(value)


@pytest.mark.parametrize("value", [10**5000, -(10**100_000), 2**63, -(2**63) - 1, 2**63 - 1, -(2**63)], ids=hex_length)
def test_integers_of_any_size(value: int) -> None:
    assert decode(encode([value])) == [value]


def test_the_order_of_dictionaries_is_kept() -> None:
    assert list(decode(encode({"b": 1, "a": 2, 3: 4}))) == ["b", "a", 3]


Point = namedtuple("Point", "x y")


class Typed(NamedTuple):
    """A named tuple of the other make."""

    x: int


class Colour(enum.IntEnum):
    """An integer that prints as something else."""

    RED = 1


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (np.float64(0.5), 0.5),
        (np.int8(-3), -3),
        (np.bool_(True), True),
        (np.str_("a"), "a"),
        (np.datetime64("2020-01-01"), date(2020, 1, 1)),
        (np.array([(1, 2), None], dtype=object), [(1, 2), None]),
        ({np.int64(1): (np.float64(2),)}, {1: (2.0,)}),
        (Colour.RED, 1),
        (type("Names", (list,), {})(["a"]), ["a"]),
        (type("Table", (OrderedDict,), {})(a=1), {"a": 1}),
    ],
)
def test_what_is_more_than_plain_becomes_plain(value: Any, plain: Any) -> None:
    assert canonical(decode(encode(value))) == canonical(plain)


@pytest.mark.parametrize(
    "value",
    [
        OrderedDict(b=1, a=2),
        Counter("aab"),
        defaultdict(list, a=[1]),
        defaultdict(None, a=1),
        deque([1, deque([2])], 4),
        bytearray(b"a"),
        Point(1, [2]),
        Typed(1),
        {"a": 1}.items(),
        {"a": 1}.keys(),
        date(2020, 2, 29),
        datetime(2020, 2, 29, 1, 2, 3, 4, UTC),
        time(1, 2),
        timedelta(-1, 2, 3),
        int,
        ValueError,
    ],
    ids=str,
)
def test_other_types_of_the_library_stay_what_they_are(value: Any) -> None:
    found = decode(encode([value]))[0]
    assert found == value
    assert type(found).__name__ == type(value).__name__
    for attribute in ("maxlen", "default_factory", "_fields", "tzinfo"):
        assert getattr(found, attribute, None) == getattr(value, attribute, None)


@pytest.mark.parametrize(
    "value", [np.eye(2), np.array(["a", "bc"]), np.zeros((0, 3), np.int8), np.array("2020", "M8[D]"), np.array(1j)]
)
def test_arrays_stay_arrays(value: Any) -> None:
    found = decode(encode(value))
    assert (found.dtype, found.shape) == (value.dtype, value.shape)
    assert (found == value).all()
    assert found.flags.writeable


def test_objects_cross_by_number() -> None:
    numbers: list[Any] = []

    def refer(value: Any) -> int:
        numbers.append(value)
        return len(numbers)

    first, second = object(), object()
    line = encode({"a": [first], (1, 2): second}, None, refer)
    assert decode(line, lambda number: numbers[number - 1]) == {"a": [first], (1, 2): second}
    for wrong in ('{"object":"a"}', '{"object":1.0}', '{"object":true}', '{"object":[1]}'):
        with pytest.raises(ValueError, match="not a plain value"):
            decode(wrong, lambda number: None)
    with pytest.raises(ValueError, match="not a plain value"):
        decode(line)


class AlwaysEqual:
    """Passes every comparison that it takes part in."""

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0


def subclass(kind: type) -> Any:
    return type("Sly", (AlwaysEqual, kind), {})()


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (AlwaysEqual(), "AlwaysEqual"),
        *((subclass(kind), "Sly") for kind in (complex, Decimal, Fraction)),
        (object(), "object"),
        (iter([]), "list_iterator"),
        ((each for each in ()), "generator"),
        (len, "builtin_function_or_method"),
        (AlwaysEqual, "type"),
        (..., "ellipsis"),
        (ValueError("a"), "ValueError"),
        (np.longdouble(1), "longdouble"),
    ],
)
def test_everything_else_is_refused_by_name_wherever_it_is(value: Any, name: str) -> None:
    for holder in (value, [value], (1, value), {"a": value}, deque([value])):
        with pytest.raises(TypeError, match=name):
            encode(holder)


@pytest.mark.parametrize("kind", [int, float, str, bytes, list, tuple, set, frozenset, dict, deque, Point])
def test_nothing_of_a_subclass_crosses_but_its_contents(kind: Any) -> None:
    made = type("Sly", (AlwaysEqual, kind), {})
    found = decode(encode(made(1, 2) if kind is Point else made()))
    assert type(found) is (tuple if kind is Point else kind)
    assert found != "anything"


def nested(depth: int) -> Any:
    value: Any = 1
    for level in range(depth):
        value = [value] if level % 2 else {"k": value}
    return value


def test_nesting_has_a_bound_on_both_sides() -> None:
    deep = nested(MAX_DEPTH)
    assert decode(encode(deep)) == deep
    with pytest.raises(ValueError, match="nested deeper than 100"):
        encode([deep])
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(ValueError, match="nested deeper than 100"):
        encode(loop)
    for text in ("[" * 101 + "]" * 101, '{"tuple":[' * 101 + "]}" * 101):
        with pytest.raises(ValueError, match="nested deeper than 100"):
            decode(text)


def test_a_line_has_a_bound_where_the_caller_sets_one() -> None:
    assert encode("abc", 5) == '"abc"'
    for value in ("abcd", [1, 2, 3], 2**100):
        with pytest.raises(ValueError, match="takes more than 5 characters"):
            encode(value, 5)
    bomb: list[Any] = []
    for _ in range(90):
        bomb = [bomb, bomb]
    with pytest.raises(ValueError, match="takes more than 1000 characters"):
        encode(bomb, 1000)


TAGS = [
    *("int", "float", "complex", "str", "bytes", "tuple", "set", "frozenset", "dict", "range", "Decimal", "Fraction"),
    *("deque", "Counter", "namedtuple", "defaultdict", "dict_keys", "date", "timedelta", "builtin", "object"),
]
TAGGED = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["", "nan", "1f", "-0", "AA==", "1", "sNaN"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(st.sampled_from([*TAGS, "object", "__class__"]), inner).map(lambda pair: dict([pair]))
        | st.dictionaries(st.sampled_from(TAGS), inner, max_size=2)
    ),
    max_leaves=12,
)


def check_is_plain(value: Any) -> None:
    assert type(value) in PLAIN or type(value).__name__ in NAMES or hasattr(value, "_fields")
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list | tuple | set | frozenset):
        for item in value:
            check_is_plain(item)


@settings(deadline=None)
@given(st.text() | TAGGED.map(json.dumps) | st.text('[]{}",:01-eaintuplse', max_size=40))
def test_any_text_gives_a_plain_value_or_a_value_error(text: str) -> None:
    try:
        value = decode(text)
    except ValueError:
        return
    check_is_plain(value)
    assert canonical(decode(encode(value))) == canonical(value)


@settings(deadline=None)
@given(VALUES, st.data())
def test_damaged_lines_give_a_plain_value_or_a_value_error(value: Any, data: Any) -> None:
    line = encode(value)
    start = data.draw(st.integers(0, len(line)))
    damaged = line[:start] + data.draw(st.text('[]{}",:01-e', max_size=2)) + line[start + 1 :]
    try:
        check_is_plain(decode(damaged))
    except ValueError:
        return


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[" * 100_000,
        '{"tuple":' * 100_000,
        "NaN",
        "-Infinity",
        "1e999",
        "9" * 5000,
        '{"int":"0x1f"}',
        '{"int":"1_0"}',
        '{"int":31}',
        '{"int":"\\u0661"}',
        '{"float":"1"}',
        '{"float":["nan"]}',
        '{"float":{"tuple":[]}}',
        '{"complex":[1,2]}',
        '{"complex":[1.0]}',
        '{"range":[1,2,0]}',
        '{"builtin":"eval"}',
        '{"builtin":"type"}',
        '{"deque":[1]}',
        '{"deque":[-1,[]]}',
        '{"namedtuple":["a b",["x"],[1]]}',
        '{"namedtuple":["a",["__x"],[1]]}',
        '{"namedtuple":["a",["x"],[]]}',
        '{"defaultdict":["eval",{"dict":[]}]}',
        '{"ndarray":["|O",[1],{"bytes":"AAAAAAAAAAA="}]}',
        '{"ndarray":["<i8",[2],{"bytes":"AAAAAAAAAAA="}]}',
        '{"date":"2020"}',
        '{"timedelta":[1,2]}',
        '{"range":[1,2]}',
        '{"range":[true,2,3]}',
        '{"tuple":"ab"}',
        '{"tuple":{"list":[]}}',
        '{"set":[[1]]}',
        '{"set":[{"Decimal":"sNaN"}]}',
        '{"dict":[1]}',
        '{"dict":[[1],2]}',
        '{"bytes":"A"}',
        '{"bytes":"AA==\\n"}',
        '{"str":"/w=="}',
        '{"Decimal":"abc"}',
        '{"Decimal":1}',
        '{"Fraction":[1,0]}',
        '{"Fraction":[1.5,1]}',
        '{"Fraction":[1,{"int":"' + "f" * 10_000 + '"}]}',
        '{"unknown":1}',
        "{}",
        '{"tuple":[],"list":[]}',
        '{"set":[' + ",".join(f'{{"int":"{k * (2**61 - 1):x}"}}' for k in range(2000)) + "]}",
        '{"dict":[' + ",".join(f'{{"int":"{k * (2**61 - 1):x}"}},0' for k in range(2000)) + "]}",
    ],
)
def test_what_no_encoder_writes_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        decode(text)


def test_large_sets_and_fractions_are_taken() -> None:
    for value in (set(range(5000)), dict.fromkeys(map(float, range(5000))), {(n, n) for n in range(2000)}):
        assert decode(encode(value)) == value
    with pytest.raises(ValueError, match="a fraction"):
        encode(Fraction(1, 2**20_000))


def test_the_codec_imports_the_standard_library_alone() -> None:
    """It runs in boxes, by whichever interpreter is there."""
    program = "import sys; from services.sandbox.agent import code_tests; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-S", "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert {name.partition(".")[0] for name in found.stdout.split()} - sys.stdlib_module_names == {
        "__main__",
        "services",
    }
