"""Configuration of a service: one section of a recipe, environment variables, and `--set`, in rising precedence."""

from __future__ import annotations

import argparse
import copy
import difflib
import json
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator

from perigee.errors import FieldViolation, InvalidArgumentError
from perigee.rpc import MAX_MESSAGE_BYTES


class Model(BaseModel):
    """A nested part of a configuration: immutable, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())

    renamed_keys: ClassVar[Mapping[str, str]] = {}
    """Old keys that are accepted for one release, each with its new one: dotted paths inside this part."""

    @model_validator(mode="before")
    @classmethod
    def _accept_renamed_keys(cls, values: Any) -> Any:
        return rename_keys(values, cls.renamed_keys) if cls.renamed_keys and isinstance(values, Mapping) else values


class ServerConfig(Model):
    """How a service listens."""

    host: str = "127.0.0.1"
    """Address to bind; anything but loopback needs a token."""
    port: int = Field(0, ge=0, le=65535)
    """Port to bind; 0 takes a free one."""
    token: SecretStr | None = None
    """Bearer token that callers must send, and that this service sends to the others; PERIGEE_TOKEN serves too."""
    tls_cert_file: str | None = None
    """PEM certificate chain; with `tls_key_file` the server speaks TLS."""
    tls_key_file: str | None = None
    """PEM private key."""
    tls_ca_file: str | None = None
    """PEM roots: callers must show a certificate signed by them, and peers are checked against them."""
    max_concurrent_rpcs: int = Field(256, ge=1)
    """Calls served at once; more are refused with RESOURCE_EXHAUSTED."""
    drain_seconds: float = Field(10.0, ge=0)
    """How long calls in flight may go on after SIGTERM."""
    metrics_port: int | None = None
    """Port of the Prometheus endpoint; none when unset."""


class HttpConfig(Model):
    """How a service answers HTTP beside gRPC: with the host, the token, the certificates and the limits of `server`."""

    port: int | None = Field(None, ge=0, le=65535)
    """Port to bind; 0 takes a free one, unset leaves HTTP off."""
    max_body_bytes: int | None = Field(None, ge=1)
    """Largest body of a request; twice the largest gRPC message unless set, since JSON takes more room."""


class TelemetryConfig(Model):
    """Logs and traces."""

    log_level: str = "info"
    """debug, info, warning or error."""
    otlp_endpoint: str | None = None
    """OTLP/gRPC collector for traces, host:port; no traces when unset."""


class ServiceConfig(Model):
    """Base of every service's configuration; `section` is its name in a recipe."""

    section: ClassVar[str]
    environment_aliases: ClassVar[dict[str, str]] = {}
    """Further environment variables and the fields that they set."""

    server: ServerConfig = ServerConfig()
    """How the service listens."""
    telemetry: TelemetryConfig = TelemetryConfig()
    """Logs and traces."""

    @property
    def message_bytes(self) -> int:
        """Largest gRPC message that is read or sent; a service that takes files overrides it."""
        return MAX_MESSAGE_BYTES


TOKEN_ALIAS = {"PERIGEE_TOKEN": "server.token"}

ConfigT = TypeVar("ConfigT", bound=ServiceConfig)
ModelT = TypeVar("ModelT", bound=BaseModel)


def load_config(config_class: type[ConfigT], argv: Sequence[str] | None = None) -> ConfigT:
    """The service's configuration from `--config FILE`, PERIGEE_<SECTION>__* variables and `--set a.b=c`.

    Ends the process with one sentence on standard error and exit code 2 when the configuration is wrong.
    """
    parser = argparse.ArgumentParser(prog=f"python -m services.{config_class.section}")
    parser.add_argument("--config", metavar="FILE", help="recipe whose section is read")
    parser.add_argument("--set", metavar="A.B=C", action="append", default=[], dest="overrides")
    arguments = parser.parse_args(argv)
    try:
        values = read_section(arguments.config, config_class.section) if arguments.config else {}
        merge(values, environment_values(config_class.section, TOKEN_ALIAS | config_class.environment_aliases))
        for override in arguments.overrides:
            merge(values, parse_override(override))
        return validate(config_class, values, arguments.config or "configuration", config_class.section)
    except InvalidArgumentError as error:
        print(error.message, file=sys.stderr)
        raise SystemExit(2) from error


def read_section(path: str | Path, section: str) -> dict[str, Any]:
    """The section of a recipe file; empty when the recipe has none.

    Raises InvalidArgumentError when the file cannot be read or is no mapping.
    """
    return dict(read_yaml(path).get(section) or {})


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file that holds a mapping.

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


def environment_values(section: str, aliases: Mapping[str, str]) -> dict[str, Any]:
    """Values from PERIGEE_<SECTION>__A__B variables, and from the aliases that are set."""
    prefix = f"PERIGEE_{section.upper()}__"
    values: dict[str, Any] = {}
    for name, field in aliases.items():
        if text := os.environ.get(name):
            merge(values, nest(field.split("."), text))
    for name, text in os.environ.items():
        if name.startswith(prefix):
            merge(values, nest(name.removeprefix(prefix).lower().split("__"), yaml.safe_load(text)))
    return values


def parse_override(override: str) -> dict[str, Any]:
    """`a.b=c` as nested mappings; the value is read as YAML.

    Raises InvalidArgumentError when there is no key or no equals sign.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InvalidArgumentError.for_field("--set", f"{override!r} is not of the form a.b=c")
    return nest(key.split("."), yaml.safe_load(text))


def nest(keys: Sequence[str], value: Any) -> dict[str, Any]:
    """The value under nested mappings, outermost key first."""
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
    """A copy of `values` in which each old key of `renamed` has become its new one, with a warning for each.

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
    """The values as `model`.

    Raises InvalidArgumentError whose message names `source`, the field and what to do.
    """
    try:
        return model(**values)
    except ValidationError as error:
        violations = [describe(model, section, dict(detail)) for detail in error.errors()]
        first = violations[0]
        raise InvalidArgumentError(f"{source}: {first.field}: {first.description}", violations=violations) from error


def describe(model: type[BaseModel], section: str, detail: Mapping[str, Any]) -> FieldViolation:
    """One pydantic error as a field and a sentence; an unknown key gets the nearest known one."""
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


def show(config: BaseModel) -> dict[str, Any]:
    """The whole configuration for the log, secrets masked."""
    shown: dict[str, Any] = json.loads(config.model_dump_json())
    return shown


def _known_keys(model: type[BaseModel], path: Sequence[str]) -> list[str]:
    known: Any = model
    for part in path:
        field = known.model_fields.get(part) if isinstance(known, type) and issubclass(known, BaseModel) else None
        if field is None:
            return []
        known = field.annotation
    return list(known.model_fields) if isinstance(known, type) and issubclass(known, BaseModel) else []


def _pop_path(values: dict[str, Any], keys: Sequence[str]) -> Any:
    """Takes out the value under nested keys, and each mapping that this leaves empty; KeyError when there is none."""
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
