"""Pool of worker slots with the job queue in front of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from perigee.errors import FailedPreconditionError, ResourceExhaustedError
from services.kit.telemetry import get_logger
from services.kit.tracing import span
from services.sandbox.config import SandboxConfig
from services.sandbox.languages.catalog import Catalog, Runtime, load_catalog
from services.sandbox.runtime import metrics
from services.sandbox.runtime.cgroups import SlotCgroup, weigh_jobs
from services.sandbox.runtime.compile_cache import CompileCache
from services.sandbox.runtime.delegation import delegate_own_group
from services.sandbox.runtime.failure import SandboxFailedError
from services.sandbox.runtime.isolation import Isolation, Machine, choose_isolation, make_init, read_machine
from services.sandbox.runtime.job_queue import JobQueue
from services.sandbox.runtime.leftovers import clear_leftovers, own_folders
from services.sandbox.runtime.sandboxes import Launchers, SandboxFactory, Zygotes
from services.sandbox.runtime.worker_slots import SlotPair, WorkerSlot, choose_first_uid, raise_open_file_limit

log = get_logger(__name__)


class Pool:
    """Leases pairs of slots to jobs; holds the catalog of runtimes and the factory of sandboxes."""

    def __init__(
        self,
        config: SandboxConfig,
        catalog: Catalog,
        factory: SandboxFactory,
        pairs: list[SlotPair],
        session_slots: list[WorkerSlot],
    ) -> None:
        self.config = config
        self.catalog = catalog
        self.factory = factory
        self.session_slots = session_slots
        self.pairs = pairs
        self._alone = asyncio.Lock()
        self._queue: JobQueue[SlotPair] = JobQueue(
            max_waiting=config.queue_limit,
            max_wait_s=config.queue_seconds,
            priority_window_s=config.priority_window_seconds,
        )
        for pair in pairs:
            self._queue.add(pair)
        metrics.WAITING.set_function(lambda: self._queue.waiting)

    @asynccontextmanager
    async def lease(self, cost_s: float, remaining_s: float | None = None) -> AsyncIterator[SlotPair]:
        """Leases the slots of a job that may take `cost_s`; raises ResourceExhaustedError when none are free."""
        asked = time.monotonic()
        try:
            with span("wait for a slot"):
                pair = await self._queue.acquire(cost_s, remaining_s)
        except ResourceExhaustedError:
            metrics.REFUSED.inc()
            raise
        metrics.WAIT_SECONDS.observe(time.monotonic() - asked)
        metrics.BUSY.set(self._queue.busy)
        try:
            yield pair
        finally:
            self._queue.release(pair)
            metrics.BUSY.set(self._queue.busy)

    @asynccontextmanager
    async def lease_alone(self, cost_s: float, remaining_s: float | None = None) -> AsyncIterator[SlotPair]:
        """Leases all slots and yields one pair, so that no other job runs beside it; raises as `lease`."""
        until = None if remaining_s is None else time.monotonic() + remaining_s
        async with self._alone, AsyncExitStack() as stack:
            for _ in self.pairs:
                left_s = None if until is None else until - time.monotonic()
                pair = await stack.enter_async_context(self.lease(cost_s, left_s))
            yield pair

    async def warm_up(self) -> None:
        """Starts the processes that the first job would wait for; raises FailedPreconditionError when they fail."""
        python = self.catalog.find("python")
        if python is None or self.factory.explain_missing(python) is not None:
            return
        try:
            async with asyncio.TaskGroup() as group:
                for pair in self.pairs:
                    group.create_task(self._open_once(python, pair.program))
        except* SandboxFailedError as errors:
            label = self.factory.isolation.label(python=True)
            raise FailedPreconditionError(
                f"sandbox.isolation: {label} does not work here: {errors.exceptions[0]}"
            ) from errors

    async def _open_once(self, runtime: Runtime, slot: WorkerSlot) -> None:
        async with self.factory.open(runtime, slot):
            return

    async def close(self) -> None:
        """Refuses waiting jobs and ends everything in all slots."""
        self._queue.close()
        slots = [slot for pair in self.pairs for slot in (pair.program, pair.judge)]
        await asyncio.gather(*(self.factory.clear(slot) for slot in (*slots, *self.session_slots)))


@asynccontextmanager
async def open_pool(config: SandboxConfig) -> AsyncIterator[Pool]:
    """Opens a pool of slots; clears what killed services left before, and what this one leaves after."""
    machine = read_machine()
    state = Path(config.state_path)
    raise_open_file_limit(2 * config.slots + config.max_sessions, config.server.max_concurrent_rpcs)
    isolation = choose_isolation(config, machine)
    if not isolation.unsafe and machine.cgroups is not None:
        await asyncio.to_thread(delegate_own_group, machine.cgroups)
    await asyncio.to_thread(clear_leftovers, machine, state)
    catalog = load_catalog(config)
    async with AsyncExitStack() as stack:
        folder = await stack.enter_async_context(own_folders(machine, state, with_groups=not isolation.unsafe))
        slots = make_slots(config, machine, isolation, folder)
        for slot in slots:
            stack.callback(slot.close)
            slot.open()
        if not isolation.unsafe and machine.cgroups is not None:
            weigh_jobs(machine.cgroups, machine.instance, config.slots)
        uids = [slot.uid for slot in slots]
        init = None if isolation.unsafe else await asyncio.to_thread(make_init, config.init_path, folder)
        zygotes = Zygotes(folder, init, uids, isolated=not isolation.unsafe)
        stack.push_async_callback(zygotes.close)
        launchers = None
        if isolation.container is not None and init is not None and machine.cgroups is not None:
            launchers = Launchers(isolation.container, init, machine.cgroups)
            stack.push_async_callback(launchers.close)
        cache = CompileCache(config.compile_cache_entries, config.compile_cache_bytes)
        factory = SandboxFactory(isolation, zygotes, launchers, cache)
        job_slots, session_slots = slots[: 2 * config.slots], slots[2 * config.slots :]
        pairs = [SlotPair(*pair) for pair in zip(job_slots[::2], job_slots[1::2], strict=True)]
        pool = Pool(config, catalog, factory, pairs, session_slots)
        stack.push_async_callback(pool.close)
        await pool.warm_up()
        label = isolation.label(python=True)
        runtimes = [runtime.name for runtime in catalog.runtimes]
        log.info("slots_ready", isolation=label, slots=config.slots, runtimes=runtimes)
        yield pool


def make_slots(config: SandboxConfig, machine: Machine, isolation: Isolation, folder: Path) -> list[WorkerSlot]:
    """Returns two slots for each job that may run at once and one for each session, each with a user of its own."""
    names = [f"slot-{index}{side}" for index in range(config.slots) for side in ("", "-judge")]
    names += [f"session-{index}" for index in range(config.max_sessions)]
    first_uid = choose_first_uid() if config.first_uid is None else config.first_uid
    slots = []
    for index, name in enumerate(names):
        cgroup = None
        if not isolation.unsafe and machine.cgroups is not None:
            cgroup = SlotCgroup(machine.cgroups, machine.instance, name)
        slots.append(WorkerSlot(name, first_uid + index, folder / name, cgroup))
    return slots
