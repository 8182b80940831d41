"""JSON values of protobuf's scalar types; every `read_` function raises ValueError with what the value must be."""

from __future__ import annotations

import base64
import math
import struct
from typing import Any

SPECIAL_FLOATS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}  # JSON has no numbers for these
_SHOWN_CHARACTERS = 60
_TYPE_NAMES: dict[type, str] = {
    type(None): "null",
    str: "a string",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    list: "an array",
    dict: "an object",
}


def name_type(value: object) -> str:
    """What a JSON value is, with its article."""
    return _TYPE_NAMES.get(type(value)) or f"Python's {type(value).__name__}"


def shown(text: str) -> str:
    """The text in quotes, in ASCII, cut where it is long."""
    return ascii(text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}...")


def read_string(value: object) -> str:
    """A string; one with lone surrogates is refused later, where it is encoded."""
    if not isinstance(value, str):
        raise ValueError(f"must be a string, got {name_type(value)}")
    return value


def read_text(value: Any) -> bytes:
    """Bytes that are UTF-8; raises UnicodeEncodeError for lone surrogates."""
    return read_string(value).encode()


def read_base64(value: object) -> bytes:
    """Bytes as base64."""
    text = read_string(value)
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise ValueError("is not base64 (of the standard alphabet, padded)") from error


def read_int(low: int, high: int, value: Any) -> int:
    """An integer of a range, ends included; 1.0 is one."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"must be an integer, got {name_type(value)}")
    if not low <= value <= high:
        raise ValueError(f"must be from {low} to {high}")
    return value


def read_enum(numbers: dict[str, int], known: tuple[str, ...], value: Any) -> int:
    """The number of an enum's name in whatever case; a number stays as it is, for enums are open."""
    if isinstance(value, int) and not isinstance(value, bool):
        return read_int(-(2**31), 2**31 - 1, value)
    number = numbers.get(read_string(value).lower())
    if number is None:
        raise ValueError(f"{shown(value)} is unknown; known: {', '.join(known)}")
    return number


def read_bool(value: Any) -> bool:
    """A boolean."""
    if not isinstance(value, bool):
        raise ValueError(f"must be true or false, got {name_type(value)}")
    return value


def read_double(value: Any) -> float:
    """A number, or the name of one that JSON has not."""
    if isinstance(value, str) and value in SPECIAL_FLOATS:
        return SPECIAL_FLOATS[value]
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"must be a number, got {name_type(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if math.isinf(number):
        raise ValueError("is out of a double's range")
    return number


def read_float(value: Any) -> float:
    """A number that 32 bits can hold, rounded to them."""
    number = read_double(value)
    try:
        struct.pack("<f", number)
    except OverflowError:
        raise ValueError("is out of a float's range") from None
    return number


def read_bool_key(key: str) -> bool:
    """A map's key that is a boolean."""
    if key not in ("true", "false"):
        raise ValueError("the key must be true or false")
    return key == "true"


def read_int_key(low: int, high: int, key: str) -> int:
    """A map's key that is an integer of a range, in its one spelling, so that no two keys are the same."""
    digits = key.removeprefix("-")
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 20 and str(int(key)) == key):
        raise ValueError("the key must be an integer")
    return read_int(low, high, int(key))


def write_as_is(value: Any) -> Any:
    """What JSON has a form for."""
    return value


def write_key(key: str | int | bool) -> str:
    """A map's key, which is a string in JSON."""
    return key if isinstance(key, str) else str(key).lower()


def write_enum(names: dict[int, str], value: int) -> str | int:
    """The name of an enum's number, or the number where it has none."""
    return names.get(value, value)


def write_float(value: float) -> float | str:
    """A number, or the name of one that JSON has not."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def write_base64(value: bytes) -> str:
    """Bytes as base64."""
    return base64.b64encode(value).decode("ascii")
