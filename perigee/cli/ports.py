"""Free loopback ports for the services of the local stack."""

from __future__ import annotations

import random
import socket

HOST = "127.0.0.1"
# Below the kernel's ephemeral range, so that no outgoing connection takes a port between choice and use.
PORT_RANGE = range(20_000, 32_000)


def pick_ports(count: int) -> list[int]:
    """Distinct ports that nothing listens on. Raises OSError when there are not enough."""
    ports: list[int] = []
    candidates = random.SystemRandom().sample(PORT_RANGE, len(PORT_RANGE))
    for port in candidates:
        if len(ports) == count:
            return ports
        if _is_free(port):
            ports.append(port)
    raise OSError(f"no {count} free ports on {HOST} between {PORT_RANGE.start} and {PORT_RANGE.stop}")


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True
