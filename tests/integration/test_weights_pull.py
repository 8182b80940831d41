"""Pulls over Mooncake: from ranks that own the pieces, through receivers that relay them, past sources that fail."""

from __future__ import annotations

import asyncio
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import torch

from perigee.errors import InvalidArgumentError, NotFoundError, ResourceExhaustedError, UnavailableError
from perigee.weights.client import WeightReceiverClient, WeightSourceClient
from perigee.weights.v1 import weights_pb2 as pb
from services.weights import lend
from services.weights.config import WeightsConfig
from services.weights.pieces import Rectangle
from services.weights.pull import ImagePull, Unit
from services.weights.receive import BufferPool
from services.weights.shared_memory import SharedBuffer
from tests.fixtures.weights import LocalReceiver, equal, local_receiver, local_source, make_tensors

CONFIG = WeightsConfig(block_bytes=1 << 16, progress_timeout_s=2)


@pytest.fixture
def afar(tmp_path: Path) -> WeightsConfig:
    """That of a machine from which nobody's shared memory is seen."""
    return CONFIG.model_copy(update={"shared_memory_dir": str(tmp_path)})


async def pull(receiver: LocalReceiver, image_id: str, *sources: str) -> pb.PullResponse:
    """Has a receiver pull an image."""
    async with WeightReceiverClient.connect(receiver.address) as client:
        return await client.pull(pb.PullRequest(image_id=image_id, sources=sources), timeout_s=60)


@pytest.mark.parametrize("is_afar", [True, False], ids=["sent", "copied"])
async def test_slices_of_several_ranks_arrive_bit_for_bit_and_versions_follow_one_another(
    afar: WeightsConfig, is_afar: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    transfers: list[Unit] = []
    transfer = ImagePull._transfer
    monkeypatch.setattr(ImagePull, "_transfer", lambda *args: (transfers.append(args[-1]), transfer(*args)))
    async with local_source(CONFIG, ranks=2) as source, local_receiver(afar if is_afar else CONFIG) as receiver:
        for version in (1, 2, 3):
            tensors = make_tensors(version, 2)
            manifest = source.publish(f"image-{version}", tensors, version)
            response = await pull(receiver, f"image-{version}", source.address)
            assert (response.policy_version, list(response.sources)) == (version, [source.address])
            assert {piece.owner for piece in manifest.pieces} == {0, 1}
            assert equal(receiver.loaded, tensors)
            # The pull is over, so nothing keeps the source from filling its memory again.
            await asyncio.wait_for(source.source.withdraw(f"image-{version}"), 60)
        assert receiver.versions == [1, 2, 3]
        # What lies in the memory of this machine is not sent.
        assert bool(transfers) == is_afar
        again = await pull(receiver, "image-3", "127.0.0.1:1")
        assert again.policy_version == 3
        assert receiver.versions == [1, 2, 3]
        with pytest.raises(InvalidArgumentError) as nameless:
            await pull(receiver, "")
        assert [violation.field for violation in nameless.value.violations] == ["image_id", "sources"]
        # An engine that started again, or is away, gets what is still in memory, which is lent on.
        receiver.is_loaded = False
        assert list((await pull(receiver, "image-3", "127.0.0.1:1")).sources) == []
        assert receiver.versions == [1, 2, 3, 3]
        assert equal(receiver.loaded, tensors)
        async with WeightSourceClient.connect(receiver.address) as client:
            assert (await anext(client.lend(pb.LendRequest(image_id="image-3")))).manifest.policy_version == 3
        # The weights of an engine that has left its memory need not stay, nor does the spare.
        receiver.is_away = True
        source.publish("image-4", tensors, 4)
        assert (await pull(receiver, "image-4", source.address)).policy_version == 4
        files = await asyncio.to_thread(lambda: [*Path(afar.shared_memory_dir).iterdir()])
        assert len(files) == int(is_afar)


async def test_a_chain_passes_pieces_on_and_a_late_worker_needs_no_trainer(tmp_path: Path) -> None:
    tensors = make_tensors(1, 2)
    async with AsyncExitStack() as stack, local_source(CONFIG) as source:
        folders = [await asyncio.to_thread(tempfile.mkdtemp, dir=tmp_path) for _ in range(3)]
        configs = [CONFIG.model_copy(update={"shared_memory_dir": folder}) for folder in folders]
        receivers = [await stack.enter_async_context(local_receiver(config)) for config in configs]
        source.publish("image", tensors, 1)
        first, second, late = receivers
        responses = await asyncio.gather(
            pull(first, "image", source.address), pull(second, "image", first.address, source.address)
        )
        assert [list(response.sources) for response in responses] == [[source.address], [first.address]]
        await source.source.withdraw("image")
        await pull(late, "image", second.address, source.address)
        assert all(equal(receiver.loaded, tensors) for receiver in receivers)


async def test_what_a_lost_source_has_not_given_comes_from_the_next(afar: WeightsConfig) -> None:
    tensors = make_tensors(1, 4)
    async with local_source(CONFIG) as source, local_receiver(afar) as receiver:
        source.publish("image", tensors, 1)
        async with local_source(CONFIG) as other:
            # The same pieces, of which the second half is announced and cannot be read.
            manifest = other.publish("image", tensors, 1)
            lent = other.source._images["image"]
            half = len(manifest.pieces) // 2
            [holding] = lent._holdings
            broken = pb.Holding(session="127.0.0.1:9", holder_id="gone")
            broken.pieces.extend(holding.pieces[half:])
            broken.addresses.extend(holding.addresses[half:])
            del holding.pieces[half:], holding.addresses[half:]
            lent.announce(broken)
            response = await pull(receiver, "image", "127.0.0.1:1", other.address, source.address)
        assert list(response.sources) == [other.address, source.address]
        assert equal(receiver.loaded, tensors)


async def test_a_host_pulls_what_its_processes_take_and_two_make_up_the_whole() -> None:
    """Two hosts of a tensor-parallel engine: half of what is divided, all of the rest. Other readers want it whole."""
    tensors = make_tensors(1, 2)
    embedding, layer = tensors["model.embed_tokens.weight"], tensors["model.layers.0.weight"]
    rows, columns = len(embedding) // 2, layer.shape[1] // 2
    shares: list[dict[str, list[Rectangle]]] = [
        {name: [((0,) * tensor.ndim, tuple(tensor.shape))] for name, tensor in tensors.items()}
        | {"model.embed_tokens.weight": [((host * rows, 0), ((host + 1) * rows, 1024))]}
        | {"model.layers.0.weight": [((0, host * columns), (len(layer), (host + 1) * columns))]}
        for host in range(2)
    ]
    async with AsyncExitStack() as stack, local_source(CONFIG, ranks=2) as source:
        hosts = [await stack.enter_async_context(local_receiver(CONFIG, wanted=share)) for share in shares]
        whole, lost = [await stack.enter_async_context(local_receiver(CONFIG)) for _ in range(2)]
        source.publish("image", tensors, 1)
        for host, receiver in enumerate(hosts):
            response = await pull(receiver, "image", source.address)
            half = (embedding.nbytes + layer.nbytes) // 2
            assert half < response.bytes < half + 4 * 64
            found = receiver.loaded
            assert torch.equal(found["model.embed_tokens.weight"].chunk(2)[host], embedding.chunk(2)[host])
            assert torch.equal(found["model.layers.0.weight"].chunk(2, 1)[host], layer.chunk(2, 1)[host])
        addresses = [receiver.address for receiver in hosts]
        assert list((await pull(whole, "image", *addresses)).sources) == addresses
        assert equal(whole.loaded, tensors)
        with pytest.raises(UnavailableError, match="does not have every piece"):
            await pull(lost, "image", addresses[0])


async def test_a_damaged_piece_is_not_committed() -> None:
    async with local_source(CONFIG) as source, local_receiver(CONFIG) as receiver:
        source.publish("good", make_tensors(1, 1), 1)
        await pull(receiver, "good", source.address)
        await source.source.withdraw("good")
        manifest = source.publish("damaged", make_tensors(2, 1), 2)
        manifest.pieces[-1].checksum = bytes(16)
        with pytest.raises(UnavailableError, match="arrived damaged"):
            await pull(receiver, "damaged", source.address)
        assert receiver.versions == [1]
        # The worker still serves, and lends, the version that it has.
        async with WeightSourceClient.connect(receiver.address) as client:
            first = await anext(client.lend(pb.LendRequest(image_id="good")))
            assert first.manifest.policy_version == 1


async def test_a_source_keeps_an_image_until_every_reader_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lend, "APPEARANCE_S", 0.1)
    async with local_source(CONFIG) as source, WeightSourceClient.connect(source.address) as client:
        source.publish("image", make_tensors(1, 0.1), 1)
        reading = client.lend(pb.LendRequest(image_id="image"))
        await anext(reading)
        # A caller who leaves takes nothing from the next one.
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(source.source.withdraw("image"), 0.05)
        withdrawing = asyncio.create_task(source.source.withdraw("image"))
        await asyncio.wait([withdrawing], timeout=0.05)
        assert not withdrawing.done()
        with pytest.raises(NotFoundError, match="publish the weights again"):
            async for _ in client.lend(pb.LendRequest(image_id="image")):
                pass
        assert not withdrawing.done()
        await reading.aclose()  # type: ignore[attr-defined]
        await asyncio.wait_for(withdrawing, 60)


async def test_the_next_host_learns_of_an_image_before_there_is_room_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    may_take = asyncio.Event()
    take = BufferPool.take

    async def take_late(pool: BufferPool, size: int, **options: bool) -> SharedBuffer:
        await may_take.wait()
        if (refusals := pool.__dict__.setdefault("refusals", [1])) and refusals.pop():
            raise ResourceExhaustedError("no memory")
        return await take(pool, size, **options)

    monkeypatch.setattr(BufferPool, "take", take_late)
    async with local_source(CONFIG) as source, local_receiver(CONFIG) as receiver:
        source.publish("image", make_tensors(1, 0.1), 1)
        pulling = asyncio.create_task(pull(receiver, "image", source.address))
        async with WeightSourceClient.connect(receiver.address) as client:
            responses = client.lend(pb.LendRequest(image_id="image"))
            while not (await anext(responses)).HasField("manifest"):
                pass
            may_take.set()
            # There is none, and none will come.
            with pytest.raises(UnavailableError, match="not whole here"):
                async for _ in responses:
                    pass
        with pytest.raises(ResourceExhaustedError):
            await pulling
        assert (await pull(receiver, "image", source.address)).policy_version == 1
