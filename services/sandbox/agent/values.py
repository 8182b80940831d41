"""Codec of plain Python values, one value as a line of ASCII, between two processes that do not trust each other.

The line is JSON. None, booleans, strings, lists, finite floats and integers of 64 bits are themselves; everything else
is an object with its type's name as the only key, such as {"tuple": [1, 2]} or {"int": "-1f"} (hexadecimal, which is
read in linear time at any size). What comes out is of exactly these types, so that nothing of a value's behaviour, its
__eq__ least of all, crosses with it.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from decimal import Decimal
from fractions import Fraction
from typing import Any

MAX_DEPTH = 100
_MAX_FRACTION_BITS = 1 << 14
_MAX_EQUAL_HASHES = 1000
_MAX_INTEGER_CHARACTERS = 32
_INT64 = 1 << 63
_HEX = re.compile(r"-?[0-9a-f]+")
_FLOAT_NAMES = ("nan", "inf", "-inf")


class _Line:
    """Parts of a line, up to a length."""

    def __init__(self, max_characters: int | None, exact: bool) -> None:
        self.parts: list[str] = []
        self.exact = exact
        self._max = max_characters
        self._left = math.inf if max_characters is None else max_characters

    def add(self, part: str) -> None:
        self._left -= len(part)
        if self._left < 0:
            raise ValueError(f"the value takes more than {self._max} characters")
        self.parts.append(part)


class _Object(list[Any]):
    """Pairs of a JSON object."""


def encode(value: Any, max_characters: int | None = None, *, exact: bool = False) -> str:
    """Encodes a value as a line without its newline.

    Unless it is to be exact, ordered, default and counting dictionaries become dictionaries, deques lists, named tuples
    tuples, numpy's scalars and arrays what their `tolist` gives. Raises TypeError with the type's name for anything
    else that is not plain, instances of subclasses included, and ValueError for values that are nested deeper than 100
    levels or take more than `max_characters`.
    """
    line = _Line(max_characters, exact)
    _write(value, 0, line)
    return "".join(line.parts)


def decode(text: str) -> Any:
    """Decodes a line; raises ValueError for anything malformed, and builds nothing but plain values."""
    try:
        node = json.loads(
            text,
            object_pairs_hook=_Object,
            parse_int=_read_json_integer,
            parse_float=_read_json_float,
            parse_constant=_refuse_constant,
        )
        return _read(node, 0)
    except (TypeError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"not a plain value: {error}") from error


def _write(value: Any, depth: int, line: _Line) -> None:
    write = _WRITERS.get(type(value))
    if write is None:
        value = _as_plain(value, line.exact)
        write = _WRITERS[type(value)]
    write(value, depth, line)


def _as_plain(value: Any, exact: bool) -> Any:
    """Converts one of the few other types that are accepted to a plain value; raises TypeError for the rest."""
    kind = type(value)
    if not exact:
        if kind in (OrderedDict, defaultdict, Counter):
            return dict(value)
        if kind is deque:
            return list(value)
        if kind.__bases__ == (tuple,) and isinstance(getattr(kind, "_fields", None), tuple):
            return tuple(tuple.__iter__(value))
        if str(kind.__module__).partition(".")[0] == "numpy" and hasattr(kind, "tolist"):
            plain = value.tolist()
            if type(plain) in _WRITERS:
                return plain
    raise TypeError(f"{kind.__name__[:100]} is not a plain type")


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


def _write_bytes(value: bytes, depth: int, line: _Line) -> None:
    line.add(f'{{"bytes":"{base64.b64encode(value).decode()}"}}')


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
    _write_tagged("dict", (part for pair in value.items() for part in pair), depth, line)


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
    range: _write_range,
    Decimal: _write_decimal,
    Fraction: _write_fraction,
}


def _read(node: Any, depth: int) -> Any:
    if type(node) is list:
        return _read_items(node, depth)
    if type(node) is not _Object:
        return node
    if len(node) != 1 or node[0][0] not in _READERS:
        raise ValueError("not a plain value: an object without a type's name")
    [(tag, content)] = node
    return _READERS[tag](content, depth)


def _read_items(node: Any, depth: int) -> list[Any]:
    if type(node) is not list:
        raise ValueError("not a plain value: a collection without a list")
    if depth >= MAX_DEPTH:
        raise ValueError(f"the value is nested deeper than {MAX_DEPTH} levels")
    return [_read(item, depth + 1) for item in node]


def _read_hashed(node: Any, depth: int) -> list[Any]:
    """Reads items for a set; building one of many equal hashes would take quadratic time."""
    items = _read_items(node, depth)
    _check_hashes(items)
    return items


def _read_dict(node: Any, depth: int) -> dict[Any, Any]:
    items = _read_items(node, depth)
    if len(items) % 2:
        raise ValueError("not a plain value: a key without a value")
    _check_hashes(items[::2])
    return dict(zip(items[::2], items[1::2]))  # noqa: B905  # both are of one length


def _read_complex(node: Any, depth: int) -> complex:
    [real, imaginary] = _of_type(float, _read_items(node, depth))
    return complex(real, imaginary)


def _read_range(node: Any, depth: int) -> range:
    [start, stop, step] = _of_type(int, _read_items(node, depth))
    return range(start, stop, step)


def _read_fraction(node: Any, depth: int) -> Fraction:
    [numerator, denominator] = _of_type(int, _read_items(node, depth))
    _check_fraction(numerator, denominator)
    return Fraction(numerator, denominator)


def _read_float_name(node: Any, depth: int) -> float:
    if node not in _FLOAT_NAMES:
        raise ValueError(f"not a plain value: a float named {node!r:.100}")
    return float(node)


def _read_hex(node: Any, depth: int) -> int:
    [text] = _of_type(str, [node])
    if _HEX.fullmatch(text) is None:
        raise ValueError("not a plain value: an integer that is not hexadecimal")
    return int(text, 16)


def _read_bytes(node: Any, depth: int) -> bytes:
    [text] = _of_type(str, [node])
    return base64.b64decode(text, validate=True)


def _read_str(node: Any, depth: int) -> str:
    return _read_bytes(node, depth).decode(errors="surrogatepass")


def _read_decimal(node: Any, depth: int) -> Decimal:
    [text] = _of_type(str, [node])
    return Decimal(text)


_READERS: dict[str, Callable[[Any, int], Any]] = {
    "int": _read_hex,
    "float": _read_float_name,
    "complex": _read_complex,
    "str": _read_str,
    "bytes": _read_bytes,
    "tuple": lambda node, depth: tuple(_read_items(node, depth)),
    "set": lambda node, depth: set(_read_hashed(node, depth)),
    "frozenset": lambda node, depth: frozenset(_read_hashed(node, depth)),
    "dict": _read_dict,
    "range": _read_range,
    "Decimal": _read_decimal,
    "Fraction": _read_fraction,
}


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
