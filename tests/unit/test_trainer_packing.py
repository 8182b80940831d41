"""Micro-batches: every sequence once, bounded and balanced; the padded view of a pack and its gradients."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.trainer.packing import (
    TokenSequence,
    make_micro_batches,
    pack_layout,
    pack_sequences,
    pad,
    take_share,
    unpad,
)

LENGTHS = st.lists(st.integers(1, 300), max_size=120)


@settings(deadline=None)  # packing takes under a millisecond, but the machine may be busy
@given(LENGTHS, st.integers(1, 600), st.integers(1, 5))
def test_each_sequence_is_in_one_micro_batch_within_the_bound(lengths: list[int], bound: int, ranks: int) -> None:
    dealt = pack_sequences(lengths, bound, ranks)
    assert len(dealt) == ranks
    packs = [pack for rank in dealt for pack in rank]
    assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
    for pack in packs:
        assert len(pack) == 1 or len(pack) * max(lengths[i] for i in pack) <= bound
    counts = [len(rank) for rank in dealt]
    assert max(counts) - min(counts) <= 1


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), min_size=64, max_size=300), st.integers(1, 4))
def test_micro_batches_are_balanced(lengths: list[int], ranks: int) -> None:
    dealt = pack_sequences(lengths, 400, ranks)
    sizes = [sum(lengths[i] for i in pack) for rank in dealt for pack in rank]
    # The padded sizes differ by less than one longest sequence; within a pack lengths differ as their neighbours do.
    assert max(sizes) <= 400
    loads = [sum(lengths[i] for pack in rank for i in pack) for rank in dealt]
    assert max(loads) - min(loads) <= 400


def test_no_more_micro_batches_than_needed() -> None:
    assert [len(rank) for rank in pack_sequences([10] * 40, 100)] == [4]
    assert [len(rank) for rank in pack_sequences([10] * 40, 100, ranks=3)] == [2, 2, 2]
    assert pack_sequences([7], 100, ranks=2) == [[[0]], []]


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12))
def test_padding_and_back_is_the_identity_with_its_gradient(lengths: list[int]) -> None:
    batches = pack_layout(lengths, torch.device("cpu")).batches
    generator = torch.Generator().manual_seed(0)
    x_T3 = torch.randn(sum(lengths), 3, generator=generator, requires_grad=True)
    remaining = list(lengths)
    for x_B3, batch in zip(x_T3.split([len(batch.rows_T) for batch in batches]), batches, strict=True):
        own, remaining = remaining[: batch.sequences], remaining[batch.sequences :]
        padded = pad(x_B3, batch)
        assert padded.shape == (len(own), max(own), 3)
        assert min(own) >= 0.7 * max(own)
        for row, length, part in zip(padded, own, x_B3.split(own), strict=True):
            assert torch.equal(row[:length], part)
            assert not row[length:].any()
        weights_NL3 = torch.randn(padded.shape, generator=generator)
        back_B3 = unpad(padded * weights_NL3, batch)
        [gradient_B3] = torch.autograd.grad(back_B3.sum(), [x_B3])
        assert torch.equal(gradient_B3, unpad(weights_NL3, batch))
    assert not remaining


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12))
def test_positions_start_anew_in_each_sequence(lengths: list[int]) -> None:
    packed = pack_layout(lengths, torch.device("cpu"))
    assert packed.positions_T.tolist() == [i for length in lengths for i in range(length)]
    assert packed.sequence_T.tolist() == [s for s, length in enumerate(lengths) for _ in range(length)]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 5))
def test_shares_are_equally_long_and_make_up_the_pack(lengths: list[int], ranks: int) -> None:
    generator = np.random.default_rng(0)
    sequences = [
        TokenSequence(
            generator.integers(0, 99, length + 1),
            generator.random(length) < 0.5,
            generator.integers(0, 4, (length, 2, 1)).astype(np.uint8),
        )
        for length in lengths
    ]
    [batch] = make_micro_batches([sequences], torch.device("cpu"))
    shares = [take_share(batch, rank, ranks) for rank in range(ranks)]
    tokens = sum(lengths)
    assert {len(share.inputs_T) for share in shares} == {-(-tokens // ranks)}
    for read in (
        lambda each: each.inputs_T,
        lambda each: each.targets_T,
        lambda each: each.trained_T,
        lambda each: each.packed.positions_T,
        lambda each: each.packed.sequence_T,
        lambda each: each.experts_TLK,
    ):
        assert torch.equal(torch.cat([read(share) for share in shares])[:tokens], read(batch))
    assert not torch.cat([share.trained_T for share in shares])[tokens:].any()
    assert all(share.packed.batches is batch.packed.batches for share in shares)
