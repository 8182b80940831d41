"""Typed configuration: models that refuse unknown keys, YAML, `a.b=c` overrides, and errors that name the field."""

from __future__ import annotations

import copy
import difflib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from perigee.errors import FieldViolation, InvalidArgumentError

ModelT = TypeVar("ModelT", bound=BaseModel)


class Model(BaseModel):
    """Part of a configuration: immutable, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())

    renamed_keys: ClassVar[Mapping[str, str]] = {}
    """Old keys that are accepted for one release, each with its new one: dotted paths inside this part."""

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, values: Any) -> Any:
        """Accepts old keys; what is not given of a part has this section's default of it, not its class's."""
        if not isinstance(values, Mapping):
            return values
        result = rename_keys(values, cls.renamed_keys) if cls.renamed_keys else dict(values)
        for name, field in cls.model_fields.items():
            default, given = field.default, result.get(name)
            if isinstance(default, Model) and field.annotation is type(default) and isinstance(given, Mapping):
                completed = default.model_dump(exclude_unset=True)
                merge(completed, rename_keys(given, default.renamed_keys))
                result[name] = completed
        return result


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Reads a YAML file that holds a mapping.

    Raises InvalidArgumentError when the file cannot be read or is no mapping.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError.for_field(str(path), f"cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise InvalidArgumentError.for_field(str(path), f"is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise InvalidArgumentError.for_field(str(path), "must be a mapping of sections")
    return values


def parse_override(override: str) -> dict[str, Any]:
    """Returns `a.b=c` as nested mappings; the value is read as YAML.

    Raises InvalidArgumentError when there is no key, no equals sign, or the value is not YAML.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InvalidArgumentError.for_field("--set", f"{override!r} is not of the form a.b=c")
    try:
        return nest(key.split("."), yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise InvalidArgumentError.for_field("--set", f"{text!r} is not YAML: {key}='\"{text}\"' is text") from error


def nest(keys: Sequence[str], value: Any) -> dict[str, Any]:
    """Returns the value under nested mappings, outermost key first."""
    for key in reversed(keys):
        value = {key: value}
    assert isinstance(value, dict)
    return value


def merge(values: dict[str, Any], overrides: Mapping[str, Any]) -> None:
    """Lays `overrides` over `values` in place, mapping by mapping."""
    for key, value in overrides.items():
        if isinstance(value, Mapping) and isinstance(values.get(key), dict):
            merge(values[key], value)
        else:
            values[key] = dict(value) if isinstance(value, Mapping) else value


def rename_keys(values: Mapping[str, Any], renamed: Mapping[str, str]) -> dict[str, Any]:
    """Returns a copy of `values` in which each old key of `renamed` has become its new one, with a warning for each.

    Raises ValueError when a key is given under both names.
    """
    result = copy.deepcopy(dict(values))
    for old, new in renamed.items():
        try:
            value = _pop_path(result, old.split("."))
        except KeyError:
            continue
        if _has_path(result, new.split(".")):
            raise ValueError(f"{old} is the old name of {new}: give {new} alone")
        merge(result, nest(new.split("."), value))
        message = f"the key {old} is called {new} now; the old name goes with the next release"
        warnings.warn(message, FutureWarning, stacklevel=2)
    return result


def validate(model: type[ModelT], values: Mapping[str, Any], source: str, section: str) -> ModelT:
    """Returns the values as `model`.

    Raises InvalidArgumentError whose message names `source`, the field and what to do.
    """
    try:
        return model(**values)
    except ValidationError as error:
        violations = [describe(model, section, dict(detail)) for detail in error.errors()]
        first = violations[0]
        raise InvalidArgumentError(f"{source}: {first.field}: {first.description}", violations=violations) from error


def describe(model: type[BaseModel], section: str, detail: Mapping[str, Any]) -> FieldViolation:
    """Returns a pydantic error as a field and a sentence; an unknown key gets the nearest known one."""
    location = [str(part) for part in detail["loc"]]
    field = ".".join([section, *location] if section else location)
    if detail["type"] == "extra_forbidden":
        near = difflib.get_close_matches(location[-1], _known_keys(model, location[:-1]), n=1)
        return FieldViolation(field, "unknown key" + (f"; did you mean {near[0]}?" if near else ""))
    if detail["type"] == "missing":
        return FieldViolation(field, "is required")
    if detail["type"] == "value_error":  # a validator of ours, whose sentence says it all
        return FieldViolation(field, str(detail["ctx"]["error"]))
    return FieldViolation(field, f"{detail['msg'][0].lower()}{detail['msg'][1:]}, got {detail['input']!r}")


def _known_keys(model: type[BaseModel], path: Sequence[str]) -> list[str]:
    known: Any = model
    for part in path:
        field = known.model_fields.get(part) if isinstance(known, type) and issubclass(known, BaseModel) else None
        if field is None:
            return []
        known = field.annotation
    return list(known.model_fields) if isinstance(known, type) and issubclass(known, BaseModel) else []


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """Returns the models that a type is made of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in models_in(part)]


def key_paths(model: type[BaseModel], path: str) -> Iterator[str]:
    """Yields the dotted path of each key below `path`, inner ones included; `[]` stands for an item of a list."""
    for name, field in model.model_fields.items():
        key = f"{path}.{name}" if path else name
        yield key
        inside = "[]" if get_origin(field.annotation) in (list, tuple) else ""
        for inner in models_in(field.annotation):
            yield from key_paths(inner, key + inside)


def _pop_path(values: dict[str, Any], keys: Sequence[str]) -> Any:
    """Removes and returns the value under nested keys, with each mapping that is empty then; KeyError without one."""
    first, *rest = keys
    if not rest:
        return values.pop(first)
    inner = values[first]
    if not isinstance(inner, dict):
        raise KeyError(first)
    value = _pop_path(inner, rest)
    if not inner:
        del values[first]
    return value


def _has_path(values: Any, keys: Sequence[str]) -> bool:
    if not keys:
        return True
    return isinstance(values, Mapping) and keys[0] in values and _has_path(values[keys[0]], keys[1:])
