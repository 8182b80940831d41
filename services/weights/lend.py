"""Lends images: tells readers which pieces are in registered memory, and keeps these in place while anyone reads."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from typing import Any

from perigee.errors import DeadlineExceededError, NotFoundError, UnavailableError
from perigee.weights.v1 import weights_pb2 as pb
from perigee.weights.v1.weights_pb2_grpc import WeightSourceServiceServicer

# A source that is silent for several of these has died or stands still.
HEARTBEAT_S = 1.0
# Receivers of a chain are asked at once, and one may ask its source before that has the manifest.
APPEARANCE_S = 5.0
# Tensors or pieces in one message, of at most a few hundred bytes each.
MAX_ENTRIES = 8192


class LentImage:
    """Pieces of one image as they become readable, and the leases of those who read them."""

    def __init__(self, manifest: pb.Manifest, holdings: Sequence[pb.Holding] = (), is_complete: bool = True) -> None:
        self.manifest = manifest
        self.is_withdrawn = False
        self._is_complete = is_complete
        self._failed = False
        self._holdings = list(holdings)
        # Call -> end of its lease (monotonic).
        self._leases: dict[object, float] = {}
        self._changed = asyncio.Event()

    def announce(self, holding: pb.Holding) -> None:
        """Adds pieces that can be read from now on."""
        self._holdings.append(holding)
        self._wake()

    def complete(self) -> None:
        """Says that everything has been announced that will be here."""
        self._is_complete = True
        self._wake()

    async def follow(self, deadline: float) -> AsyncGenerator[pb.LendResponse, None]:
        """Yields what can be read, and signs of life, until the caller leaves: then it has read what it wanted.

        Raises UnavailableError when the image is given up, and DeadlineExceededError at the deadline (monotonic).
        """
        call = object()
        self._leases[call] = deadline
        try:
            for part in _cut_manifest(self.manifest):
                yield pb.LendResponse(manifest=part)
            sent = 0
            while time.monotonic() < deadline:
                if self._failed:
                    raise UnavailableError("the image is not whole here, and will not become so")
                changed = self._changed
                for holding in self._holdings[sent:]:
                    yield pb.LendResponse(holding=holding)
                    sent += 1
                if sent == len(self._holdings):
                    yield pb.LendResponse(complete=self._is_complete)
                    await _wait(changed, HEARTBEAT_S)
            raise DeadlineExceededError("the pieces were lent for as long as weights.transfer_timeout_s allows")
        finally:
            del self._leases[call]
            self._wake()

    def give_up(self) -> None:
        """Ends the calls of those who read: the pieces that are missing will not come."""
        self._failed = True
        self._wake()

    async def wait_unread(self) -> None:
        """Returns when everyone who reads has left, or has lost the lease: a reader that stands still never leaves."""
        while self._leases and (left_s := max(self._leases.values()) - time.monotonic()) > 0:
            await _wait(self._changed, left_s)

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class WeightSource(WeightSourceServiceServicer):
    """Serves perigee.weights.v1.WeightSourceService: the images that this process lends, by id."""

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._images: dict[str, LentImage] = {}
        self._appeared = asyncio.Event()

    def lend(self, image_id: str, image: LentImage) -> None:
        """Lends an image from now on."""
        self._images[image_id] = image
        self._appeared.set()
        self._appeared = asyncio.Event()

    async def withdraw(self, image_id: str) -> None:
        """Lends an image no longer, and returns when nobody with a lease reads it; an unknown id is no error.

        A call that is cancelled can be made again.
        """
        if (image := self._images.get(image_id)) is not None:
            image.is_withdrawn = True
            await image.wait_unread()
            # Another image may have taken its place.
            if self._images.get(image_id) is image:
                del self._images[image_id]

    async def close(self) -> None:
        """Ends the calls of those who read."""
        for image in self._images.values():
            image.give_up()

    async def Lend(self, request: pb.LendRequest, context: Any) -> AsyncIterator[pb.LendResponse]:
        """Follows an image; one that is not here may appear within seconds.

        A reader that neither ends its call nor loses its connection has its lease, which ends the call.
        """
        begin = time.monotonic()
        appeared = self._appeared
        while (image := self._images.get(request.image_id)) is None or image.is_withdrawn:
            if time.monotonic() > begin + APPEARANCE_S:
                raise NotFoundError(f"image {request.image_id} is not here: publish the weights again")
            yield pb.LendResponse()
            await _wait(appeared, HEARTBEAT_S)
            appeared = self._appeared
        async with aclosing(image.follow(begin + self._lease_s)) as responses:
            async for response in responses:
                yield response


def _cut_manifest(manifest: pb.Manifest) -> Iterator[pb.Manifest]:
    """Yields parts that fit into messages; merged they are the manifest."""
    head = pb.Manifest(
        run_id=manifest.run_id,
        policy_version=manifest.policy_version,
        total_bytes=manifest.total_bytes,
        fingerprint=manifest.fingerprint if manifest.HasField("fingerprint") else None,
    )
    yield head
    for begin in range(0, len(manifest.tensors), MAX_ENTRIES):
        yield pb.Manifest(tensors=manifest.tensors[begin : begin + MAX_ENTRIES])
    for begin in range(0, len(manifest.pieces), MAX_ENTRIES):
        yield pb.Manifest(pieces=manifest.pieces[begin : begin + MAX_ENTRIES])


async def _wait(event: asyncio.Event, seconds: float) -> None:
    """Waits for an event for a while."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return
