"""Whole runs of a real coordinator on the real buffer, with fake workers, trainer and reward service."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from prometheus_client import REGISTRY
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from perigee.buffer.v1 import buffer_pb2
from perigee.coordinator.client import CoordinatorClient
from perigee.coordinator.v1 import coordinator_pb2 as pb
from perigee.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError
from perigee.rollout.v1 import rollout_pb2
from services.coordinator import run_status
from services.coordinator.__main__ import lifespan
from services.coordinator.config import CoordinatorConfig
from services.kit.hf import open_tokenizer
from services.kit.server import serving
from tests.faults.law import Law, look
from tests.fixtures.coordinator import math_line, write_lines, write_run_section
from tests.fixtures.coordinator_fakes import FakePeers, FakeWorker, fake_peers, worker_in_service

PHASES = {"preparation", "rollout", "scoring", "training", "checkpoint", "commit", "weights"}


@asynccontextmanager
async def coordinator(peers: FakePeers, **settings: Any) -> AsyncIterator[CoordinatorClient]:
    config = CoordinatorConfig(**(peers.settings() | settings))
    async with serving(config, lifespan) as app, CoordinatorClient.connect(app.address) as client:
        yield client


async def finish(client: CoordinatorClient, run_id: str) -> list[pb.RunSnapshot]:
    """The snapshots until the run ends."""
    return [response.run async for response in client.watch_run(pb.WatchRunRequest(run_id=run_id), timeout_s=60)]


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def trained_ids(peers: FakePeers) -> Counter[str]:
    return Counter(
        member.trajectory_id
        for request in peers.trainer.trained
        for group in request.groups
        for member in group.trajectories
    )


async def test_a_run_from_sft_to_summary(buffer_address: str, tmp_path: Path) -> None:
    run_id = f"run-{uuid.uuid4().hex}"
    dataset = write_lines(tmp_path / "sft.jsonl", [{"prompt": "1+1=", "response": "2"}])
    stage = {"dataset": str(dataset), "steps": 3, "optimizer": {"learning_rate": 1e-3}}
    section = write_run_section(
        tmp_path,
        sft=[stage, stage],
        evaluation={"every": 2, "samples": 2, "problems": 5, "keep_checkpoints": True},
        rollout={"token_budget": 10, "max_response_tokens": 24},
        optimizer={"learning_rate": 1e-4},
        final_lr_ratio=0.5,
    )
    tokenizer = open_tokenizer(tmp_path / "model", "run.model")
    async with AsyncExitStack() as stack:
        peers = await stack.enter_async_context(fake_peers(buffer_address))
        client = await stack.enter_async_context(coordinator(peers))
        for name in ("a", "b"):
            worker = peers.add_worker(name, tokenizer)
            await stack.enter_async_context(worker_in_service(worker, client.target))
        run_path = tmp_path / "run"
        response = await client.start_run(
            pb.StartRunRequest(run_id=run_id, config_yaml=section, run_path=str(run_path))
        )
        assert not response.resumed
        snapshots = await finish(client, run_id)
        assert snapshots[-1].error == ""
        assert snapshots[-1].phase == pb.RUN_PHASE_FINISHED
        assert {pb.RUN_PHASE_SFT, pb.RUN_PHASE_EVALUATION, pb.RUN_PHASE_ROLLOUT, pb.RUN_PHASE_TRAINING} <= {
            snapshot.phase for snapshot in snapshots
        }
        assert snapshots[-1].metrics["iteration"] == 3

    # Two stages make versions 1 and 2; three iterations 3, 4 and 5, each from the one before.
    assert [request.new_version for request in peers.trainer.fine_tuned] == [1, 2]
    assert [(request.base_version, request.new_version) for request in peers.trainer.trained] == [
        (2, 3),
        (3, 4),
        (4, 5),
    ]
    # The supervised model twice, by its stage and by the baseline's evaluation; then what else was evaluated.
    assert peers.trainer.pinned == [2, 2, 4, 5]
    rates = [request.optimizer.learning_rate for request in peers.trainer.trained]
    assert rates == pytest.approx([1e-4, 0.75e-4, 0.5e-4])
    assert set(trained_ids(peers).values()) == {1}
    assert peers.trainer.exported == [str(run_path / "model")]
    assert all(peers.workers[name].extended for name in ("a", "b"))

    lines = read_json_lines(run_path / "metrics.jsonl")
    assert [line["iteration"] for line in lines] == [1, 2, 3]
    kept = read_json_lines(run_path / "samples.jsonl")
    assert Counter((line["evaluation"], line["iteration"]) for line in kept) == {
        ("baseline", 0): 10,
        ("", 1): 10,
        ("", 2): 10,
        ("periodic", 2): 10,
        ("", 3): 10,
        ("final", 3): 10,
    }
    assert {line["kind"] for line in kept} >= {"right", "wrong"}
    assert all(line["prompt"] and line["response"] and line["policy_versions"] for line in kept)
    for line in lines:
        assert line["reward/groups"] > 0
        assert line["reward/responses"] == 4 * line["reward/groups"]
        assert line["rollout/ended/stop"] + line["rollout/ended/budget"] > 0
        assert line["rollout/finished"] == line["rollout/ended/stop"]
        assert {key.split("/")[1] for key in line if key.endswith("/start")} == PHASES
        assert line["rollout/live_groups"] + line["train/groups"] + line["train/groups_uniform"] == 16
    # The fake trainer's entropy is halved at each iteration.
    assert [line["train/entropy_ratio"] for line in lines] == [1, 0.5, 0.25]
    trained = sum(line["train/trajectories"] for line in lines)
    assert trained == sum(trained_ids(peers).values())
    assert sum(line["train/trajectories_multi_version"] for line in lines) > 0
    # Tokens by version are those of the trained trajectories, the policy of earlier iterations included.
    versions = {key.rpartition("/")[2] for key in lines[-1] if key.startswith("train/tokens_by_version/")}
    assert versions <= {"2", "3", "4"}
    assert len(versions) > 1

    evaluations = read_json_lines(run_path / "evaluations.jsonl")
    assert [(line["kind"], line["iteration"], line["problems"]) for line in evaluations] == [
        ("baseline", 0, 12),
        ("periodic", 2, 5),
        ("final", 3, 12),
    ]
    summary = json.loads((run_path / "summary.json").read_text())
    assert summary["accuracy_baseline"] == evaluations[0]["accuracy"]
    assert set(summary["accuracy_final"]) == {"overall", "math"}
    interval = summary["accuracy_final"]["overall"]["sampled"]
    assert 0 <= interval["low"] <= interval["mean"] <= interval["high"] <= 1
    assert summary["trajectories_trained"] == trained
    assert summary["tokens_generated"] == sum(line["rollout/tokens"] for line in lines)
    assert summary["train_infer_logprob_diff_max"] == pytest.approx(1e-4)
    assert {"sft", "evaluation", "rollout", "training", "weights", "commit", "total"} <= set(summary["seconds"])
    assert json.loads((run_path / "run.json").read_text())["status"] == "finished"
    events = EventAccumulator(str(run_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("reward/mean")] == [1, 2, 3]

    state = (await peers_run_state(buffer_address, run_id)).run
    assert (state.iteration, state.policy_version) == (3, 5)


async def test_the_trainer_gets_rewards_less_the_overlong_penalty(buffer_address: str, tmp_path: Path) -> None:
    run_id = f"run-{uuid.uuid4().hex}"
    section = write_run_section(
        tmp_path,
        iterations=1,
        rollout={"token_budget": 0, "max_response_tokens": 24},
        overlong_penalty={"weight": 0.5, "cap": 12, "buffer": 8},
        drop_uniform_groups=False,
    )
    tokenizer = open_tokenizer(tmp_path / "model", "run.model")
    async with AsyncExitStack() as stack:
        peers = await stack.enter_async_context(fake_peers(buffer_address))
        client = await stack.enter_async_context(coordinator(peers))
        await stack.enter_async_context(worker_in_service(peers.add_worker("a", tokenizer), client.target))
        run_path = tmp_path / "run"
        await client.start_run(pb.StartRunRequest(run_id=run_id, config_yaml=section, run_path=str(run_path)))
        assert (await finish(client, run_id))[-1].error == ""
        rewards = {
            member.trajectory_id: member.reward
            for request in peers.trainer.trained
            for group in request.groups
            for member in group.trajectories
        }
    penalties = {name: 0.5 * min(1.0, max(0, length - 4) / 8) for name, length in peers.trainer.lengths.items()}
    assert {name: reward + penalties[name] for name, reward in rewards.items()} == {
        name: pytest.approx(float(rewards[name] + penalties[name] > 0.5)) for name in rewards
    }
    assert len(set(penalties.values())) > 2
    [line] = read_json_lines(run_path / "metrics.jsonl")
    assert line["rollout/overlong_rate"] == pytest.approx(
        sum(value > 0 for value in penalties.values()) / len(penalties)
    )


async def peers_run_state(buffer_address: str, run_id: str) -> buffer_pb2.GetRunResponse:
    from perigee.buffer.client import BufferClient

    async with BufferClient.connect(buffer_address) as buffer:
        return await buffer.get_run(buffer_pb2.GetRunRequest(run_id=run_id))


async def test_a_trajectory_gets_its_budget_once_an_iteration_and_never_passes_the_cap(
    buffer_address: str, tmp_path: Path
) -> None:
    run_id = f"run-{uuid.uuid4().hex}"
    rollout = {"token_budget": 4, "max_response_tokens": 11, "max_prefill_share": 1}
    section = write_run_section(tmp_path, iterations=5, rollout=rollout)
    tokenizer = open_tokenizer(tmp_path / "model", "run.model")
    # Each token adds more to a deadline than passes before the peer looks at it.
    deadlines = {
        "dispatch": {"worker_wait_s": 60, "call_timeout_s": 1000, "token_timeout_s": 100, "overcommit": 2},
        "train_timeout_s": 1000,
        "train_token_timeout_s": 100,
    }
    async with fake_peers(buffer_address) as peers, coordinator(peers, **deadlines) as client:
        worker = peers.add_worker("a", tokenizer)
        async with worker_in_service(worker, client.target):
            await client.start_run(
                pb.StartRunRequest(run_id=run_id, config_yaml=section, run_path=str(tmp_path / "run"))
            )
            assert (await finish(client, run_id))[-1].phase == pb.RUN_PHASE_FINISHED
    # In the first iteration groups get one, two or three budgets in turn.
    budgets = {leased.token_budget for call in worker.calls for leased in call.trajectories}
    assert budgets == {3, 4, 8, 11}
    assert {call.max_response_tokens for call in worker.calls} == {11}
    prompt = 4  # "3+4=" is as long as all of them
    for call, seconds in zip(worker.calls, worker.seconds, strict=True):
        longest = prompt + max(leased.tokens + leased.token_budget for leased in call.trajectories)
        assert seconds == pytest.approx(1000 + 100 * 2 * longest, rel=0.02)  # gRPC rounds it
    for request, seconds in zip(peers.trainer.trained, peers.trainer.seconds, strict=True):
        trained = [member for group in request.groups for member in group.trajectories]
        tokens = sum(member.prompt_tokens + sum(member.tokens_by_version.values()) for member in trained)
        assert seconds == pytest.approx(1000 + 100 * tokens, rel=0.02)
    # A response of 4 tokens an iteration takes three at most.
    assert max(Counter(worker.extended).values()) == 3
    lines = read_json_lines(tmp_path / "run" / "metrics.jsonl")
    ended = Counter({key: sum(line[key] for line in lines) for key in lines[0] if key.startswith("rollout/ended/")})
    assert ended.total() == len(worker.extended)
    assert max(line["rollout/response_tokens/max"] or 0 for line in lines) == 11
    # Groups of responses as long as three budgets do not end together.
    assert all(line["reward/groups"] for line in lines)
    assert ended["rollout/ended/max_response_tokens"] > 0


async def test_partial_trajectories_stay_with_their_worker_while_its_prefixes_are_valid(
    buffer_address: str, tmp_path: Path
) -> None:
    run_id = f"run-{uuid.uuid4().hex}"
    rollout = {"token_budget": 4, "max_response_tokens": 24, "max_kv_staleness": 1}
    section = write_run_section(tmp_path, iterations=5, rollout=rollout)
    tokenizer = open_tokenizer(tmp_path / "model", "run.model")
    async with AsyncExitStack() as stack:
        peers = await stack.enter_async_context(fake_peers(buffer_address))
        client = await stack.enter_async_context(coordinator(peers))
        for name in ("a", "b"):
            worker = peers.add_worker(name, tokenizer, capacity=64)
            await stack.enter_async_context(worker_in_service(worker, client.target))
        await client.start_run(pb.StartRunRequest(run_id=run_id, config_yaml=section, run_path=str(tmp_path / "run")))
        assert (await finish(client, run_id))[-1].error == ""
    calls = [call for worker in peers.workers.values() for call in worker.calls]
    assert {call.max_kv_staleness for call in calls} == {1}
    lines = read_json_lines(tmp_path / "run" / "metrics.jsonl")
    for line in lines:
        computed = line["rollout/prefilled_tokens"]
        assert line["rollout/prefill_share"] == computed / (computed + line["rollout/tokens"])
        assert line["rollout/prefill_time_share"] == 0.25
    assert sum(line["rollout/decode_seconds"] for line in lines) == 0.75 * len(calls)
    # At least nine tenths of the tokens that were continued, where two thirds are by chance.
    segments = sum(line[key] for line in lines for key in line if key.startswith("rollout/ended/"))
    cached, continued = (sum(line[f"rollout/{key}_tokens"] for line in lines) for key in ("cached", "prefilled"))
    continued += cached - len("1+2=") * segments
    assert 0 < continued * 0.9 <= cached


async def test_groups_that_begin_together_do_not_end_together(buffer_address: str, tmp_path: Path) -> None:
    groups, run_id = 14, f"run-{uuid.uuid4().hex}"
    rollout = {"token_budget": 16, "max_response_tokens": 32}
    changes = {"iterations": 3, "max_live_groups": groups, "group_size": 2, "rollout": rollout}
    section = write_run_section(tmp_path, **changes)

    def respond(trajectory_id: str, prompt: str) -> str:
        """Short responses of the first groups, which end together, then some that no budget is enough for."""
        return "#1" if int(trajectory_id[1:9]) < groups else "1" * 40

    tokenizer = open_tokenizer(tmp_path / "model", "run.model")
    async with fake_peers(buffer_address) as peers, coordinator(peers) as client:
        worker = peers.add_worker("a", tokenizer)
        worker.respond = respond
        async with worker_in_service(worker, client.target):
            await client.start_run(
                pb.StartRunRequest(run_id=run_id, config_yaml=section, run_path=str(tmp_path / "run"))
            )
            assert (await finish(client, run_id))[-1].phase == pb.RUN_PHASE_FINISHED
    completed = [line["reward/groups"] for line in read_json_lines(tmp_path / "run" / "metrics.jsonl")]
    # Iterations without a signal are not counted, up to as many.
    assert completed[0] == groups
    assert completed[1:] == [groups // 2] * (len(completed) - 1)
    assert len(completed) > 3


async def test_bad_requests_name_the_field_and_write_nothing(buffer_address: str, tmp_path: Path) -> None:
    section = write_run_section(tmp_path)
    values = yaml.safe_load(section)
    run_path = tmp_path / "run"
    malformed = write_lines(tmp_path / "malformed.jsonl", [math_line("a", "1+1=", "2"), {"id": "b"}])
    too_long = write_lines(tmp_path / "long.jsonl", [math_line("huge", "1" * 300, "2")])
    cases = [
        (values | {"iteratoins": 3}, "run.iteratoins: unknown key; did you mean iterations?"),
        (values | {"max_live_groups": 0, "group_size": 4}, "run.max_live_groups"),
        (values | {"model": str(tmp_path)}, "run.model"),
        (values | {"prompts": str(malformed)}, "malformed.jsonl:2: verifier"),
        (values | {"heldout": str(too_long)}, "prompt huge"),
        (values | {"algorithm": {"name": "magic"}}, "run.algorithm.name: magic is unknown"),
        (values | {"sft": [{"dataset": "/none", "steps": 1}]}, "run.sft.0.dataset: /none cannot be read"),
    ]
    async with fake_peers(buffer_address) as peers, coordinator(peers) as client:
        for wrong, said in cases:
            request = pb.StartRunRequest(run_id="r", config_yaml=yaml.safe_dump(wrong), run_path=str(run_path))
            with pytest.raises(InvalidArgumentError) as caught:
                await client.start_run(request)
            assert said in caught.value.message
            assert caught.value.violations
        with pytest.raises(InvalidArgumentError) as caught:
            await client.start_run(pb.StartRunRequest(run_id="../r", config_yaml="", run_path="relative"))
        assert [violation.field for violation in caught.value.violations] == ["run_id", "config_yaml", "run_path"]
        with pytest.raises(NotFoundError):
            await client.stop_run(pb.StopRunRequest(run_id="unknown"))
        assert not (await client.get_status(pb.GetStatusRequest())).HasField("run")
    assert not run_path.exists()


async def test_stop_and_go_on(buffer_address: str, tmp_path: Path) -> None:
    run_id = f"run-{uuid.uuid4().hex}"
    section = write_run_section(tmp_path, iterations=4)
    tokenizer = open_tokenizer(tmp_path / "model", "run.model")
    request = pb.StartRunRequest(run_id=run_id, config_yaml=section, run_path=str(tmp_path / "run"))
    async with (
        fake_peers(buffer_address) as peers,
        coordinator(peers) as client,
        worker_in_service(peers.add_worker("a", tokenizer), client.target),
    ):
        is_stopped = False
        # The second training lasts until the run is stopped in it.
        peers.trainer.is_done = lambda version: version == 0 or is_stopped
        await client.start_run(request)
        async for response in client.watch_run(pb.WatchRunRequest(run_id=run_id)):
            if response.run.metrics.get("iteration", 0) >= 1:
                break
        assert (await client.start_run(request)).resumed
        await client.stop_run(pb.StopRunRequest(run_id=run_id))
        assert (await finish(client, run_id))[-1].phase == pb.RUN_PHASE_STOPPED
        is_stopped = True
        other = pb.StartRunRequest(run_id="other", config_yaml=section, run_path=request.run_path)
        with pytest.raises(FailedPreconditionError, match="choose another run_path"):
            await client.start_run(other)
        changed = yaml.safe_dump(yaml.safe_load(section) | {"seed": 7})
        with pytest.raises(FailedPreconditionError, match="another configuration"):
            await client.start_run(pb.StartRunRequest(run_id=run_id, config_yaml=changed, run_path=request.run_path))
        assert (await client.start_run(request)).resumed
        assert (await finish(client, run_id))[-1].phase == pb.RUN_PHASE_FINISHED
    lines = read_json_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["iteration"] for line in lines] == [1, 2, 3, 4]
    committed = {line["iteration"]: n for line in lines if (n := line["train/trajectories"])}
    # What was trained just before the stop may have been rolled back and trained again: the last request counts.
    trained = {r.iteration: sum(len(group.trajectories) for group in r.groups) for r in peers.trainer.trained}
    assert committed == trained


async def test_a_coordinator_that_is_back_goes_on_with_a_run_whose_folder_is_elsewhere(
    buffer_address: str, tmp_path: Path
) -> None:
    run_id, own = f"run-{uuid.uuid4().hex}", str(tmp_path / "own")
    run_path = str(tmp_path / "run")
    async with fake_peers(buffer_address) as peers:
        async with coordinator(peers, run_path=own) as client:
            section = write_run_section(tmp_path)
            await client.start_run(pb.StartRunRequest(run_id=run_id, config_yaml=section, run_path=run_path))
        async with coordinator(peers, run_path=own) as client:
            assert (await client.get_status(pb.GetStatusRequest())).run.run_id == run_id
            await client.stop_run(pb.StopRunRequest(run_id=run_id))
        async with coordinator(peers, run_path=own) as client:
            assert not (await client.get_status(pb.GetStatusRequest())).HasField("run")


async def test_the_time_limit_ends_a_run_after_an_iteration(
    buffer_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = f"run-{uuid.uuid4().hex}"
    section = write_run_section(tmp_path, iterations=10_000, time_limit_s=1.5)
    tokenizer = open_tokenizer(tmp_path / "model", "run.model")
    async with (
        fake_peers(buffer_address) as peers,
        coordinator(peers) as client,
        worker_in_service(peers.add_worker("a", tokenizer), client.target),
    ):
        # Each iteration takes 0.8 s by the run's clock.
        clock = SimpleNamespace(monotonic=lambda: 0.8 * len(peers.trainer.trained))
        monkeypatch.setattr(run_status, "time", clock)
        await client.start_run(pb.StartRunRequest(run_id=run_id, config_yaml=section, run_path=str(tmp_path / "run")))
        assert (await finish(client, run_id))[-1].phase == pb.RUN_PHASE_FINISHED
    lines = read_json_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["time/elapsed_seconds"] for line in lines] == [0.8, 1.6]
    assert lines[-1]["train/learning_rate"] <= lines[0]["train/learning_rate"]


async def test_the_same_weights_are_evaluated_once(buffer_address: str, tmp_path: Path) -> None:
    section = write_run_section(tmp_path, iterations=0, evaluation={"end_problems": 3, "samples": 2})
    tokenizer = open_tokenizer(tmp_path / "model", "run.model")
    async with AsyncExitStack() as stack:
        peers = await stack.enter_async_context(fake_peers(buffer_address))
        client = await stack.enter_async_context(coordinator(peers))
        worker = peers.add_worker("a", tokenizer)
        await stack.enter_async_context(worker_in_service(worker, client.target))
        run_path, run_id = tmp_path / "run", f"run-{uuid.uuid4().hex}"
        await client.start_run(pb.StartRunRequest(run_id=run_id, config_yaml=section, run_path=str(run_path)))
        assert (await finish(client, run_id))[-1].error == ""
    baseline, final = read_json_lines(run_path / "evaluations.jsonl")
    assert (baseline["kind"], final["kind"], baseline["problems"]) == ("baseline", "final", 3)
    assert final == baseline | {"kind": "final", "seconds": 0.0}
    assert baseline["seconds"] > 0


async def test_trainer_and_workers_take_turns_on_shared_devices(buffer_address: str, tmp_path: Path) -> None:
    run_id = f"run-{uuid.uuid4().hex}"
    dataset = write_lines(tmp_path / "sft.jsonl", [{"prompt": "1+1=", "response": "2"}])
    section = write_run_section(
        tmp_path,
        iterations=2,
        sft=[{"dataset": str(dataset), "steps": 3, "optimizer": {"learning_rate": 1e-3}}],
        deployment="hybrid",
        hybrid={"engine": "restart", "workers": ["pod"]},
    )
    tokenizer = open_tokenizer(tmp_path / "model", "run.model")
    async with AsyncExitStack() as stack:
        peers = await stack.enter_async_context(fake_peers(buffer_address))
        # As another run has left it.
        peers.trainer.shares_with, peers.trainer.version, peers.trainer.offloaded = "pod", 3, True
        client = await stack.enter_async_context(coordinator(peers))
        for name in ("pod", "other"):
            worker = peers.add_worker(name, tokenizer)
            await stack.enter_async_context(worker_in_service(worker, client.target))
        while len((await client.get_status(pb.GetStatusRequest())).workers) < 2:  # noqa: ASYNC110 (others register)
            await asyncio.sleep(0.01)
        await client.start_run(pb.StartRunRequest(run_id=run_id, config_yaml=section, run_path=str(tmp_path / "run")))
        snapshots = await finish(client, run_id)
    assert snapshots[-1].phase == pb.RUN_PHASE_FINISHED
    # Before the supervised stage, both iterations and the export.
    assert peers.workers["pod"].left == {1: 2, 2: 2}
    assert not peers.workers["other"].left
    assert peers.trainer.loaded == [0]
    assert peers.trainer.exported
    for line in read_json_lines(tmp_path / "run" / "metrics.jsonl"):
        starts = [line[f"time/{phase}/start"] for phase in ("leave", "onload", "training", "convert", "offload")]
        assert starts == sorted(starts)
        assert line["time/offload/start"] < line["time/weights/start"]


async def test_seconds_of_phases_count_once_in_an_iteration_that_trains_nothing(
    buffer_address: str, tmp_path: Path
) -> None:
    run_id, run_path = f"run-{uuid.uuid4().hex}", tmp_path / "run"
    section = write_run_section(tmp_path, iterations=1, deployment="hybrid", hybrid={"workers": ["pod"]})
    tokenizer = open_tokenizer(tmp_path / "model", "run.model")
    run_path.mkdir()
    # Without it the trainer would leave for the evaluation, before the first iteration.
    baseline = {"kind": "baseline", "iteration": 0, "policy_version": 9, "problems": 1, "samples": 1}
    write_lines(run_path / "evaluations.jsonl", [baseline | {"accuracy": {"overall": {}}}])
    async with AsyncExitStack() as stack:
        peers = await stack.enter_async_context(fake_peers(buffer_address))
        peers.trainer.convert_seconds = 0.1
        client = await stack.enter_async_context(coordinator(peers))
        worker = peers.add_worker("other", tokenizer, respond=lambda *_: "#0")
        await stack.enter_async_context(worker_in_service(worker, client.target))
        await client.start_run(pb.StartRunRequest(run_id=run_id, config_yaml=section, run_path=str(run_path)))
        assert (await finish(client, run_id))[-1].phase == pb.RUN_PHASE_FINISHED
    assert not peers.trainer.trained
    lines = read_json_lines(run_path / "metrics.jsonl")
    seconds = json.loads((run_path / "summary.json").read_text())["seconds"]
    for phase in ("convert", "offload", "rollout"):
        of_lines = sum(line.get(f"time/{phase}/seconds", 0.0) for line in lines)
        assert seconds[phase] == pytest.approx(of_lines, abs=0.01), phase


@dataclass
class StayingWorker(FakeWorker):
    """Answers one call while the trainer has its turn; others that come then wait for the next weights."""

    coordinator: CoordinatorClient | None = None
    # Calls while the trainer had its turn, and segments that ended then, by version.
    ahead: Counter[int] = field(default_factory=Counter)
    ended: Counter[int] = field(default_factory=Counter)

    async def _read(self, request: rollout_pb2.ExtendTrajectoriesRequest) -> dict[str, tuple[str, list[int]]]:
        assert self.coordinator is not None
        version = request.policy_version
        if "ahead" in (await self.coordinator.get_status(pb.GetStatusRequest())).run.phases:
            self.ahead[version] += 1
            while self.ahead[version] > 1 and self.version == version:  # noqa: ASYNC110, weights tell nobody
                await asyncio.sleep(0.01)
        return await super()._read(request)

    async def _extend(self, request: rollout_pb2.ExtendTrajectoriesRequest, *rest: Any) -> rollout_pb2.SegmentEnd:
        end = await super()._extend(request, *rest)
        self.ended[request.policy_version] += self.ahead[request.policy_version] > 0
        return end


@dataclass
class Ended:
    """A run that has ended, and what it trained in each iteration that it has committed."""

    lines: list[dict[str, Any]]
    trained: dict[int, list[str]]
    prompts: list[bytes]
    calls_ahead: Counter[int]
    evaluations: list[int]


async def run_on_shared_devices(buffer_address: str, folder: Path, ahead: bool, stall_in: str = "") -> Ended:
    """Runs with a worker that leaves and one that stays; the coordinator is replaced where the trainer stalls."""
    section = write_run_section(
        folder,
        iterations=4,
        drop_uniform_groups=False,
        evaluation={"every": 2, "samples": 1, "problems": 2, "end_problems": 2},
        rollout={"token_budget": 4, "max_response_tokens": 24, "during_training": ahead},
        update={"max_staleness": 1},
        deployment="hybrid",
        hybrid={"engine": "restart", "workers": ["pod"]},
    )
    tokenizer = open_tokenizer(folder / "model", "run.model")
    run_id, run_path = f"run-{uuid.uuid4().hex}", folder / "run"
    async with fake_peers(buffer_address) as peers:
        trainer, pod = peers.trainer, peers.add_worker("pod", tokenizer)
        stays = StayingWorker("stays", peers.buffer, tokenizer)
        peers.workers["stays"], trainer.shares_with = stays, "pod"
        # The last iteration has none after it.
        trainer.is_done = lambda version: (
            not ahead or version == 3 or (stays.ahead[version] > 1 and stays.ended[version] > 0)
        )
        request = pb.StartRunRequest(run_id=run_id, config_yaml=section, run_path=str(run_path))
        for stall in (stall_in, "") if stall_in else ("",):
            trainer.stall_in = stall
            async with AsyncExitStack() as stack:
                stays.coordinator = client = await stack.enter_async_context(coordinator(peers, run_path=str(run_path)))
                for worker in (pod, stays):
                    await stack.enter_async_context(worker_in_service(worker, client.target))
                while len((await client.get_status(pb.GetStatusRequest())).workers) < 2:  # noqa: ASYNC110 (others register)
                    await asyncio.sleep(0.01)
                await client.start_run(request)
                if stall:
                    await asyncio.wait_for(trainer.stalled.wait(), timeout=60)
                    # The push begins together with the commit.
                    committed_by_then = 1 if stall == "PushWeights" else 0
                    while (await peers_run_state(buffer_address, run_id)).run.iteration < committed_by_then:  # noqa: ASYNC110
                        await asyncio.sleep(0.01)
                else:
                    assert (await finish(client, run_id))[-1].error == ""
        Law(run_path / "metrics.jsonl").check(await look(peers.buffer, run_id))
    committed = {request.iteration: request for request in trainer.trained}
    trained = {
        number: [member.trajectory_id for group in request.groups for member in group.trajectories]
        for number, request in committed.items()
    }
    return Ended(
        read_json_lines(run_path / "metrics.jsonl"),
        trained,
        [trainer.prompts[name] for names in trained.values() for name in names],
        stays.ahead,
        [line["iteration"] for line in read_json_lines(run_path / "evaluations.jsonl")],
    )


async def test_workers_that_stay_generate_while_the_trainer_trains(buffer_address: str, tmp_path: Path) -> None:
    def worker_failures() -> float | None:
        return REGISTRY.get_sample_value("perigee_coordinator_failures_total", {"kind": "worker_call"})

    failures = worker_failures()
    plain = await run_on_shared_devices(buffer_address, tmp_path / "plain", ahead=False)
    ahead = await run_on_shared_devices(buffer_address, tmp_path / "ahead", ahead=True)
    # Nobody was given work that had left, was about to, or had other weights.
    assert worker_failures() == failures
    cut, cut_later = [
        await run_on_shared_devices(buffer_address, tmp_path / stall_in, ahead=True, stall_in=stall_in)
        for stall_in in ("SaveCheckpoint", "PushWeights")
    ]

    assert not plain.calls_ahead
    assert not any(line["rollout/ahead_tokens"] or "time/ahead/start" in line for line in plain.lines)
    same = ("rollout/tokens", "rollout/finished", "rollout/ended/budget", "reward/groups", "rollout/live_groups")
    for run in (ahead, cut, cut_later):
        # Each iteration trains the same responses of the same prompts in the same order: nobody had a second budget.
        assert run.trained == plain.trained
        assert run.prompts == plain.prompts
        for key in same:
            assert [line[key] for line in run.lines] == [line[key] for line in plain.lines], key
        assert run.evaluations == [0, 2, 4]
        assert all(line["rollout/ahead_tokens"] > 0 for line in run.lines[1:])
        assert run.lines[0]["rollout/ahead_tokens"] == 0
        # What follows the commit of an iteration is in its line unless the coordinator died meanwhile.
        for line in run.lines[run is cut_later : -1]:
            ended = line["time/ahead/start"] + line["time/ahead/seconds"]
            assert line["time/ahead/start"] <= line["time/leave/start"]
            assert line["time/weights/start"] < ended
        assert "time/ahead/start" not in run.lines[-1]
    assert {*ahead.calls_ahead} == {0, 1, 2}


async def test_a_run_on_separate_devices_generates_ahead_where_it_is_asked_to(
    buffer_address: str, tmp_path: Path
) -> None:
    rollout = {"token_budget": 4, "max_response_tokens": 24, "during_training": True}
    section = write_run_section(tmp_path, iterations=3, drop_uniform_groups=False, rollout=rollout)
    tokenizer = open_tokenizer(tmp_path / "model", "run.model")
    run_id, run_path = f"run-{uuid.uuid4().hex}", tmp_path / "run"
    async with fake_peers(buffer_address) as peers, coordinator(peers) as client:
        worker, trainer = peers.add_worker("a", tokenizer), peers.trainer
        # Until the worker has extended something more often than iterations have begun; the last one has none after it.
        trainer.is_done = lambda version: version == 2 or max(Counter(worker.extended).values()) > version + 1
        async with worker_in_service(worker, client.target):
            await client.start_run(pb.StartRunRequest(run_id=run_id, config_yaml=section, run_path=str(run_path)))
            assert (await finish(client, run_id))[-1].error == ""
        Law(run_path / "metrics.jsonl").check(await look(peers.buffer, run_id))
    first, *others = read_json_lines(run_path / "metrics.jsonl")
    assert first["rollout/ahead_tokens"] == 0
    assert all(line["rollout/ahead_tokens"] > 0 for line in others)
