"""Pushes over real Mooncake TCP to receivers behind real gRPC servers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import pytest_asyncio
import torch
import xxhash

from perigee.errors import AbortedError, DataLossError, FailedPreconditionError, InvalidArgumentError
from perigee.weights.client import WeightReceiverClient
from perigee.weights.v1 import weights_pb2 as pb
from services.weights.config import WeightsConfig
from services.weights.manifest import WeightImage
from services.weights.pieces import PieceStore
from services.weights.send import EndpointPool, WeightSender, start_write
from services.weights.transport import MooncakeTransport
from tests.fixtures.weights import equal, local_receiver, make_tensors, push_target

CONFIG = WeightsConfig(transfer_timeout_s=20, progress_timeout_s=2)
ENDPOINTS = EndpointPool(lambda: MooncakeTransport(CONFIG))
Export = Callable[..., WeightImage]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def sender() -> AsyncIterator[WeightSender]:
    """A sender for all pushes: each engine that it opens takes a second to close."""
    sender = WeightSender(CONFIG)
    yield sender
    await sender.close()


async def test_three_receivers_get_the_same_bits(export: Export, sender: WeightSender) -> None:
    tensors = make_tensors(seed=1, megabytes=6)
    image = export(tensors, policy_version=3)
    assert len(image.manifest.shards) > 2
    async with AsyncExitStack() as stack:
        receivers = [await stack.enter_async_context(local_receiver(CONFIG)) for _ in range(3)]
        outcomes = await sender.push(image, [push_target(f"w{i}", r.address) for i, r in enumerate(receivers)])
        assert [(o.worker_id, o.committed, o.reason) for o in outcomes] == [(f"w{i}", True, "") for i in range(3)]
        assert all(o.transfer_seconds > 0 and o.commit_seconds > 0 for o in outcomes)
        for receiver in receivers:
            assert equal(receiver.loaded, tensors)
            assert receiver.receiver.current is not None
            assert receiver.receiver.current.manifest.policy_version == 3


async def test_versions_of_changing_size_follow_each_other(export: Export, sender: WeightSender) -> None:
    async with local_receiver(CONFIG) as local:
        for version, megabytes in enumerate([1, 1, 4, 2, 0.1, 6]):
            tensors = make_tensors(seed=version, megabytes=megabytes)
            image = export(tensors, version)
            [outcome] = await sender.push(image, [push_target("w", local.address)])
            image.close()
            assert outcome.committed, outcome.reason
            assert equal(local.loaded, tensors)
        assert local.versions == [0, 1, 2, 3, 4, 5]
        assert local.receiver.current is not None
        address, tensors, local.is_away = local.receiver.current.buffer.address, make_tensors(6, 6), True
        [outcome] = await sender.push(export(tensors, 6), [push_target("w", local.address)])
        assert outcome.committed, outcome.reason
        # The weights of an engine that has left its memory need not stay.
        assert local.receiver.current.buffer.address == address
        assert equal(local.loaded, tensors)


async def test_a_damaged_shard_is_refused_and_the_old_version_serves_on(export: Export, sender: WeightSender) -> None:
    good, bad = make_tensors(seed=1, megabytes=1), make_tensors(seed=2, megabytes=1)
    async with local_receiver(CONFIG) as local:
        await sender.push(export(good, 1), [push_target("w", local.address)])
        damaged = export(bad, 2)
        with damaged.buffer.view() as view:
            view[damaged.manifest.shards[1].offset + damaged.manifest.shards[1].bytes // 2] ^= 1
        [outcome] = await sender.push(damaged, [push_target("w", local.address)])
        assert not outcome.committed
        assert damaged.manifest.shards[1].name in outcome.reason
        assert local.versions == [1]
        assert equal(local.loaded, good)
        [outcome] = await sender.push(export(bad, 3), [push_target("w", local.address)])
        assert outcome.committed
        assert equal(local.loaded, bad)


async def test_damage_is_data_loss_on_the_wire(export: Export) -> None:
    image = export(make_tensors(seed=1, megabytes=1), 1)
    async with local_receiver(CONFIG) as local, WeightReceiverClient.connect(local.address) as client:
        manifest = image.manifest
        prepared = await client.prepare(pb.PrepareRequest(manifest=manifest))
        with pytest.raises(DataLossError, match=image.manifest.shards[0].name):  # nothing was written
            await client.commit(pb.CommitRequest(transfer_id=prepared.transfer_id))


async def test_an_engine_that_refuses_keeps_the_old_version(export: Export, sender: WeightSender) -> None:
    def refuse_two(image: WeightImage) -> None:
        if image.manifest.policy_version == 2:
            raise DataLossError("the engine refused the weights")

    async with local_receiver(CONFIG, refuse_two) as local:
        target = push_target("w", local.address)
        [first] = await sender.push(export(make_tensors(1, 1), 1), [target])
        [second] = await sender.push(export(make_tensors(2, 1), 2), [target])
        assert (first.committed, second.committed) == (True, False)
        assert "the engine refused the weights" in second.reason
        assert local.receiver.current is not None
        assert local.receiver.current.manifest.policy_version == 1
        assert equal(local.loaded, make_tensors(1, 1))


async def test_a_newer_preparation_voids_the_older(export: Export) -> None:
    older, newer = export(make_tensors(1, 1), 1), export(make_tensors(2, 1), 2)
    async with local_receiver(CONFIG) as local, WeightReceiverClient.connect(local.address) as client:
        first = await client.prepare(pb.PrepareRequest(manifest=older.manifest))
        second = await client.prepare(pb.PrepareRequest(manifest=newer.manifest))
        # The older sender writes late; its buffer is not the newer one's.
        assert first.address != second.address
        for image, prepared in ((newer, second), (older, first)):
            await start_write(ENDPOINTS, image.buffer, image.manifest.total_bytes, prepared)
        with pytest.raises(AbortedError, match="newer push"):
            await client.commit(pb.CommitRequest(transfer_id=first.transfer_id))
        await client.commit(pb.CommitRequest(transfer_id=second.transfer_id))
        assert local.versions == [2]
        assert equal(local.loaded, make_tensors(2, 1))


async def test_a_commit_asked_twice_happens_once(export: Export) -> None:
    image = export(make_tensors(1, 1), 1)
    manifest = image.manifest
    async with local_receiver(CONFIG) as local, WeightReceiverClient.connect(local.address) as client:
        prepared = await client.prepare(pb.PrepareRequest(manifest=manifest))
        await start_write(ENDPOINTS, image.buffer, image.manifest.total_bytes, prepared)
        commit = pb.CommitRequest(transfer_id=prepared.transfer_id)
        first, second = await asyncio.gather(client.commit(commit), client.commit(commit))
        assert first == second == await client.commit(commit)
        assert local.versions == [1]


async def test_bad_manifests_name_their_fields(export: Export) -> None:
    image = export(make_tensors(1, 1), 1)
    small = WeightsConfig(max_image_bytes=1000)
    async with local_receiver(small) as local, WeightReceiverClient.connect(local.address) as client:
        with pytest.raises(InvalidArgumentError, match="max_image_bytes 1000") as too_large:
            await client.prepare(pb.PrepareRequest(manifest=image.manifest))
        assert [v.field for v in too_large.value.violations] == ["manifest.total_bytes"]
        shard = pb.Shard(name="a", offset=0, bytes=999, checksum=xxhash.xxh3_128_hexdigest(b""))
        broken = pb.Manifest(run_id="r", total_bytes=10, shards=[shard, pb.Shard(offset=5, checksum="no")])
        with pytest.raises(InvalidArgumentError) as violations:
            await client.prepare(pb.PrepareRequest(manifest=broken))
        assert {v.field for v in violations.value.violations} == {
            "manifest.shards[0].bytes",
            "manifest.shards[1].name",
            "manifest.shards[1].offset",
            "manifest.shards[1].bytes",
            "manifest.shards[1].checksum",
        }


async def test_an_image_closed_during_its_push_stays_until_the_write_has_ended(
    export: Export, sender: WeightSender
) -> None:
    tensors = {"w": torch.arange(16 << 20, dtype=torch.int32)}
    image = export(tensors, 1)
    async with local_receiver(CONFIG) as local:
        push = asyncio.create_task(sender.push(image, [push_target("w", local.address)]))
        await asyncio.sleep(0)  # the push begins
        image.close()
        assert not image.path.exists()
        [outcome] = await push
        assert outcome.committed, outcome.reason
        assert equal(local.loaded, tensors)


@pytest.mark.skipif([*Path("/sys/class/infiniband").glob("*")] != [], reason="needs a machine without an RDMA card")
async def test_rdma_without_a_card_fails_instead_of_falling_back_to_tcp() -> None:
    config = WeightsConfig(transport="rdma")
    for start in (lambda: MooncakeTransport(config), PieceStore(config).open):
        with pytest.raises(FailedPreconditionError, match=r"weights\.transport: Mooncake cannot start rdma"):
            start()
    # The receiver of pushes and pulls opens its own when the worker starts.
    with pytest.raises(FailedPreconditionError, match="cannot start rdma"):
        async with local_receiver(config):
            pass
