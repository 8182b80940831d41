"""Images and manifests: what is packed comes out again, and what is wrong is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load

from perigee.errors import DataLossError, FailedPreconditionError, InvalidArgumentError, ResourceExhaustedError
from perigee.weights.v1 import weights_pb2 as pb
from services.weights.manifest import check_manifest, export_image, verify_shards
from services.weights.safetensors import ALIGNMENT, DTYPE_NAMES
from services.weights.shared_memory import SharedBuffer
from tests.fixtures.weights import equal, make_tensors, read_image

shapes = st.lists(st.integers(0, 5), max_size=3)
named_shapes = st.dictionaries(
    st.text(min_size=1, max_size=8), st.tuples(shapes, st.sampled_from(list(DTYPE_NAMES))), min_size=1
)


@settings(max_examples=60, deadline=None)
@given(specs=named_shapes, max_shard_bytes=st.integers(1, 400), data=st.data())
def test_any_tensors_come_out_bit_exact(
    specs: dict[str, tuple[list[int], torch.dtype]], max_shard_bytes: int, data: st.DataObject
) -> None:
    specs.pop("__metadata__", None)
    tensors = {}
    for name, (shape, dtype) in specs.items():
        size = torch.empty(shape, dtype=dtype).nbytes
        raw = torch.tensor(list(data.draw(st.binary(min_size=size, max_size=size))), dtype=torch.uint8)
        tensors[name] = (raw % 2).bool().reshape(shape) if dtype is torch.bool else raw.view(dtype).reshape(shape)
    if not tensors:
        return
    image = export_image("run", 1, tensors.items(), max_shard_bytes)
    try:
        found = read_image(image)
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found[name].dtype is tensor.dtype
            assert found[name].shape == tensor.shape
            # Bits, because a NaN does not equal itself.
            assert torch.equal(found[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8))
        with image.buffer.view() as view:
            verify_shards(view, image.manifest)
    finally:
        image.close()


def test_shards_keep_to_the_size_and_each_is_a_safetensors_file() -> None:
    tensors = {f"layer.{index}": torch.full((1000,), float(index)) for index in range(10)}
    image = export_image("run", 1, iter(tensors.items()), max_shard_bytes=9000)
    data = image.path.read_bytes()
    assert [shard.name for shard in image.manifest.shards] == [
        f"model-0000{i}-of-00005.safetensors" for i in range(1, 6)
    ]
    for shard in image.manifest.shards:
        assert shard.offset % ALIGNMENT == 0
        assert len(load(data[shard.offset : shard.offset + shard.bytes])) == 2
    image.close()


def test_transposed_and_strided_tensors_are_packed_as_they_read() -> None:
    base = torch.arange(60, dtype=torch.float32).reshape(6, 10)
    tensors = {"transposed": base.T, "strided": base[::2, 1::3], "grad": base.clone().requires_grad_()}
    image = export_image("run", 1, tensors.items(), 1 << 20)
    assert equal(read_image(image), {name: tensor.detach().contiguous() for name, tensor in tensors.items()})
    image.close()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([], "at least one tensor"),
        ([("a", torch.zeros(1)), ("a", torch.zeros(1))], "a is given twice"),
        ([("a", torch.zeros(1, dtype=torch.complex64))], "complex64"),
    ],
)
def test_tensors_that_make_no_image_are_refused_and_leave_no_file(
    tmp_path: Path, tensors: list[tuple[str, torch.Tensor]], message: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        export_image("run", 1, tensors, 1 << 20, str(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [1 << 45, 1 << 62])
def test_a_full_shared_memory_is_one_sentence_that_says_what_to_do(tmp_path: Path, size: int) -> None:
    with pytest.raises(ResourceExhaustedError, match=r"no room for .* enlarge it"):
        SharedBuffer.allocate("/dev/shm", size)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FailedPreconditionError, match=r"weights\.shared_memory_dir: .*missing cannot be written"):
        export_image("run", 1, [("a", torch.zeros(1))], 1 << 20, str(tmp_path / "missing"))


def test_a_closed_image_lets_go_of_its_memory_with_the_last_pin(tmp_path: Path) -> None:
    image = export_image("run", 1, [("a", torch.arange(1000))], 1 << 20, str(tmp_path))
    image.buffer.pin()
    image.buffer.pin()
    image.close()
    assert not image.path.exists()
    image.buffer.unpin()
    with image.buffer.view() as view:
        verify_shards(view, image.manifest)  # still mapped
    image.buffer.unpin()
    with pytest.raises(ValueError, match="closed"), image.buffer.view():
        pass
    with pytest.raises(FailedPreconditionError, match="export the weights again"):
        image.buffer.pin()


@given(st.integers(0), st.integers(0, 7))
@settings(max_examples=50, deadline=None)
def test_any_flipped_bit_of_a_shard_is_found(position: int, bit: int) -> None:
    image = IMAGE
    shard = image.manifest.shards[position % len(image.manifest.shards)]
    data = bytearray(image.path.read_bytes())
    data[shard.offset + position % shard.bytes] ^= 1 << bit
    with pytest.raises(DataLossError, match=shard.name):
        verify_shards(memoryview(data), image.manifest)


IMAGE = export_image("run", 7, make_tensors(seed=1, megabytes=0.01).items(), 4000)

checksums = st.text("0123456789abcdef", min_size=32, max_size=32)


@settings(deadline=None)
@given(st.lists(st.tuples(st.text(min_size=1), st.integers(0, 9), st.integers(1, 1 << 40), checksums), min_size=1))
def test_manifests_of_disjoint_shards_are_taken(rows: list[tuple[str, int, int, str]]) -> None:
    shards, end = [], 0
    for name, gap, size, checksum in rows:
        shards.append(pb.Shard(name=name, offset=end + gap, bytes=size, checksum=checksum))
        end += gap + size
    check_manifest(pb.Manifest(run_id="run", policy_version=3, total_bytes=end, shards=shards))


def test_an_empty_manifest_is_refused() -> None:
    with pytest.raises(InvalidArgumentError) as error:
        check_manifest(pb.Manifest())
    assert [v.field for v in error.value.violations] == ["manifest.run_id", "manifest.shards"]
