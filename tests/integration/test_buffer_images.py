"""Images in the buffer: against a plain model of the contract, and the ways in which a call may end."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import pytest
import pytest_asyncio
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from perigee.buffer.client import BufferClient
from perigee.buffer.images import PIECE_BYTES, cut_images, digest_of
from perigee.buffer.packing import pack_token_ids
from perigee.buffer.v1 import buffer_pb2 as pb
from perigee.errors import (
    DataLossError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    PerigeeError,
    ResourceExhaustedError,
)
from services.buffer.config import BufferConfig, ImagesConfig, LocalServerConfig
from services.buffer.local_server import local_server
from services.buffer.service import lifespan
from services.kit.server import serving

MAX_BYTES = 30
PIECE = 5
# Two of them fit.
FILES = [bytes(range(start, start + size)) for start, size in ((0, 10), (50, 12), (100, 14))]
DIGESTS = [digest_of(data) for data in FILES]
numbers = itertools.count()


@dataclass
class Stores:
    """Two buffers on one Valkey server, and a client of that server."""

    clients: Sequence[BufferClient]
    redis: Redis


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def stores(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stores]:
    """The buffers, which have room for 30 bytes of images a run."""
    async with (
        local_server(tmp_path_factory.mktemp("images"), LocalServerConfig()) as url,
        Redis.from_url(url) as redis,
    ):
        config = BufferConfig(redis_url=url, images=ImagesConfig(max_bytes=MAX_BYTES, unreferenced_s=3600))
        async with (
            serving(config, lifespan) as first,
            serving(config, lifespan) as second,
            BufferClient.connect(first.address) as one,
            BufferClient.connect(second.address) as two,
        ):
            yield Stores((one, two), redis)


def new_group(name: str, digests: Sequence[str]) -> pb.NewGroup:
    prompt = pack_token_ids([5] * len(digests) + [1])
    return pb.NewGroup(
        group_id=name, prompt_id="p", prompt_token_ids=prompt, trajectory_ids=[f"{name}.0"], image_digests=digests
    )


async def create(client: BufferClient, run_id: str, name: str, digests: Sequence[str]) -> None:
    await client.create_groups(pb.CreateGroupsRequest(run_id=run_id, groups=[new_group(name, digests)]))


async def start_run(client: BufferClient) -> str:
    run_id = f"images-{next(numbers)}"
    await client.create_run(pb.CreateRunRequest(run_id=run_id, config_digest="d"))
    return run_id


async def put(client: BufferClient, run_id: str, *pieces: pb.ImagePiece) -> list[str]:
    """The digests that one call says are whole."""
    request = pb.PutImagesRequest(run_id=run_id, pieces=pieces)
    return list((await client._unary(client._stub.PutImages, request, 60.0)).whole)


async def read(client: BufferClient, run_id: str, *digests: str) -> list[bytes]:
    return [data async for _, data in client.read_images(run_id, digests)]


@dataclass
class ModelImage:
    """What is here of an image, and why it is kept."""

    bytes: int
    data: bytes = b""
    whole: bool = False
    promised: bool = True


@dataclass
class Model:
    """The contract: images by number, and the numbers of the images that live groups name."""

    images: dict[int, ModelImage] = field(default_factory=dict)
    groups: dict[str, list[int]] = field(default_factory=dict)

    def sweep(self) -> None:
        named = {number for group in self.groups.values() for number in group}
        self.images = {n: image for n, image in self.images.items() if image.promised or n in named}

    def put(self, number: int, offset: int, content: bytes, image_bytes: int) -> str:
        """The outcome of one piece."""
        if offset and not content:
            return "InvalidArgumentError"
        if len(content) == image_bytes and digest_of(content) != DIGESTS[number]:
            return "InvalidArgumentError"
        self.sweep()
        held = self.images.get(number)
        if held and held.whole:
            if held.bytes != image_bytes:
                return "InvalidArgumentError"
            held.promised = True
            return "whole"
        if len(content) == image_bytes:
            if self.taken(but=number) + image_bytes > MAX_BYTES:
                return "ResourceExhaustedError"
            self.images[number] = ModelImage(image_bytes, content, whole=True)
            return "whole"
        if held and held.bytes != image_bytes:
            return "InvalidArgumentError"
        if not content and not held:
            return "partial"
        return self.put_piece(number, offset, content, image_bytes)

    def put_piece(self, number: int, offset: int, content: bytes, image_bytes: int) -> str:
        held = self.images.get(number)
        data = held.data if held else b""
        if offset > len(data):
            return "FailedPreconditionError"
        common = data[offset : offset + len(content)]
        if common != content[: len(common)]:
            del self.images[number]
            return "DataLossError"
        if not held:
            if self.taken() + image_bytes > MAX_BYTES:
                return "ResourceExhaustedError"
            held = self.images[number] = ModelImage(image_bytes)
        held.data += content[len(common) :]
        held.promised = True
        if len(held.data) < image_bytes:
            return "partial"
        if held.data != FILES[number]:
            del self.images[number]
            return "DataLossError"
        held.whole = True
        return "whole"

    def create(self, name: str, wanted: list[int]) -> str:
        if name in self.groups:
            return "created"
        if not all(number in self.images and self.images[number].whole for number in wanted):
            return "FailedPreconditionError"
        self.groups[name] = wanted
        for number in wanted:
            self.images[number].promised = False
        return "created"

    def taken(self, but: int = -1) -> int:
        return sum(image.bytes for number, image in self.images.items() if number != but)


pieces = st.tuples(
    st.just("put"),
    st.integers(0, 1),
    st.integers(0, 2),
    # A file in one piece, its pieces from a place that may leave a gap, or none; damaged now and then.
    st.sampled_from(["all", "ask", 0, 0, 1, 1, 2, 2]),
    st.sampled_from(["", "", "", "", "content", "size"]),
)
groups = st.tuples(st.just("create"), st.integers(0, 1), st.integers(0, 3), st.lists(st.integers(0, 2), max_size=3))
commits = st.tuples(st.just("commit"), st.integers(0, 1), st.lists(st.integers(0, 3), unique=True))
steps = st.lists(
    st.one_of(pieces, pieces, pieces, groups, groups, commits, st.tuples(st.just("wait"))), min_size=10, max_size=30
)


def make_piece(number: int, part: str | int, oddity: str) -> tuple[int, bytes, int]:
    """Offset, content and whole size of a piece."""
    data = FILES[number]
    size = len(data) + (oddity == "size")
    if part == "ask":
        return 0, b"", size
    offset, stop = (0, len(data)) if part == "all" else (int(part) * PIECE, int(part) * PIECE + PIECE)
    content = data[offset:stop]
    return offset, content[:-1] + b"?" if oddity == "content" and content else content, size


async def outcome_of(call: asyncio.Future[object] | object) -> str:
    """The class of the error that a call ends with, or "" without one."""
    try:
        await call  # type: ignore[misc]
    except PerigeeError as error:
        return type(error).__name__
    return ""


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=steps)
async def test_buffer_keeps_images_as_the_model_does(stores: Stores, steps: Sequence[tuple]) -> None:  # type: ignore[type-arg]
    run_id = await start_run(stores.clients[0])
    prefix = f"perigee:{{{run_id}}}:"
    model, consumed, iteration = Model(), set[str](), 0
    for step in steps:
        client = stores.clients[step[1]] if len(step) > 1 else stores.clients[0]
        if step[0] == "put":
            number, (offset, content, size) = step[2], make_piece(*step[2:])
            expected = model.put(number, offset, content, size)
            event(f"put: {expected}")
            piece = pb.ImagePiece(digest=DIGESTS[number], image_bytes=size, offset=offset, content=content)
            assert await put_outcome(client, run_id, piece) == expected
        elif step[0] == "create":
            name = f"g{step[2]}-{len(consumed)}"
            expected = model.create(name, step[3])
            event(f"create: {expected}")
            call = create(client, run_id, name, [DIGESTS[number] for number in step[3]])
            assert (await outcome_of(call) or "created") == expected
        elif step[0] == "commit":
            chosen = [name for index, name in enumerate(list(model.groups)) if index in step[2]]
            iteration += 1
            await client.commit_iteration(
                pb.CommitIterationRequest(run_id=run_id, iteration=iteration, consumed_group_ids=chosen)
            )
            for name in chosen:
                del model.groups[name]
                consumed.add(name)
            model.sweep()
        else:
            for digest in await stores.redis.zrange(prefix + "unreferenced", 0, -1):
                await stores.redis.zadd(prefix + "unreferenced", {digest: 0})
            for image in model.images.values():
                image.promised = False
    await check_store(stores, run_id, model)


async def put_outcome(client: BufferClient, run_id: str, piece: pb.ImagePiece) -> str:
    """What became of one piece."""
    try:
        whole = await put(client, run_id, piece)
    except PerigeeError as error:
        return type(error).__name__
    assert whole in ([], [piece.digest])
    return "whole" if whole else "partial"


async def check_store(stores: Stores, run_id: str, model: Model) -> None:
    """The bytes that are counted and kept, and the images that can be read, are those of the model."""
    prefix = f"perigee:{{{run_id}}}:"
    counted = int(await stores.redis.hget(prefix + "run", "image_bytes") or 0)
    keys = {key.decode().rpartition(":")[2] for key in await stores.redis.keys(prefix + "image:*")}
    assert counted == model.taken()
    assert keys == {DIGESTS[number] for number, image in model.images.items() if image.data}
    for number, digest in enumerate(DIGESTS):
        held = model.images.get(number)
        if held and held.whole:
            assert await read(stores.clients[0], run_id, digest) == [FILES[number]]
        else:
            with pytest.raises(NotFoundError, match=digest):
                await read(stores.clients[1], run_id, digest)


async def test_a_large_image_from_two_writers_at_once_is_stored_once(buffer_client: BufferClient) -> None:
    run_id = await start_run(buffer_client)
    images = {digest_of(data): data for data in (bytes([value]) * (5 * PIECE_BYTES // 2) for value in range(3))}
    images |= {digest_of(data): data for data in (b"small", b"smaller")}
    await asyncio.gather(*(buffer_client.put_images(run_id, images) for _ in range(2)))
    digests = [*images, next(iter(images))]
    assert await read(buffer_client, run_id, *digests) == [images[digest] for digest in digests]
    request = pb.ReadImagesRequest(run_id=run_id, digests=digests)
    pages = [page async for page in buffer_client._stream(buffer_client._stub.ReadImages, request, 60.0)]
    assert max(page.ByteSize() for page in pages) < PIECE_BYTES + 4096
    # What is whole is not sent again.
    assert await put(
        buffer_client, run_id, *(pb.ImagePiece(digest=each, image_bytes=len(images[each])) for each in images)
    )


async def test_damaged_pieces_are_dropped_and_the_image_can_be_sent_again(buffer_client: BufferClient) -> None:
    run_id = await start_run(buffer_client)
    data = bytes(3 * PIECE_BYTES)
    digest = digest_of(data)
    first, second = [piece for pieces in cut_images({digest: data}) for piece in pieces][:2]
    *_, damaged = [piece for pieces in cut_images({digest: data[:-1] + b"?"}) for piece in pieces]
    assert await put(buffer_client, run_id, first, second) == []
    with pytest.raises(
        DataLossError, match=f"image {digest}: the pieces make a file whose SHA-256 is .*: send it again"
    ):
        await put(buffer_client, run_id, damaged)
    with pytest.raises(NotFoundError, match=f"image {digest} does not exist"):
        await read(buffer_client, run_id, digest)
    with pytest.raises(
        FailedPreconditionError, match="at offset 1048576 came where offset 0 was due: send the pieces in"
    ):
        await put(buffer_client, run_id, second)
    await buffer_client.put_images(run_id, {digest: data})
    assert await read(buffer_client, run_id, digest) == [data]


async def test_a_client_that_finds_its_pieces_gone_begins_again(buffer_client: BufferClient) -> None:
    run_id = await start_run(buffer_client)
    data = bytes(4 * PIECE_BYTES)
    digest = digest_of(data)
    # Another writer's damaged first piece is there: the first attempt meets it, drops it, and is made again.
    other = pb.ImagePiece(digest=digest, image_bytes=len(data), content=b"other")
    assert await put(buffer_client, run_id, other) == []
    await buffer_client.put_images(run_id, {digest: data})
    assert await read(buffer_client, run_id, digest) == [data]


async def test_images_live_as_long_as_groups_that_name_them(stores: Stores) -> None:
    client = stores.clients[0]
    run_id = await start_run(client)
    one, two, three = DIGESTS
    with pytest.raises(
        FailedPreconditionError, match=f"image {one} of group 'a' is not in run '{run_id}': put it first"
    ):
        await create(client, run_id, "a", [one])
    await client.put_images(run_id, dict(zip((one, two), FILES, strict=False)))
    with pytest.raises(
        ResourceExhaustedError, match=r"no room for an image of 14 bytes.* take 22 of 30: raise buffer\.i"
    ):
        await client.put_images(run_id, {three: FILES[2]})
    await create(client, run_id, "a", [one, two, one])
    await create(client, run_id, "b", [two])
    [stored] = [each async for each in client.read_trajectories(run_id, ["a.0"])]
    assert stored.image_digests == (one, two, one)
    groups = [new_group("c", [one]), new_group("d", [three])]
    with pytest.raises(FailedPreconditionError, match=f"image {three} of group 'd'"):
        await client.create_groups(pb.CreateGroupsRequest(run_id=run_id, groups=groups))
    await client.commit_iteration(pb.CommitIterationRequest(run_id=run_id, iteration=1, consumed_group_ids=["a"]))
    with pytest.raises(NotFoundError, match=one):
        await read(client, run_id, two, one)
    assert await read(client, run_id, two) == [FILES[1]]
    # An image put for a group that is still to come outlives the last group that is there.
    await client.put_images(run_id, {two: FILES[1]})
    await client.commit_iteration(pb.CommitIterationRequest(run_id=run_id, iteration=2, consumed_group_ids=["b"]))
    await create(client, run_id, "e", [two])
    await client.commit_iteration(pb.CommitIterationRequest(run_id=run_id, iteration=3, consumed_group_ids=["e"]))
    left = {key.decode().rpartition(":")[2] for key in await stores.redis.keys(f"perigee:{{{run_id}}}:*")}
    assert left == {"run", "consumed"}
    assert await stores.redis.hget(f"perigee:{{{run_id}}}:run", "image_bytes") == b"0"


async def test_wrong_images_are_named(buffer_client: BufferClient) -> None:
    run_id = await start_run(buffer_client)
    with pytest.raises(InvalidArgumentError, match=rf"pieces\[0\]\.digest: is not that of the content.* {DIGESTS[1]}"):
        await buffer_client.put_images(run_id, {DIGESTS[0]: FILES[1]})
    with pytest.raises(NotFoundError, match="run 'none' does not exist"):
        await buffer_client.put_images("none", {DIGESTS[0]: FILES[0]})
    with pytest.raises(NotFoundError, match="run 'none' does not exist"):
        await read(buffer_client, "none", DIGESTS[0])
