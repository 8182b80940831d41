"""One-sided writes of registered memory into a peer's registered memory: the base, and Mooncake's transfer engine."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from enum import Enum
from typing import TYPE_CHECKING

from perigee.errors import FailedPreconditionError, InternalError, UnavailableError
from services.weights.config import WeightsConfig

if TYPE_CHECKING:
    from mooncake.engine import TransferEngine

# Bounds of the histograms of seconds, on both sides.
BUCKETS = (0.01, 0.05, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300)


class WriteState(Enum):
    """State of a submitted write; DONE and FAILED are final, and the source may be changed only then."""

    PENDING = "pending"
    DONE = "done"
    FAILED = "failed"


class Transport(ABC):
    """One endpoint that can be written to and can write to others. All methods block: call them in a thread."""

    @property
    @abstractmethod
    def session(self) -> str:
        """Returns the address that a peer dials to write to this endpoint."""

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
    def poll(self, write: int) -> WriteState:
        """Returns the state of a write; must not be called again after a final one."""

    @abstractmethod
    def close(self) -> None:
        """Releases ports and threads."""


# transfer_check_status: 1 done, 0 pending; -1 failed and -2 timed out are both final.
STATES = {1: WriteState.DONE, 0: WriteState.PENDING, -1: WriteState.FAILED, -2: WriteState.FAILED}


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

    def poll(self, write: int) -> WriteState:
        return STATES[self._open_engine().transfer_check_status(write)]

    def close(self) -> None:
        self._engine = None

    def _open_engine(self) -> TransferEngine:
        if self._engine is None:
            raise InternalError("the weight transport is closed")
        return self._engine
