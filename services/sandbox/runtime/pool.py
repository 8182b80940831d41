"""The slots and the line before them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from perigee.errors import FailedPreconditionError, ResourceExhaustedError
from services.kit.telemetry import get_logger
from services.sandbox.config import SandboxConfig
from services.sandbox.languages.catalog import Catalog, Runtime, load_catalog
from services.sandbox.runtime import metrics
from services.sandbox.runtime.cgroups import SlotCgroup
from services.sandbox.runtime.helper_process import BoxFailedError
from services.sandbox.runtime.isolation import Isolation, Machine, choose_isolation, make_init, read_machine
from services.sandbox.runtime.job_queue import WaitingLine
from services.sandbox.runtime.leftovers import clear_leftovers, own_folders
from services.sandbox.runtime.sandboxes import Launchers, Opener, Zygotes
from services.sandbox.runtime.worker_slots import Place, choose_first_uid, make_room

log = get_logger(__name__)


@dataclass(eq=False)
class Slot:
    """Where one job runs: a place for its program, and one for whoever judges it."""

    program: Place
    judge: Place


class Pool:
    """Hands out slots; which runtimes there are and how boxes are opened belongs to it."""

    def __init__(
        self, config: SandboxConfig, catalog: Catalog, opener: Opener, slots: list[Slot], session_places: list[Place]
    ) -> None:
        self.config = config
        self.catalog = catalog
        self.opener = opener
        self.session_places = session_places
        self._slots = slots
        self._line: WaitingLine[Slot] = WaitingLine(
            max_waiting=config.queue_limit, max_wait_s=config.queue_seconds, overtaking_s=config.overtaking_seconds
        )
        for slot in slots:
            self._line.add(slot)
        metrics.WAITING.set_function(lambda: self._line.waiting)

    @asynccontextmanager
    async def take(self, cost_s: float, remaining_s: float | None = None) -> AsyncIterator[Slot]:
        """A slot for one job that may take `cost_s`; raises ResourceExhaustedError when there is none in time."""
        asked = time.monotonic()
        try:
            slot = await self._line.acquire(cost_s, remaining_s)
        except ResourceExhaustedError:
            metrics.REFUSED.inc()
            raise
        metrics.WAIT_SECONDS.observe(time.monotonic() - asked)
        metrics.BUSY.set(self._line.busy)
        try:
            yield slot
        finally:
            self._line.release(slot)
            metrics.BUSY.set(self._line.busy)

    async def warm_up(self) -> None:
        """Starts what the first job would wait for; raises FailedPreconditionError when it does not start."""
        python = self.catalog.find("python")
        if python is None or self.opener.explain_missing(python) is not None:
            return
        try:
            async with asyncio.TaskGroup() as group:
                for slot in self._slots:
                    group.create_task(self._open_once(python, slot.program))
        except* BoxFailedError as errors:
            label = self.opener.isolation.label(python=True)
            raise FailedPreconditionError(
                f"sandbox.isolation: {label} does not work here: {errors.exceptions[0]}"
            ) from errors

    async def _open_once(self, runtime: Runtime, place: Place) -> None:
        async with self.opener.open(runtime, place):
            return

    async def close(self) -> None:
        """Refuses who waits, and ends everything in all places."""
        self._line.close()
        places = [place for slot in self._slots for place in (slot.program, slot.judge)]
        await asyncio.gather(*(self.opener.clear(place) for place in (*places, *self.session_places)))


@asynccontextmanager
async def open_pool(config: SandboxConfig) -> AsyncIterator[Pool]:
    """A pool of slots, with the leftovers of killed services cleared before and its own after."""
    machine = read_machine()
    state = Path(config.state_path)
    make_room(2 * config.slots + config.max_sessions, config.server.max_concurrent_rpcs)
    await asyncio.to_thread(clear_leftovers, machine, state)
    isolation = choose_isolation(config, machine)
    catalog = load_catalog(config)
    async with AsyncExitStack() as stack:
        folder = await stack.enter_async_context(own_folders(machine, state, with_groups=not isolation.unsafe))
        places = make_places(config, machine, isolation, folder)
        for place in places:
            stack.callback(place.close)
            place.open()
        uids = [place.uid for place in places]
        init = None if isolation.unsafe else await asyncio.to_thread(make_init, config.init_path, folder)
        zygotes = Zygotes(folder, init, uids, isolated=not isolation.unsafe)
        stack.push_async_callback(zygotes.close)
        launchers = None
        if isolation.container is not None and init is not None and machine.cgroups is not None:
            launchers = Launchers(isolation.container, init, machine.cgroups)
            stack.push_async_callback(launchers.close)
        opener = Opener(isolation, zygotes, launchers)
        pairs = places[: 2 * config.slots]
        slots = [Slot(*pair) for pair in zip(pairs[::2], pairs[1::2], strict=True)]
        pool = Pool(config, catalog, opener, slots, places[2 * config.slots :])
        stack.push_async_callback(pool.close)
        await pool.warm_up()
        label = isolation.label(python=True)
        runtimes = [runtime.name for runtime in catalog.runtimes]
        log.info("slots_ready", isolation=label, slots=config.slots, runtimes=runtimes)
        yield pool


def make_places(config: SandboxConfig, machine: Machine, isolation: Isolation, folder: Path) -> list[Place]:
    """Two places for each slot, and one for each session; each with a user of its own."""
    names = [f"slot-{index}{side}" for index in range(config.slots) for side in ("", "-judge")]
    names += [f"session-{index}" for index in range(config.max_sessions)]
    first_uid = choose_first_uid() if config.first_uid is None else config.first_uid
    places = []
    for index, name in enumerate(names):
        cgroup = None
        if not isolation.unsafe and machine.cgroups is not None:
            cgroup = SlotCgroup(machine.cgroups, machine.instance, name)
        places.append(Place(name, first_uid + index, folder / name, cgroup))
    return places
