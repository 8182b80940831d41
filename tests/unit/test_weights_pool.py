"""The sender's endpoints and the receiver's buffers, over a transport that only counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from perigee.errors import ResourceExhaustedError
from services.weights.config import WeightsConfig
from services.weights.receive import BufferPool
from services.weights.transport import EndpointPool, TransferState, Transport


class CountingTransport(Transport):
    """Remembers what is registered and whether it was closed."""

    def __init__(self) -> None:
        self.registered: dict[int, int] = {}
        self.closed = False

    @property
    def session(self) -> str:
        return "here"

    def register(self, address: int, size: int) -> None:
        self.registered[address] = size

    def unregister(self, address: int) -> None:
        del self.registered[address]

    def submit_write(self, session: str, source: int, target: int, size: int) -> int:
        return 1

    def submit_read(self, session: str, source: int, target: int, size: int) -> int:
        return 1

    def poll(self, transfer: int) -> TransferState:
        return TransferState.DONE

    def close(self) -> None:
        self.closed = True


def test_an_endpoint_serves_one_write_at_a_time_and_is_kept() -> None:
    pool = EndpointPool(CountingTransport)
    a, b = ("a:1", "first"), ("b:1", "other")
    to_a, to_b = pool.borrow(*a), pool.borrow(*b)
    assert to_a is not to_b
    pool.give_back(to_a)
    pool.give_back(to_b)
    assert pool.borrow(*b) is to_b
    assert pool.borrow(*a) is to_a


def test_an_endpoint_that_dialled_the_predecessor_of_a_receiver_is_closed() -> None:
    pool = EndpointPool(CountingTransport)
    old = pool.borrow("a:1", "first")
    pool.give_back(old)
    new = pool.borrow("a:1", "restarted")
    assert new is not old
    assert isinstance(old.transport, CountingTransport)
    assert old.transport.closed


def names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


@pytest.fixture
def transport() -> CountingTransport:
    return CountingTransport()


async def test_a_buffer_in_quarantine_is_not_lent_until_its_write_has_ended(
    tmp_path: Path, transport: CountingTransport
) -> None:
    pool = BufferPool(WeightsConfig(shared_memory_dir=str(tmp_path)), transport)
    current, first, second = [await pool.take(4096) for _ in range(3)]
    pool.quarantine("x", first)
    pool.quarantine("y", second)
    with pytest.raises(ResourceExhaustedError, match="all 3 weight buffers") as full:
        await pool.take(10)
    assert full.value.retry_after_s is not None
    assert 300 < full.value.retry_after_s < 320
    pool.release("unknown")
    pool.release("y")
    assert await pool.take(10) is second
    assert transport.registered == {b.address: 4096 for b in (current, first, second)}
    await pool.close()
    assert transport.registered == {}
    assert names_in(tmp_path) == []


async def test_quarantine_ends_by_itself(tmp_path: Path, transport: CountingTransport) -> None:
    config = WeightsConfig(shared_memory_dir=str(tmp_path), transfer_timeout_s=1e-9, progress_timeout_s=1)
    pool = BufferPool(config, transport)
    pool._quarantine_s = 0.0
    buffer = await pool.take(4096)
    pool.quarantine("x", buffer)
    assert await pool.take(4096) is buffer
    await pool.close()


async def test_spares_that_are_too_small_make_room_for_larger_ones(
    tmp_path: Path, transport: CountingTransport
) -> None:
    pool = BufferPool(WeightsConfig(shared_memory_dir=str(tmp_path)), transport)
    small = [await pool.take(4096) for _ in range(3)]
    for buffer in small:
        pool.give_back(buffer)
    large = await pool.take(1 << 20)
    assert list(transport.registered.values()) == [1 << 20]
    assert names_in(tmp_path) == [large.path.name]
    await pool.close()
