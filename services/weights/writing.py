"""One write of an image to one receiver, in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
import time

from perigee.errors import InternalError, PerigeeError, UnavailableError
from services.weights.buffer import SharedBuffer
from services.weights.pool import Destination, Endpoint, EndpointPool
from services.weights.transport import Transport, WriteState

FIRST_POLL_S = 0.0005
LAST_POLL_S = 0.005


def start_write(
    endpoints: EndpointPool, source: SharedBuffer, size: int, destination: Destination
) -> asyncio.Future[float]:
    """Writes the first `size` bytes of `source`; the future is done when the write has ended, one way or the other.

    Its result is the seconds of the transfer, its exception a PerigeeError. The source stays pinned until then.
    The thread is a daemon: Mooncake offers no way to end a write to a silent peer, and a process that is told to
    stop must not wait a minute for one.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[float] = loop.create_future()
    source.pin()
    thread = threading.Thread(
        target=_write_and_tell,
        args=(endpoints, source, size, destination, loop, future),
        name=f"weights-to-{destination.session}",
        daemon=True,
    )
    thread.start()
    return future


def _write_and_tell(
    endpoints: EndpointPool,
    source: SharedBuffer,
    size: int,
    destination: Destination,
    loop: asyncio.AbstractEventLoop,
    future: asyncio.Future[float],
) -> None:
    endpoint: Endpoint | None = None
    outcome: float | PerigeeError
    try:
        endpoint = endpoints.borrow(destination)
        outcome = _write(endpoint.transport, source, size, destination)
    except PerigeeError as error:
        outcome = error
    except Exception as error:
        outcome = InternalError(f"the write to {destination.session} failed: {type(error).__name__}: {error}")
    if not loop.is_closed():
        loop.call_soon_threadsafe(_settle, source, future, outcome)
    if endpoint is None:
        return
    if isinstance(outcome, PerigeeError):
        endpoint.transport.close()
    else:
        endpoints.give_back(endpoint)


def _settle(source: SharedBuffer, future: asyncio.Future[float], outcome: float | PerigeeError) -> None:
    source.unpin()
    if future.cancelled():
        return
    if isinstance(outcome, PerigeeError):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)


def _write(transport: Transport, source: SharedBuffer, size: int, destination: Destination) -> float:
    transport.register(source.address, size)
    begin = time.monotonic()
    try:
        write = transport.submit_write(destination.session, source.address, destination.address, size)
        pause_s = FIRST_POLL_S
        while (state := transport.poll(write)) is WriteState.PENDING:
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.5, LAST_POLL_S)
    finally:
        transport.unregister(source.address)
    if state is WriteState.FAILED:
        raise UnavailableError(f"the write to {destination.session} broke off: the receiver died or made no progress")
    return time.monotonic() - begin
