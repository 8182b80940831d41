"""Token sequences and the packed micro-batches made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from services.trainer.packed import PackedLayout, lay_out
from services.trainer.packing import pack_sequences


@dataclass(frozen=True)
class TokenSequence:
    """n tokens and, for each of the n - 1 predictions of a next token, whether it takes part in the loss."""

    tokens: npt.NDArray[np.int64]
    trained_T: npt.NDArray[np.bool_]
    # Multiplies the token's log-probability in the advantage term; ones unless importance sampling is on.
    importance_T: npt.NDArray[np.float32]


@dataclass(frozen=True)
class MicroBatch:
    """T packed predictions: inputs, targets, masks, and which of the job's sequences they belong to."""

    inputs_T: torch.Tensor
    targets_T: torch.Tensor
    trained_T: torch.Tensor
    importance_T: torch.Tensor
    layout: PackedLayout
    # Index in the job's list of each packed sequence; empty in a filler.
    indices: tuple[int, ...]


# A rank with nothing to do takes part in a step's collectives with this, which trains no token.
_FILLER = TokenSequence(np.zeros(2, np.int64), np.zeros(1, np.bool_), np.ones(1, np.float32))


def make_micro_batches(
    sequences: Sequence[TokenSequence],
    chosen: Sequence[int],
    max_tokens: int,
    ranks: int,
    rank: int,
    device: torch.device,
) -> list[MicroBatch]:
    """The micro-batches of this data-parallel rank for one step over the `chosen` sequences; at least one."""
    packs = pack_sequences([len(sequences[i].tokens) - 1 for i in chosen], max_tokens, ranks)[rank]
    if not packs:
        return [_make_batch([_FILLER], (), device)]
    return [_make_batch([sequences[chosen[i]] for i in pack], tuple(chosen[i] for i in pack), device) for pack in packs]


def _make_batch(sequences: Sequence[TokenSequence], indices: tuple[int, ...], device: torch.device) -> MicroBatch:
    return MicroBatch(
        inputs_T=torch.from_numpy(np.concatenate([s.tokens[:-1] for s in sequences])).to(device),
        targets_T=torch.from_numpy(np.concatenate([s.tokens[1:] for s in sequences])).to(device),
        trained_T=torch.from_numpy(np.concatenate([s.trained_T for s in sequences])).to(device),
        importance_T=torch.from_numpy(np.concatenate([s.importance_T for s in sequences])).to(device),
        layout=lay_out([len(s.tokens) - 1 for s in sequences], device),
        indices=indices,
    )
