"""The registered buffers of a receiver: the one in use, a spare, and those that an abandoned write may still reach."""

from __future__ import annotations

import asyncio
import time

from perigee.errors import ResourceExhaustedError
from services.weights.buffer import SharedBuffer
from services.weights.config import WeightsConfig
from services.weights.transport import Transport

# The current version, the spare, and one that an abandoned write may still reach.
MAX_BUFFERS = 3


class BufferPool:
    """Hands out at most three buffers, registered with the transport.

    A write cannot be called back, and one that arrives in unmapped memory ends the process. So the buffer of a voided
    preparation is kept apart until its sender says that the write has ended, or until no write could still be alive.
    """

    def __init__(self, config: WeightsConfig, transport: Transport) -> None:
        self._directory = config.shared_memory_dir
        self._transport = transport
        self._quarantine_s = config.transfer_timeout_s + config.progress_timeout_s
        self._free: list[SharedBuffer] = []
        self._all: list[SharedBuffer] = []
        # transfer id -> buffer and the monotonic time after which it may be used again
        self._quarantined: dict[str, tuple[SharedBuffer, float]] = {}

    async def take(self, size: int) -> SharedBuffer:
        """A registered buffer of at least `size` bytes that nobody else writes to.

        Raises ResourceExhaustedError when all are taken, with the time to wait, or when memory is short.
        """
        now = time.monotonic()
        for transfer_id in [key for key, (_, until) in self._quarantined.items() if until <= now]:
            self.release(transfer_id)
        for buffer in self._free:
            if buffer.size >= size:
                self._free.remove(buffer)
                return buffer
        # Too small for this model: make room before asking for more.
        while self._free:
            await self._drop(self._free.pop())
        if len(self._all) >= MAX_BUFFERS:
            wait_s = min((until for _, until in self._quarantined.values()), default=now + 1.0) - now
            raise ResourceExhaustedError(
                f"all {MAX_BUFFERS} weight buffers are taken by transfers that have not ended; "
                f"try again in {wait_s:.0f} s",
                retry_after_s=wait_s,
            )
        buffer = await asyncio.to_thread(SharedBuffer.allocate, self._directory, size)
        self._all.append(buffer)
        try:
            await asyncio.to_thread(self._transport.register, buffer.address, buffer.size)
        except BaseException:
            self._all.remove(buffer)
            buffer.close()
            raise
        return buffer

    def give_back(self, buffer: SharedBuffer) -> None:
        """Makes a buffer that no write can reach any more the spare."""
        self._free.append(buffer)

    def quarantine(self, transfer_id: str, buffer: SharedBuffer) -> None:
        """Keeps a buffer apart that the write of `transfer_id` may still reach."""
        self._quarantined[transfer_id] = buffer, time.monotonic() + self._quarantine_s

    def release(self, transfer_id: str) -> None:
        """Ends the quarantine of a transfer; an unknown id is no error."""
        if (entry := self._quarantined.pop(transfer_id, None)) is not None:
            self.give_back(entry[0])

    async def close(self) -> None:
        """Unregisters and removes every buffer."""
        for buffer in list(self._all):
            await self._drop(buffer)
        self._free.clear()
        self._quarantined.clear()

    async def _drop(self, buffer: SharedBuffer) -> None:
        self._all.remove(buffer)
        await asyncio.to_thread(self._transport.unregister, buffer.address)
        buffer.close()
