"""The sender's endpoints and the receiver's buffers, over a transport that only counts."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from perigee.errors import InternalError, ResourceExhaustedError, UnavailableError
from perigee.weights.v1 import weights_pb2 as pb
from services.weights.config import WeightsConfig
from services.weights.lend import LentImage
from services.weights.manifest import WeightImage
from services.weights.pieces import PieceStore, TensorSlice
from services.weights.pull import ImagePull, Target
from services.weights.receive import BufferPool
from services.weights.send import start_write
from services.weights.shared_memory import SharedBuffer
from services.weights.transport import EndpointPool, TransferState, Transport


class CountingTransport(Transport):
    """Remembers what is registered and whether it was closed."""

    def __init__(self) -> None:
        self.registered: dict[int, int] = {}
        self.refusals = 0
        self.closed = False

    @property
    def session(self) -> str:
        return "here"

    def register(self, address: int, size: int) -> None:
        if self.refusals:
            self.refusals -= 1
            raise InternalError("check the memlock limit")
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


async def test_an_endpoint_whose_write_failed_is_used_again(tmp_path: Path) -> None:
    class FailingTransport(CountingTransport):
        def poll(self, transfer: int) -> TransferState:
            return TransferState.FAILED

    transport = FailingTransport()
    opened: Iterator[Transport] = iter([transport])
    pool = EndpointPool(lambda: next(opened))
    buffer = SharedBuffer.allocate(str(tmp_path), 64)
    destination = pb.PrepareResponse(session="there", receiver_id="it", address=1)
    with pytest.raises(UnavailableError, match="broke off"):
        await start_write(pool, buffer, 64, destination)
    transport.refusals = 1
    with pytest.raises(InternalError, match="memlock"):
        await start_write(pool, buffer, 64, destination)
    # To close it would stop the interpreter for a second.
    assert pool.borrow("elsewhere", "another").transport is transport
    assert (transport.registered, transport.closed) == ({}, False)
    buffer.close()


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


async def test_a_buffer_whose_taker_was_cancelled_becomes_the_spare(
    tmp_path: Path, transport: CountingTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_register = threading.Event()
    register = transport.register

    def register_late(address: int, size: int) -> None:
        may_register.wait()
        register(address, size)

    monkeypatch.setattr(transport, "register", register_late)
    pool = BufferPool(WeightsConfig(shared_memory_dir=str(tmp_path)), transport)
    taking = asyncio.create_task(pool.take(4096))
    while not names_in(tmp_path):  # noqa: ASYNC110, another thread makes it
        await asyncio.sleep(0.001)
    taking.cancel()
    await asyncio.wait([taking])
    may_register.set()
    async with asyncio.timeout(60):
        while not pool._free:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    buffer = await pool.take(4096)
    assert (names_in(tmp_path), list(transport.registered)) == ([buffer.path.name], [buffer.address])
    await pool.close()
    assert names_in(tmp_path) == []


class SlowTransport(CountingTransport):
    """Reads nothing until it may; from `broken` it cannot."""

    def __init__(self, pull: SlowPull) -> None:
        super().__init__()
        self._pull = pull

    def submit_read(self, session: str, source: int, target: int, size: int) -> int:
        if session == "broken":
            self._pull.failed.set()
            raise UnavailableError("it broke off")
        self._pull.reading.set()
        self._pull.may_read.wait()
        return 1


class SlowPull:
    """Pull of an image with a byte at each of some holders, from a source that lends it for ever."""

    def __init__(self, folder: Path, *holders: str) -> None:
        self.reading, self.failed, self.may_read = threading.Event(), threading.Event(), threading.Event()
        self.transports: list[CountingTransport] = []
        self.has_reader = True
        self._holders = holders
        self._buffer = SharedBuffer.allocate(str(folder), 64)
        pull = ImagePull(
            WeightsConfig(shared_memory_dir=str(folder)), EndpointPool(self._open), self._connect, self._begin
        )
        self.task = asyncio.create_task(pull.run("i", ["s"]))

    def _open(self) -> Transport:
        self.transports.append(SlowTransport(self))
        return self.transports[-1]

    async def _begin(self, manifest: pb.Manifest) -> Target:
        return Target(WeightImage(manifest, self._buffer), LentImage(manifest), "here", "me")

    @asynccontextmanager
    async def _connect(self, address: str) -> AsyncIterator[Any]:
        yield self

    def close(self) -> None:
        """Ends its buffer."""
        assert not any(transport.registered for transport in self.transports)
        self._buffer.close()

    async def lend(self, request: pb.LendRequest, timeout_s: float) -> AsyncIterator[pb.LendResponse]:
        """Announces the pieces, as a source."""
        size = len(self._holders)
        manifest = pb.Manifest(run_id="run", tensors=[pb.TensorSpec(name="a", dtype="U8", shape=[size])])
        for number in range(size):
            manifest.pieces.add(lower=[number], upper=[number + 1], offset=number)
        yield pb.LendResponse(manifest=manifest)
        for number, session in enumerate(self._holders):
            holding = pb.Holding(session=session, holder_id="it", pieces=[number], addresses=[1 + number])
            yield pb.LendResponse(holding=holding)
        try:
            await asyncio.Event().wait()
        finally:
            self.has_reader = False


async def test_a_pull_that_is_cancelled_twice_still_waits_for_its_reads(tmp_path: Path) -> None:
    """Its buffer is used for the next pull, into which they would write; the source keeps what a reader reads."""
    pull = SlowPull(tmp_path, "there")
    await asyncio.to_thread(pull.reading.wait)
    for has_reader in (True, False):
        pull.task.cancel()
        await asyncio.wait([pull.task], timeout=0.05)
        assert (pull.task.done(), pull.has_reader) == (False, has_reader)
    pull.may_read.set()
    await asyncio.wait([pull.task])
    assert pull.task.cancelled()
    pull.close()


async def test_a_source_is_left_when_all_reads_from_it_have_ended_once_one_has_failed(tmp_path: Path) -> None:
    """It may unmap what is read once its call has ended."""
    pull = SlowPull(tmp_path, "there", "broken")
    await asyncio.to_thread(pull.failed.wait)
    await asyncio.wait([pull.task], timeout=0.05)
    assert pull.has_reader
    pull.may_read.set()
    with pytest.raises(UnavailableError, match="it broke off"):
        await pull.task
    assert not pull.has_reader
    pull.close()


def test_a_store_whose_memory_cannot_be_registered_registers_it_when_filled_again(tmp_path: Path) -> None:
    (tmp_path / "perigee-weights-1-killed").touch()
    transport = CountingTransport()
    store = PieceStore(WeightsConfig(shared_memory_dir=str(tmp_path)), open_transport=lambda: transport)
    part = TensorSlice("a", (1,), (0,), torch.zeros(1))
    transport.refusals = 1
    with pytest.raises(InternalError, match="memlock"):
        store.fill(lambda: [part])
    assert names_in(tmp_path) == []
    assert [*store.fill(lambda: [part]).addresses] == list(transport.registered)
    store.close()
