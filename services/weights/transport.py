"""One-sided reads and writes of a peer's registered memory: the base, Mooncake's engine, and a pool."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from perigee.errors import FailedPreconditionError, InternalError, PerigeeError, UnavailableError
from services.weights.config import WeightsConfig

if TYPE_CHECKING:
    from mooncake.engine import TransferEngine

# Bounds of the histograms of seconds, on both sides.
BUCKETS = (0.01, 0.05, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300)
FIRST_POLL_S = 0.0005
LAST_POLL_S = 0.005


class TransferState(Enum):
    """State of a submitted transfer; DONE and FAILED are final, and the local memory may be changed only then."""

    PENDING = "pending"
    DONE = "done"
    FAILED = "failed"


class Transport(ABC):
    """One endpoint whose memory others can read and write, and vice versa. All methods block: call them in a thread."""

    @property
    @abstractmethod
    def session(self) -> str:
        """Returns the address that a peer dials to reach this endpoint."""

    @abstractmethod
    def register(self, address: int, size: int) -> None:
        """Makes `size` bytes at `address` usable as source and target; raises InternalError when that is refused."""

    @abstractmethod
    def unregister(self, address: int) -> None:
        """Undoes `register`."""

    @abstractmethod
    def submit_write(self, session: str, source: int, target: int, size: int) -> int:
        """Starts to write `size` bytes from address `source` to address `target` of `session`; returns a handle.

        Raises UnavailableError when the peer cannot be reached.
        """

    @abstractmethod
    def submit_read(self, session: str, source: int, target: int, size: int) -> int:
        """Starts to read `size` bytes from address `source` of `session` to address `target`; returns a handle.

        Raises UnavailableError when the peer cannot be reached.
        """

    @abstractmethod
    def poll(self, transfer: int) -> TransferState:
        """Returns the state of a transfer; must not be called again after a final one."""

    @abstractmethod
    def close(self) -> None:
        """Releases ports and threads."""


def wait_for_transfers(transport: Transport, transfers: Iterable[int]) -> bool:
    """Blocks until every transfer has ended; returns whether all have succeeded."""
    succeeded = True
    for transfer in transfers:
        pause_s = FIRST_POLL_S
        while (state := transport.poll(transfer)) is TransferState.PENDING:
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.5, LAST_POLL_S)
        succeeded = succeeded and state is TransferState.DONE
    return succeeded


def run_in_daemon(call: Callable[[], float], name: str) -> asyncio.Future[float]:
    """Runs a call in a thread that does not keep the process from ending, for transfers: Mooncake calls none back.

    An exception that is no PerigeeError becomes an InternalError.
    """
    ended: Future[float] = Future()

    def run() -> None:
        try:
            ended.set_result(call())
        except Exception as error:
            shown = (
                error if isinstance(error, PerigeeError) else InternalError(f"{name}: {type(error).__name__}: {error}")
            )
            ended.set_exception(shown)

    threading.Thread(target=run, name=name, daemon=True).start()
    return asyncio.wrap_future(ended)


# transfer_check_status: 1 done, 0 pending; -1 failed and -2 timed out are both final.
STATES = {1: TransferState.DONE, 0: TransferState.PENDING, -1: TransferState.FAILED, -2: TransferState.FAILED}


def set_environment(config: WeightsConfig) -> None:
    """Sets Mooncake's process-wide settings; the configuration wins over a variable inherited from elsewhere."""
    # Without these two Mooncake picks whatever it finds, and a missing card would degrade to TCP in silence.
    chosen, other = ("MC_FORCE_HCA", "MC_FORCE_TCP") if config.transport == "rdma" else ("MC_FORCE_TCP", "MC_FORCE_HCA")
    os.environ[chosen] = "1"
    os.environ.pop(other, None)
    os.environ["MC_TCP_PROGRESS_TIMEOUT_SEC"] = str(round(config.progress_timeout_s))
    os.environ["MC_TCP_SLICE_SIZE"] = str(config.slice_bytes)
    os.environ["MC_MIN_RPC_PORT"] = str(config.min_rpc_port)
    os.environ["MC_MAX_RPC_PORT"] = str(config.max_rpc_port)
    os.environ["MC_LOG_LEVEL"] = "ERROR"


class MooncakeTransport(Transport):
    """One TransferEngine.

    Opening takes a millisecond; closing takes a second, during which no other Python thread runs.
    """

    def __init__(self, config: WeightsConfig) -> None:
        set_environment(config)
        from mooncake.engine import TransferEngine  # reads the environment

        host = config.host or "127.0.0.1"
        self._engine: TransferEngine | None = TransferEngine()
        if self._engine.initialize(host, "P2PHANDSHAKE", config.transport, config.device):
            raise FailedPreconditionError(
                f"weights.transport: Mooncake cannot start {config.transport} on {host} "
                f"(device {config.device or 'any'}, ports {config.min_rpc_port}-{config.max_rpc_port}); "
                "check weights.device, weights.host and the port range"
            )
        self._session = f"{host}:{self._engine.get_rpc_port()}"

    @property
    def session(self) -> str:
        return self._session

    def register(self, address: int, size: int) -> None:
        if self._open_engine().register_memory(address, size):
            raise InternalError(f"Mooncake cannot register {size} bytes; check the memlock limit (ulimit -l)")

    def unregister(self, address: int) -> None:
        if self._open_engine().unregister_memory(address):
            raise InternalError("Mooncake cannot unregister a weight buffer")

    def submit_write(self, session: str, source: int, target: int, size: int) -> int:
        write: int = self._open_engine().transfer_submit_write(session, source, target, size)
        if write == 0:
            raise UnavailableError(f"the weight buffer at {session} cannot be reached")
        return write

    def submit_read(self, session: str, source: int, target: int, size: int) -> int:
        # One entry per handle: the state of a batch is that of its first entry.
        read: int = self._open_engine().batch_transfer_async_read(session, [target], [source], [size])
        if read == 0:
            raise UnavailableError(f"the weights at {session} cannot be reached")
        return read

    def poll(self, transfer: int) -> TransferState:
        return STATES[self._open_engine().transfer_check_status(transfer)]

    def close(self) -> None:
        self._engine = None

    def _open_engine(self) -> TransferEngine:
        if self._engine is None:
            raise InternalError("the weight transport is closed")
        return self._engine


@dataclass(eq=False)
class Endpoint:
    """Transport and the ids of the peers that it has dialled, by session."""

    transport: Transport
    dialled: dict[str, str] = field(default_factory=dict)

    def is_outdated(self, session: str, peer_id: str) -> bool:
        """Returns whether another peer answered at the session when this endpoint dialled it."""
        return self.dialled.get(session, peer_id) != peer_id


class EndpointPool:
    """Lends endpoints to threads.

    Mooncake's engine dictates this. A silent peer blocks an engine for a minute, so one engine must not serve two
    transfers at once; closing an engine stops the whole interpreter for a second, so they are kept, those of a failed
    transfer, too; and an engine remembers what a session stood for, so one that dialled a peer since restarted must
    not dial it again.
    """

    def __init__(self, open_transport: Callable[[], Transport]) -> None:
        self._open_transport = open_transport
        self._lock = threading.Lock()
        self._idle: list[Endpoint] = []

    def borrow(self, session: str, peer_id: str) -> Endpoint:
        """Borrows an endpoint that knows nothing outdated about the peer; opens one when none is idle."""
        with self._lock:
            outdated = [e for e in self._idle if e.is_outdated(session, peer_id)]
            usable = [e for e in self._idle if e not in outdated]
            # One that has dialled the peer saves a handshake.
            usable.sort(key=lambda endpoint: session in endpoint.dialled)
            endpoint = usable.pop() if usable else None
            self._idle = usable
        for other in outdated:
            other.transport.close()
        if endpoint is None:
            endpoint = Endpoint(self._open_transport())
        endpoint.dialled[session] = peer_id
        return endpoint

    def give_back(self, endpoint: Endpoint) -> None:
        """Takes an endpoint back whose transfers have ended, one way or the other."""
        with self._lock:
            self._idle.append(endpoint)

    def close(self) -> None:
        """Closes the endpoints that are not borrowed."""
        with self._lock:
            idle, self._idle = self._idle, []
        for endpoint in idle:
            endpoint.transport.close()
