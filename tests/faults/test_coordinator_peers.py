"""Workers that die, hang or refuse, a trainer that restarts, a reward service that fails: what a run makes of it."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from tokenizers import Tokenizer

from perigee.config import merge
from perigee.coordinator.client import CoordinatorClient
from perigee.coordinator.v1 import coordinator_pb2 as pb
from services.coordinator.__main__ import lifespan
from services.coordinator.config import CoordinatorConfig
from services.kit.hf import open_tokenizer
from services.kit.server import serving
from tests.fixtures.coordinator import write_run_section
from tests.fixtures.coordinator_fakes import FakePeers, FakeWorker, fake_peers, worker_in_service


@dataclass
class Stage:
    """A coordinator with its fake peers, and a run section to start."""

    peers: FakePeers
    client: CoordinatorClient
    stack: AsyncExitStack
    tokenizer: Tokenizer
    section: str
    run_path: Path
    run_id: str

    async def add_worker(self, worker_id: str, **behaviour: Any) -> tuple[FakeWorker, asyncio.Task[None]]:
        worker = self.peers.add_worker(worker_id, self.tokenizer, **behaviour)
        return worker, await self.stack.enter_async_context(worker_in_service(worker, self.client.target))

    async def start(self) -> None:
        request = pb.StartRunRequest(run_id=self.run_id, config_yaml=self.section, run_path=str(self.run_path))
        await self.client.start_run(request)

    async def finish(self) -> list[pb.RunSnapshot]:
        request = pb.WatchRunRequest(run_id=self.run_id)
        return [response.run async for response in self.client.watch_run(request, timeout_s=90)]

    async def reach(self, phase: pb.RunPhase.ValueType) -> None:
        """Waits until the run shows a phase."""
        async with asyncio.timeout(60):
            while (await self.client.get_status(pb.GetStatusRequest())).run.phase != phase:  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run_path / "metrics.jsonl").read_text().splitlines()]


@asynccontextmanager
async def stage(buffer_address: str, folder: Path, settings: dict[str, Any], **run: Any) -> AsyncIterator[Stage]:
    section = write_run_section(folder, **({"rollout": {"token_budget": 9, "max_response_tokens": 24}} | run))
    tokenizer = open_tokenizer(folder / "model", "run.model")
    async with AsyncExitStack() as stack:
        peers = await stack.enter_async_context(fake_peers(buffer_address))
        values = peers.settings()
        merge(values, settings)
        app = await stack.enter_async_context(serving(CoordinatorConfig(**values), lifespan))
        client = await stack.enter_async_context(CoordinatorClient.connect(app.address))
        workers = await stack.enter_async_context(AsyncExitStack())
        yield Stage(peers, client, workers, tokenizer, section, folder / "run", f"run-{uuid.uuid4().hex}")


async def wait_until(condition: Any) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110, the fakes tell nobody
            await asyncio.sleep(0.02)


async def test_a_hanging_worker_that_loses_its_lease_gives_its_work_to_the_other(
    buffer_address: str, tmp_path: Path
) -> None:
    async with stage(buffer_address, tmp_path, {}, iterations=2) as s:
        good, _ = await s.add_worker("good")
        bad, renewing = await s.add_worker("bad", hang=True)
        await s.start()
        await wait_until(lambda: bad.calls)
        renewing.cancel()
        assert (await s.finish())[-1].phase == pb.RUN_PHASE_FINISHED
        # What the lost worker held was leased anew, which fences it.
        lost = {t.trajectory_id: t.epoch for call in bad.calls for t in call.trajectories}
        taken = {t.trajectory_id: t.epoch for call in good.calls for t in call.trajectories if t.trajectory_id in lost}
        assert set(taken) == set(lost)
        assert all(taken[trajectory_id] > epoch for trajectory_id, epoch in lost.items())
        assert [line["iteration"] for line in s.lines()] == [1, 2]


async def test_an_end_that_the_coordinator_did_not_hear_of_is_read_from_the_buffer(
    buffer_address: str, tmp_path: Path
) -> None:
    # Without a budget every segment ends its trajectory, so the one that was cut off cannot be leased again.
    rollout = {"token_budget": 0, "max_response_tokens": 24}
    async with stage(buffer_address, tmp_path, {}, iterations=2, rollout=rollout) as s:
        worker, _ = await s.add_worker("a", cut_after=3)
        await s.start()
        snapshots = await s.finish()
        assert (snapshots[-1].phase, snapshots[-1].error) == (pb.RUN_PHASE_FINISHED, "")
        assert len(worker.extended) == len(set(worker.extended)) == 2 * 64
        scored = [item for item in s.peers.reward.seen if item.startswith("g0")]
        assert sorted(scored) == sorted(worker.extended)
        assert [line["rollout/finished"] for line in s.lines()] == [64, 64]


async def test_failed_segments_are_given_out_again(buffer_address: str, tmp_path: Path) -> None:
    async with stage(buffer_address, tmp_path, {}, iterations=1) as s:
        await s.add_worker("a", failing={"g00000000-0": 2, "g00000003-1": 1})
        await s.start()
        assert (await s.finish())[-1].phase == pb.RUN_PHASE_FINISHED
        assert s.lines()[0]["rollout/failures"] == 3


async def test_a_segment_that_always_fails_ends_the_run_with_its_reason(buffer_address: str, tmp_path: Path) -> None:
    async with stage(buffer_address, tmp_path, {}, iterations=1) as s:
        await s.add_worker("a", failing={"g00000000-0": 100})
        await s.start()
        last = (await s.finish())[-1]
        assert last.phase == pb.RUN_PHASE_FAILED
        assert last.error == "Sequence g00000000-0 failed 5 times, last: told to fail"
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


async def test_a_worker_that_joins_gets_the_weights_and_then_work(buffer_address: str, tmp_path: Path) -> None:
    async with stage(buffer_address, tmp_path, {}, iterations=4) as s:
        first, _ = await s.add_worker("first")
        await s.start()
        await wait_until(lambda: len(s.peers.trainer.trained) >= 1)
        # From here on work for many seconds.
        first.call_seconds = 0.5
        second, _ = await s.add_worker("second")
        await wait_until(lambda: second.extended)
        first.call_seconds = 0.0
        assert (await s.finish())[-1].phase == pb.RUN_PHASE_FINISHED
        assert second.extended
        assert min(call.policy_version for call in second.calls) >= 1


async def test_a_worker_that_refuses_weights_is_left_out_until_it_takes_them(
    buffer_address: str, tmp_path: Path
) -> None:
    async with stage(buffer_address, tmp_path, {}, iterations=4) as s:
        good, _ = await s.add_worker("good")
        bad, _ = await s.add_worker("bad", takes_weights=False)
        await s.start()
        await wait_until(lambda: len(s.peers.trainer.trained) >= 1)
        assert not bad.calls
        # From here on work for many seconds.
        good.call_seconds, bad.takes_weights = 0.5, True
        await wait_until(lambda: bad.extended)
        good.call_seconds = 0.0
        assert (await s.finish())[-1].phase == pb.RUN_PHASE_FINISHED
        assert bad.extended


async def test_an_engine_that_restarts_is_filled_again(buffer_address: str, tmp_path: Path) -> None:
    async with stage(buffer_address, tmp_path, {}, iterations=4) as s:
        worker, _ = await s.add_worker("a", call_seconds=0.02)
        await s.start()
        await wait_until(lambda: len(s.peers.trainer.trained) >= 1)
        pushes = len(s.peers.trainer.pushes)
        worker.ready, worker.version = False, 0
        assert (await s.finish())[-1].phase == pb.RUN_PHASE_FINISHED
        assert len(s.peers.trainer.pushes) > pushes
        assert [line["iteration"] for line in s.lines()] == [1, 2, 3, 4]


async def test_neither_a_dead_engine_nor_a_late_push_holds_up_an_iteration(buffer_address: str, tmp_path: Path) -> None:
    async with stage(buffer_address, tmp_path, {}, iterations=6) as s:
        good, _ = await s.add_worker("good", call_seconds=0.02)
        dead, _ = await s.add_worker("dead")
        await s.start()
        await wait_until(lambda: len(s.peers.trainer.trained) >= 1)
        dead.starting = True
        async with asyncio.timeout(60):
            while all(w.ready for w in (await s.client.get_status(pb.GetStatusRequest())).workers):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        pushes = len(s.peers.trainer.pushes)
        s.peers.trainer.stall_for, good.call_seconds, calls = "late", 0.5, len(good.calls)
        await wait_until(lambda: len(good.calls) > calls + 1)
        late, _ = await s.add_worker("late")
        await wait_until(lambda: not s.peers.trainer.stall_for)
        good.call_seconds = 0.0
        assert (await s.finish())[-1].phase == pb.RUN_PHASE_FINISHED
        assert not any("dead" in targets for _, targets in s.peers.trainer.pushes[pushes:])
        events = [event["event"] for line in s.lines() for event in line["events"]]
        # A push that it refused may be told before.
        assert "dead: its engine died and starts again" in events
        assert any(event.startswith("late joined, at 127.0.0.1:") for event in events)
        # Its first push was still under way when the iteration went on.
        assert late.extended
        assert [line["iteration"] for line in s.lines()] == [1, 2, 3, 4, 5, 6]


async def test_without_workers_a_run_waits_and_then_says_so(buffer_address: str, tmp_path: Path) -> None:
    async with stage(buffer_address, tmp_path, {"dispatch": {"worker_wait_s": 0.8}}) as s:
        await s.start()
        snapshots = await s.finish()
        assert pb.RUN_PHASE_WAITING in {snapshot.phase for snapshot in snapshots}
        assert snapshots[-1].phase == pb.RUN_PHASE_FAILED
        assert snapshots[-1].error.startswith("No rollout worker took the weights for 0.8 s")


async def test_workers_that_all_leave_make_the_run_wait_for_the_next(buffer_address: str, tmp_path: Path) -> None:
    async with stage(buffer_address, tmp_path, {}, iterations=2) as s:
        first, renewing = await s.add_worker("first", hang=True)
        await s.start()
        await wait_until(lambda: first.calls)
        renewing.cancel()
        waiting = asyncio.create_task(s.finish())
        await s.reach(pb.RUN_PHASE_WAITING)
        second, _ = await s.add_worker("second")
        assert (await waiting)[-1].phase == pb.RUN_PHASE_FINISHED
        assert second.extended


async def test_a_trainer_that_restarts_loads_the_committed_version(buffer_address: str, tmp_path: Path) -> None:
    async with stage(buffer_address, tmp_path, {}, iterations=4) as s:
        await s.add_worker("a", call_seconds=0.02)
        await s.start()
        await wait_until(lambda: len(s.peers.trainer.trained) >= 2)
        s.peers.trainer.version = 0
        snapshots = await s.finish()
        assert (snapshots[-1].phase, snapshots[-1].error) == (pb.RUN_PHASE_FINISHED, "")
        assert any(version > 0 for version in s.peers.trainer.loaded)
        assert [line["policy_version"] for line in s.lines()] == [1, 2, 3, 4]


async def test_a_trainer_and_all_workers_that_restart_in_a_rollout_go_on(buffer_address: str, tmp_path: Path) -> None:
    async with stage(buffer_address, tmp_path, {}, iterations=3) as s:
        first, renewing = await s.add_worker("first", call_seconds=0.02)
        await s.start()
        await wait_until(lambda: s.peers.trainer.version >= 1)
        first.hang, calls = True, len(first.calls)
        await wait_until(lambda: len(first.calls) > calls)
        renewing.cancel()
        s.peers.trainer.version = 0
        await s.add_worker("second")
        snapshots = await s.finish()
        assert (snapshots[-1].phase, snapshots[-1].error) == (pb.RUN_PHASE_FINISHED, "")
        assert [line["policy_version"] for line in s.lines()] == [1, 2, 3]


async def test_a_failed_verdict_is_never_a_reward(buffer_address: str, tmp_path: Path) -> None:
    rollout = {"token_budget": 0, "max_response_tokens": 24}
    async with stage(buffer_address, tmp_path, {}, iterations=1, rollout=rollout, drop_uniform_groups=False) as s:
        s.peers.reward.broken = {"g00000000-0", "g00000001-0", "g00000001-1", "g00000001-2"}
        s.peers.reward.refused = {"g00000002-3"}
        s.peers.reward.failing = {"g00000003-0": 3}
        await s.add_worker("a")
        await s.start()
        assert (await s.finish())[-1].phase == pb.RUN_PHASE_FINISHED
        [line] = s.lines()
        assert line["reward/failures"] == 5
        [request] = s.peers.trainer.trained
    members = {group.group_id: [m.trajectory_id for m in group.trajectories] for group in request.groups}
    assert members["g00000000"] == ["g00000000-1", "g00000000-2", "g00000000-3"]
    assert members["g00000002"] == ["g00000002-0", "g00000002-1", "g00000002-2"]
    # One judged member teaches nothing.
    assert "g00000001" not in members
    assert line["train/groups_failed"] == 1
    assert len(members["g00000003"]) == 4


async def test_responses_that_break_their_calls_fail_alone_and_the_run_goes_on(
    buffer_address: str, tmp_path: Path
) -> None:
    rollout = {"token_budget": 0, "max_response_tokens": 24}
    scoring = {"attempts": 2, "call_timeout_s": 0.3, "retry_s": 0.01, "batch": 64}
    async with stage(
        buffer_address, tmp_path, {"scoring": scoring}, iterations=2, rollout=rollout, drop_uniform_groups=False
    ) as s:
        s.peers.reward.poison = {
            "g00000000-0": grpc.StatusCode.INTERNAL,
            "g00000001-1": grpc.StatusCode.DATA_LOSS,
            "g00000002-2": grpc.StatusCode.INVALID_ARGUMENT,
        }
        s.peers.reward.hanging = "g00000003-3"
        await s.add_worker("a")
        await s.start()
        assert (await s.finish())[-1].phase == pb.RUN_PHASE_FINISHED
        assert [line["reward/failures"] for line in s.lines()] == [4, 0]
        request = s.peers.trainer.trained[0]
    members = {group.group_id: {m.trajectory_id[-1] for m in group.trajectories} for group in request.groups}
    for number, missing in enumerate("0123"):
        assert members[f"g0000000{number}"] == set("0123") - {missing}
    assert all(len(found) == 4 for name, found in members.items() if name > "g00000003")


async def test_a_reward_service_that_goes_away_is_waited_for(buffer_address: str, tmp_path: Path) -> None:
    async with stage(buffer_address, tmp_path, {}, iterations=2) as s:
        s.peers.reward.away = True
        await s.add_worker("a")
        await s.start()
        await wait_until(lambda: s.peers.reward.refusals >= 3)
        assert not s.peers.trainer.trained
        s.peers.reward.away = False
        assert (await s.finish())[-1].phase == pb.RUN_PHASE_FINISHED
        assert sum(line["reward/failures"] for line in s.lines()) == 0


async def test_a_reward_service_that_stays_away_ends_the_run(buffer_address: str, tmp_path: Path) -> None:
    async with stage(buffer_address, tmp_path, {"scoring": {"unavailable_s": 0.5}}) as s:
        s.peers.reward.away = True
        await s.add_worker("a")
        await s.start()
        last = (await s.finish())[-1]
        assert last.phase == pb.RUN_PHASE_FAILED
        assert last.error.startswith("Responses could not be scored for 0.5 s: RewardService at 127.0.0.1:")


async def test_a_call_that_breaks_off_gives_no_second_budget(buffer_address: str, tmp_path: Path) -> None:
    rollout = {"token_budget": 2, "max_response_tokens": 24}
    async with stage(buffer_address, tmp_path, {}, iterations=2, rollout=rollout) as s:
        worker, _ = await s.add_worker("a", cut_after=64 + 3)
        await s.start()
        assert (await s.finish())[-1].phase == pb.RUN_PHASE_FINISHED
        # The third segment of iteration 2 was appended and not told; its trajectory is not extended again there.
        first, second = s.lines()[:2]
        assert sum(first[f"rollout/ended/{reason}"] for reason in ("stop", "budget")) == 64
        extended = worker.extended[64:][: second["rollout/ended/stop"] + second["rollout/ended/budget"]]
        assert len(set(extended)) == len(extended)
        assert 0 < second["rollout/tokens"] <= 2 * len(extended)
