"""Machines of a trainer: where each is reached, and connections by which the others notice that one is gone.

On one machine torchrun ends all ranks when one of them dies. Between machines a rank would learn of it in its next
collective, and never where a machine vanishes without closing its connections.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING

from perigee.errors import InvalidArgumentError, UnavailableError
from services.kit.addresses import address_towards, advertised_host, is_loopback, is_own
from services.kit.config import ServerConfig
from services.kit.telemetry import get_logger

if TYPE_CHECKING:
    from services.trainer.megatron.parallel import ObjectChannel

log = get_logger(__name__)

_CONNECT_S = 60.0
_SECRET_BYTES = 16
_SECRET_S = 5.0
# Unanswered probes after which the kernel ends a connection.
_PROBES = 3


def reached_host(server: ServerConfig, machine: int) -> str:
    """Returns the name or address under which others reach a process of a machine.

    Machine 0 is reached as its server is. The others serve nothing, and a recipe that all share may name machine 0:
    they take what is advertised where it is theirs, else the address from which they reach machine 0.
    """
    if machine == 0:
        return advertised_host(server)
    host = server.advertise_host
    return host if host and not is_loopback(host) and is_own(host) else address_towards(os.environ["MASTER_ADDR"])


def check_hosts(everyone: ObjectChannel, host: str) -> None:
    """Raises InvalidArgumentError, on every rank, when ranks of two machines would be reached under one host."""
    # Ranks of one machine and one network may share it.
    own = socket.gethostname(), Path("/proc/self/ns/net").stat().st_ino
    machines: dict[str, tuple[str, int]] = {}
    for name, machine in everyone.gather((host, own)):
        if machines.setdefault(name, machine) != machine:
            raise InvalidArgumentError.for_field(
                "trainer.weights.host",
                f"{name} stands for two machines: leave it out, or set it on each to its own name or address",
            )


def connect_machines(everyone: ObjectChannel, rank: int, world: int, processes: int) -> list[socket.socket]:
    """Connects machine 0 with each of the others by the first ranks of both; a collective.

    `processes` are the ranks of each machine. Returns the connections of this rank, none on one that is not the first
    of its machine. Raises UnavailableError when another machine cannot be reached.
    """
    if world == processes:
        return []
    master = os.environ["MASTER_ADDR"]
    listener = _listen(master) if rank == 0 else None
    own = listener and (listener.getsockname()[1], os.urandom(_SECRET_BYTES))
    # None where rank 0 does not listen: the others do not wait for it.
    if (found := everyone.broadcast(own)) is None:
        raise UnavailableError(f"machine 0 of the trainer opens no port for the others at {master}: see its log")
    port, secret = found
    try:
        if listener is not None:
            return _accept(listener, secret, world // processes - 1)
        if rank % processes:
            return []
        connection = socket.create_connection((master, port), timeout=_CONNECT_S)
        connection.sendall(secret)
        return [connection]
    except OSError as error:
        raise UnavailableError(
            f"the trainer's machines do not reach one another through {master}: {error}; open all ports between them"
        ) from error


def _listen(master: str) -> socket.socket | None:
    """Returns a listening socket of the family of machine 0's address; None, with the reason in the log, if none."""
    try:
        family = socket.getaddrinfo(master, None, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server(("", 0), family=family)
    except OSError as error:
        log.error("no port for the other machines", master=master, error=str(error))
        return None


def _accept(listener: socket.socket, secret: bytes, count: int) -> list[socket.socket]:
    """Returns so many connections of callers that know the secret."""
    accepted: list[socket.socket] = []
    listener.settimeout(_CONNECT_S)
    with listener:
        while len(accepted) < count:
            connection, _ = listener.accept()
            # Whoever knows the secret has sent it by now; a stranger may send nothing, or be gone.
            connection.settimeout(_SECRET_S)
            with suppress(OSError):
                if connection.recv(_SECRET_BYTES) == secret:
                    accepted.append(connection)
                    continue
            connection.close()
    return accepted


class MachineWatch:
    """Calls `on_lost` with one sentence, in a thread, when a machine is gone.

    That is when a connection ends, as all do with their process, or when the other side's kernel does not answer for
    `timeout_s`; a process that only stands still is no loss.
    """

    def __init__(self, connections: Sequence[socket.socket], timeout_s: float, on_lost: Callable[[str], None]) -> None:
        self._hosts = {connection: connection.getpeername()[0] for connection in connections}
        self._on_lost = on_lost
        self._ended = threading.Event()
        for connection in connections:
            _probe(connection, timeout_s)
        self._thread = threading.Thread(target=self._wait, name="machines", daemon=True)
        if connections:
            self._thread.start()

    def end(self) -> None:
        """Takes the end of a connection for no loss from now on."""
        self._ended.set()

    def close(self) -> None:
        """Closes the connections and ends the thread."""
        self.end()
        for connection in self._hosts:
            # A connection that a thread waits for is closed only when the wait ends.
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def _wait(self) -> None:
        connection: socket.socket = wait(list(self._hosts))[0]  # type: ignore[assignment]
        if self._ended.is_set():
            return
        code = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        reason = os.strerror(code) if code else "its process has ended"
        self._on_lost(f"machine {self._hosts[connection]} of the trainer is gone ({reason}); start all machines again")


def _probe(connection: socket.socket, timeout_s: float) -> None:
    """Has the kernel end a connection that is not answered for `timeout_s`."""
    seconds = max(1, round(timeout_s / (_PROBES + 1)))
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, seconds)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, seconds)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES)
