"""What a transport for weights must do: one-sided writes of registered memory into a peer's registered memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import Enum


class WriteState(Enum):
    """Where a submitted write stands; DONE and FAILED are final, and the source may be changed only then."""

    PENDING = "pending"
    DONE = "done"
    FAILED = "failed"


class Transport(ABC):
    """One endpoint that can be written to and can write to others. All methods block: call them in a thread."""

    @property
    @abstractmethod
    def session(self) -> str:
        """What a peer dials to write to this endpoint."""

    @abstractmethod
    def register(self, address: int, size: int) -> None:
        """Makes `size` bytes at `address` usable as source and as target; InternalError when it is refused."""

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
        """State of a write; not to be asked again after a final answer."""

    @abstractmethod
    def close(self) -> None:
        """Lets go of ports and threads."""
