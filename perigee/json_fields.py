"""What a message's descriptor says about its JSON form: its keys, and how each field is read and written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor

from perigee import json_scalars as scalars

Convert = Callable[[Any], Any]

INT_RANGES = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}
BASE64_SUFFIX = "_base64"


@dataclass(frozen=True)
class Field:
    """One field of a message.

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
    """The fields of a message in the order of their declaration."""
    return tuple(_describe_field(field) for field in descriptor.fields)


@cache
def keys_of(descriptor: Descriptor) -> dict[str, tuple[Field, bool]]:
    """The JSON keys of a message: their fields, and whether the key holds base64."""
    fields = fields_of(descriptor)
    keys = {f"{field.name}{BASE64_SUFFIX}": (field, True) for field in fields if field.is_bytes}
    return keys | {field.name: (field, False) for field in fields}


@cache
def enum_names(enum: EnumDescriptor) -> dict[int, str]:
    """The JSON name of each number: lower case, without the enum's name where all values begin with it."""
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
        read_key=_key_reader(entry.fields_by_name["key"]) if entry else scalars.write_as_is,
        write_key=scalars.write_key,
    )


def _reader(field: FieldDescriptor) -> Convert | None:
    if field.cpp_type in INT_RANGES:
        return partial(scalars.read_int, *INT_RANGES[field.cpp_type])
    if field.enum_type is not None:
        names = enum_names(field.enum_type)
        numbers = {value.name.lower(): value.number for value in field.enum_type.values}
        return partial(
            scalars.read_enum, numbers | {name: number for number, name in names.items()}, (*names.values(),)
        )
    readers: dict[int, Convert] = {
        FieldDescriptor.TYPE_STRING: scalars.read_string,
        FieldDescriptor.TYPE_BYTES: scalars.read_text,
        FieldDescriptor.TYPE_BOOL: scalars.read_bool,
        FieldDescriptor.TYPE_DOUBLE: scalars.read_double,
        FieldDescriptor.TYPE_FLOAT: scalars.read_float,
    }
    return readers.get(field.type)


def _writer(field: FieldDescriptor) -> Convert | None:
    if field.message_type is not None:
        return None
    if field.enum_type is not None:
        return partial(scalars.write_enum, enum_names(field.enum_type))
    if field.cpp_type in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
        return scalars.write_float
    return scalars.write_as_is


def _key_reader(field: FieldDescriptor) -> Convert:
    if field.type == FieldDescriptor.TYPE_STRING:
        return scalars.write_as_is
    if field.type == FieldDescriptor.TYPE_BOOL:
        return scalars.read_bool_key
    return partial(scalars.read_int_key, *INT_RANGES[field.cpp_type])
