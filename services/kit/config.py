"""Configuration of a service: one section of a recipe, environment variables, and `--set`, in rising precedence."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self, TypeVar

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import EnvSettingsSource, SettingsError

from perigee.config import Model, merge, nest, parse_override, read_yaml, validate
from perigee.errors import InvalidArgumentError
from perigee.rpc import MAX_MESSAGE_BYTES

__all__ = [
    "Audience",
    "CallerConfig",
    "HttpConfig",
    "Model",
    "QuotaConfig",
    "ServerConfig",
    "ServiceConfig",
    "TelemetryConfig",
    "load_config",
]


Audience = Literal["control", "policy", "reward", "sandbox"]


class QuotaConfig(Model):
    """Bounds on the calls of one caller to one process, over gRPC and HTTP together; none where unset."""

    max_in_flight: int | None = Field(None, ge=1)
    """Calls at once; more are refused with RESOURCE_EXHAUSTED."""
    per_second: float | None = Field(None, gt=0)
    """Calls begun per second, on average over one second; more are refused with RESOURCE_EXHAUSTED."""


class CallerConfig(Model):
    """Another team or pipeline that may call."""

    tokens: list[SecretStr] = Field(min_length=1)
    """Its bearer tokens, all of them valid: the old one and the new one while they are rotated."""
    audiences: list[Audience] = Field(min_length=1)
    """What it may call: reward, sandbox, policy, which is the endpoint of rollout workers alone, or control, which is
    every other service."""
    quota: QuotaConfig | None = None
    """Its own quota; `server.quota` when unset."""

    @field_validator("tokens")
    @classmethod
    def _check_tokens(cls, tokens: list[SecretStr]) -> list[SecretStr]:
        if not all(token.get_secret_value() for token in tokens):
            raise ValueError("a token is empty")
        return tokens


class ServerConfig(Model):
    """Address, credentials and limits of a server."""

    host: str = "127.0.0.1"
    """Address to bind; anything but loopback needs a token."""
    port: int = Field(0, ge=0, le=65535)
    """Port to bind; 0 takes a free one."""
    token: SecretStr | None = None
    """Bearer token of the stack, valid everywhere, that this service sends to the others; PERIGEE_TOKEN serves too."""
    advertise_host: str | None = None
    """Name or address under which other machines reach this process; PERIGEE_ADVERTISE_HOST serves too. When unset, the
    bound address; for 0.0.0.0 the address of the host name, else that of the interface of the default route."""
    token_file: str | None = None
    """File with `token`, read anew when it changes; of several, one a line, all are valid and the first is sent.
    PERIGEE_TOKEN_FILE serves too."""
    callers: dict[str, CallerConfig] = {}
    """Further callers by name, with tokens of their own."""
    callers_file: str | None = None
    """YAML file with more of `callers`, read anew when it changes; PERIGEE_CALLERS_FILE serves too."""
    quota: QuotaConfig = QuotaConfig()
    """Quota of each of `callers` without one of its own; the stack's token has none."""
    audit: Literal["none", "callers", "all"] = "callers"
    """Calls with a line in the log: none, those without the stack's token, or all."""
    tls_cert_file: str | None = None
    """PEM certificate chain; with `tls_key_file` the server speaks TLS. Files are read anew when they change."""
    tls_key_file: str | None = None
    """PEM private key."""
    tls_ca_file: str | None = None
    """PEM roots: peers are reached by TLS and checked against them, and callers must show a certificate of theirs."""
    tls_verify_clients: bool = True
    """Whether `tls_ca_file` has callers show a certificate, too; without, a token is enough."""
    tls_server_name: str | None = None
    """Name in the peers' certificates, where they are not for the peers' addresses."""
    max_concurrent_rpcs: int = Field(256, ge=1)
    """Calls served at once; more are refused with RESOURCE_EXHAUSTED."""
    max_request_bytes_in_flight: int = Field(1 << 30, ge=1)
    """Bytes of all requests that are served or wait, over gRPC and HTTP together; more are refused with
    RESOURCE_EXHAUSTED. One that is larger than this alone is always refused."""
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

    @model_validator(mode="after")
    def _check_credentials(self) -> Self:
        if self.token is not None and self.token_file is not None:
            raise ValueError("token and token_file are both given: leave out one of them")
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            raise ValueError("tls_cert_file and tls_key_file are given together or not at all")
        if self.tls_ca_file is not None and self.tls_cert_file is None and self.tls_verify_clients:
            raise ValueError("tls_ca_file needs tls_cert_file and tls_key_file, unless tls_verify_clients is false")
        if self.tls_server_name is not None and self.tls_ca_file is None:
            raise ValueError("tls_server_name needs tls_ca_file, since peers are reached in clear without it")
        return self

    @property
    def has_tokens(self) -> bool:
        """Whether calls need a token."""
        return any(each is not None for each in (self.token, self.token_file, self.callers_file)) or bool(self.callers)


class HttpConfig(Model):
    """HTTP beside gRPC, with the host, the token, the certificates and the limits of `server`."""

    audience: ClassVar[Audience | None] = None
    """What a caller's token must be for over HTTP; as over gRPC when None, and for RPCs in any case."""

    port: int | None = Field(None, ge=0, le=65535)
    """Port to bind; 0 takes a free one, unset leaves HTTP off."""
    max_body_bytes: int | None = Field(None, ge=1)
    """Largest body of a request; half as much again as the largest gRPC message unless set, since JSON takes more
    room."""
    timeout_seconds: float | None = Field(None, gt=0)
    """Deadline of a call that brings none; unset leaves it without one."""


class TelemetryConfig(Model):
    """Logs and traces."""

    log_level: str = "info"
    """debug, info, warning or error."""
    log_format: Literal["json", "console"] = "json"
    """Form of log lines: `json` for machines, `console` for people."""
    otlp_endpoint: str | None = None
    """OTLP/gRPC collector for traces: host:port or http://host:port in clear, https://host:port with TLS. Unset, the
    OTEL_EXPORTER_OTLP_ENDPOINT variable decides; without either there are no traces."""


class ServiceConfig(Model):
    """Base of every service's configuration; `section` is its name in a recipe."""

    section: ClassVar[str]
    audience: ClassVar[Audience] = "control"
    """What a caller's token must be for."""
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


SERVER_ALIASES = {
    "PERIGEE_TOKEN": "server.token",
    "PERIGEE_TOKEN_FILE": "server.token_file",
    "PERIGEE_CALLERS_FILE": "server.callers_file",
    "PERIGEE_ADVERTISE_HOST": "server.advertise_host",
}
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
        if recipe.get("model") is not None and "model" in config_class.model_fields:
            values.setdefault("model", recipe["model"])
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
