"""Configuration of a service: one section of a recipe, environment variables, and `--set`, in rising precedence."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

from pydantic import Field, SecretStr
from pydantic_settings import EnvSettingsSource, SettingsError

from perigee.config import Model, merge, nest, parse_override, read_yaml, validate
from perigee.errors import InvalidArgumentError
from perigee.rpc import MAX_MESSAGE_BYTES

__all__ = ["HttpConfig", "Model", "ServerConfig", "ServiceConfig", "TelemetryConfig", "load_config"]


class ServerConfig(Model):
    """Address, credentials and limits of a server."""

    host: str = "127.0.0.1"
    """Address to bind; anything but loopback needs a token."""
    port: int = Field(0, ge=0, le=65535)
    """Port to bind; 0 takes a free one."""
    token: SecretStr | None = None
    """Bearer token that callers must send, and that this service sends to the others; PERIGEE_TOKEN serves too."""
    advertise_host: str | None = None
    """Name or address under which other machines reach this process; PERIGEE_ADVERTISE_HOST serves too. When unset, the
    bound address; for 0.0.0.0 the address of the host name, else that of the interface of the default route."""
    tls_cert_file: str | None = None
    """PEM certificate chain; with `tls_key_file` the server speaks TLS."""
    tls_key_file: str | None = None
    """PEM private key."""
    tls_ca_file: str | None = None
    """PEM roots: callers must show a certificate signed by them, and peers are checked against them."""
    max_concurrent_rpcs: int = Field(256, ge=1)
    """Calls served at once; more are refused with RESOURCE_EXHAUSTED."""
    drain_seconds: float = Field(10.0, ge=0)
    """Time that calls in flight have after SIGTERM."""
    metrics_port: int | None = Field(None, ge=0, le=65535)
    """Port of `/metrics`, `/healthz` and `/readyz`, in clear and without a token; 0 takes a free one, none when
    unset."""
    max_connection_age_seconds: float | None = Field(120.0, gt=0)
    """Age at which a connection takes no new calls, so that its caller looks up the addresses of the service again and
    finds new replicas; never when null."""
    max_connection_grace_seconds: float | None = Field(None, gt=0)
    """Time that calls in flight have on a connection of that age; when unset they end by themselves, at the latest at
    their own deadlines, so that no stream breaks off."""


class HttpConfig(Model):
    """HTTP beside gRPC, with the host, the token, the certificates and the limits of `server`."""

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


SERVER_ALIASES = {"PERIGEE_TOKEN": "server.token", "PERIGEE_ADVERTISE_HOST": "server.advertise_host"}
# Folders in a recipe that `perigee` fills in.
PLACEHOLDERS = ("{data}", "{run}", "{recipe}")

ConfigT = TypeVar("ConfigT", bound=ServiceConfig)


def load_config(config_class: type[ConfigT], argv: Sequence[str] | None = None) -> ConfigT:
    """Returns the service's configuration from `--config FILE`, PERIGEE_<SECTION>__* variables and `--set a.b=c`.

    Ends the process with one sentence on standard error and exit code 2 when the configuration is wrong.
    """
    parser = argparse.ArgumentParser(prog=f"python -m services.{config_class.section}")
    parser.add_argument("--config", metavar="FILE", help="recipe whose section is read")
    parser.add_argument("--set", metavar="A.B=C", action="append", default=[], dest="overrides")
    arguments = parser.parse_args(argv)
    try:
        recipe = read_yaml(arguments.config) if arguments.config else {}
        values = dict(recipe.get(config_class.section) or {})
        merge(values, environment_values(config_class))
        for override in arguments.overrides:
            merge(values, parse_override(override))
        source = arguments.config or "configuration"
        refuse_placeholders(values, source, config_class.section)
        return validate(config_class, values, source, config_class.section)
    except InvalidArgumentError as error:
        print(error.message, file=sys.stderr)
        raise SystemExit(2) from error


def refuse_placeholders(value: Any, source: str, field: str) -> None:
    """Raises InvalidArgumentError for a value with a placeholder, which only the command line can fill in."""
    if isinstance(value, dict):
        for key, each in value.items():
            refuse_placeholders(each, source, f"{field}.{key}")
    elif isinstance(value, str) and any(name in value for name in PLACEHOLDERS):
        raise InvalidArgumentError.for_field(
            f"{source}: {field}",
            f"{value} names a folder that a service does not know: run `perigee prepare RECIPE --out DIR` first and "
            "start it with --config DIR/recipe.yaml",
        )


def environment_values(config_class: type[ServiceConfig]) -> dict[str, Any]:
    """Returns the values of PERIGEE_<SECTION>__A__B variables, and of the aliases that are set.

    Mappings and lists are JSON, `null` is None. Unknown names are among the values, for the model to refuse them.
    """
    prefix = f"PERIGEE_{config_class.section.upper()}__"
    values: dict[str, Any] = {}
    for name, field in (SERVER_ALIASES | config_class.environment_aliases).items():
        if text := os.environ.get(name):
            merge(values, nest(field.split("."), text))
    source = EnvSettingsSource(
        config_class,  # type: ignore[arg-type]
        env_prefix=prefix,
        env_nested_delimiter="__",
        env_parse_none_str="null",
    )
    try:
        merge(values, source())
    except SettingsError as error:
        raise InvalidArgumentError.for_field(prefix, f"{error}: {error.__cause__}") from error
    for name, text in os.environ.items():
        keys = name.removeprefix(prefix).lower().split("__")
        if name.startswith(prefix) and keys[0] not in config_class.model_fields:
            merge(values, nest(keys, text))
    return values
