"""The sender's endpoints: kept between pushes, each used for one write at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from services.weights.transport import Transport


@dataclass(frozen=True)
class Destination:
    """Where to write: the session to dial, the receiver that it belonged to when it answered, and the address there."""

    session: str
    receiver_id: str
    address: int


@dataclass(eq=False)
class Endpoint:
    """A transport and the receivers that it has dialled, by session."""

    transport: Transport
    dialled: dict[str, str] = field(default_factory=dict)

    def is_outdated(self, destination: Destination) -> bool:
        """Whether another receiver answered at the destination's session when this endpoint dialled it."""
        return self.dialled.get(destination.session, destination.receiver_id) != destination.receiver_id


class EndpointPool:
    """Lends endpoints to threads.

    Mooncake's engine dictates this. A silent peer blocks an engine for a minute, so one engine must not serve two
    writes at once; closing an engine stops the whole interpreter for a second, so they are kept; and an engine
    remembers what a session stood for, so one that dialled a receiver since restarted must not dial it again.
    """

    def __init__(self, open_transport: Callable[[], Transport]) -> None:
        self._open_transport = open_transport
        self._lock = threading.Lock()
        self._idle: list[Endpoint] = []

    def borrow(self, destination: Destination) -> Endpoint:
        """An endpoint that knows nothing outdated about the destination; opens one when none is idle."""
        with self._lock:
            outdated = [e for e in self._idle if e.is_outdated(destination)]
            usable = [e for e in self._idle if e not in outdated]
            # One that has dialled the receiver saves a handshake.
            usable.sort(key=lambda endpoint: destination.session in endpoint.dialled)
            endpoint = usable.pop() if usable else None
            self._idle = usable
        for other in outdated:
            other.transport.close()
        if endpoint is None:
            endpoint = Endpoint(self._open_transport())
        endpoint.dialled[destination.session] = destination.receiver_id
        return endpoint

    def give_back(self, endpoint: Endpoint) -> None:
        """Takes an endpoint back whose write has succeeded; close the transport of any other."""
        with self._lock:
            self._idle.append(endpoint)

    def close(self) -> None:
        """Closes the idle endpoints."""
        with self._lock:
            idle, self._idle = self._idle, []
        for endpoint in idle:
            endpoint.transport.close()
