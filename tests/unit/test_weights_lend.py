"""A source keeps an image for as long as a reader with a lease has not left, whatever else happens, and no longer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from perigee.errors import PerigeeError
from perigee.weights.v1 import weights_pb2 as pb
from services.weights import lend
from services.weights.lend import LentImage, WeightSource

LEASE_S = 10
IDS = st.sampled_from(["a", "b"])
NUMBERS = st.integers(0, 1 << 16)


class SteppedLoop(asyncio.SelectorEventLoop):
    """An event loop whose time passes only when it is told."""

    now = 0.0

    def time(self) -> float:
        return self.now


@dataclass(eq=False)
class Reader:
    """A call of Lend, and what it waits for, if anything; one that waits for nothing stands still."""

    image: LentImage
    responses: AsyncGenerator[pb.LendResponse, None]
    lease_end: float
    waiting: asyncio.Task[Any] | None = None
    has_left: bool = False


class Lending(RuleBasedStateMachine):
    """One source, in any order of calls."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = SteppedLoop()
        clock = SimpleNamespace(monotonic=self.loop.time)
        self.patch = mock.patch.object(lend, "time", clock)
        self.patch.start()
        self.source = WeightSource(LEASE_S)
        self.images: dict[str, LentImage] = {}
        self.readers: list[Reader] = []
        self.withdrawals: list[tuple[LentImage, asyncio.Task[None]]] = []

    def teardown(self) -> None:
        for reader in self.present():
            self.leave(reader)
        for _, task in self.withdrawals:
            self.run(task)
        self.patch.stop()
        self.loop.close()

    def run(self, work: Any) -> Any:
        async def wait() -> Any:
            return await work

        return self.loop.run_until_complete(wait())

    def let_run(self) -> None:
        """Lets everything go as far as it can at this time."""

        async def turn() -> None:
            for _ in range(12):
                await asyncio.sleep(0)

        self.loop.run_until_complete(turn())
        for reader in self.readers:
            if reader.waiting is not None and reader.waiting.done():
                reader.has_left = reader.waiting.exception() is not None
                assert not reader.has_left or isinstance(reader.waiting.exception(), PerigeeError)
                reader.waiting = None

    def start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = self.loop.create_task(work)
        self.let_run()
        return task

    def present(self) -> list[Reader]:
        return [reader for reader in self.readers if not reader.has_left]

    def leave(self, reader: Reader) -> None:
        if reader.waiting is not None:
            reader.waiting.cancel()
            self.run(asyncio.wait({reader.waiting}))
            reader.waiting = None
        self.run(reader.responses.aclose())
        reader.has_left = True

    @rule(image_id=IDS)
    def lend_one(self, image_id: str) -> None:
        """As a receiver does that pulls an image again while one of that name is withdrawn."""
        if (image := self.images.get(image_id)) is None or image.is_withdrawn:
            self.images[image_id] = LentImage(pb.Manifest(run_id="run"), [pb.Holding(session="here")])
            self.source.lend(image_id, self.images[image_id])

    @rule(image_id=IDS)
    def read(self, image_id: str) -> None:
        responses: Any = self.source.Lend(pb.LendRequest(image_id=image_id), None)
        image = self.images.get(image_id)
        if image is None or image.is_withdrawn:
            assert not self.run(anext(responses)).HasField("manifest")
            self.run(responses.aclose())
            return
        assert self.run(anext(responses)).HasField("manifest")
        self.readers.append(Reader(image, responses, self.loop.now + LEASE_S))

    @precondition(lambda self: self.present())
    @rule(number=NUMBERS)
    def go_on(self, number: int) -> None:
        """A reader takes its next response, or waits for it."""
        readers = self.present()
        reader = readers[number % len(readers)]
        if reader.waiting is None:
            reader.waiting = self.loop.create_task(anext(reader.responses))  # type: ignore[arg-type]

    @precondition(lambda self: self.present())
    @rule(number=NUMBERS)
    def leave_one(self, number: int) -> None:
        readers = self.present()
        self.leave(readers[number % len(readers)])

    @rule(image_id=IDS)
    def announce(self, image_id: str) -> None:
        if image_id in self.images:
            self.images[image_id].announce(pb.Holding(session="here"))

    @rule(image_id=IDS)
    def give_up(self, image_id: str) -> None:
        if image_id in self.images:
            self.images[image_id].give_up()

    @rule(image_id=IDS, cancels=st.booleans())
    def withdraw(self, image_id: str, cancels: bool) -> None:
        """Perhaps by a caller that leaves, after which another one asks again."""
        task = self.start(self.source.withdraw(image_id))
        if cancels:
            task.cancel()
            task = self.start(self.source.withdraw(image_id))
        if image_id in self.images:
            self.withdrawals.append((self.images[image_id], task))

    @rule(seconds=st.sampled_from([0.5, 3.0, 10.0]))
    def pass_time(self, seconds: float) -> None:
        self.loop.now += seconds

    @invariant()
    def an_image_is_kept_while_it_is_read(self) -> None:
        self.let_run()
        for image, task in self.withdrawals:
            readers = [reader for reader in self.present() if reader.image is image]
            assert task.done() == all(reader.lease_end <= self.loop.now for reader in readers)


TestLending = Lending.TestCase
TestLending.settings = settings(stateful_step_count=25, deadline=None)
