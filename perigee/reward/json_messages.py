"""Fills protobuf messages from JSON values and names every field that is wrong, not just the first one.

The form is that of the services over HTTP: keys are the proto's names; enums are lower-case names without their prefix;
a bytes field `x` is text under `x`, or base64 under `x_base64`; null stands for a field that is not there.
"""

from __future__ import annotations

import base64
import binascii
import difflib
import re
from collections.abc import Callable, Mapping
from typing import Any, cast

from google.protobuf.descriptor import EnumDescriptor, FieldDescriptor
from google.protobuf.message import Message

from perigee.errors import FieldViolation

BASE64_SUFFIX = "_base64"
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
        field = _find_field(fields, str(key))
        place = f"{path}.{key}" if path else str(key)
        if field is None:
            violations.append(FieldViolation(place, unknown_key(str(key), fields)))
            continue
        if value is None:
            continue
        oneof = field.containing_oneof
        group = oneof.name if oneof is not None and len(oneof.fields) > 1 else field.name
        if group in chosen:
            violations.append(FieldViolation(place, f"cannot stand beside {chosen[group]}"))
            continue
        chosen[group] = str(key)
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


def _find_field(fields: Mapping[str, FieldDescriptor], key: str) -> FieldDescriptor | None:
    field = fields.get(key)
    if field is None and key.endswith(BASE64_SUFFIX):
        field = fields.get(key.removesuffix(BASE64_SUFFIX))
        return field if field is not None and field.type == FieldDescriptor.TYPE_BYTES else None
    return field


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
        put(_read_scalar(field, value, is_base64=place.endswith(BASE64_SUFFIX)))
    except ValueError as error:
        return [FieldViolation(place, f"{error}, got {describe_value(value)}")]
    return []


def _read_scalar(field: FieldDescriptor, value: object, *, is_base64: bool) -> object:
    """The value as the field takes it; ValueError says what it must be."""
    kind = field.cpp_type
    if kind == FieldDescriptor.CPPTYPE_STRING:
        if not isinstance(value, str):
            raise ValueError("must be a string")
        if field.type != FieldDescriptor.TYPE_BYTES:
            return value
        return _read_base64(value) if is_base64 else value.encode()
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        if not isinstance(value, bool):
            raise ValueError("must be true or false")
        return value
    if kind == FieldDescriptor.CPPTYPE_ENUM:
        assert field.enum_type is not None
        return _read_enum(field.enum_type, value)
    if kind in _FLOATS:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError("must be a number")
        return float(value)
    return _read_integer(value, *_INTEGERS[kind])


def _read_enum(enum: EnumDescriptor, value: object) -> int:
    prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", enum.name).upper() + "_"
    numbers = {item.name.removeprefix(prefix).lower(): item.number for item in enum.values}
    name = value.upper().removeprefix(prefix).lower() if isinstance(value, str) else ""
    if name not in numbers:
        raise ValueError(f"must be one of {', '.join(numbers)}")
    return numbers[name]


def _read_integer(value: object, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        raise ValueError("must be a whole number")
    if not low <= value <= high:
        raise ValueError(f"must be from {low} to {high}")
    return int(value)


def _read_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        raise ValueError("must be base64") from None
