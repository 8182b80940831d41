"""Options of the commands that call services: token, TLS and mutual TLS."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from perigee.cli.ending import reporting_errors
from perigee.rpc import VARIABLES, ChannelOptions

# By field of ChannelOptions: what its value is called, and what it is.
OPTIONS = {
    "token": ("TEXT", "Bearer token."),
    "token_file": ("FILE", "File whose first line is the bearer token."),
    "ca_file": ("FILE", "PEM roots of the service's certificate; without them the connection is in clear."),
    "cert_file": ("FILE", "PEM certificate chain for a service that wants one."),
    "key_file": ("FILE", "PEM private key of --cert-file."),
    "server_name": ("NAME", "Name in the service's certificate, where it is not that of the address."),
}


def connecting(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command that takes a `channel` the options that make one; PERIGEE_TOKEN and so on serve too."""
    signature = inspect.signature(command, eval_str=True)
    own = [parameter for parameter in signature.parameters.values() if parameter.name != "channel"]
    added = [_make_parameter(name, *OPTIONS[name]) for name in OPTIONS]

    @functools.wraps(command)
    def run(**values: Any) -> None:
        given = {name: values.pop(name) for name in OPTIONS}
        with reporting_errors(values.get("debug", False)):
            channel = ChannelOptions.from_environment(**given)
        command(channel=channel, **values)

    run.__signature__ = signature.replace(parameters=[*own, *added])  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *added)}
    return run


def _make_parameter(name: str, metavar: str, help_text: str) -> inspect.Parameter:
    option = typer.Option(
        f"--{name.replace('_', '-')}",
        metavar=metavar,
        help=f"{help_text} [{VARIABLES[name]}]",
        rich_help_panel="Connection",
    )
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Parameter(name, kind, default=None, annotation=Annotated[str | None, option])
