"""Packed micro-batches: which sequences go together on which rank, and where each of their tokens sits.

Sequences of a pack are laid end to end, and everything but attention runs on its T tokens without padding. Attention
gathers those of near length into padded [n, L] batches, where right padding cannot reach a real token under a causal
mask, and scatters the results back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from megatron.core.packed_seq_params import PackedSeqParams

if TYPE_CHECKING:
    from perigee.images import Image

# Shortest sequence of a padded batch by its longest: less padding against more calls.
_NEAR = 0.7


def pack_sequences(lengths: Sequence[int], max_tokens: int, ranks: int = 1) -> list[list[list[int]]]:
    """Returns the sequences of each micro-batch of each rank: result[rank][micro-batch].

    Sequences of near length go together, so that a micro-batch padded to its longest stays within `max_tokens`; a
    single sequence longer than that has one of its own. Each sequence is in exactly one micro-batch of one rank. The
    number of micro-batches is the smallest that fits, rounded up to fill every rank, and the largest is as small as
    that number allows. A rank may get none when there are fewer sequences than ranks.
    """
    if not lengths:
        return [[] for _ in range(ranks)]
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    ordered = [lengths[i] for i in order]
    fewest = len(_cut(ordered, max_tokens))
    wanted = min(-(-fewest // ranks) * ranks, len(ordered))
    low, high = 1, max_tokens
    while low < high:
        middle = (low + high) // 2
        if len(_cut(ordered, middle)) <= wanted:
            high = middle
        else:
            low = middle + 1
    packs = [[order[i] for i in range(start, stop)] for start, stop in _cut(ordered, low)]
    return _deal(packs, lengths, ranks)


def _cut(descending: list[int], cells: int) -> list[tuple[int, int]]:
    """Cuts descending lengths into the fewest runs whose padded size, count times the first, is at most `cells`.

    A length above `cells` is a run of its own.
    """
    runs = []
    start = 0
    while start < len(descending):
        stop = min(len(descending), start + max(1, cells // descending[start]))
        runs.append((start, stop))
        start = stop
    return runs


def _deal(packs: list[list[int]], lengths: Sequence[int], ranks: int) -> list[list[list[int]]]:
    """Deals each pack, largest first, to the rank with the fewest tokens among those with the fewest packs."""
    tokens = [sum(lengths[i] for i in pack) for pack in packs]
    dealt: list[list[list[int]]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for index in sorted(range(len(packs)), key=lambda i: (-tokens[i], i)):
        rank = min(range(ranks), key=lambda r: (len(dealt[r]), load[r], r))
        dealt[rank].append(packs[index])
        load[rank] += tokens[index]
    return dealt


@dataclass(frozen=True)
class PaddedBatch:
    """Neighbours in a pack that attention pads to the longest of them, L."""

    # Row of each of their tokens in the padded batch flattened to [n * L], [T].
    rows_T: torch.Tensor
    sequences: int
    longest: int

    @property
    def is_dense(self) -> bool:
        """Whether all sequences are equally long, so that no padding is needed."""
        return self.sequences * self.longest == len(self.rows_T)


@dataclass
class PackLayout(PackedSeqParams):  # type: ignore[misc]  # megatron.core is untyped
    """Place of each packed token; travels through Megatron as its `packed_seq_params`.

    `qkv_format` stays "sbhd" (batch 1), so Megatron itself never splits the pack.
    """

    # Position of each token in its own sequence, [T].
    positions_T: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    # Sequence of each token, [T].
    sequence_T: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    batches: list[PaddedBatch] = field(default_factory=list)
    images: PackedImages | None = None


@dataclass(frozen=True)
class PackedImages:
    """Images of a pack, each once, and the F tokens whose embeddings are features of them."""

    images: list[Image]
    tokens_F: torch.Tensor
    """Packed token of each feature."""
    features_F: torch.Tensor
    """Feature of each, counted through all images; those of an image that several sequences have come again."""
    features: int
    positions_3T: torch.Tensor | None
    """Position of each packed token on the axes of time, height and width; None where positions count tokens."""


def pack_layout(lengths: list[int], device: torch.device) -> PackLayout:
    """Returns the layout of sequences of these lengths, laid end to end."""
    lengths_N = np.asarray(lengths, dtype=np.int64)
    sequence_T, positions_T = _index_tokens(lengths_N)
    batches = []
    start = 0
    for stop in range(1, len(lengths) + 1):
        if stop == len(lengths) or not _NEAR * lengths[start] <= lengths[stop] <= lengths[start]:
            numbers_T, offsets_T = _index_tokens(lengths_N[start:stop])
            rows_T = torch.from_numpy(numbers_T * lengths[start] + offsets_T).to(device)
            batches.append(PaddedBatch(rows_T, stop - start, lengths[start]))
            start = stop
    return PackLayout(
        qkv_format="sbhd",
        positions_T=torch.from_numpy(positions_T).to(device),
        sequence_T=torch.from_numpy(sequence_T).to(device),
        batches=batches,
    )


def _index_tokens(lengths_N: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Returns the sequence of each token, and its position there."""
    sequence_T = np.repeat(np.arange(len(lengths_N)), lengths_N)
    starts_N = np.cumsum(lengths_N) - lengths_N
    return sequence_T, np.arange(len(sequence_T)) - starts_N[sequence_T]


class _Pad(torch.autograd.Function):
    """[T, ...] -> [n, L, ...] with zeros for padding. A gather backward is much faster than index_add."""

    @staticmethod
    def forward(ctx: Any, x_T: torch.Tensor, batch: PaddedBatch) -> torch.Tensor:
        ctx.batch = batch
        return _scatter(x_T, batch)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0].flatten(0, 1).index_select(0, ctx.batch.rows_T), None


class _Unpad(torch.autograd.Function):
    """[n, L, ...] -> [T, ...]; padding gets a zero gradient."""

    @staticmethod
    def forward(ctx: Any, x_NL: torch.Tensor, batch: PaddedBatch) -> torch.Tensor:
        ctx.batch = batch
        return x_NL.flatten(0, 1).index_select(0, batch.rows_T)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _scatter(gradients[0], ctx.batch), None


def _scatter(x_T: torch.Tensor, batch: PaddedBatch) -> torch.Tensor:
    padded = x_T.new_zeros(batch.sequences * batch.longest, *x_T.shape[1:])
    return padded.index_copy_(0, batch.rows_T, x_T).view(batch.sequences, batch.longest, *x_T.shape[1:])


def pad(x_T: torch.Tensor, batch: PaddedBatch) -> torch.Tensor:
    """Returns the tokens [T, ...] as a padded batch [n, L, ...]."""
    if batch.is_dense:
        return x_T.reshape(batch.sequences, batch.longest, *x_T.shape[1:])
    padded: torch.Tensor = _Pad.apply(x_T, batch)  # type: ignore[no-untyped-call]
    return padded


def unpad(x_NL: torch.Tensor, batch: PaddedBatch) -> torch.Tensor:
    """Returns the real tokens of a padded batch [n, L, ...], end to end: [T, ...]."""
    if batch.is_dense:
        return x_NL.flatten(0, 1)
    x_T: torch.Tensor = _Unpad.apply(x_NL, batch)  # type: ignore[no-untyped-call]
    return x_T


@dataclass(frozen=True)
class PlacedImage:
    """Image of a prompt, and the positions of its F tokens in the sequence."""

    image: Image
    tokens_F: npt.NDArray[np.int64]
    grid: tuple[int, int] | None = None
    """Rows and columns of its tokens, for models whose positions have axes of height and width."""


@dataclass(frozen=True)
class TokenSequence:
    """Sequence of n tokens and, for each of its n - 1 predictions, whether it takes part in the loss."""

    tokens: npt.NDArray[np.int64]
    trained_T: npt.NDArray[np.bool_]
    experts_TLK: npt.NDArray[np.unsignedinteger[Any]] | None = None
    """Experts that the rollout chose for the last T predictions, those of the response."""
    images: tuple[PlacedImage, ...] = ()
    """Those of the prompt, in order."""


@dataclass(frozen=True)
class MicroBatch:
    """T packed predictions of a step's micro-batch number `index`: inputs, targets, mask and layout."""

    inputs_T: torch.Tensor
    targets_T: torch.Tensor
    trained_T: torch.Tensor
    packed: PackLayout
    index: int
    is_filler: bool = False
    experts_TLK: torch.Tensor | None = None
    """Experts that routers are to take, -1 where they choose; None where no sequence has any."""


def make_micro_batches(
    packs: Sequence[Sequence[TokenSequence]], device: torch.device, count: int = 1
) -> list[MicroBatch]:
    """Builds a micro-batch of each pack, and further ones up to `count`, which train nothing.

    A rank with fewer packs than others needs these fillers to take part in the collectives of a step, and of the
    experts in each micro-batch.
    """
    filler = TokenSequence(np.zeros(2, np.int64), np.zeros(1, np.bool_))
    batches = [_make_batch(pack, device, index) for index, pack in enumerate(packs)]
    return batches + [
        _make_batch([filler], device, index, is_filler=True) for index in range(len(packs), max(count, 1))
    ]


def take_share(batch: MicroBatch, rank: int, ranks: int, parts: int = 1) -> MicroBatch:
    """Returns the tokens of a micro-batch that one of the ranks of a context group computes, as many as each other.

    They can be cut into so many equal parts, for tensor-parallel ranks. Tokens of no sequence fill up the last shares:
    `batches` of the layout, which is of all ranks, has none of them.
    """
    size = -(-len(batch.inputs_T) // (ranks * parts)) * parts
    if ranks == 1 and size == len(batch.inputs_T):
        return batch

    def take(values_T: torch.Tensor, fill: int = 0) -> torch.Tensor:
        share_T = values_T[rank * size : (rank + 1) * size]
        missing = share_T.new_full((size - len(share_T), *share_T.shape[1:]), fill)
        return torch.cat([share_T, missing]) if len(missing) else share_T

    packed, images = batch.packed, batch.packed.images
    if images is not None:
        own_F = (images.tokens_F >= rank * size) & (images.tokens_F < (rank + 1) * size)
        images = replace(
            images,
            # A share without any of their tokens needs no features; one that has some computes all of the pack's.
            images=images.images if own_F.any() else [],
            tokens_F=images.tokens_F[own_F] - rank * size,
            features_F=images.features_F[own_F],
            positions_3T=None if images.positions_3T is None else take(images.positions_3T.T).T,
        )
    return replace(
        batch,
        inputs_T=take(batch.inputs_T),
        targets_T=take(batch.targets_T),
        trained_T=take(batch.trained_T),
        packed=replace(packed, positions_T=take(packed.positions_T), sequence_T=take(packed.sequence_T), images=images),
        experts_TLK=None if batch.experts_TLK is None else take(batch.experts_TLK, -1),
    )


def _make_batch(
    sequences: Sequence[TokenSequence], device: torch.device, index: int, is_filler: bool = False
) -> MicroBatch:
    packed = pack_layout([len(s.tokens) - 1 for s in sequences], device)
    packed.images = _pack_images(sequences, device)
    return MicroBatch(
        inputs_T=torch.from_numpy(np.concatenate([s.tokens[:-1] for s in sequences])).to(device),
        targets_T=torch.from_numpy(np.concatenate([s.tokens[1:] for s in sequences])).to(device),
        trained_T=torch.from_numpy(np.concatenate([s.trained_T for s in sequences])).to(device),
        packed=packed,
        index=index,
        is_filler=is_filler,
        experts_TLK=_join_experts(sequences, device),
    )


def _join_experts(sequences: Sequence[TokenSequence], device: torch.device) -> torch.Tensor | None:
    """Returns the rollout's experts for predictions that are trained.

    Prompts and stale tokens route themselves: the engine read them anew under the weights that drew the tokens after.
    """
    given = [s.experts_TLK for s in sequences if s.experts_TLK is not None]
    if not given:
        return None
    joined_TLK = np.full((sum(len(s.trained_T) for s in sequences), *given[0].shape[1:]), -1, np.int16)
    stop = 0
    for s in sequences:
        stop += len(s.trained_T)
        if s.experts_TLK is not None:
            joined_TLK[stop - len(s.experts_TLK) : stop] = s.experts_TLK
            joined_TLK[stop - len(s.trained_T) : stop][~s.trained_T] = -1
    return torch.from_numpy(joined_TLK).to(device)


def _pack_images(sequences: Sequence[TokenSequence], device: torch.device) -> PackedImages | None:
    """Returns the images of sequences laid end to end, None without any."""
    lengths_N = np.array([len(s.tokens) - 1 for s in sequences])
    placed = [
        (start, each) for start, s in zip(np.cumsum(lengths_N) - lengths_N, sequences, strict=True) for each in s.images
    ]
    if not placed:
        return None
    first_by_digest: dict[str, int] = {}
    images: list[Image] = []
    features = 0
    for _, each in placed:
        if each.image.digest not in first_by_digest:
            first_by_digest[each.image.digest] = features
            images.append(each.image)
            features += len(each.tokens_F)
    positions_3T = None
    if any(each.grid is not None for _, each in placed):
        positions_3T = torch.from_numpy(np.concatenate([place_on_axes(s) for s in sequences], axis=1)).to(device)
    return PackedImages(
        images=images,
        tokens_F=torch.from_numpy(np.concatenate([start + each.tokens_F for start, each in placed])).to(device),
        features_F=torch.from_numpy(
            np.concatenate([first_by_digest[each.image.digest] + np.arange(len(each.tokens_F)) for _, each in placed])
        ).to(device),
        features=features,
        positions_3T=positions_3T,
    )


def place_on_axes(sequence: TokenSequence) -> npt.NDArray[np.int64]:
    """Returns the position of each token but the last on the axes of time, height and width, [3, T].

    Text counts on all three. The tokens of an image lie on its grid, and what follows begins behind its longer side
    (Qwen2-VL, arXiv 2409.12191, section 2.1).
    """
    positions_3T = np.empty((3, len(sequence.tokens) - 1), np.int64)
    done = position = 0
    for each in sequence.images:
        assert each.grid is not None
        begin, (rows, columns) = int(each.tokens_F[0]), each.grid
        positions_3T[:, done:begin] = position + np.arange(begin - done)
        position, done = position + begin - done, begin + rows * columns
        positions_3T[:, begin:done] = position
        positions_3T[1, begin:done] += np.repeat(np.arange(rows), columns)
        positions_3T[2, begin:done] += np.tile(np.arange(columns), rows)
        position += max(rows, columns)
    positions_3T[:, done:] = position + np.arange(positions_3T.shape[1] - done)
    return positions_3T
