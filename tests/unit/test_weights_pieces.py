"""Pieces: cut, covered, placed and read back; and the schedule of a pull."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perigee.errors import InvalidArgumentError
from perigee.weights.v1 import weights_pb2 as pb
from services.weights.config import WeightsConfig
from services.weights.pieces import (
    PieceStore,
    TensorSlice,
    check_pieces,
    cut_slice,
    digest_tensors,
    place_pieces,
    read_pieces,
)
from services.weights.pull import Schedule, Unit

shapes = st.lists(st.integers(1, 9), max_size=3).map(tuple)
tensor_cuts = st.lists(st.tuples(shapes, st.integers(0, 2), st.integers(1, 3)), min_size=1, max_size=4)


def describe(blocks: Sequence[TensorSlice]) -> pb.Manifest:
    """The manifest of blocks, without checksums."""
    manifest = pb.Manifest(run_id="run", policy_version=3)
    names: list[str] = []
    for block in blocks:
        if block.name not in names:
            names.append(block.name)
            manifest.tensors.add(name=block.name, dtype="F32", shape=block.shape)
        upper = [low + n for low, n in zip(block.lower, block.tensor.shape, strict=True)]
        manifest.pieces.add(tensor=names.index(block.name), lower=block.lower, upper=upper)
    return manifest


def slice_evenly(name: str, tensor: torch.Tensor, axis: int, ranks: int) -> list[TensorSlice]:
    """Slices of a tensor along an axis."""
    if tensor.ndim == 0:
        return [TensorSlice(name, (), (), tensor)]
    axis %= tensor.ndim
    slices, begin = [], 0
    for part in tensor.chunk(ranks, axis):
        lower = tuple(begin if n == axis else 0 for n in range(tensor.ndim))
        slices.append(TensorSlice(name, tuple(tensor.shape), lower, part))
        begin += part.shape[axis]
    return slices


@given(tensor_cuts, st.integers(1, 200), st.integers(0, 1 << 30))
@settings(max_examples=60, deadline=None)
def test_tensors_come_back_from_pieces_in_any_order(
    tensors: list[tuple[tuple[int, ...], int, int]], block_bytes: int, seed: int
) -> None:
    originals = {f"t{i}": torch.randn(shape) for i, (shape, _, _) in enumerate(tensors)}
    blocks = [
        block
        for (name, tensor), (_, axis, ranks) in zip(originals.items(), tensors, strict=True)
        for part in slice_evenly(name, tensor, axis, ranks)
        for block in cut_slice(part, block_bytes)
    ]
    assert all(block.tensor.nbytes <= block_bytes or len(block.tensor) == 1 for block in blocks if block.tensor.ndim)
    Random(seed).shuffle(blocks)
    manifest = describe(blocks)
    check_pieces(manifest)
    image = place_pieces(manifest)
    assert not any(piece.offset for piece in manifest.pieces)
    memory = bytearray(image.total_bytes)
    for index, block in enumerate(blocks):
        data = block.tensor.contiguous().numpy().tobytes()
        offset = image.pieces[index].offset
        assert not any(memory[offset : offset + len(data)])
        memory[offset : offset + len(data)] = data
    found = dict(read_pieces(memoryview(memory), image))
    assert found.keys() == originals.keys()
    assert all(torch.equal(found[name], originals[name]) for name in originals)


def test_blocks_of_whole_rows_are_read_without_a_copy() -> None:
    blocks = [*cut_slice(TensorSlice("a", (6, 4), (0, 0), torch.randn(6, 4)), 32)]
    assert len(blocks) == 3
    image = place_pieces(describe(blocks))
    memory = bytearray(image.total_bytes)
    [(_, tensor)] = read_pieces(memoryview(memory), image)
    memory[0:4] = b"\x00\x00\x80\x3f"
    assert tensor[0, 0] == 1.0


def test_only_pieces_that_touch_what_is_wanted_are_placed_and_put_together() -> None:
    """A process of the engine that uses one half of the columns, alone on its host or beside the other one."""
    manifest = describe(slice_evenly("columns", torch.zeros(4, 8), 1, 4) + slice_evenly("others", torch.zeros(3), 0, 1))
    wanted = {"columns": [((0, 4), (4, 8))]}
    for image in (place_pieces(manifest, wanted), place_pieces(manifest)):
        memory = memoryview(bytearray(b"\x00\x00\x80\x3f" * (image.total_bytes // 4)))
        [(_, tensor)] = read_pieces(memory, image, wanted)
        assert bool((tensor[:, 4:] == 1).all())
    placed = place_pieces(manifest, wanted)
    assert [piece.HasField("offset") for piece in placed.pieces] == [False, False, True, True, False]
    assert placed.total_bytes == 4 * 4 * 4
    assert place_pieces(manifest, {}).total_bytes == 0


def test_checksums_of_tensors_follow_their_pieces() -> None:
    manifest = describe(slice_evenly("a", torch.zeros(4, 8), 0, 2) + slice_evenly("b", torch.zeros(3), 0, 1))
    before = digest_tensors(manifest)
    manifest.pieces.reverse()
    assert digest_tensors(manifest) == before
    manifest.pieces[-1].checksum = bytes(16)
    changed = digest_tensors(manifest)
    assert (changed["a"] != before["a"], changed["b"] == before["b"]) == (True, True)
    other = describe(slice_evenly("a", torch.zeros(4, 8), 1, 2))
    assert digest_tensors(other)["a"] != before["a"]
    assert digest_tensors(pb.Manifest()) == {}


@pytest.mark.parametrize(
    ("lower", "upper", "message"),
    [
        ([0, 0], [2, 4], "8 of its 16 elements"),
        ([0, 0], [4, 5], "does not lie within its tensor"),
        ([2, 0], [2, 4], "does not lie within its tensor"),
        ([0], [4], "is of no tensor"),
    ],
)
def test_pieces_that_make_no_image_are_refused(lower: list[int], upper: list[int], message: str) -> None:
    manifest = pb.Manifest(run_id="run", tensors=[pb.TensorSpec(name="a", dtype="F32", shape=[4, 4])])
    manifest.pieces.add(lower=lower, upper=upper)
    with pytest.raises(InvalidArgumentError, match=message):
        check_pieces(manifest)
    with pytest.raises(InvalidArgumentError, match="is empty"):
        check_pieces(pb.Manifest(run_id="run"))


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(0, 1 << 30))
@settings(max_examples=60, deadline=None)
def test_a_pull_reads_every_piece_and_none_twice_at_once(all_sizes: list[int], seed: int) -> None:
    """Two sources fail in turn with reads under way, each of two holders; the third one gives the rest."""
    random = Random(seed)
    sizes = dict(enumerate(all_sizes))
    schedule = Schedule(sizes, 60)
    underway: list[Unit] = []
    arrived: set[int] = set()

    def finish(good: bool) -> None:
        unit = underway.pop(0)
        schedule.finish(unit, good)
        arrived.update(unit.addresses if good else ())

    def start(session: str) -> bool:
        if (unit := schedule.next_unit(session)) is None:
            return False
        size = sum(sizes[piece] for piece in unit.addresses)
        assert size <= 60 or len(unit.addresses) == 1
        assert not unit.addresses.keys() & ({piece for other in underway for piece in other.addresses} | arrived)
        underway.append(unit)
        return True

    for source in range(3):
        schedule.forget_offers()
        for holder in range(2):
            pieces = [piece for piece in sizes if piece % 2 == holder]
            schedule.offer(pb.Holding(session=f"{source}-{holder}", pieces=pieces, addresses=pieces))
        for _ in range(random.randrange(8) if source < 2 else 0):
            start(random.choice(schedule.sessions))
            if underway and random.random() < 0.5:
                finish(random.random() < 0.7)
    # The third source has announced everything before reads of the others fail.
    while underway or start("2-0") or start("2-1"):
        if random.random() < 0.5:
            start(random.choice(schedule.sessions))
        finish(not underway[0].session.startswith(("0", "1")) or random.random() < 0.5)
    assert schedule.complete == (arrived == sizes.keys())
    assert arrived == sizes.keys()


def test_a_large_tensor_is_cut_once() -> None:
    part = TensorSlice("a", (1000, 10), (0, 0), torch.zeros(1000, 10))
    blocks = list(cut_slice(part, 4000))
    assert [len(block.tensor) for block in blocks] == [100] * 10
    assert blocks[3].lower == (300, 0)


def test_copies_of_a_slice_share_its_blocks_out() -> None:
    slices = [TensorSlice("a", (7, 2), (0, 0), torch.zeros(7, 2)), TensorSlice("b", (2,), (0,), torch.zeros(2))]
    store = PieceStore(WeightsConfig.model_construct(block_bytes=8))
    shares = [
        [
            (block.name, block.lower)
            for block in store._blocks(lambda copy=copy: [replace(s, copy=copy, copies=2) for s in slices])
        ]  # type: ignore[misc]
        for copy in range(2)
    ]
    assert sorted(shares[0] + shares[1]) == [("a", (row, 0)) for row in range(7)] + [("b", (0,))]
    assert min(len(share) for share in shares) >= 3
