"""Protobuf messages as JSON, by their descriptors.

Keys are the fields' names. Enums are lower-case names without their prefix, 64-bit integers are numbers, and a bytes
field `x` is text under `x` or base64 under `x_base64`. Scalars, lists and maps are always written; messages, members of
a oneof and optional fields only where they are set. When read, null stands for a field that is not there. What is read
need not come from JSON: mappings are objects, and subclasses are what their bases are.
"""

from __future__ import annotations

import base64
import difflib
import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal, TypeVar

from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor
from google.protobuf.message import Message

from perigee.errors import FieldViolation, InvalidArgumentError

MessageT = TypeVar("MessageT", bound=Message)

# A hostile body may be wrong in a million places; nobody reads on after these.
MAX_VIOLATIONS = 1000
_LONGEST_GUESS = 64
_NO_TEXT = "has a lone surrogate, which no UTF-8 text can hold"
Convert = Callable[[Any], Any]

INT_RANGES = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}
BASE64_SUFFIX = "_base64"
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


@dataclass(frozen=True)
class _Key:
    """A step of a path that is neither a field nor a position."""

    text: str


# Where a value stands: the path of what holds it, and a field, a position or a key. Written out for violations only.
_Path = tuple["_Path | None", str | int | _Key] | None


def parse_json(body: bytes) -> Any:
    """Returns the body's value; raises InvalidArgumentError of the field `body`."""
    try:
        return json.loads(body.decode(), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise InvalidArgumentError.for_field("body", f"is not UTF-8: byte {error.start}") from error
    except RecursionError as error:
        raise InvalidArgumentError.for_field("body", "is nested too deeply") from error
    except ValueError as error:
        raise InvalidArgumentError.for_field("body", f"is not JSON: {error}") from error


def dump_json(value: Any) -> bytes:
    """Returns a JSON value in one line."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def read_message(message_class: type[MessageT], value: Any) -> MessageT:
    """Returns the message that a JSON value stands for.

    Raises InvalidArgumentError with every violation, the first 1000 of them at most.
    """
    message = message_class()
    if violations := fill_message(message, value):
        raise InvalidArgumentError.for_fields(violations)
    return message


def fill_message(message: Message, value: Any, place: str = "") -> list[FieldViolation]:
    """Sets the fields of a message from a JSON value that stands at `place`; returns what is wrong, field by field.

    At most 1000 violations; with any of them the message is incomplete.
    """
    reader = _Reader()
    try:
        reader.read(message, value, (None, place) if place else None)
    except _TooManyViolationsError:
        pass
    except RecursionError:
        return [FieldViolation(place or "body", "is nested too deeply")]
    return reader.violations


def unknown_key(key: str, known: Iterable[str]) -> str:
    """Returns the description of an unknown key, with the nearest known one."""
    near = difflib.get_close_matches(key, known, n=1) if len(key) <= _LONGEST_GUESS else []
    return f"unknown key; did you mean {near[0]}?" if near else "unknown key"


def write_message(message: Message) -> dict[str, Any]:
    """Returns the message as a JSON object."""
    written: dict[str, Any] = {}
    for field in fields_of(message.DESCRIPTOR):
        if field.has_presence and not message.HasField(field.name):
            continue
        value = getattr(message, field.name)
        if field.is_bytes:
            key, written_value = _write_bytes(field, value)
            written[key] = written_value
        else:
            write = field.write or write_message
            if field.shape == "one":
                written[field.name] = write(value)
            elif field.shape == "list":
                written[field.name] = [write(element) for element in value]
            else:
                written[field.name] = {field.write_key(key): write(element) for key, element in value.items()}
    return written


class _TooManyViolationsError(Exception):
    """Signals that reading stops: there are MAX_VIOLATIONS."""


class _Reader:
    """Reader of one body into messages; collects violations."""

    def __init__(self) -> None:
        self.violations: list[FieldViolation] = []

    def read(self, message: Message, value: Any, path: _Path) -> None:
        """Fills the message, which a violation may leave incomplete."""
        if not isinstance(value, Mapping):
            self._add(path, f"must be an object, got {name_type(value)}")
            return
        keys = keys_of(message.DESCRIPTOR)
        groups: dict[str, Field] = {}
        for key, item in value.items():
            field, is_base64 = keys.get(key, (None, False))
            if field is None:
                self._add((path, _Key(str(key))), unknown_key(str(key), keys))
                continue
            if item is None:
                continue
            here = (path, key)
            if is_base64 and value.get(field.name) is not None:
                self._add(here, f"must not be given beside {field.name}")
            if field.oneof is not None:
                other = groups.setdefault(field.oneof, field)
                if other is not field:
                    self._add(here, f"must not be given beside {other.name}: only one of them may be set")
            try:
                self._set(message, field, item, is_base64, here)
            except UnicodeEncodeError:
                self._add(here, _NO_TEXT)
            except ValueError as error:
                self._add(here, str(error))

    def _set(self, message: Message, field: Field, item: Any, is_base64: bool, path: _Path) -> None:
        read = read_base64 if is_base64 else field.read
        if field.shape == "map":
            self._set_map(getattr(message, field.name), field, read, item, path)
        elif field.shape == "list":
            self._set_list(getattr(message, field.name), read, item, path)
        elif read is not None:
            setattr(message, field.name, read(item))
        else:
            part = getattr(message, field.name)
            part.SetInParent()
            self.read(part, item, path)

    def _set_list(self, target: Any, read: Any, item: Any, path: _Path) -> None:
        if not isinstance(item, list):
            raise ValueError(f"must be an array, got {name_type(item)}")
        for index, element in enumerate(item):
            if read is None:
                self.read(target.add(), element, (path, index))
                continue
            try:
                target.append(read(element))
            except UnicodeEncodeError:
                self._add((path, index), _NO_TEXT)
            except ValueError as error:
                self._add((path, index), str(error))

    def _set_map(self, target: Any, field: Field, read: Any, item: Any, path: _Path) -> None:
        if not isinstance(item, Mapping):
            raise ValueError(f"must be an object, got {name_type(item)}")
        for text, element in item.items():
            here = (path, _Key(text))
            try:
                key = field.read_key(text)
                if read is None:
                    self.read(target[key], element, here)
                else:
                    target[key] = read(element)
            except UnicodeEncodeError:
                self._add(here, _NO_TEXT)
            except ValueError as error:
                self._add(here, str(error))

    def _add(self, path: _Path, description: str) -> None:
        self.violations.append(FieldViolation(_write_path(path), description))
        if len(self.violations) == MAX_VIOLATIONS:
            raise _TooManyViolationsError


def _write_path(path: _Path) -> str:
    steps: list[str] = []
    while path is not None:
        path, step = path
        if isinstance(step, int):
            steps.append(f"[{step}]")
        elif isinstance(step, _Key) and not (step.text.isidentifier() and step.text.isascii() and len(step.text) < 80):
            steps.append(f"[{shown(step.text)}]")
        else:
            steps.append(f".{step.text if isinstance(step, _Key) else step}")
    return "".join(reversed(steps)).removeprefix(".") or "body"


def _write_bytes(field: Field, value: Any) -> tuple[str, Any]:
    try:
        if field.shape == "one":
            return field.name, value.decode()
        if field.shape == "list":
            return field.name, [element.decode() for element in value]
        return field.name, {field.write_key(key): element.decode() for key, element in value.items()}
    except UnicodeDecodeError:
        name = f"{field.name}{BASE64_SUFFIX}"
    if field.shape == "one":
        return name, write_base64(value)
    if field.shape == "list":
        return name, [write_base64(element) for element in value]
    return name, {field.write_key(key): write_base64(element) for key, element in value.items()}


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


@dataclass(frozen=True)
class Field:
    """Field of a message, and how its JSON form is read and written.

    `value` describes it, or each element of a list or map. `read` and `write` convert such a scalar, and are None for
    messages; `read` raises ValueError. `read_key` and `write_key` are a map's. `oneof` names the group of which at most
    one may be set.
    """

    name: str
    shape: Literal["one", "list", "map"]
    value: FieldDescriptor
    has_presence: bool
    is_bytes: bool
    oneof: str | None
    read: Convert | None
    write: Convert | None
    read_key: Convert
    write_key: Convert


@cache
def fields_of(descriptor: Descriptor) -> tuple[Field, ...]:
    """Returns the fields of a message in the order of their declaration."""
    return tuple(_describe_field(field) for field in descriptor.fields)


@cache
def keys_of(descriptor: Descriptor) -> dict[str, tuple[Field, bool]]:
    """Returns the JSON keys of a message: their fields, and whether the key holds base64."""
    fields = fields_of(descriptor)
    keys = {f"{field.name}{BASE64_SUFFIX}": (field, True) for field in fields if field.is_bytes}
    return keys | {field.name: (field, False) for field in fields}


@cache
def enum_names(enum: EnumDescriptor) -> dict[int, str]:
    """Returns the JSON name of each number: lower case, without the enum's name where all values begin with it."""
    words = "".join(f"_{letter}" if letter.isupper() else letter for letter in enum.name).strip("_")
    prefix = f"{words.upper()}_"
    if not all(value.name.startswith(prefix) for value in enum.values):
        prefix = ""
    names: dict[int, str] = {}
    for value in enum.values:
        names.setdefault(value.number, value.name.removeprefix(prefix).lower())
    return names


def _describe_field(field: FieldDescriptor) -> Field:
    entry = field.message_type if field.message_type and field.message_type.GetOptions().map_entry else None
    value = entry.fields_by_name["value"] if entry else field
    # proto3 makes a oneof of its own for each optional field.
    group = field.containing_oneof if field.containing_oneof and len(field.containing_oneof.fields) > 1 else None
    return Field(
        name=field.name,
        shape="map" if entry else "list" if field.is_repeated else "one",
        value=value,
        has_presence=field.has_presence,
        is_bytes=value.type == FieldDescriptor.TYPE_BYTES,
        oneof=group.name if group else None,
        read=_reader(value),
        write=_writer(value),
        read_key=_key_reader(entry.fields_by_name["key"]) if entry else write_as_is,
        write_key=write_key,
    )


def _reader(field: FieldDescriptor) -> Convert | None:
    if field.cpp_type in INT_RANGES:
        return partial(read_int, *INT_RANGES[field.cpp_type])
    if field.enum_type is not None:
        names = enum_names(field.enum_type)
        numbers = {value.name.lower(): value.number for value in field.enum_type.values}
        return partial(read_enum, numbers | {name: number for number, name in names.items()}, (*names.values(),))
    readers: dict[int, Convert] = {
        FieldDescriptor.TYPE_STRING: read_string,
        FieldDescriptor.TYPE_BYTES: read_text,
        FieldDescriptor.TYPE_BOOL: read_bool,
        FieldDescriptor.TYPE_DOUBLE: read_double,
        FieldDescriptor.TYPE_FLOAT: read_float,
    }
    return readers.get(field.type)


def _writer(field: FieldDescriptor) -> Convert | None:
    if field.message_type is not None:
        return None
    if field.enum_type is not None:
        return partial(write_enum, enum_names(field.enum_type))
    if field.cpp_type in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
        return write_float
    return write_as_is


def _key_reader(field: FieldDescriptor) -> Convert:
    if field.type == FieldDescriptor.TYPE_STRING:
        return write_as_is
    if field.type == FieldDescriptor.TYPE_BOOL:
        return read_bool_key
    return partial(read_int_key, *INT_RANGES[field.cpp_type])


def name_type(value: object) -> str:
    """Returns the type of a JSON value with its article."""
    return _TYPE_NAMES.get(type(value)) or f"Python's {type(value).__name__}"


def shown(text: str) -> str:
    """Returns the text in quotes, in ASCII, cut where it is long."""
    return ascii(text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}...")


def read_string(value: object) -> str:
    """Reads a string; one with lone surrogates is refused later, where it is encoded."""
    if not isinstance(value, str):
        raise ValueError(f"must be a string, got {name_type(value)}")
    return value


def read_text(value: Any) -> bytes:
    """Reads bytes as UTF-8 text; raises UnicodeEncodeError for lone surrogates."""
    return read_string(value).encode()


def read_base64(value: object) -> bytes:
    """Reads bytes as base64."""
    text = read_string(value)
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise ValueError("is not base64 (of the standard alphabet, padded)") from error


def read_int(low: int, high: int, value: Any) -> int:
    """Reads an integer of a range, ends included; 1.0 is one."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"must be an integer, got {name_type(value)}")
    if not low <= value <= high:
        raise ValueError(f"must be from {low} to {high}")
    return value


def read_enum(numbers: dict[str, int], known: tuple[str, ...], value: Any) -> int:
    """Reads the number of an enum's name in any case; a number stays as it is, for enums are open."""
    if isinstance(value, int) and not isinstance(value, bool):
        return read_int(-(2**31), 2**31 - 1, value)
    number = numbers.get(read_string(value).lower())
    if number is None:
        raise ValueError(f"{shown(value)} is unknown; known: {', '.join(known)}")
    return number


def read_bool(value: Any) -> bool:
    """Reads a boolean."""
    if not isinstance(value, bool):
        raise ValueError(f"must be true or false, got {name_type(value)}")
    return value


def read_double(value: Any) -> float:
    """Reads a number, or the name of one that JSON has not."""
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
    """Reads a number that 32 bits can hold, rounded to them."""
    number = read_double(value)
    try:
        struct.pack("<f", number)
    except OverflowError:
        raise ValueError("is out of a float's range") from None
    return number


def read_bool_key(key: str) -> bool:
    """Reads a map's key that is a boolean."""
    if key not in ("true", "false"):
        raise ValueError("the key must be true or false")
    return key == "true"


def read_int_key(low: int, high: int, key: str) -> int:
    """Reads a map's key that is an integer of a range, in its one spelling, so that no two keys are the same."""
    digits = key.removeprefix("-")
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 20 and str(int(key)) == key):
        raise ValueError("the key must be an integer")
    return read_int(low, high, int(key))


def write_as_is(value: Any) -> Any:
    """Returns a value for which JSON has a form."""
    return value


def write_key(key: str | int | bool) -> str:
    """Returns a map's key, which is a string in JSON."""
    return key if isinstance(key, str) else str(key).lower()


def write_enum(names: dict[int, str], value: int) -> str | int:
    """Returns the name of an enum's number, or the number where it has none."""
    return names.get(value, value)


def write_float(value: float) -> float | str:
    """Returns a number, or the name of one that JSON has not."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def write_base64(value: bytes) -> str:
    """Returns bytes as base64."""
    return base64.b64encode(value).decode("ascii")
