"""A slot: where one job runs at a time, in a place for the program and one beside it for whoever judges it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from services.sandbox import metrics
from services.sandbox.attendants import BoxFailedError
from services.sandbox.boxes import Box, has_ended
from services.sandbox.finishing import finish
from services.sandbox.isolation import Isolation
from services.sandbox.launchers import Launchers
from services.sandbox.places import Place
from services.sandbox.runtimes import Runtime
from services.sandbox.zygotes import Zygotes


class Opener:
    """Opens boxes in places: by the keeper of the place, who serves one job after another, or by its launcher."""

    def __init__(self, isolation: Isolation, zygotes: Zygotes, launchers: Launchers | None) -> None:
        self.isolation = isolation
        self._zygotes = zygotes
        self._launchers = launchers
        self._keepers: dict[str, tuple[str, Box]] = {}

    def forks(self, runtime: Runtime) -> bool:
        """Whether programs of the runtime are forks of a keeper."""
        return self.isolation.unsafe or (self.isolation.warm and runtime.python is not None)

    def explain_missing(self, runtime: Runtime) -> str | None:
        """Why the runtime cannot be used with this isolation; None when it can."""
        if self.forks(runtime) or self._launchers is not None:
            return None
        return f"needs containers ({'; '.join(self.isolation.reasons)})"

    @asynccontextmanager
    async def open(self, runtime: Runtime, place: Place) -> AsyncIterator[Box]:
        """A box in a place for as long as the block lasts; one that is broken afterwards leaves the place empty."""
        if not place.is_empty:
            await self.clear(place)
            if not place.is_empty:
                raise BoxFailedError(f"processes of an earlier job in {place.name} do not end")
        opening = self._take_keeper(runtime, place) if self.forks(runtime) else self._open_container(runtime, place)
        box = await opening
        try:
            yield box
        finally:
            if box.broken:
                box.close()
                await self.clear(place)
            elif self.forks(runtime) and not self.isolation.unsafe:
                self._keepers[place.name] = (runtime.name, box)
            elif self.isolation.unsafe:
                box.close()

    async def _open_container(self, runtime: Runtime, place: Place) -> Box:
        if self._launchers is None:
            raise BoxFailedError(f"{runtime.name} {self.explain_missing(runtime)}")
        try:
            if (keeper := self._keepers.pop(place.name, None)) is not None:
                await keeper[1].dismiss()  # its launcher may end everything else in the place's control group
            return await self._launchers.open(runtime, place)
        except BaseException:
            await self.clear(place)
            raise

    async def _take_keeper(self, runtime: Runtime, place: Place) -> Box:
        name, box = self._keepers.pop(place.name, ("", None))
        if box is not None and name == runtime.name and not has_ended(box):
            return box
        try:
            if box is not None:
                await box.dismiss()
            if self._launchers is not None:
                await self._launchers.rest(place)
        except BoxFailedError:
            await self.clear(place)
        except BaseException:
            await self.clear(place)
            raise
        return await self._zygotes.fork(runtime, place)

    async def clear(self, place: Place) -> None:
        """Ends everything in the place, also where the caller is cancelled meanwhile."""
        await finish(self._clear(place))

    async def _clear(self, place: Place) -> None:
        metrics.CLEARED.inc()
        if (keeper := self._keepers.pop(place.name, None)) is not None:
            keeper[1].close()
        if self._launchers is not None:
            await self._launchers.kill(place)
        await place.empty()
