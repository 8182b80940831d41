"""Codec of plain Python values, one value as a line of ASCII, between two processes that do not trust each other.

The line is JSON. None, booleans, strings, lists, finite floats and integers of 64 bits are themselves; everything else
is an object with its type's name as the only key, such as {"tuple": [1, 2]} or {"int": "-1f"} (hexadecimal, which is
read in linear time at any size). What comes out is of exactly these types, so that nothing of a value's behaviour, its
__eq__ least of all, crosses with it. Anything else may cross as a number that both sides know it by.
"""

from __future__ import annotations

import base64
import builtins
import json
import math
import re
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable, Iterable
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from typing import Any

MAX_DEPTH = 100
_MAX_FRACTION_BITS = 1 << 14
_MAX_EQUAL_HASHES = 1000
_MAX_INTEGER_CHARACTERS = 32
_INT64 = 1 << 63
_HEX = re.compile(r"-?[0-9a-f]+")
_MAX_DIMENSION = 1 << 31
_ARRAY_TYPE = re.compile(r"[<>|=][biufcSU][0-9]{1,5}|[<>][mM]8(\[[0-9]*[a-zA-Z]+\])?")
"""Element types of arrays that cross as they are: no objects, no records."""
_FLOAT_NAMES = ("nan", "inf", "-inf")


Refer = Callable[[Any], int]
"""Returns the number of a value that is not plain; raises TypeError for one that does not cross."""
Resolve = Callable[[int], Any]
"""Returns what stands for the other side's value of a number; raises ValueError."""


class _Line:
    """Parts of a line, up to a length."""

    def __init__(self, max_characters: int | None, refer: Refer) -> None:
        self.parts: list[str] = []
        self.refer = refer
        self._max = max_characters
        self._left = math.inf if max_characters is None else max_characters

    def add(self, part: str) -> None:
        self._left -= len(part)
        if self._left < 0:
            raise ValueError(f"the value takes more than {self._max} characters")
        self.parts.append(part)


class _Object(list[Any]):
    """Pairs of a JSON object."""


def refuse(value: Any) -> int:
    """Lets nothing cross that is not plain."""
    raise TypeError(f"{type(value).__name__[:100]} is not a plain type")


def encode(value: Any, max_characters: int | None = None, refer: Refer = refuse) -> str:
    """Encodes a value as a line without its newline.

    An instance of a subclass becomes one of the plain type below it, a scalar of numpy what its `tolist` gives. Raises
    TypeError with the type's name for anything else that is not plain, unless `refer` numbers it, and ValueError for
    values that are nested deeper than 100 levels or take more than `max_characters`.
    """
    line = _Line(max_characters, refer)
    _write(value, 0, line)
    return "".join(line.parts)


def decode(text: str, resolve: Resolve | None = None) -> Any:
    """Decodes a line; raises ValueError for anything malformed, and builds nothing but plain values, and those that
    `resolve` returns.
    """
    try:
        node = json.loads(
            text,
            object_pairs_hook=_Object,
            parse_int=_read_json_integer,
            parse_float=_read_json_float,
            parse_constant=_refuse_constant,
        )
        return _Reader(resolve).read(node, 0)
    except (TypeError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"not a plain value: {error}") from error


def _write(value: Any, depth: int, line: _Line) -> None:
    write = _WRITERS.get(type(value))
    if write is None:
        write, value = _find_writer(value)
    write(value, depth, line)


def _find_writer(value: Any) -> tuple[Callable[[Any, int, _Line], None], Any]:
    """Returns how one of the few other types that are accepted is written, and as what value."""
    kind = type(value)
    if kind is type:
        return (_write_builtin if value in _BUILTIN_TYPES else _write_reference), value
    if kind.__bases__ == (tuple,) and isinstance(getattr(kind, "_fields", None), tuple):
        return _write_named_tuple, value
    if str(kind.__module__).partition(".")[0] == "numpy" and hasattr(kind, "tolist"):
        if kind.__name__ == "ndarray" and _ARRAY_TYPE.fullmatch(value.dtype.str):
            return _write_array, value
        plain = value.tolist()
        return _WRITERS.get(type(plain), _write_reference), plain
    plain = copy_as_plain(value)
    return (_write_reference if plain is value else _WRITERS[type(plain)]), plain


def copy_as_plain(value: Any) -> Any:
    """Returns the contents of an instance of a subclass of a plain type; anything else as it is."""
    for base, read_base in _BASES:
        if base in type(value).__mro__:
            return read_base(value)
    return value


_BASES: tuple[tuple[type, Callable[[Any], Any]], ...] = (
    (int, lambda value: int.__add__(value, 0)),
    (float, float.__float__),
    (str, str.__str__),
    (bytes, lambda value: bytes.__add__(value, b"")),
    (bytearray, lambda value: bytearray(bytearray.__add__(value, b""))),
    (list, lambda value: list(list.__iter__(value))),
    (tuple, lambda value: tuple(tuple.__iter__(value))),
    (set, lambda value: set(set.__iter__(value))),
    (frozenset, lambda value: frozenset(frozenset.__iter__(value))),
    (deque, lambda value: deque(deque.__iter__(value))),
    (dict, lambda value: dict(dict.items(value))),
)
"""Plain type below a subclass, and a copy of a value by that type's own methods."""


def _write_json(value: bool | None, depth: int, line: _Line) -> None:
    line.add(json.dumps(value))


def _write_int(value: int, depth: int, line: _Line) -> None:
    line.add(repr(value) if -_INT64 <= value < _INT64 else f'{{"int":"{value:x}"}}')


def _write_float(value: float, depth: int, line: _Line) -> None:
    line.add(repr(value) if math.isfinite(value) else f'{{"float":"{value!r}"}}')


def _write_complex(value: complex, depth: int, line: _Line) -> None:
    _write_tagged("complex", (value.real, value.imag), depth, line)


def _write_str(value: str, depth: int, line: _Line) -> None:
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON would join two halves of a surrogate pair
        data = base64.b64encode(value.encode(errors="surrogatepass")).decode()
        line.add(f'{{"str":"{data}"}}')
    else:
        line.add(json.dumps(value))


def _write_bytes(value: bytes | bytearray, depth: int, line: _Line) -> None:
    line.add(f'{{"{type(value).__name__}":"{base64.b64encode(value).decode()}"}}')


def _write_list(value: Iterable[Any], depth: int, line: _Line) -> None:
    if depth >= MAX_DEPTH:
        raise ValueError(f"the value is nested deeper than {MAX_DEPTH} levels")
    line.add("[")
    separator = ""
    for item in value:
        line.add(separator)
        _write(item, depth + 1, line)
        separator = ","
    line.add("]")


def _write_tagged(tag: str, items: Iterable[Any], depth: int, line: _Line) -> None:
    line.add(f'{{"{tag}":')
    _write_list(items, depth, line)
    line.add("}")


def _write_collection(value: Iterable[Any], depth: int, line: _Line) -> None:
    _write_tagged(type(value).__name__, value, depth, line)


def _write_dict(value: dict[Any, Any], depth: int, line: _Line) -> None:
    """Writes keys and values in turn."""
    _write_tagged(type(value).__name__, (part for pair in value.items() for part in pair), depth, line)


def _write_default_dict(value: defaultdict[Any, Any], depth: int, line: _Line) -> None:
    factory = value.default_factory
    name = factory.__name__ if factory in _BUILTIN_TYPES else None
    _write_tagged("defaultdict", (name, dict(value)), depth, line)


def _write_deque(value: deque[Any], depth: int, line: _Line) -> None:
    _write_tagged("deque", (value.maxlen, list(value)), depth, line)


def _write_named_tuple(value: Any, depth: int, line: _Line) -> None:
    kind = type(value)
    _write_tagged("namedtuple", (kind.__name__, list(kind._fields), list(tuple.__iter__(value))), depth, line)


def _write_array(value: Any, depth: int, line: _Line) -> None:
    _write_tagged("ndarray", (value.dtype.str, list(value.shape), value.tobytes()), depth, line)


def _write_builtin(value: type, depth: int, line: _Line) -> None:
    line.add(f'{{"builtin":"{value.__name__}"}}')


def _write_reference(value: Any, depth: int, line: _Line) -> None:
    line.add(f'{{"object":{line.refer(value)}}}')


def _write_iso(value: date | time, depth: int, line: _Line) -> None:
    line.add(f'{{"{type(value).__name__}":"{value.isoformat()}"}}')


def _write_timedelta(value: timedelta, depth: int, line: _Line) -> None:
    _write_tagged("timedelta", (value.days, value.seconds, value.microseconds), depth, line)


def _write_range(value: range, depth: int, line: _Line) -> None:
    _write_tagged("range", (value.start, value.stop, value.step), depth, line)


def _write_decimal(value: Decimal, depth: int, line: _Line) -> None:
    line.add(f'{{"Decimal":"{value}"}}')


def _write_fraction(value: Fraction, depth: int, line: _Line) -> None:
    _check_fraction(value.numerator, value.denominator)
    _write_tagged("Fraction", (value.numerator, value.denominator), depth, line)


_WRITERS: dict[type, Callable[[Any, int, _Line], None]] = {
    type(None): _write_json,
    bool: _write_json,
    int: _write_int,
    float: _write_float,
    complex: _write_complex,
    str: _write_str,
    bytes: _write_bytes,
    list: _write_list,
    tuple: _write_collection,
    set: _write_collection,
    frozenset: _write_collection,
    dict: _write_dict,
    OrderedDict: _write_dict,
    Counter: _write_dict,
    defaultdict: _write_default_dict,
    deque: _write_deque,
    type({}.keys()): _write_collection,
    type({}.values()): _write_collection,
    type({}.items()): _write_collection,
    range: _write_range,
    bytearray: _write_bytes,
    Decimal: _write_decimal,
    Fraction: _write_fraction,
    date: _write_iso,
    time: _write_iso,
    datetime: _write_iso,
    timedelta: _write_timedelta,
}
_BUILTIN_TYPES = {
    kind for name, kind in vars(builtins).items() if isinstance(kind, type) and kind is not type and name[0] != "_"
}
"""Types that cross by name."""


class _Reader:
    """Reader of one line."""

    def __init__(self, resolve: Resolve | None) -> None:
        self._resolve = resolve

    def read(self, node: Any, depth: int) -> Any:
        """Returns the value of a node of the JSON."""
        if type(node) is list:
            return self.items(node, depth)
        if type(node) is not _Object:
            return node
        if len(node) == 1:
            [(tag, content)] = node
            if tag in _BUILDERS:
                return _BUILDERS[tag](self.items(content, depth))
            if tag in _TEXT_READERS:
                [text] = _of_type(str, [content])
                return _TEXT_READERS[tag](text)
            if tag == "object" and self._resolve is not None:
                [number] = _of_type(int, [content])
                return self._resolve(number)
        raise ValueError("not a plain value: an object without a type's name")

    def items(self, node: Any, depth: int) -> list[Any]:
        """Returns the values of a list."""
        if type(node) is not list:
            raise ValueError("not a plain value: a collection without a list")
        if depth >= MAX_DEPTH:
            raise ValueError(f"the value is nested deeper than {MAX_DEPTH} levels")
        return [self.read(item, depth + 1) for item in node]


def _hashed(items: list[Any]) -> list[Any]:
    """Returns items for a set; building one of many equal hashes would take quadratic time."""
    _check_hashes(items)
    return items


def _pairs(items: list[Any]) -> Iterable[tuple[Any, Any]]:
    if len(items) % 2:
        raise ValueError("not a plain value: a key without a value")
    _check_hashes(items[::2])
    return zip(items[::2], items[1::2])  # noqa: B905  # both are of one length


def _build_complex(items: list[Any]) -> complex:
    [real, imaginary] = _of_type(float, items)
    return complex(real, imaginary)


def _build_range(items: list[Any]) -> range:
    [start, stop, step] = _of_type(int, items)
    return range(start, stop, step)


def _build_fraction(items: list[Any]) -> Fraction:
    [numerator, denominator] = _of_type(int, items)
    _check_fraction(numerator, denominator)
    return Fraction(numerator, denominator)


def _build_timedelta(items: list[Any]) -> timedelta:
    [days, seconds, microseconds] = _of_type(int, items)
    return timedelta(days, seconds, microseconds)


def _build_counter(items: list[Any]) -> Counter[Any]:
    counter: Counter[Any] = Counter()
    dict.update(counter, _pairs(items))
    return counter


def _build_default_dict(items: list[Any]) -> defaultdict[Any, Any]:
    name, content = items
    [content] = _of_type(dict, [content])
    return defaultdict(None if name is None else _read_builtin(*_of_type(str, [name])), content)


def _build_deque(items: list[Any]) -> deque[Any]:
    most, content = items
    [content] = _of_type(list, [content])
    return deque(content, None if most is None else _of_type(int, [most])[0])


def _build_named_tuple(items: list[Any]) -> Any:
    name, fields, values = items
    [name, *fields] = _of_type(str, [name, *_of_type(list, [fields])[0]])
    return _named_tuple_type(name, tuple(fields))(*_of_type(list, [values])[0])


@lru_cache(maxsize=1000)
def _named_tuple_type(name: str, fields: tuple[str, ...]) -> Any:
    return namedtuple(name, fields)


def _build_array(items: list[Any]) -> Any:
    try:
        import numpy
    except ImportError as error:
        raise ValueError(f"an array, and {error}") from error
    element, shape, data = items
    [shape] = _of_type(list, [shape])
    [data] = _of_type(bytes, [data])
    if not isinstance(element, str) or not _ARRAY_TYPE.fullmatch(element):
        raise ValueError(f"not a plain value: an array of {element!r:.100}")
    if any(not 0 <= size < _MAX_DIMENSION for size in _of_type(int, shape)):
        raise ValueError("not a plain value: an array of an impossible shape")
    return numpy.frombuffer(bytearray(data), numpy.dtype(element)).reshape(shape)


_BUILDERS: dict[str, Callable[[list[Any]], Any]] = {
    "complex": _build_complex,
    "tuple": tuple,
    "set": lambda items: set(_hashed(items)),
    "frozenset": lambda items: frozenset(_hashed(items)),
    "dict": lambda items: dict(_pairs(items)),
    "OrderedDict": lambda items: OrderedDict(_pairs(items)),
    "Counter": _build_counter,
    "defaultdict": _build_default_dict,
    "deque": _build_deque,
    "dict_keys": lambda items: dict.fromkeys(_hashed(items)).keys(),
    "dict_values": lambda items: dict(enumerate(items)).values(),
    "dict_items": lambda items: dict(_pairs([part for pair in _of_type(tuple, items) for part in pair])).items(),
    "namedtuple": _build_named_tuple,
    "range": _build_range,
    "Fraction": _build_fraction,
    "timedelta": _build_timedelta,
    "ndarray": _build_array,
}
"""Value of a list of values, by tag."""


def _read_float_name(text: str) -> float:
    if text not in _FLOAT_NAMES:
        raise ValueError(f"not a plain value: a float named {text!r:.100}")
    return float(text)


def _read_hex(text: str) -> int:
    if _HEX.fullmatch(text) is None:
        raise ValueError("not a plain value: an integer that is not hexadecimal")
    return int(text, 16)


def _read_bytes(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


def _read_builtin(text: str) -> type:
    kind = getattr(builtins, text, None)
    if kind not in _BUILTIN_TYPES:
        raise ValueError(f"not a plain value: a type named {text!r:.100}")
    return kind  # type: ignore[no-any-return]


_TEXT_READERS: dict[str, Callable[[str], Any]] = {
    "int": _read_hex,
    "float": _read_float_name,
    "str": lambda text: _read_bytes(text).decode(errors="surrogatepass"),
    "bytes": _read_bytes,
    "bytearray": lambda text: bytearray(_read_bytes(text)),
    "Decimal": Decimal,
    "date": date.fromisoformat,
    "time": time.fromisoformat,
    "datetime": datetime.fromisoformat,
    "builtin": _read_builtin,
}
"""Value of a text, by tag."""


def _read_json_integer(text: str) -> int:
    if len(text) > _MAX_INTEGER_CHARACTERS:
        raise ValueError("not a plain value: a long integer that is not hexadecimal")
    return int(text)


def _read_json_float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("not a plain value: a number past the range of floats")
    return number


def _refuse_constant(name: str) -> float:
    raise ValueError(f"not a plain value: {name}")


def _of_type(kind: type, items: list[Any]) -> list[Any]:
    if any(type(item) is not kind for item in items):
        raise ValueError(f"not a plain value: a part that is no {kind.__name__}")
    return items


def _check_hashes(items: list[Any]) -> None:
    if len(items) > _MAX_EQUAL_HASHES and max(Counter(map(hash, items)).values()) > _MAX_EQUAL_HASHES:
        raise ValueError(f"a set or dictionary with more than {_MAX_EQUAL_HASHES} equal hashes")


def _check_fraction(numerator: int, denominator: int) -> None:
    """Bounds the parts of a fraction: reducing it takes quadratic time."""
    if max(abs(numerator), denominator) >> _MAX_FRACTION_BITS:
        raise ValueError(f"a fraction with parts of more than {_MAX_FRACTION_BITS} bits")
