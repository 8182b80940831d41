"""The worker and its supervisor over an engine that can be made to fail."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from perigee.buffer.client import BufferClient, StoredTrajectory
from perigee.buffer.packing import pack_token_ids
from perigee.buffer.v1.buffer_pb2 import END_REASON_UNSPECIFIED, AppendChunksRequest, AppendChunksResponse, Chunk
from perigee.errors import (
    AbortedError,
    DataLossError,
    DeadlineExceededError,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    PerigeeError,
    ResourceExhaustedError,
    UnavailableError,
)
from perigee.rollout.v1 import rollout_pb2 as pb
from perigee.weights.v1.weights_pb2 import CommitResponse, Fingerprint, Manifest
from services.rollout import extend
from services.rollout.engine import EngineOutput, EngineRequest, PromptScore
from services.rollout.extend import ChunkWriter, extend_trajectories
from services.rollout.model import open_policy
from services.rollout.residence import RESIDENCES
from services.rollout.segment import SegmentSettings
from services.rollout.service import RolloutService
from services.rollout.worker import AWAY, DRAINING, EMPTY, READY, STARTING, Worker, WorkerStatus, supervise
from services.weights.manifest import WeightImage, export_image
from tests.fixtures.rollout import make_policy, policy_tensors, rollout_config
from tests.fixtures.rollout_engine import FragileEngine


class Bench:
    """A supervised worker; `held` is what a receiver would keep in memory."""

    def __init__(self, folder: Path, images: Path) -> None:
        config = rollout_config(
            folder,
            "127.0.0.1:1",
            max_queued_sequences=10,
            commit_wait_seconds=60,
            supervision={"start_attempts": 3, "retry_seconds": 0.01},
        )
        self.engine = FragileEngine()
        self.worker = Worker(config, open_policy(str(folder), None), self.engine, "w")
        self.images = images
        self.tensors = policy_tensors(make_policy(3))
        self.held: WeightImage | None = None
        self.fatal: asyncio.Queue[InternalError] = asyncio.Queue()

    async def commit(self, version: int, fingerprint: Sequence[float] = ()) -> CommitResponse:
        image = export_image("run", version, self.tensors.items(), 1 << 20, str(self.images))
        if fingerprint:
            image.manifest.fingerprint.logprobs.extend(fingerprint)
        report = await self.worker.commit(image)
        self.held = image
        return report

    async def wait(self, status: WorkerStatus, restarts: int = 0) -> None:
        async with asyncio.timeout(60):
            while self.worker.status != status or self.worker.engine_restarts < restarts:
                await self.worker.wait_change()

    @asynccontextmanager
    async def supervised(self) -> AsyncIterator[None]:
        task = asyncio.create_task(supervise(self.worker, lambda: self.held, self.fatal.put_nowait))
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])


@pytest.fixture
def bench(policy_folder: Path, tmp_path: Path) -> Bench:
    return Bench(policy_folder, tmp_path)


async def test_a_worker_is_empty_until_weights_arrive(bench: Bench) -> None:
    async with bench.supervised():
        await bench.wait(EMPTY)
        with pytest.raises(FailedPreconditionError, match="holds no weights"):
            bench.worker.check_ready("run", None)
        await bench.commit(4)
        assert (bench.worker.status, bench.worker.policy_version) == (READY, 4)
        bench.worker.check_ready("run", 4)


@pytest.mark.parametrize("name", pb.Residence.keys()[1:])
async def test_a_worker_leaves_and_comes_back(bench: Bench, name: str) -> None:
    residence = RESIDENCES[pb.Residence.Value(name)]
    async with bench.supervised():
        await bench.commit(4)
        for cycle in (1, 2):
            freed = await bench.worker.leave(residence)
            assert (freed, bench.worker.status) == (0 if name == "RESIDENCE_KEEP" else 100, AWAY)
            assert await bench.worker.leave(residence) == 0
            with pytest.raises(FailedPreconditionError, match="is away"):
                bench.worker.check_ready("run", 4)
            assert bench.worker.is_away
            await bench.worker.come_back(lambda: bench.held)
            await bench.worker.come_back(lambda: None)
            assert not bench.worker.is_away
            assert (bench.worker.status, bench.engine.versions) == (READY, [4] * (1 + cycle))
        await bench.worker.leave(residence)
        await bench.commit(5)
        assert (bench.worker.status, bench.worker.policy_version, bench.worker.engine_restarts) == (READY, 5, 0)
        assert bench.engine.starts == (4 if name == "RESIDENCE_RESTART" else 1)


async def test_prefixes_are_kept_for_as_many_versions_as_the_run_allows(bench: Bench) -> None:
    worker, kept = bench.worker, bench.engine.kept
    async with bench.supervised():
        await bench.commit(4)
        await bench.commit(4)
        await bench.commit(5)
        # Without a word of the run nothing is kept of other weights, and what is kept is exact.
        assert (kept, worker.prefix_salt) == ([False, True, False], "")
        worker.max_kv_staleness = 2
        for version in (6, 7, 8, 9):
            await bench.commit(version)
        assert kept[3:] == [True, True, False, True]
        # Prefixes of version 8, in an engine with version 9.
        assert worker.prefix_salt == "9"
        # An iteration that was rolled back, then other weights under a number that is known.
        await bench.commit(8)
        bench.tensors = {name: tensor + 1 for name, tensor in bench.tensors.items()}
        await bench.commit(8)
        assert kept[7:] == [False, False]
        for name, is_kept in (("SLEEP", None), ("RESTART", False), ("KEEP", True)):
            await worker.leave(RESIDENCES[pb.Residence.Value(f"RESIDENCE_{name}")])
            kept.clear()
            await worker.come_back(lambda: bench.held)
            assert (kept, worker.prefix_salt) == ([] if is_kept is None else [is_kept], "")


async def test_an_engine_that_cannot_sleep_serves_on(bench: Bench) -> None:
    bench.engine.can_sleep = False
    async with bench.supervised():
        await bench.commit(4)
        with pytest.raises(FailedPreconditionError, match=r"rollout\.enable_sleep_mode"):
            await bench.worker.leave(RESIDENCES[pb.RESIDENCE_SLEEP])
        assert bench.worker.status == READY


@pytest.mark.parametrize("is_killed", [False, True])
async def test_an_engine_that_does_not_wake_up_is_replaced(bench: Bench, is_killed: bool) -> None:
    async with bench.supervised():
        await bench.commit(4)
        await bench.worker.leave(RESIDENCES[pb.RESIDENCE_SLEEP])
        bench.engine.failing_wakes = 1
        if is_killed:
            bench.engine.dead.set()
        await bench.commit(5)
        assert (bench.worker.status, bench.worker.policy_version, bench.engine.starts) == (READY, 5, 2)
        bench.engine.dead.set()
        await bench.wait(READY, restarts=1)


async def test_an_engine_that_hangs_as_it_comes_back_is_replaced(bench: Bench) -> None:
    bench.worker.config = bench.worker.config.model_copy(update={"update_timeout_seconds": 0.05})
    async with bench.supervised():
        await bench.commit(4)
        await bench.worker.leave(RESIDENCES[pb.RESIDENCE_SLEEP])
        bench.engine.hanging_wakes = 1
        await bench.commit(5)
        assert (bench.worker.status, bench.worker.policy_version, bench.engine.starts) == (READY, 5, 2)


async def test_an_engine_that_hangs_as_it_leaves_is_restarted_with_a_reason(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.worker.config = bench.worker.config.model_copy(update={"update_timeout_seconds": 0.01})
    monkeypatch.setattr(bench.engine, "sleep", asyncio.Event().wait)
    async with bench.supervised():
        await bench.wait(EMPTY)
        with pytest.raises(InternalError, match=r"not within 0\.01 s \(rollout\.update_timeout_seconds\)"):
            await bench.worker.leave(RESIDENCES[pb.RESIDENCE_SLEEP])


async def test_a_worker_without_weights_does_not_say_that_it_came_back(bench: Bench) -> None:
    service = RolloutService(bench.worker, None, lambda: bench.held)  # type: ignore[arg-type]
    async with bench.supervised():
        await bench.wait(EMPTY)
        with pytest.raises(FailedPreconditionError, match="is empty and holds no weights"):
            await service.ComeBack(pb.ComeBackRequest(run_id="run", iteration=1), None)


async def test_a_worker_whose_next_engine_fails_too_is_restarted(bench: Bench) -> None:
    async with bench.supervised():
        await bench.commit(4)
        await bench.worker.leave(RESIDENCES[pb.RESIDENCE_SLEEP])
        bench.engine.failing_wakes = bench.engine.failing_starts = 1
        with pytest.raises(FailedPreconditionError, match="holds no weights"):
            await bench.worker.come_back(lambda: None)
        with pytest.raises(InternalError, match="no memory"):
            await bench.worker.come_back(lambda: bench.held)
        await bench.wait(READY, restarts=1)


def test_a_call_of_an_earlier_iteration_is_refused(bench: Bench) -> None:
    for run, iteration in (("run", 3), ("run", 3), ("other", 1), ("run", 2)):
        bench.worker.check_iteration(run, iteration)
    with pytest.raises(FailedPreconditionError, match="iteration 2, not 1"):
        bench.worker.check_iteration("run", 1)


async def test_a_commit_waits_for_an_engine_that_starts(bench: Bench) -> None:
    commit = asyncio.create_task(bench.commit(4))
    await asyncio.sleep(0.01)
    assert not commit.done()
    async with bench.supervised():
        await commit
        assert bench.worker.status == READY


async def test_a_dead_engine_is_restarted_and_filled_from_memory(bench: Bench) -> None:
    async with bench.supervised():
        await bench.wait(EMPTY)
        await bench.commit(4)
        bench.engine.may_start.clear()
        bench.engine.dead.set()
        await bench.wait(STARTING)
        with pytest.raises(FailedPreconditionError, match="starting"):
            bench.worker.check_ready("run", None)
        # Others wait for the end of this push.
        with pytest.raises(UnavailableError, match="died and starts again"):
            await bench.commit(5)
        bench.engine.may_start.set()
        await bench.wait(READY, restarts=1)
        assert (bench.engine.starts, bench.engine.versions, bench.worker.policy_version) == (2, [4, 4], 4)


async def test_a_failed_update_restarts_the_engine_with_the_old_weights(bench: Bench) -> None:
    async with bench.supervised():
        await bench.wait(EMPTY)
        await bench.commit(4)
        bench.engine.failing_updates = 1
        with pytest.raises(InternalError, match="half loaded"):
            await bench.commit(5)
        await bench.wait(READY, restarts=1)
        assert bench.worker.policy_version == 4
        await bench.commit(5)
        assert (bench.engine.versions, bench.worker.policy_version) == ([4, 4, 5], 5)


@pytest.fixture
def computed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> list[Sequence[float]]:
    """Log-probabilities that the first engine computes, those that the second one does, and so on."""
    by_engine: list[Sequence[float]] = []

    async def generate(request: EngineRequest) -> AsyncIterator[EngineOutput]:
        found = by_engine[min(bench.engine.starts, len(by_engine)) - 1]
        scores = [PromptScore(logprob, 0, 0.0) for logprob in found]
        yield EngineOutput([], [], [], cached_tokens=0, finish="length", prompt_scores=scores)

    monkeypatch.setattr(bench.engine, "generate", generate)
    return by_engine


async def test_an_engine_that_computes_something_else_than_the_trainer_is_replaced(
    bench: Bench, computed: list[Sequence[float]]
) -> None:
    computed += [(-1.0, -2.0), (-3.0, -6.0)]
    async with bench.supervised():
        assert (await bench.commit(4, [-1.001, -2.0])).warning == ""
        warning = (await bench.commit(5, [-3.0, -6.0])).warning
        assert "version 5: log-probabilities of the fingerprint were 3 nats" in warning
        assert "above 0.01; 0 in an engine that took its place" in warning
        assert (bench.worker.status, bench.worker.policy_version) == (READY, 5)
        assert (bench.engine.versions, bench.engine.starts, bench.worker.engine_restarts) == ([4, 5, 5], 2, 0)
        bench.engine.dead.set()
        await bench.wait(READY, restarts=1)


async def test_weights_that_a_replaced_engine_is_refilled_with_are_kept_meanwhile(
    bench: Bench, computed: list[Sequence[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that is away would give them up for those that come, and take these beside them."""
    computed += [(-1.0, -2.0), (-9.0, -9.0), (-1.0, -2.0)]
    load, statuses = bench.engine.update_weights, list[WorkerStatus]()

    async def look_and_load(image: WeightImage, **options: bool) -> float:
        statuses.append(bench.worker.status)
        return await load(image, **options)

    monkeypatch.setattr(bench.engine, "update_weights", look_and_load)
    async with bench.supervised():
        await bench.commit(4, [-1.0, -2.0])
        bench.engine.dead.set()
        await bench.wait(READY, restarts=1)
    assert (statuses, bench.engine.starts) == ([EMPTY, STARTING, STARTING], 3)


async def test_a_difference_that_another_engine_has_too_is_served_and_becomes_the_noise(
    bench: Bench, computed: list[Sequence[float]]
) -> None:
    computed.append((-1.0, -2.0))
    async with bench.supervised():
        assert "0.2 in an engine that took its place" in (await bench.commit(4, [-1.1, -2.3])).warning
        assert (bench.worker.status, bench.engine.starts) == (READY, 2)
        assert (await bench.commit(5, [-1.2, -2.3])).warning == ""
        assert (bench.worker.policy_version, bench.engine.starts) == (5, 2)


async def test_a_fingerprint_that_fills_the_context_is_not_compared(bench: Bench) -> None:
    bench.worker.model = replace(bench.worker.model, context_tokens=24)
    image = export_image("run", 4, bench.tensors.items(), 1 << 20, str(bench.images))
    image.manifest.fingerprint.token_ids.extend(range(24))
    async with bench.supervised():
        assert (await bench.worker.commit(image)).warning == ""
        assert bench.worker.status == READY


async def test_an_engine_without_a_place_for_the_fingerprint_serves_and_one_that_took_its_place_does_not(
    bench: Bench, computed: list[Sequence[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    computed.append((-9.0, -9.0))
    answer = bench.engine.generate
    hanging: list[int] = []

    async def generate(request: EngineRequest) -> AsyncIterator[EngineOutput]:
        if bench.engine.starts in hanging:
            await asyncio.Event().wait()
        async for output in answer(request):
            yield output

    monkeypatch.setattr(bench.engine, "generate", generate)
    bench.worker.config = bench.worker.config.model_copy(update={"fingerprint_timeout_seconds": 0.01})
    async with bench.supervised():
        hanging.append(1)
        assert (await bench.commit(4, [-1.0, -2.0])).warning == ""
        hanging[:] = [2]
        with pytest.raises(InternalError, match=r"within 0\.01 s \(rollout\.fingerprint_timeout_seconds\)"):
            await bench.commit(5, [-1.0, -2.0])


@pytest.mark.parametrize("expected", [-6.0, float("nan")])
async def test_weights_that_two_engines_compute_wrongly_are_refused_without_a_third(
    bench: Bench, computed: list[Sequence[float]], expected: float
) -> None:
    computed.append((-1.0, -2.0))
    async with bench.supervised():
        await bench.commit(4, [-1.0, -2.0])
        for _ in range(3):
            with pytest.raises(
                FailedPreconditionError, match=r"above rollout.max_fingerprint_difference 0\.5: refused"
            ):
                await bench.commit(5, [-3.0, expected])
            assert (bench.worker.status, bench.engine.starts, bench.engine.versions) == (EMPTY, 2, [4, 5, 5])
        refused = Manifest(run_id="run", fingerprint=Fingerprint(logprobs=[-3.0, expected]))
        with pytest.raises(FailedPreconditionError, match="refused"):
            await bench.worker.find_slices(refused)
        await bench.commit(6, [-1.0, -2.0])
        assert (bench.worker.status, bench.engine.starts, bench.worker.engine_restarts) == (READY, 2, 0)


async def test_weights_that_break_the_engine_again_are_not_tried_for_ever(bench: Bench) -> None:
    async with bench.supervised():
        await bench.wait(EMPTY)
        await bench.commit(4)
        bench.engine.failing_updates = 1
        bench.engine.dead.set()
        await bench.wait(EMPTY, restarts=2)
        assert bench.engine.starts == 3
        await bench.commit(5)


async def test_a_caller_that_goes_away_does_not_stop_a_commit(bench: Bench) -> None:
    async with bench.supervised():
        await bench.wait(EMPTY)
        bench.engine.may_update.clear()
        commit = asyncio.create_task(bench.commit(4))
        await asyncio.sleep(0.05)
        commit.cancel()
        await asyncio.wait([commit])
        bench.engine.may_update.set()
        await bench.wait(READY)
        assert bench.engine.versions == [4]


async def test_an_engine_that_starts_again_while_the_worker_shuts_down_is_ended(bench: Bench) -> None:
    async with bench.supervised():
        await bench.commit(4)
        await bench.worker.leave(RESIDENCES[pb.RESIDENCE_RESTART])
        bench.engine.may_start.clear()
        coming = asyncio.create_task(bench.worker.come_back(lambda: bench.held))
        await asyncio.sleep(0)
        coming.cancel()
        await asyncio.wait([coming])
        bench.worker.set_status(DRAINING)
    await bench.worker.close()
    bench.engine.may_start.set()
    await asyncio.sleep(0.01)
    assert (bench.engine.starts, bench.engine.dead.is_set()) == (1, True)


async def test_an_engine_that_dies_in_a_commit_does_not_become_ready(bench: Bench) -> None:
    async with bench.supervised():
        await bench.wait(EMPTY)
        bench.engine.may_update.clear()
        commit = asyncio.create_task(bench.commit(4))
        await bench.engine.updating.wait()
        bench.engine.dead.set()
        await bench.wait(EMPTY, restarts=1)
        bench.engine.may_update.set()
        with pytest.raises(UnavailableError, match="died"):
            await commit
        assert bench.worker.status == EMPTY


async def test_a_commit_that_fails_after_its_engine_does_not_end_the_next_one(bench: Bench) -> None:
    async with bench.supervised():
        await bench.wait(EMPTY)
        bench.engine.may_update.clear()
        bench.engine.failing_updates = 1
        commit = asyncio.create_task(bench.commit(4))
        await bench.engine.updating.wait()
        bench.engine.dead.set()
        await bench.wait(EMPTY, restarts=1)
        bench.engine.may_update.set()
        with pytest.raises(InternalError, match="half loaded"):
            await commit
        assert (bench.worker.status, bench.worker.broken.is_set()) == (EMPTY, False)


async def test_a_start_that_fails_is_tried_again(bench: Bench) -> None:
    bench.engine.failing_starts = 2
    async with bench.supervised():
        await bench.wait(EMPTY)
    assert (bench.engine.starts, bench.fatal.empty()) == (3, True)


async def test_a_start_that_hangs_is_given_up(bench: Bench) -> None:
    supervision = bench.worker.config.supervision.model_copy(update={"start_seconds": 0.01})
    bench.worker.config = bench.worker.config.model_copy(update={"supervision": supervision})
    bench.engine.may_start.clear()
    async with bench.supervised(), asyncio.timeout(60):
        error = await bench.fatal.get()
    assert "did not start in 3 attempts: not within 0.01 s" in error.message


async def test_an_engine_that_never_starts_ends_the_service(bench: Bench) -> None:
    bench.engine.failing_starts = 9
    async with bench.supervised(), asyncio.timeout(60):
        error = await bench.fatal.get()
    assert bench.engine.starts == 3
    assert "did not start in 3 attempts: no memory" in error.message


async def test_a_checkpoint_with_a_tensor_missing_never_reaches_the_engine(bench: Bench) -> None:
    del bench.tensors["model.layers.1.mlp.up_proj.weight"]
    async with bench.supervised():
        await bench.wait(EMPTY)
        with pytest.raises(InvalidArgumentError, match=r"up_proj\.weight is missing"):
            await bench.commit(4)
    assert bench.engine.versions == []


def test_admission_counts_and_refuses(bench: Bench) -> None:
    worker = bench.worker
    with worker.admit(6) as admission:
        admission.leave()
        assert worker.running == 5
        with pytest.raises(ResourceExhaustedError), worker.admit(6):
            pass
        with worker.admit(5):
            assert worker.running == 10
    assert worker.running == 0


async def test_a_buffer_that_cannot_be_reached_fails_the_call(bench: Bench) -> None:
    settings = SegmentSettings(pb.Sampling(temperature=1), pb.RepetitionStop(), (1,), 16)
    lease = pb.LeasedTrajectory(trajectory_id="t", epoch=1)
    request = pb.ExtendTrajectoriesRequest(
        run_id="run", policy_version=4, token_budget=8, max_response_tokens=8, trajectories=[lease]
    )
    async with bench.supervised(), BufferClient.connect("127.0.0.1:1") as buffer:
        await bench.wait(EMPTY)
        await bench.commit(4)
        with pytest.raises(UnavailableError, match=r"BufferService at 127\.0\.0\.1:1 cannot be reached"):
            await anext(extend_trajectories(bench.worker, buffer, request, settings))
        assert bench.worker.running == 0
        left = [task.get_coro() for task in asyncio.all_tasks()]
        assert not [each for each in left if each is not None and each.cr_code.co_filename == extend.__file__]


class Loses(BufferClient):
    """A buffer that has trajectories and cannot give an image of theirs."""

    error: PerigeeError

    async def read_trajectories(self, run_id: str, trajectory_ids: Sequence[str], **_: Any) -> Any:
        for name, digests in zip(trajectory_ids, (["0" * 64], []), strict=True):
            prompt = pack_token_ids([5, 9] if digests else [9])
            yield StoredTrajectory(name, prompt, b"", b"", (), END_REASON_UNSPECIFIED, 1, image_digests=digests)

    async def read_images(self, *_: Any, **__: Any) -> AsyncIterator[tuple[str, bytes]]:
        raise self.error
        yield


@pytest.mark.parametrize("error", [NotFoundError("gone"), DataLossError("cut"), AbortedError("deleted")])
async def test_an_image_that_cannot_be_read_fails_its_trajectory_alone(vision_model: Path, error: PerigeeError) -> None:
    config = rollout_config(vision_model, "127.0.0.1:1")
    worker = Worker(config, open_policy(str(vision_model), None), FragileEngine(), "w")
    worker.status, worker.run_id, worker.policy_version = READY, "run", 4
    leases = [pb.LeasedTrajectory(trajectory_id="blind", epoch=1), pb.LeasedTrajectory(trajectory_id="old", epoch=2)]
    request = pb.ExtendTrajectoriesRequest(
        run_id="run", policy_version=4, token_budget=8, max_response_tokens=8, trajectories=leases
    )
    settings = SegmentSettings(pb.Sampling(temperature=1), pb.RepetitionStop(), (1,), 16)
    async with Loses.connect("127.0.0.1:1") as buffer:
        buffer.error = error
        results = [each async for batch in extend_trajectories(worker, buffer, request, settings) for each in batch]
    reasons = {each.trajectory_id: each.reason for each in results if isinstance(each, pb.SegmentFailure)}
    assert reasons == {"blind": error.message, "old": "the trajectory is leased again: epoch 1, not 2"}
    await worker.images.close()


async def test_an_append_that_fails_tells_its_writer_and_the_next_one_is_tried() -> None:
    async with BufferClient.connect("127.0.0.1:1") as buffer:
        writer = ChunkWriter(buffer, "run", flush_seconds=0.01, timeout_seconds=0.5)
        writer.writers = 1
        writing = asyncio.create_task(writer.run())
        for offset in (0, 1):
            chunk = Chunk(trajectory_id="t", epoch=1, offset=offset, token_ids=pack_token_ids([5]))
            with pytest.raises((UnavailableError, DeadlineExceededError)):
                await writer.append(chunk)
        writing.cancel()


async def test_an_answer_that_lacks_outcomes_fails_the_writers() -> None:
    async def append(request: AppendChunksRequest, timeout_s: float) -> AppendChunksResponse:
        return AppendChunksResponse()

    buffer: Any = SimpleNamespace(append_chunks=append)
    writer = ChunkWriter(buffer, "run", flush_seconds=0.01, timeout_seconds=0.5)
    writing = asyncio.create_task(writer.run())
    async with asyncio.timeout(60):
        with pytest.raises(ValueError, match="shorter"):
            await writer.append(Chunk(trajectory_id="t"))
    writing.cancel()


@pytest.mark.parametrize("is_away", [False, True])
async def test_a_worker_that_shuts_down_starts_no_engine(bench: Bench, is_away: bool) -> None:
    """Where it was away, others have the memory."""
    async with bench.supervised():
        await bench.commit(4)
        if is_away:
            await bench.worker.leave(RESIDENCES[pb.RESIDENCE_RESTART])
        bench.worker.set_status(DRAINING)
        bench.engine.dead.set()
        for _ in range(20):
            await asyncio.sleep(0)
        assert (bench.engine.starts, bench.worker.engine_restarts) == (1, 0)


def test_draining_is_final(bench: Bench) -> None:
    bench.worker.set_status(DRAINING)
    bench.worker.set_status(READY, "run", 3)
    assert bench.worker.status == DRAINING
