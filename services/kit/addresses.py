"""Addresses under which other machines reach a process."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable

from perigee.errors import InvalidArgumentError
from services.kit.config import ServerConfig

UNSPECIFIED = ("0.0.0.0", "::", "[::]")
# Of the block for documentation, to which nobody sends: it stands for every address without a route of its own.
ELSEWHERE = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"}


def is_loopback(host: str) -> bool:
    """Returns whether a name or address is this machine's alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def advertised_host(config: ServerConfig) -> str:
    """Returns the name or address under which others reach a server with this configuration.

    Raises InvalidArgumentError when it is not configured and cannot be found.
    """
    if config.advertise_host:
        return config.advertise_host
    if config.host not in UNSPECIFIED:
        return config.host
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    if (found := find_address(family)) is None:
        raise InvalidArgumentError.for_field(
            "server.advertise_host",
            "is required: neither the host name nor a default route has an address that other machines reach; "
            "set PERIGEE_ADVERTISE_HOST to this machine's",
        )
    return found


def find_address(family: socket.AddressFamily) -> str | None:
    """Returns this machine's address off loopback: that of its name, as in a container, else the default route's."""
    look_ups: tuple[Callable[[socket.AddressFamily], str], ...] = (_address_of_name, _address_of_route)
    for look_up in look_ups:
        try:
            address = look_up(family)
        except OSError:
            continue
        if not is_loopback(address):
            return address
    return None


def address_towards(host: str) -> str:
    """Returns the address of this machine from which it reaches another; raises OSError where there is no way."""
    family, _, _, _, there = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(there)  # sends nothing
        return str(probe.getsockname()[0])


def is_own(host: str) -> bool:
    """Returns whether a name or address is one of this machine's."""
    try:
        family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
        socket.create_server((host, 0), family=family).close()
    except OSError:
        return False
    return True


def join_address(host: str, port: str | int) -> str:
    """Returns host:port, with brackets around an address of IPv6."""
    return f"[{host}]:{port}" if ":" in host.strip("[]") and not host.startswith("[") else f"{host}:{port}"


def _address_of_name(family: socket.AddressFamily) -> str:
    return str(socket.getaddrinfo(socket.gethostname(), None, family)[0][4][0])


def _address_of_route(family: socket.AddressFamily) -> str:
    return address_towards(ELSEWHERE[family])
