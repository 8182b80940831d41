"""Leases, trust in weights, and who gets the next work."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from perigee.errors import (
    DataLossError,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    UnavailableError,
)
from perigee.rollout.client import RolloutClient
from services.coordinator.config import DispatchConfig
from services.coordinator.dispatcher import Dispatcher, PeerError, Progress
from services.coordinator.workers import EMPTY, READY, PeerLostError, Worker, WorkerRegistry


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make_registry(clock: Clock | None = None) -> WorkerRegistry:
    # The client dials nobody: nothing here calls a worker.
    return WorkerRegistry(RolloutClient.connect, lease_seconds=10.0, clock=clock or Clock())


def add_worker(registry: WorkerRegistry, worker_id: str, version: int = 1, capacity: int = 4) -> Worker:
    worker = registry.register(worker_id, "127.0.0.1:1", capacity, 0, EMPTY)
    registry.mark_pushed(worker, version)
    return worker


async def test_a_lease_ends_unless_it_is_renewed() -> None:
    clock = Clock()
    registry = make_registry(clock)
    worker, other = add_worker(registry, "a"), add_worker(registry, "b")
    clock.now += 8
    registry.renew("a", worker.lease_epoch, 0, 1, READY)
    clock.now += 3
    assert registry.expire() == [other]
    assert registry.is_live(worker)
    assert not registry.is_live(other)
    with pytest.raises(NotFoundError, match="register again"):
        registry.renew("b", other.lease_epoch, 0, 1, READY)


async def test_a_second_registration_ends_the_first() -> None:
    registry = make_registry()
    first = add_worker(registry, "a")
    second = registry.register("a", "127.0.0.1:1", 4, 1, READY)
    assert not registry.is_live(first)
    assert second.lease_epoch > first.lease_epoch
    with pytest.raises(NotFoundError):
        registry.deregister("a", first.lease_epoch)
    # What the worker claims to hold is not trusted: this coordinator has pushed nothing to it since.
    assert registry.with_version(1) == []


async def test_registrations_are_checked() -> None:
    registry = make_registry()
    for arguments, field in [
        (("", "h:1", 1, 0, READY), "worker_id"),
        (("a", "host", 1, 0, READY), "address"),
        (("a", "h:1", 0, 0, READY), "capacity"),
    ]:
        with pytest.raises(InvalidArgumentError) as caught:
            registry.register(*arguments)
        assert caught.value.violations[0].field == field


async def test_the_backlog_is_a_metric_for_autoscalers() -> None:
    def read() -> list[float | None]:
        names = ("waiting_sequences", "running_sequences", "sequence_capacity", "workers")
        return [REGISTRY.get_sample_value(f"perigee_coordinator_{name}") for name in names]

    registry = make_registry()
    add_worker(registry, "a", capacity=3)
    seen = []

    async def call(worker: Worker, keys: list[str]) -> AsyncGenerator[Progress, None]:
        seen.append(read())
        yield Progress(ended=keys)

    await make_dispatcher(registry, call, calls_per_worker=1, overcommit=1.0).run(["1", "2", "3", "4"])
    assert seen == [[1, 3, 3, 1], [0, 1, 3, 1]]
    assert read() == [0, 0, 3, 1]


async def test_a_suspect_worker_is_out_until_it_renews() -> None:
    registry = make_registry()
    worker = add_worker(registry, "a")
    registry.suspect(worker, "cut")
    assert registry.with_version(1) == []
    registry.renew("a", worker.lease_epoch, 0, 1, READY)
    assert registry.with_version(1) == [worker]
    registry.invalidate()
    assert registry.with_version(1) == []


async def test_time_in_which_the_coordinator_stood_still_ends_no_lease() -> None:
    clock = Clock()
    registry = make_registry(clock)
    worker = add_worker(registry, "a")
    clock.now += 30
    registry.excuse(30 - 1.25, tolerance_s=1.25)
    assert registry.expire() == []
    clock.now += 9
    registry.excuse(1.0, tolerance_s=1.25)
    assert registry.expire() == [worker]


async def test_leases_are_swept_by_the_clock() -> None:
    clock = Clock()
    registry = WorkerRegistry(RolloutClient.connect, lease_seconds=0.04, clock=clock)
    worker = add_worker(registry, "a")
    sweeping = asyncio.create_task(registry.sweep())
    async with asyncio.timeout(60):
        while registry.is_live(worker):
            # Two pauses of the sweep at most, so that it does not count as standing still.
            clock.now += 0.008
            await asyncio.sleep(0.005)
    sweeping.cancel()
    with suppress(asyncio.CancelledError):
        await sweeping


def make_dispatcher(registry: WorkerRegistry, call: object, **config: object) -> Dispatcher:
    return Dispatcher(registry, 1, DispatchConfig(**config), call, lambda waiting: None)  # type: ignore[arg-type]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 60),
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.integers(1, 5),
    st.sets(st.integers(0, 59), max_size=8),
    st.integers(0, 2),
)
async def test_every_sequence_ends_once_within_every_workers_room(
    count: int, capacities: list[int], calls: int, failing: set[int], broken: int
) -> None:
    registry = make_registry()
    workers = [add_worker(registry, f"w{n}", capacity=capacity) for n, capacity in enumerate(capacities)]
    ended: list[str] = []
    to_fail = {str(key) for key in failing}
    to_break = broken

    async def call(worker: Worker, keys: list[str]) -> AsyncGenerator[Progress, None]:
        nonlocal to_break
        assert worker.outstanding <= 2 * worker.capacity
        for key in keys:
            await asyncio.sleep(0)
            if key in to_fail:
                to_fail.remove(key)
                yield Progress(failed=[(key, "once")])
                continue
            if to_break and len(ended) > 3:
                to_break -= 1
                asyncio.get_running_loop().call_later(
                    0.001, lambda: registry.renew(worker.worker_id, worker.lease_epoch, 0, 1, READY)
                )
                raise UnavailableError("cut")
            ended.append(key)
            yield Progress(ended=[key])

    keys = [str(key) for key in range(count)]
    await make_dispatcher(registry, call, calls_per_worker=calls, overcommit=2.0).run(keys)
    assert sorted(ended) == sorted(keys)
    assert all(worker.outstanding == 0 for worker in workers)


async def test_a_fast_worker_takes_more_than_a_slow_one() -> None:
    registry = make_registry()
    add_worker(registry, "fast")
    add_worker(registry, "slow")
    taken = {"fast": 0, "slow": 0}

    async def call(worker: Worker, keys: list[str]) -> AsyncGenerator[Progress, None]:
        for key in keys:
            for _ in range(1 if worker.worker_id == "fast" else 20):
                await asyncio.sleep(0)
            taken[worker.worker_id] += 1
            yield Progress(ended=[key])

    await make_dispatcher(registry, call).run(str(key) for key in range(100))
    assert taken["fast"] > 3 * taken["slow"] > 0


async def test_what_all_have_room_for_is_given_out_by_speed() -> None:
    registry = make_registry()
    add_worker(registry, "fast", capacity=32).record_phase(work=20.0, seconds=10.0)
    add_worker(registry, "slow", capacity=32).record_phase(work=10.0, seconds=10.0)
    calls: dict[str, list[int]] = {"fast": [], "slow": []}

    async def call(worker: Worker, keys: list[str]) -> AsyncGenerator[Progress, None]:
        calls[worker.worker_id].append(len(keys))
        yield Progress(ended=keys)

    await make_dispatcher(registry, call).run(str(key) for key in range(60))
    assert calls == {"fast": [16, 16, 8], "slow": [16, 4]}


async def test_a_lost_workers_call_is_cancelled_and_its_work_given_to_others() -> None:
    clock = Clock()
    registry = make_registry(clock)
    lost = add_worker(registry, "lost")
    cancelled: list[str] = []

    async def call(worker: Worker, keys: list[str]) -> AsyncGenerator[Progress, None]:
        if worker is lost:
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.extend(keys)
        yield Progress(ended=keys)

    async def lose() -> None:
        await asyncio.sleep(0.01)
        clock.now += 20
        add_worker(registry, "other")
        assert registry.expire() == [lost]

    losing = asyncio.create_task(lose())
    await make_dispatcher(registry, call).run(["1", "2", "3"])
    await losing
    assert sorted(cancelled) == ["1", "2", "3"]


async def test_errors_of_peers_and_requests_end_the_dispatch() -> None:
    registry = make_registry()
    worker = add_worker(registry, "a")

    async def refuse(worker: Worker, keys: list[str]) -> AsyncGenerator[Progress, None]:
        raise InvalidArgumentError.for_field("sampling.top_p", "is refused")
        yield Progress()

    async def lose_buffer(worker: Worker, keys: list[str]) -> AsyncGenerator[Progress, None]:
        raise PeerError(UnavailableError("the buffer is away"))
        yield Progress()

    async def miss_tokens(worker: Worker, keys: list[str]) -> AsyncGenerator[Progress, None]:
        raise DataLossError("a file does not exist")
        yield Progress()

    with pytest.raises(InvalidArgumentError, match="top_p"):
        await make_dispatcher(registry, refuse).run(["1"])
    with pytest.raises(DataLossError, match="does not exist"):
        await make_dispatcher(registry, miss_tokens).run(["1"])
    with pytest.raises(UnavailableError, match="the buffer is away"):
        await make_dispatcher(registry, lose_buffer).run(["1"])
    assert worker.suspect is None
    assert worker.outstanding == 0


async def test_a_sequence_that_keeps_failing_is_named() -> None:
    registry = make_registry()
    add_worker(registry, "a")

    async def call(worker: Worker, keys: list[str]) -> AsyncGenerator[Progress, None]:
        yield Progress(failed=[(key, "no luck") for key in keys])

    with pytest.raises(InternalError, match="Sequence 1 failed 3 times, last: no luck"):
        await make_dispatcher(registry, call, attempts=3).run(["1"])


async def test_only_some_workers_get_work_until_the_dispatch_goes_on() -> None:
    registry = make_registry()
    stays, leaves = add_worker(registry, "stays", capacity=1), add_worker(registry, "leaves", capacity=1)
    calls: asyncio.Queue[tuple[str, list[str]]] = asyncio.Queue()
    released = asyncio.Semaphore(0)

    async def call(worker: Worker, keys: list[str]) -> AsyncGenerator[Progress, None]:
        calls.put_nowait((worker.worker_id, keys))
        await released.acquire()
        yield Progress(ended=keys)

    # Nobody is waited for too long, nor is that shown.
    config = DispatchConfig(calls_per_worker=1, overcommit=1.0, worker_wait_s=0.001)
    dispatcher = Dispatcher(registry, 1, config, call, lambda waiting: None, lambda worker: worker is stays)
    async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
        running = tasks.create_task(dispatcher.run(["1", "2", "3"]))
        assert await calls.get() == ("stays", ["1"])
        draining = tasks.create_task(dispatcher.drain())
        await asyncio.sleep(0)
        assert not draining.done()
        released.release()
        await draining
        await asyncio.sleep(0.01)
        assert calls.empty()
        registry.mark_pushed(leaves, 2)
        dispatcher.go_on(2, ["4"])
        for key in ("2", "3", "4"):
            assert await calls.get() == ("leaves", [key])
            released.release()
        await running


async def test_a_call_that_other_weights_overtook_is_made_again() -> None:
    registry = make_registry()
    worker = add_worker(registry, "a")
    calls: list[list[str]] = []

    async def call(worker: Worker, keys: list[str]) -> AsyncGenerator[Progress, None]:
        calls.append(keys)
        if worker.pushed_version == 1:
            registry.mark_pushed(worker, 2)
            dispatcher.go_on(2, ["2"])
            raise FailedPreconditionError("holds version 2")
        yield Progress(ended=keys)

    dispatcher = make_dispatcher(registry, call, calls_per_worker=1)
    await dispatcher.run(["1"])
    assert (calls, worker.suspect) == ([["1"], ["1", "2"]], None)


async def test_without_a_worker_the_wait_is_shown_and_bounded() -> None:
    shown: list[bool] = []
    dispatcher = Dispatcher(make_registry(), 1, DispatchConfig(worker_wait_s=0.05), lambda *_: None, shown.append)  # type: ignore[arg-type,return-value]
    with pytest.raises(PeerLostError, match=r"No rollout worker has been registered for 0\.05 s"):
        await dispatcher.run(["1"])
    assert shown == [True, False]
