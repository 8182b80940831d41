"""A slot: where one job runs at a time, in a place for the program and one beside it for whoever judges it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from services.sandbox.attendants import BoxFailedError
from services.sandbox.boxes import Box, has_ended
from services.sandbox.isolation import Isolation
from services.sandbox.launchers import Launchers
from services.sandbox.places import Place
from services.sandbox.runtimes import Runtime
from services.sandbox.zygotes import Zygotes


class Opener:
    """Opens boxes in places, and makes the next one ready as soon as one is closed."""

    def __init__(self, isolation: Isolation, zygotes: Zygotes, launchers: Launchers | None) -> None:
        self.isolation = isolation
        self._zygotes = zygotes
        self._launchers = launchers
        self._spares: dict[str, tuple[str, Box]] = {}

    def forks(self, runtime: Runtime) -> bool:
        """Whether boxes of the runtime are forks that end with their job."""
        return self.isolation.unsafe or (self.isolation.warm and runtime.python is not None)

    def explain_missing(self, runtime: Runtime) -> str | None:
        """Why the runtime cannot be used with this isolation; None when it can."""
        if self.forks(runtime) or self._launchers is not None:
            return None
        return f"needs containers ({'; '.join(self.isolation.reasons)})"

    @asynccontextmanager
    async def open(self, runtime: Runtime, place: Place, spare: bool = True) -> AsyncIterator[Box]:
        """A box in a place for as long as the block lasts; afterwards the place is empty, or a box waits in it for the
        next job of the same runtime.
        """
        box = await (self._take_spare(runtime, place) if self.forks(runtime) else self._open_container(runtime, place))
        try:
            yield box
        finally:
            if self.forks(runtime):
                box.close()
            if box.broken:
                await self.clear(place)
            elif spare and self.forks(runtime) and not self.isolation.unsafe:
                self._make_spare(runtime, place)

    async def _open_container(self, runtime: Runtime, place: Place) -> Box:
        if self._launchers is None:
            raise BoxFailedError(f"{runtime.name} {self.explain_missing(runtime)}")
        self._drop_spare(place)
        try:
            return await self._launchers.open(runtime, place)
        except BaseException:
            await self.clear(place)
            raise

    async def _take_spare(self, runtime: Runtime, place: Place) -> Box:
        name, box = self._spares.pop(place.name, ("", None))
        if box is not None and name == runtime.name and not has_ended(box):
            return box
        if box is not None:
            box.channel.close()
        return await self._zygotes.fork(runtime, place)

    def _drop_spare(self, place: Place) -> None:
        if (spare := self._spares.pop(place.name, None)) is not None:
            spare[1].channel.close()

    def _make_spare(self, runtime: Runtime, place: Place) -> None:
        with contextlib.suppress(BoxFailedError):  # the next job of the place finds out, and starts what has ended
            box = self._zygotes.fork_at_once(runtime, place)
            if box is not None:
                self._spares[place.name] = (runtime.name, box)

    async def clear(self, place: Place) -> None:
        """Ends everything in the place."""
        self._drop_spare(place)
        if self._launchers is not None:
            await self._launchers.kill(place)
        await place.empty()
