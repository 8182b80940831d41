"""Long trajectories in files: moved, read, deleted, and what a front that was killed in between leaves."""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from pydantic import SecretStr
from redis.asyncio import Redis

from perigee.buffer.client import BufferClient, StoredTrajectory, join_pieces
from perigee.buffer.packing import pack_logprobs, pack_token_ids
from perigee.buffer.v1 import buffer_pb2 as pb
from perigee.errors import AbortedError, DataLossError, FailedPreconditionError, NotFoundError, ResourceExhaustedError
from services.buffer import model
from services.buffer.config import BufferConfig, LocalServerConfig, OffloadConfig
from services.buffer.files import BEGIN_MOVE, FINISH_MOVE, READ_TOKENS, Mover, TokenFile, folder_of
from services.buffer.local_server import local_server
from services.buffer.nodes import Nodes
from services.buffer.scripts import Script, ScriptRunner
from services.buffer.service import _follow_redis, lifespan
from services.kit.server import serving
from services.kit.storage import StagedFile, delete_file, list_files

MIN_TOKENS = 8
EXPERT_BYTES = 3
numbers = itertools.count()


@dataclass
class Store:
    """A Redis, a buffer before it without a mover of its own, and what a mover needs."""

    url: str
    client: BufferClient
    redis: Redis
    scripts: ScriptRunner
    offload: OffloadConfig

    @property
    def mover(self) -> Mover:
        """A front's mover that begins anew."""
        return Mover(self.scripts, self.offload)

    def folder(self, run_id: str) -> Path:
        """The run's folder."""
        return Path(folder_of(str(self.offload.location), run_id))

    def files(self, run_id: str) -> list[str]:
        """Names in the run's folder."""
        folder = self.folder(run_id)
        return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def store(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Store]:
    folder = tmp_path_factory.mktemp("files")
    offload = OffloadConfig(
        location=str(folder / "files"), min_tokens=MIN_TOKENS, retired_s=0, abandoned_s=1, sweep_s=1e6
    )
    async with local_server(folder / "data", LocalServerConfig()) as url:
        nodes = Nodes(url, connections=8, timeout_s=30)
        scripts = ScriptRunner(nodes, durability="segments", durability_timeout_s=10)
        config = BufferConfig(redis_url=SecretStr(url), offload=offload, read_piece_tokens=5)
        # Its own mover is busy with nothing: a test makes the moves.
        async with serving(config, lifespan) as app, BufferClient.connect(app.address) as client:
            yield Store(url, client, nodes.first, scripts, offload)
        await nodes.close()


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fronts whose movers wait, so that a test stops a move where it wants."""
    monkeypatch.setattr(Mover, "note", lambda mover, run_id: None)


async def begin_run(store: Store, ids: Sequence[str]) -> str:
    """A run with a group of leased trajectories."""
    run_id = f"files/{next(numbers)} ü"
    await store.client.create_run(pb.CreateRunRequest(run_id=run_id, config_digest="d"))
    group = pb.NewGroup(group_id="g", prompt_id="p", prompt_token_ids=pack_token_ids([1, 2]), trajectory_ids=ids)
    await store.client.create_groups(pb.CreateGroupsRequest(run_id=run_id, groups=[group]))
    await store.client.lease_trajectories(pb.LeaseTrajectoriesRequest(run_id=run_id, worker_id="w", trajectory_ids=ids))
    return run_id


def last_chunk(trajectory_id: str, tokens: int, end: pb.EndReason.ValueType = pb.END_REASON_STOP) -> pb.Chunk:
    """All tokens of a trajectory in one chunk that ends it."""
    return pb.Chunk(
        trajectory_id=trajectory_id,
        epoch=1,
        token_ids=pack_token_ids(range(100, 100 + tokens)),
        logprobs=pack_logprobs(-number / 64 for number in range(tokens)),
        experts=bytes(number % 251 for number in range(EXPERT_BYTES * tokens)),
        versions=[pb.VersionSpan(policy_version=3, tokens=2), pb.VersionSpan(policy_version=4, tokens=tokens - 2)],
        end_reason=end,
    )


async def append(store: Store, run_id: str, *chunks: pb.Chunk) -> list[int]:
    return list((await store.client.append_chunks(pb.AppendChunksRequest(run_id=run_id, chunks=chunks))).outcomes)


async def read(store: Store, run_id: str, *ids: str) -> list[StoredTrajectory]:
    found = store.client.read_trajectories(run_id, ids, with_logprobs=True, with_experts=True)
    return [each async for each in found]


async def keys_of(store: Store, run_id: str, trajectory_id: str) -> int:
    """How many of the strings of a trajectory's tokens are in Redis."""
    prefix = f"perigee:{{{run_id}}}"
    return int(
        await store.redis.exists(*(f"{prefix}:{kind}:{trajectory_id}" for kind in ("tokens", "logprobs", "experts")))
    )


async def commit(store: Store, run_id: str) -> None:
    """Consumes the group."""
    await store.client.commit_iteration(pb.CommitIterationRequest(run_id=run_id, iteration=1, consumed_group_ids=["g"]))


async def test_long_finished_trajectories_move_and_are_read_as_before(store: Store, idle: None) -> None:
    ids = ["long", "at limit", "short", "under way"]
    run_id = await begin_run(store, ids)
    chunks = [
        last_chunk("long", 23),
        last_chunk("at limit", MIN_TOKENS, pb.END_REASON_MAX_RESPONSE_TOKENS),
        last_chunk("short", MIN_TOKENS - 1),
        last_chunk("under way", 23, pb.END_REASON_UNSPECIFIED),
    ]
    assert await append(store, run_id, *chunks) == [pb.APPEND_OUTCOME_APPENDED] * 4
    before = await read(store, run_id, *ids)
    await store.mover.move_all(run_id)
    assert [await keys_of(store, run_id, each) for each in ids] == [0, 0, 3, 3]
    assert len(store.files(run_id)) == 2
    assert await read(store, run_id, *ids) == before
    assert before[0].tokens == 23
    assert len(before[0].experts) == 23 * EXPERT_BYTES
    # A front may send again what it got no answer for; other tokens of another lease are refused as ever.
    assert await append(store, run_id, chunks[0]) == [pb.APPEND_OUTCOME_DUPLICATE]
    later = last_chunk("long", 24)
    assert await append(store, run_id, later) == [pb.APPEND_OUTCOME_CONFLICT]
    await store.mover.sweep(run_id, with_unknown=True)
    assert await read(store, run_id, *ids) == before
    await commit(store, run_id)
    await store.mover.sweep(run_id, with_unknown=True)
    assert store.files(run_id) == []
    with pytest.raises(NotFoundError):
        await read(store, run_id, "long")


@pytest.mark.parametrize("seed", range(6))
async def test_segments_move_one_after_the_other(store: Store, idle: None, seed: int) -> None:
    """Random segments in random chunks, moved, read and sent again at any time, are read as they were written."""
    chosen = random.Random(seed)
    run_id, epoch, whole = await begin_run(store, ["t"]), 1, last_chunk("t", 200)
    tokens = moved = 0
    with_experts = chosen.random() < 0.7

    def chunk_of(first: int, stop: int, end: pb.EndReason.ValueType = pb.END_REASON_UNSPECIFIED) -> pb.Chunk:
        return pb.Chunk(
            trajectory_id="t",
            epoch=epoch,
            offset=first,
            token_ids=whole.token_ids[first * 4 : stop * 4],
            logprobs=whole.logprobs[first * 4 : stop * 4],
            experts=whole.experts[first * EXPERT_BYTES : stop * EXPERT_BYTES] if with_experts else b"",
            versions=[pb.VersionSpan(policy_version=7, tokens=stop - first)],
            end_reason=end,
        )

    while tokens < 150:
        ends = chosen.random() < 0.4
        first, tokens = tokens, tokens + chosen.randrange(1, 12)
        sent = chunk_of(first, tokens, pb.END_REASON_BUDGET if ends else pb.END_REASON_UNSPECIFIED)
        assert await append(store, run_id, sent) == [pb.APPEND_OUTCOME_APPENDED]
        if chosen.random() < 0.5:
            await store.mover.move_all(run_id)
        again = chosen.randrange(tokens)
        assert await append(store, run_id, chunk_of(again, tokens)) == [pb.APPEND_OUTCOME_DUPLICATE]
        if ends:
            lease = pb.LeaseTrajectoriesRequest(run_id=run_id, worker_id="w", trajectory_ids=["t"])
            [leased] = (await store.client.lease_trajectories(lease)).leases
            epoch, moved = leased.epoch, tokens
        if chosen.random() < 0.2:
            await store.mover.move_all(run_id)
        [found] = await read(store, run_id, "t")
        assert found.token_ids == whole.token_ids[: tokens * 4]
        assert found.logprobs == whole.logprobs[: tokens * 4]
        assert found.experts == (whole.experts[: tokens * EXPERT_BYTES] if with_experts else b"")
    await store.mover.move_all(run_id)
    held = await store.redis.strlen(f"perigee:{{{run_id}}}:tokens:t")
    assert held < (MIN_TOKENS + tokens - moved) * 4
    files = store.files(run_id)
    assert len(files) > 1
    wrong = chunk_of(0, tokens)
    wrong.token_ids = wrong.token_ids[:-4] + pack_token_ids([9])
    if held:
        assert await append(store, run_id, wrong) == [pb.APPEND_OUTCOME_CONFLICT]
    await store.mover.sweep(run_id, with_unknown=True)
    assert store.files(run_id) == files
    await commit(store, run_id)
    await store.mover.sweep(run_id, with_unknown=True)
    assert store.files(run_id) == []


async def check_a_front_alone(data_path: Path, offload: OffloadConfig) -> None:
    """A front moves a finished trajectory, reads it, and deletes its file after the commit, by itself."""
    config = BufferConfig(data_path=data_path, offload=offload, read_piece_tokens=5)
    async with (
        serving(config, lifespan) as app,
        BufferClient.connect(app.address) as client,
        Redis(unix_socket_path=str(data_path / "valkey.sock")) as redis,
    ):
        store = Store("", client, redis, None, offload)  # type: ignore[arg-type]
        run_id = await begin_run(store, ["t"])
        chunk = last_chunk("t", 23)
        await append(store, run_id, chunk)
        async with asyncio.timeout(60):
            while await keys_of(store, run_id, "t"):  # noqa: ASYNC110 (what a service does sets no event here)
                await asyncio.sleep(0.02)
        [found] = await read(store, run_id, "t")
        assert (found.token_ids, found.logprobs, found.experts) == (chunk.token_ids, chunk.logprobs, chunk.experts)
        await commit(store, run_id)
        folder = folder_of(str(offload.location), run_id)
        async with asyncio.timeout(60):
            while await asyncio.to_thread(list_files, folder, "tests"):  # noqa: ASYNC110
                await asyncio.sleep(0.02)


async def test_a_front_moves_by_itself(tmp_path: Path) -> None:
    offload = OffloadConfig(location=str(tmp_path / "files"), min_tokens=MIN_TOKENS, retired_s=0)
    await check_a_front_alone(tmp_path / "data", offload)


@pytest.mark.parametrize("which", ["mover", "watch"])
async def test_work_ends_in_a_moment_in_which_its_client_of_redis_loses_cancellations(
    store: Store, idle: None, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    """asyncio.wait_for of Python 3.11, by which the client writes, returns when the write is done, though cancelled."""
    is_work = contextvars.ContextVar("is_work", default=False)
    drain = asyncio.StreamWriter.drain

    async def drain_and_end_the_work(writer: asyncio.StreamWriter) -> None:
        await drain(writer)
        if is_work.get() and not task.cancelling():
            task.cancel()

    class Service:
        def set_ready(self, *_: object) -> None:
            pass

    async def work() -> None:
        is_work.set(True)
        if which == "mover":
            await store.mover.run()
        else:
            await _follow_redis(Service(), store.scripts)  # type: ignore[arg-type]

    monkeypatch.setattr(asyncio.StreamWriter, "drain", drain_and_end_the_work)
    task = asyncio.create_task(work())
    done, _ = await asyncio.wait([task], timeout=30)
    task.cancel()
    assert done == {task}


@pytest.mark.parametrize("stage", ["name", "half a file", "file", "reference"])
async def test_a_front_killed_in_a_move_loses_nothing_and_leaves_nothing(store: Store, idle: None, stage: str) -> None:
    run_id = await begin_run(store, ["t"])
    await append(store, run_id, last_chunk("t", 23))
    before = await read(store, run_id, "t")
    # What it has done until then.
    await store.scripts.run(BEGIN_MOVE, run_id, "killed", 1)
    path = f"{folder_of(str(store.offload.location), run_id)}/killed"
    if stage != "name":
        file = StagedFile(path, "f")
        [found] = before
        file.write(found.token_ids + found.logprobs + found.experts)
        file._file.flush()
        if stage != "half a file":
            file.publish()
    if stage == "reference":
        assert (await store.scripts.run(FINISH_MOVE, run_id, "killed", "t", 0, 23, MIN_TOKENS))[1] == 1
    assert len(store.files(run_id)) == (stage != "name")
    assert await read(store, run_id, "t") == before
    # Another front takes the move over when its time is over.
    async with asyncio.timeout(60):
        while await keys_of(store, run_id, "t"):
            await store.mover.move_all(run_id)
            assert await read(store, run_id, "t") == before
    await store.mover.sweep(run_id, with_unknown=True)
    assert await read(store, run_id, "t") == before
    assert len(store.files(run_id)) == 1
    # The one that was slow and not dead has no say any more.
    assert (await store.scripts.run(FINISH_MOVE, run_id, "killed", "t", 0, 23, MIN_TOKENS))[1] == 0
    assert await read(store, run_id, "t") == before


async def test_a_location_that_cannot_be_written_is_named_and_the_tokens_stay(store: Store, idle: None) -> None:
    run_id = await begin_run(store, ["t"])
    await append(store, run_id, last_chunk("t", 23))
    broken = Mover(store.scripts, OffloadConfig(location="/dev/null/files", min_tokens=MIN_TOKENS))
    with pytest.raises(ResourceExhaustedError, match=r"buffer\.offload\.location: .*cannot be read or written"):
        await broken.move_all(run_id)
    [found] = await read(store, run_id, "t")
    assert found.tokens == 23
    # Nobody waits until that move is taken for abandoned.
    await store.mover.move_all(run_id)
    assert await keys_of(store, run_id, "t") == 0


async def test_a_full_redis_is_emptied(store: Store, idle: None) -> None:
    """What moves trajectories out of it, and consumes them, needs no room."""
    run_id = await begin_run(store, ["t"])
    await append(store, run_id, last_chunk("t", 23))
    await store.redis.config_set("maxmemory", 1)
    try:
        await store.mover.move_all(run_id)
        assert await keys_of(store, run_id, "t") == 0
        await commit(store, run_id)
        await store.mover.sweep(run_id)
        assert store.files(run_id) == []
    finally:
        await store.redis.config_set("maxmemory", 0)


async def test_a_run_that_is_gone_is_left(store: Store, idle: None) -> None:
    assert await store.mover._try("deleted", with_unknown=True)


async def test_files_that_redis_does_not_know_go_after_a_while(store: Store, idle: None) -> None:
    run_id = await begin_run(store, ["t"])
    file = StagedFile(str(store.folder(run_id) / "made after the snapshot"), "f")
    file.publish()
    file.discard()
    await store.mover.sweep(run_id, with_unknown=True)
    assert store.files(run_id) == ["made after the snapshot"]
    async with asyncio.timeout(60):
        while store.files(run_id):
            await store.mover.sweep(run_id)


async def test_a_trajectory_moved_while_it_is_read_is_read_on(
    store: Store, idle: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "BYTES_PER_CALL", 1)
    run_id = await begin_run(store, ["t", "u"])
    await append(store, run_id, last_chunk("t", 23), last_chunk("u", 23))
    before = await read(store, run_id, "t", "u")
    request = pb.ReadTrajectoriesRequest(
        run_id=run_id, trajectory_ids=["t", "u"], with_logprobs=True, with_experts=True
    )
    pieces = model.read_trajectories(store.scripts, request, 5, store.offload)
    found = [await anext(pieces)]
    await store.mover.move_all(run_id)
    found += [await anext(pieces) for _ in range(6)]
    assert join_pieces("t", found[:5], with_logprobs=True) == before[0]
    await commit(store, run_id)
    await store.mover.sweep(run_id)
    with pytest.raises(AbortedError, match="consumed while it was read"):
        [_ async for _ in pieces]


async def test_trajectories_moved_one_after_the_other_while_they_are_read_are_read(
    store: Store, idle: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = ["t", "u", "v"]
    run_id = await begin_run(store, ids)
    await append(store, run_id, *(last_chunk(each, 23) for each in ids))
    before = await read(store, run_id, *ids)
    run, unmoved = store.scripts.run, list(ids)

    async def move_one_and_run(script: Script, run_id: str, *arguments: Any, **options: Any) -> list[Any]:
        if script is READ_TOKENS and unmoved and unmoved[0] in arguments:
            with monkeypatch.context() as moving:
                moving.setattr(store.scripts, "run", run)
                _, trajectory_id, *_ = await run(BEGIN_MOVE, run_id, name := unmoved.pop(0), 60)
                await store.mover._move(run_id, trajectory_id.decode(), TokenFile(name, 0, 23), EXPERT_BYTES)
        return await run(script, run_id, *arguments, **options)

    request = pb.ReadTrajectoriesRequest(run_id=run_id, trajectory_ids=ids)
    with monkeypatch.context() as patched:
        patched.setattr(store.scripts, "run", move_one_and_run)
        pieces = [piece async for piece in model.read_trajectories(store.scripts, request, 32, store.offload)]
    assert [piece.token_ids for piece in pieces] == [each.token_ids for each in before]
    assert len(store.files(run_id)) == 3


async def test_a_group_consumed_in_the_middle_of_a_move_ends_it(store: Store, idle: None) -> None:
    run_id = await begin_run(store, ["t"])
    await append(store, run_id, last_chunk("t", 23))
    mover = store.mover
    await store.scripts.run(BEGIN_MOVE, run_id, "late", 1)
    await commit(store, run_id)
    with pytest.raises(AbortedError, match="consumed, or moved"):
        await mover._move(run_id, "t", TokenFile("late", 0, 23), EXPERT_BYTES)
    assert store.files(run_id) == []
    assert (await store.scripts.run(FINISH_MOVE, run_id, "late", "t", 0, 23, MIN_TOKENS))[1] == 0


def cut(path: Path) -> None:
    """Drops the last byte of a file."""
    path.write_bytes(path.read_bytes()[:-1])


async def test_a_file_that_is_gone_is_named(store: Store, idle: None) -> None:
    run_id = await begin_run(store, ["t"])
    await append(store, run_id, last_chunk("t", 23))
    await store.mover.move_all(run_id)
    [name] = store.files(run_id)
    cut(store.folder(run_id) / name)
    with pytest.raises(DataLossError, match=f"{name} is too short"):
        await read(store, run_id, "t")
    delete_file(str(store.folder(run_id) / name), "f")
    with pytest.raises(DataLossError, match=f"{name} does not exist"):
        await read(store, run_id, "t")
    without = BufferConfig(redis_url=SecretStr(store.url))
    async with serving(without, lifespan) as app, BufferClient.connect(app.address) as client:
        with pytest.raises(FailedPreconditionError, match=r"buffer\.offload\.location"):
            [_ async for _ in client.read_trajectories(run_id, ["t"])]
