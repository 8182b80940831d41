"""Protobuf messages as JSON, by their descriptors.

Keys are the fields' names. Enums are lower-case names without their prefix, 64-bit integers are numbers, and a bytes
field `x` is text under `x` or base64 under `x_base64`. Scalars, lists and maps are always written; messages, members of
a oneof and optional fields only where they are set. When read, null stands for a field that is not there. What is read
need not come from JSON: mappings are objects, and subclasses are what their bases are.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from google.protobuf.message import Message

from perigee.errors import FieldViolation, InvalidArgumentError
from perigee.json_fields import BASE64_SUFFIX, Field, fields_of, keys_of
from perigee.json_scalars import name_type, read_base64, shown, write_base64

MessageT = TypeVar("MessageT", bound=Message)

# A hostile body may be wrong in a million places; nobody reads on after these.
MAX_VIOLATIONS = 1000
_LONGEST_GUESS = 64
_NO_TEXT = "has a lone surrogate, which no UTF-8 text can hold"


@dataclass(frozen=True)
class _Key:
    """A step of a path that is neither a field nor a position."""

    text: str


# Where a value stands: the path of what holds it, and a field, a position or a key. Written out for violations only.
_Path = tuple["_Path | None", str | int | _Key] | None


def parse_json(body: bytes) -> Any:
    """The body's value; raises InvalidArgumentError of the field `body`."""
    try:
        return json.loads(body.decode(), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise InvalidArgumentError.for_field("body", f"is not UTF-8: byte {error.start}") from error
    except RecursionError as error:
        raise InvalidArgumentError.for_field("body", "is nested too deeply") from error
    except ValueError as error:
        raise InvalidArgumentError.for_field("body", f"is not JSON: {error}") from error


def dump_json(value: Any) -> bytes:
    """A JSON value in one line."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def read_message(message_class: type[MessageT], value: Any) -> MessageT:
    """The message that a JSON value stands for.

    Raises InvalidArgumentError with every violation, the first 1000 of them at most.
    """
    message = message_class()
    if violations := fill_message(message, value):
        first = "; ".join(f"{violation.field}: {violation.description}" for violation in violations[:5])
        raise InvalidArgumentError(first, violations=violations)
    return message


def fill_message(message: Message, value: Any, place: str = "") -> list[FieldViolation]:
    """Sets the fields of a message from a JSON value that stands at `place`; what is wrong with it, field by field.

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
    """What to say about a key that is not known: the nearest one that is."""
    near = difflib.get_close_matches(key, known, n=1) if len(key) <= _LONGEST_GUESS else []
    return f"unknown key; did you mean {near[0]}?" if near else "unknown key"


def write_message(message: Message) -> dict[str, Any]:
    """The message as a JSON object."""
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
    """Nothing is read after this many."""


class _Reader:
    """Reads one body into messages and keeps what is wrong with it."""

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
