"""Pulls an image from sources in turn, several owners at once, piece by piece, each verified as it arrives."""

from __future__ import annotations

import asyncio
import os
import time
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import xxhash

from perigee.errors import (
    DataLossError,
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    PerigeeError,
    ResourceExhaustedError,
    UnavailableError,
)
from perigee.weights.client import WeightSourceClient
from perigee.weights.v1 import weights_pb2 as pb
from services.kit.tasks import finish
from services.kit.telemetry import get_logger
from services.weights.config import WeightsConfig
from services.weights.lend import HEARTBEAT_S, LentImage
from services.weights.manifest import WeightImage
from services.weights.pieces import check_pieces, piece_bytes
from services.weights.shared_memory import PREFIX, SharedBuffer
from services.weights.transport import Endpoint, EndpointPool, Transport, run_in_daemon, wait_for_transfers

log = get_logger(__name__)

# Mooncake refuses more than about twice as many transfers to one peer.
MAX_PIECES = 1024
# A read that is this quick spends much of its time on getting started: the next ones take twice as much, up to a bound.
QUICK_S = 0.02
MAX_UNIT_BYTES = 16 << 20
# Reads of one holder at once: one arrives while the one before it is verified.
DEPTH = 2
# A source that could give way to another one may be silent for this long.
SILENCE_S = 5 * HEARTBEAT_S

Connect = Callable[[str], AbstractAsyncContextManager[WeightSourceClient]]


@dataclass(frozen=True, eq=False)
class Unit:
    """Pieces to read from one holder together, and the address of each."""

    session: str
    holder_id: str
    addresses: Mapping[int, int]


@dataclass(frozen=True, eq=False)
class Target:
    """Image that a pull fills, and how others read from it what is here and verified."""

    image: WeightImage
    lent: LentImage
    session: str
    holder_id: str

    def announce(self, pieces: Iterable[int]) -> None:
        """Lends pieces from now on."""
        buffer = self.image.buffer
        holding = pb.Holding(session=self.session, holder_id=self.holder_id, pieces=pieces)
        holding.file, holding.base = buffer.path.name, buffer.address
        holding.addresses.extend(self.address(piece) for piece in holding.pieces)
        self.lent.announce(holding)

    def address(self, piece: int) -> int:
        """Returns the address of a piece in this process."""
        return self.image.buffer.address + self.image.manifest.pieces[piece].offset


class Schedule:
    """Pieces of a pull: which are missing, and where they can be read. None is on its way twice at once."""

    def __init__(self, sizes: Mapping[int, int], unit_bytes: int) -> None:
        self.unit_bytes = unit_bytes
        self._sizes = sizes
        self._missing = set(sizes)
        self._underway: set[int] = set()
        # session -> id of the holder, and pieces with their addresses in order of announcement
        self._offers: dict[str, tuple[str, deque[tuple[int, int]]]] = {}
        # Offers of pieces that were on their way from elsewhere: taken up when they do not arrive.
        self._passed_over: dict[int, list[tuple[str, int]]] = defaultdict(list)

    @property
    def complete(self) -> bool:
        """Whether every piece is here."""
        return not self._missing and not self._underway

    @property
    def sessions(self) -> Sequence[str]:
        """Sessions of those who offer anything."""
        return list(self._offers)

    def offer(self, holding: pb.Holding) -> None:
        """Adds pieces that a holder has."""
        _, offered = self._offers.setdefault(holding.session, (holding.holder_id, deque()))
        offered.extend(zip(holding.pieces, holding.addresses, strict=True))

    def forget_offers(self) -> None:
        """Drops what was offered: another source begins."""
        self._offers.clear()
        self._passed_over.clear()

    def next_unit(self, session: str) -> Unit | None:
        """Returns missing pieces that the holder has, the first announced first; None when it has none."""
        holder_id, offered = self._offers[session]
        addresses: dict[int, int] = {}
        size = 0
        while offered and len(addresses) < MAX_PIECES:
            piece, address = offered[0]
            if piece in self._missing:
                if addresses and size + self._sizes[piece] > self.unit_bytes:
                    break
                addresses[piece] = address
                size += self._sizes[piece]
                self._missing.remove(piece)
            elif piece in self._underway:
                self._passed_over[piece].append((session, address))
            offered.popleft()
        self._underway.update(addresses)
        return Unit(session, holder_id, addresses) if addresses else None

    def finish(self, unit: Unit, arrived: bool) -> None:
        """Takes the pieces of a unit off their way: they are here, or missing again."""
        self._underway.difference_update(unit.addresses)
        passed_over = {piece: self._passed_over.pop(piece, []) for piece in unit.addresses}
        if arrived:
            return
        self._missing.update(unit.addresses)
        for piece, offers in passed_over.items():
            for session, address in offers:
                self._offers[session][1].append((piece, address))


class ImagePull:
    """Pull of one image. `begin` is awaited with the manifest and returns where the pieces go."""

    def __init__(
        self,
        config: WeightsConfig,
        endpoints: EndpointPool,
        connect: Connect,
        begin: Callable[[pb.Manifest], Awaitable[Target]],
    ) -> None:
        self.sources: list[str] = []
        """Sources that pieces were asked of, in turn."""
        self.target: Target | None = None
        """What `begin` returned; None before."""
        self._config = config
        self._endpoints = endpoints
        self._connect = connect
        self._begin = begin
        self._schedule = Schedule({}, config.block_bytes)
        self._reads: dict[asyncio.Future[float], Unit] = {}
        self._idle: dict[str, list[Endpoint]] = defaultdict(list)
        # session -> descriptor of the file that the holder's memory is, on this machine, and address of its first byte
        self._files: dict[str, tuple[int, int]] = {}

    async def run(self, image_id: str, sources: Sequence[str]) -> Target:
        """Pulls until every piece is here and verified; a source that fails gives way to the next.

        No read is under way any more when this returns or raises. Raises UnavailableError when no source is left, and
        what `begin` raises.
        """
        problems = []
        try:
            for number, address in enumerate(sources):
                try:
                    return await self._pull_from(image_id, address, number == len(sources) - 1)
                except (FailedPreconditionError, InvalidArgumentError, ResourceExhaustedError):
                    raise
                except PerigeeError as error:
                    problems.append(f"{address}: {error.message}")
                    log.warning("weights not pulled from source", source=address, reason=error.message)
            raise UnavailableError(f"no source has the whole image {image_id}: {'; '.join(problems)}")
        finally:
            # A read under way would write into a buffer that is used again.
            await finish(self._end())

    async def _pull_from(self, image_id: str, address: str, is_last: bool) -> Target:
        """Reads what the source has, until nothing is missing."""
        async with self._connect(address) as client:
            lent = client.lend(pb.LendRequest(image_id=image_id), timeout_s=self._config.transfer_timeout_s)
            async with aclosing(_watch(lent, None if is_last else SILENCE_S)) as responses:
                manifest, response = await _read_manifest(responses)
                target = self.target or await self._begin_with(manifest)
                self._schedule.forget_offers()
                self.sources.append(address)
                await self._read_pieces(target, response, responses)
                return target

    async def _begin_with(self, manifest: pb.Manifest) -> Target:
        """Returns where the pieces go, which the first source's manifest says."""
        await asyncio.to_thread(check_pieces, manifest)
        self.target = target = await self._begin(manifest)
        pieces = enumerate(target.image.manifest.pieces)
        sizes = {index: piece_bytes(manifest, piece) for index, piece in pieces if piece.HasField("offset")}
        self._schedule = Schedule(sizes, self._config.block_bytes)
        return target

    async def _read_pieces(
        self, target: Target, response: pb.LendResponse, responses: AsyncIterator[pb.LendResponse]
    ) -> None:
        """Reads pieces as they are announced; raises the error of the first read from this source that fails.

        Raises UnavailableError when the source has given all that it has and something is missing.
        """
        started: set[asyncio.Future[float]] = set()
        announced = asyncio.ensure_future(anext(responses))
        try:
            while not self._schedule.complete:
                if response.HasField("holding"):
                    self._open_file(response.holding)
                    self._schedule.offer(response.holding)
                    response.ClearField("holding")
                started |= self._start_reads(target)
                if response.complete and not self._reads:
                    raise UnavailableError("the source does not have every piece")
                events: list[asyncio.Future[Any]] = [announced, *self._reads]
                await asyncio.wait(events, return_when=asyncio.FIRST_COMPLETED)
                for read in [read for read in self._reads if read.done()]:
                    self._finish_read(target, read)
                    if read in started and read.exception() is not None:
                        await self._wait_for(started)
                        read.result()
                if announced.done():
                    response = announced.result()
                    announced = asyncio.ensure_future(anext(responses))
        except asyncio.CancelledError:
            await self._wait_for(started)
            raise
        finally:
            announced.cancel()
            await asyncio.gather(announced, return_exceptions=True)

    def _start_reads(self, target: Target) -> set[asyncio.Future[float]]:
        """Starts to read what the holders have; returns the reads, each of which ends by itself."""
        started = set()
        for session in self._schedule.sessions:
            running = sum(unit.session == session for unit in self._reads.values())
            while running < DEPTH and (unit := self._schedule.next_unit(session)) is not None:
                read = run_in_daemon(partial(self._read, target, unit), f"weights-from-{session}")
                self._reads[read] = unit
                started.add(read)
                running += 1
        return started

    async def _wait_for(self, reads: Iterable[asyncio.Future[float]]) -> None:
        """Waits for the ends of reads: a source may unmap what is read once its call has ended."""
        if underway := self._reads.keys() & reads:
            await asyncio.wait(underway)

    def _finish_read(self, target: Target, read: asyncio.Future[float]) -> None:
        unit = self._reads.pop(read)
        arrived = read.exception() is None
        self._schedule.finish(unit, arrived)
        if arrived:
            target.announce(unit.addresses)
            if read.result() < QUICK_S:
                self._schedule.unit_bytes = min(2 * self._schedule.unit_bytes, MAX_UNIT_BYTES)

    def _read(self, target: Target, unit: Unit) -> float:
        """Reads a unit and verifies its pieces, in a thread; returns the seconds.

        Raises UnavailableError or DataLossError.
        """
        begin = time.monotonic()
        if unit.session in self._files:
            _copy_runs(*self._files[unit.session], target, unit)
        else:
            self._transfer(target, unit)
        manifest = target.image.manifest
        with target.image.buffer.view() as view:
            for index in unit.addresses:
                piece = manifest.pieces[index]
                with view[piece.offset : piece.offset + piece_bytes(manifest, piece)] as data:
                    if xxhash.xxh3_128_digest(data) != piece.checksum:
                        name = manifest.tensors[piece.tensor].name
                        raise DataLossError(f"a piece of {name} from {unit.session} arrived damaged")
        return time.monotonic() - begin

    def _transfer(self, target: Target, unit: Unit) -> None:
        idle = self._idle[unit.session]
        try:
            endpoint = idle.pop()
        except IndexError:  # to look first would race with another thread
            endpoint = self._open(target, unit)
        try:
            _read_runs(endpoint.transport, target, unit)
        finally:
            idle.append(endpoint)

    def _open_file(self, holding: pb.Holding) -> None:
        """Opens the file of a holder on this machine, which is read several times as fast as over a connection.

        Another machine has no file of that name; what a process may not read, as in another container, is sent to it.
        """
        if holding.session in self._files or not holding.file.startswith(PREFIX) or "/" in holding.file:
            return
        with suppress(OSError):
            descriptor = os.open(Path(self._config.shared_memory_dir) / holding.file, os.O_RDONLY)
            self._files[holding.session] = descriptor, holding.base

    def _open(self, target: Target, unit: Unit) -> Endpoint:
        endpoint = self._endpoints.borrow(unit.session, unit.holder_id)
        try:
            endpoint.transport.register(target.image.buffer.address, target.image.buffer.size)
        except BaseException:
            self._endpoints.give_back(endpoint)
            raise
        return endpoint

    async def _end(self) -> None:
        """Waits for the reads under way, of which Mooncake can call none back, and gives the endpoints back."""
        if self._reads:
            await asyncio.wait(self._reads)
            for read in self._reads:
                read.exception()
        for descriptor, _ in self._files.values():
            os.close(descriptor)
        if self.target is not None:
            await asyncio.to_thread(self._give_back, self.target.image.buffer)

    def _give_back(self, buffer: SharedBuffer) -> None:
        for endpoint in (endpoint for idle in self._idle.values() for endpoint in idle):
            endpoint.transport.unregister(buffer.address)
            self._endpoints.give_back(endpoint)


async def _watch(
    responses: AsyncIterator[pb.LendResponse], silence_s: float | None
) -> AsyncGenerator[pb.LendResponse, None]:
    """Yields responses; raises DeadlineExceededError after a silence, and UnavailableError when they end."""
    while True:
        try:
            async with asyncio.timeout(silence_s):
                response = await anext(responses)
        except TimeoutError as error:
            raise DeadlineExceededError(f"the source has been silent for {silence_s:g} s") from error
        except StopAsyncIteration as error:
            raise UnavailableError("the source has ended the call") from error
        yield response


async def _read_manifest(responses: AsyncIterator[pb.LendResponse]) -> tuple[pb.Manifest, pb.LendResponse]:
    """Returns the manifest, and the first response after its parts."""
    manifest = pb.Manifest()
    while True:
        response = await anext(responses)
        if response.HasField("manifest"):
            manifest.MergeFrom(response.manifest)
        elif manifest.run_id:
            return manifest, response


def _read_runs(transport: Transport, target: Target, unit: Unit) -> None:
    transfers: list[int] = []
    try:
        for source, place, size in _runs(target, unit):
            transfers.append(transport.submit_read(unit.session, source, place, size))
    finally:
        arrived = wait_for_transfers(transport, transfers)
    if not arrived:
        raise UnavailableError(f"the read from {unit.session} broke off: the holder died or made no progress")


def _copy_runs(descriptor: int, base: int, target: Target, unit: Unit) -> None:
    """Copies a unit from the holder's file."""
    buffer = target.image.buffer
    with buffer.view() as view:
        for source, place, size in _runs(target, unit):
            with view[place - buffer.address : place - buffer.address + size] as part:
                if os.preadv(descriptor, [part], source - base) != size:
                    raise UnavailableError(f"the shared memory of {unit.session} is shorter than it said")


def _runs(target: Target, unit: Unit) -> Iterator[tuple[int, int, int]]:
    """Yields address there, address here and size of each run of pieces that adjoin on both sides."""
    source, place, size = 0, 0, 0
    for index, address in unit.addresses.items():
        here = target.address(index)
        length = piece_bytes(target.image.manifest, target.image.manifest.pieces[index])
        if size and (source + size, place + size) == (address, here):
            size += length
            continue
        if size:
            yield source, place, size
        source, place, size = address, here, length
    if size:
        yield source, place, size
