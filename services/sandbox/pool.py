"""The slots and the bounded queue before them."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from perigee.errors import FailedPreconditionError, ResourceExhaustedError
from services.kit.telemetry import get_logger
from services.sandbox import metrics
from services.sandbox.cgroups import SlotCgroup, instances, is_alive, remove_instance
from services.sandbox.config import SandboxConfig
from services.sandbox.detect import choose_isolation, read_machine
from services.sandbox.isolation import Isolation, Machine, Place, find_python
from services.sandbox.slots import BoxFailedError, Slot

log = get_logger(__name__)

_RESTART_PAUSE_S = 1.0
_SMOOTHING = 0.1


class Pool:
    """Hands out slots first come, first served; broken ones are started again while the others go on."""

    def __init__(self, isolation: Isolation, slots: list[Slot], queue_limit: int) -> None:
        self.isolation = isolation
        self.slots = slots
        self._free: asyncio.Queue[Slot] = asyncio.Queue()
        self._queue_limit = queue_limit
        self._waiting = 0
        self._job_s = 0.1
        self._restarts: set[asyncio.Task[None]] = set()

    @property
    def version(self) -> str:
        """The version of the interpreter in the boxes."""
        return self.slots[0].version

    async def start(self) -> None:
        """Starts every slot; raises FailedPreconditionError with what the launcher said when one does not start."""
        try:
            async with asyncio.TaskGroup() as group:
                for slot in self.slots:
                    group.create_task(slot.start())
        except* BoxFailedError as errors:
            message = str(errors.exceptions[0])
            raise FailedPreconditionError(
                f"sandbox.isolation: {self.isolation.name} does not work here: {message}"
            ) from errors
        for slot in self.slots:
            self._free.put_nowait(slot)

    @asynccontextmanager
    async def take(self) -> AsyncIterator[Slot]:
        """A slot for one job; raises ResourceExhaustedError when the queue is full."""
        if self._free.empty() and self._waiting >= self._queue_limit:
            retry_after_s = max(0.1, self._job_s * self._waiting / len(self.slots))
            raise ResourceExhaustedError(f"{self._waiting} jobs wait already", retry_after_s=retry_after_s)
        self._waiting += 1
        metrics.WAITING.set(self._waiting)
        try:
            slot = await self._free.get()
        finally:
            self._waiting -= 1
            metrics.WAITING.set(self._waiting)
        started = asyncio.get_running_loop().time()
        metrics.BUSY.inc()
        try:
            yield slot
        finally:
            metrics.BUSY.dec()
            self._job_s += _SMOOTHING * (asyncio.get_running_loop().time() - started - self._job_s)
            if slot.idle:
                self._free.put_nowait(slot)
            else:
                self._begin_restart(slot)

    def _begin_restart(self, slot: Slot) -> None:
        metrics.RESTARTS.inc()
        task = asyncio.create_task(self._restart(slot))
        self._restarts.add(task)
        task.add_done_callback(self._restarts.discard)

    async def _restart(self, slot: Slot) -> None:
        await slot.kill()
        while True:
            try:
                await slot.start()
                break
            except BoxFailedError as error:
                log.error("slot_does_not_start", slot=slot.place.index, error=error.message)
                await asyncio.sleep(_RESTART_PAUSE_S)
        self._free.put_nowait(slot)

    async def close(self) -> None:
        """Ends every launcher and restart."""
        for task in list(self._restarts):
            task.cancel()
        await asyncio.gather(*self._restarts, return_exceptions=True)
        await asyncio.gather(*(slot.kill() for slot in self.slots))


@asynccontextmanager
async def open_pool(config: SandboxConfig) -> AsyncIterator[Pool]:
    """A pool of running slots, with the leftovers of killed services cleared before and its own after."""
    machine = read_machine()
    state = Path(config.state_path)
    await asyncio.to_thread(clear_leftovers, machine, state)
    isolation = choose_isolation(config, machine, find_python(config))
    folder = state / machine.instance
    folder.mkdir(parents=True)
    folder.chmod(0o711)
    pool = Pool(
        isolation,
        [Slot(isolation, place) for place in make_places(config, machine, isolation, folder)],
        config.queue_limit,
    )
    try:
        await pool.start()
        log.info("slots_ready", isolation=isolation.name, slots=len(pool.slots), python=pool.version)
        yield pool
    finally:
        await pool.close()
        await asyncio.to_thread(remove_own, machine, folder)


def make_places(config: SandboxConfig, machine: Machine, isolation: Isolation, folder: Path) -> list[Place]:
    """A folder, a user and, where the isolation limits by it, a control group for each slot."""
    places = []
    for index in range(config.slots):
        cgroup = None
        if isolation.name != "process" and machine.cgroups is not None:
            cgroup = SlotCgroup(machine.cgroups, machine.instance, index)
            try:
                cgroup.create()
            except OSError as error:
                raise FailedPreconditionError(
                    f"sandbox.isolation: {isolation.name} cannot make control groups: {error}"
                ) from error
        place = Place(index, config.first_uid + index, folder / f"slot-{index}", cgroup)
        place.folder.mkdir()
        isolation.prepare(place)
        places.append(place)
    return places


def clear_leftovers(machine: Machine, state: Path) -> None:
    """Removes the processes, control groups and folders of services that ended without doing so."""
    if machine.root and machine.cgroups is not None:
        for instance in instances(machine.cgroups):
            if not is_alive(instance):
                log.warning("clearing_leftovers", instance=instance)
                remove_instance(machine.cgroups, instance)
    for folder in state.glob("*-*/") if state.exists() else []:
        if not is_alive(folder.name):
            shutil.rmtree(folder)


def remove_own(machine: Machine, folder: Path) -> None:
    """Removes this service's control groups and folder."""
    if machine.root and machine.cgroups is not None:
        remove_instance(machine.cgroups, machine.instance)
    shutil.rmtree(folder)
