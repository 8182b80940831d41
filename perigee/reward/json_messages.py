"""Fills protobuf messages from JSON values and names every field that is wrong, not just the first one.

Names are the proto's. Bytes are base64, as in proto3 JSON; 64-bit integers may be strings, enums are their names.
"""

from __future__ import annotations

import base64
import binascii
import difflib
from collections.abc import Callable, Mapping
from typing import Any, cast

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from perigee.errors import FieldViolation

_INTEGERS = {
    FieldDescriptor.CPPTYPE_INT32: (-(1 << 31), (1 << 31) - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(1 << 63), (1 << 63) - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, (1 << 32) - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, (1 << 64) - 1),
}
_FLOATS = (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE)


def fill_message(message: Message, values: object, path: str = "") -> list[FieldViolation]:
    """Sets the message's fields from a JSON object; what is wrong with it, each by its path below `path`."""
    if not isinstance(values, Mapping):
        return [FieldViolation(path or "value", f"must be an object, got {describe_value(values)}")]
    # The stubs name the C implementation of a descriptor beside its documented class.
    fields = cast(Mapping[str, FieldDescriptor], message.DESCRIPTOR.fields_by_name)
    violations = []
    chosen: dict[str, str] = {}
    for key, value in values.items():
        field = fields.get(str(key))
        place = f"{path}.{key}" if path else str(key)
        if field is None:
            violations.append(FieldViolation(place, unknown_key(str(key), fields)))
            continue
        if value is None:
            continue
        oneof = field.containing_oneof
        if oneof is not None and len(oneof.fields) > 1:
            if oneof.name in chosen:
                violations.append(FieldViolation(place, f"cannot stand beside {chosen[oneof.name]}"))
                continue
            chosen[oneof.name] = str(key)
        violations += _fill_field(message, field, value, place)
    return violations


def unknown_key(key: str, known: Mapping[str, object]) -> str:
    """What to say about a key that is not known: the nearest known one, or all of them."""
    near = difflib.get_close_matches(key, known, n=1)
    return f"unknown field; did you mean {near[0]}?" if near else f"unknown field; the fields are {', '.join(known)}"


def describe_value(value: object) -> str:
    """A value for an error message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _fill_field(message: Message, field: FieldDescriptor, value: object, place: str) -> list[FieldViolation]:
    if not field.is_repeated:
        if field.message_type is not None:
            child: Message = getattr(message, field.name)
            child.SetInParent()
            return fill_message(child, value, place)
        return _set_scalar(lambda scalar: setattr(message, field.name, scalar), field, value, place)
    if not isinstance(value, list):
        return [FieldViolation(place, f"must be a list, got {describe_value(value)}")]
    repeated = getattr(message, field.name)
    violations = []
    for index, element in enumerate(value):
        where = f"{place}[{index}]"
        if field.message_type is not None:
            violations += fill_message(repeated.add(), element, where)
        else:
            violations += _set_scalar(repeated.append, field, element, where)
    return violations


def _set_scalar(
    put: Callable[[Any], object], field: FieldDescriptor, value: object, place: str
) -> list[FieldViolation]:
    try:
        put(_read_scalar(field, value))
    except ValueError as error:
        return [FieldViolation(place, f"{error}, got {describe_value(value)}")]
    return []


def _read_scalar(field: FieldDescriptor, value: object) -> object:
    """The value as the field takes it; ValueError says what it must be."""
    kind = field.cpp_type
    if field.type == FieldDescriptor.TYPE_BYTES:
        return _read_bytes(value)
    if kind == FieldDescriptor.CPPTYPE_STRING:
        if not isinstance(value, str):
            raise ValueError("must be a string")
        return value
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        if not isinstance(value, bool):
            raise ValueError("must be true or false")
        return value
    if kind == FieldDescriptor.CPPTYPE_ENUM:
        assert field.enum_type is not None
        names = field.enum_type.values_by_name
        if value not in names:
            raise ValueError(f"must be one of {', '.join(names)}")
        return names[str(value)].number
    if kind in _FLOATS:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError("must be a number")
        return float(value)
    return _read_integer(value, *_INTEGERS[kind])


def _read_integer(value: object, low: int, high: int) -> int:
    whole = isinstance(value, int) and not isinstance(value, bool)
    digits = isinstance(value, str) and value.removeprefix("-").isdecimal()
    if not (whole or digits or (isinstance(value, float) and value.is_integer())):
        raise ValueError("must be a whole number")
    number = int(value)  # type: ignore[call-overload]
    if not low <= number <= high:
        raise ValueError(f"must be from {low} to {high}")
    return int(number)


def _read_bytes(value: object) -> bytes:
    try:
        if isinstance(value, str):
            return base64.b64decode(value, validate=True)
    except binascii.Error:
        pass
    raise ValueError("must be base64")
