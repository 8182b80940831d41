"""Prints docs/configuration.md: every key of a recipe with its type, its default and its docstring.

python tools/print_configuration.py > docs/configuration.md
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from perigee.config import models_in

ROOT = Path(__file__).parents[1]
SERVICES = ("coordinator", "rollout", "trainer", "reward", "sandbox", "buffer")
SHARED = ("server", "telemetry", "http")
# What several sections have: the keys below it stand once, at the top level.
TOP_LEVEL = ("rope",)
HEAD = """# Configuration

Printed from the code by `make docs`; edit the docstrings there. A recipe has a section `run`, which says what is
trained, and a section for each service. In rising precedence, a key is set in the recipe, by an environment variable
(`PERIGEE_ROLLOUT__MAX_NUM_SEQS=128`, for a service's), and by `--set rollout.max_num_seqs=128`.
"""


def type_name(annotation: Any) -> str:
    """A type as a person writes it."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(json.dumps(value) for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join("null" if part is type(None) else type_name(part) for part in arguments)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"mapping of {type_name(arguments[1])}"
    if origin is not None and hasattr(origin, "__metadata__"):
        return type_name(arguments[0])
    if origin in (list, tuple, set, frozenset):
        return "list of " + type_name(arguments[0])
    if annotation is SecretStr:
        return "secret"
    names = {"str": "text", "int": "integer", "float": "number", "bool": "true or false", "Path": "path"}
    name = getattr(annotation, "__name__", str(annotation))
    return names.get(name, name)


def bounds(field: FieldInfo) -> str:
    """The limits of a number, `>= 1` for example."""
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    found = [
        f"{sign} {getattr(part, name)}"
        for part in field.metadata
        for name, sign in signs.items()
        if getattr(part, name, None) is not None
    ]
    return " " + " and ".join(found) if found else ""


def default_of(field: FieldInfo, given: Any) -> str:
    """The default as YAML writes it; `given` is what the model around it sets instead."""
    if field.default_factory is not None:
        return "computed"
    value = field.default if given is None else given
    return "required" if value is PydanticUndefined else f"`{json.dumps(plain(value), ensure_ascii=False)}`"


def plain(value: Any) -> Any:
    """A default as JSON has it."""
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(part) for part in value]
    if isinstance(value, Mapping):
        return {key: plain(part) for key, part in value.items()}
    return value


def is_own(model: type[BaseModel], key: str) -> bool:
    """Whether a key is the service's own, or has a default of its own, and is not as every service has it."""
    name, _, rest = key.partition(".")
    annotation: Any = model.model_fields[name].annotation
    if name not in SHARED:
        return True
    return annotation.__module__ != "services.kit.config" and rest.split(".")[0] in annotation.__annotations__


def rows_of(model: type[BaseModel], prefix: str, given: Any = None) -> Iterator[tuple[str, str, str, str]]:
    """Key, type, default and meaning of each field; those of nested models follow under their path."""
    for name, field in model.model_fields.items():
        key, value = f"{prefix}{name}", getattr(given, name, None)
        meaning = " ".join((field.description or "").split()).replace("|", "\\|")
        nested = models_in(field.annotation)
        if not nested:
            yield key, type_name(field.annotation) + bounds(field), default_of(field, value), meaning
            continue
        yield key, "", "required" if field.is_required() else "", meaning
        default = field.default if value is None else value
        origin = get_origin(field.annotation)
        inside = "[]." if origin in (list, tuple) else ".NAME." if origin is dict else "."
        for inner in nested:
            yield from rows_of(inner, key + inside, default if isinstance(default, inner) else None)


def section(name: str, model: type[BaseModel], skip_shared: bool) -> list[str]:
    """The heading and the table of a section."""
    lines = [f"## {name}", "", " ".join((model.__doc__ or "").split("\n\n")[0].split()), ""]
    lines += ["| key | type | default | |", "|---|---|---|---|"]
    for key, kind, default, meaning in rows_of(model, ""):
        if skip_shared and not is_own(model, key):
            continue
        parents, _, last = key.rpartition(".")
        if name != "Top level" and not {*TOP_LEVEL}.isdisjoint(parents.split(".")):
            continue
        if name != "Top level" and last in TOP_LEVEL:
            meaning += f" Keys: [`{last}`](#top-level)."
        lines.append(f"| `{key}` | {kind} | {default} | {meaning} |")
    return [*lines, ""]


def service_config(service: str) -> type[BaseModel]:
    """The configuration class of a service."""
    module = importlib.import_module(f"services.{service}.config")
    [found] = [value for value in vars(module).values() if getattr(value, "section", None) == service]
    assert isinstance(found, type)
    return found


def shared_lines() -> list[str]:
    """The parts that every service has."""
    from services.kit import config

    lines = ["## Every service", "", "Keys of each service's section; `http` where the service answers HTTP.", ""]
    lines += ["| key | type | default | |", "|---|---|---|---|"]
    models: list[type[BaseModel]] = [config.ServerConfig, config.TelemetryConfig, config.HttpConfig]
    for name, model in zip(SHARED, models, strict=True):
        lines += [
            f"| `{key}` | {kind} | {default} | {text} |" for key, kind, default, text in rows_of(model, f"{name}.")
        ]
    return [*lines, ""]


def render() -> str:
    """The whole page."""
    from perigee.cli.recipe import RecipeHead
    from services.coordinator.run_config import RunConfig
    from services.trainer.algorithms import ALGORITHMS, SUPERVISED

    lines = [HEAD, *section("Top level", RecipeHead, skip_shared=False), *section("run", RunConfig, skip_shared=False)]
    for name, algorithm in ALGORITHMS.items():
        lines += section(f"run.algorithm where its name is {name}", algorithm.Settings, skip_shared=False)
    for name, supervised in SUPERVISED.items():
        if supervised.Settings.model_fields:
            lines += section(f"run.sft[].algorithm where its name is {name}", supervised.Settings, skip_shared=False)
    for service in SERVICES:
        lines += section(service, service_config(service), skip_shared=True)
    text = "\n".join([*lines, *shared_lines()]).rstrip() + "\n"
    return re.sub(r"\n{3,}", "\n\n", text)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    print(render(), end="")
