"""Batches of similar length: little padding, and the same order for the same seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

# Steps whose units are sorted by length together.
WINDOW_STEPS = 32


def draw_steps(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """An epoch as steps of unit indices: shuffled, sorted by length within windows, the steps shuffled again."""
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths)).tolist()
    window = WINDOW_STEPS * batch_size
    steps: list[list[int]] = []
    for begin in range(0, len(order), window):
        part = sorted(order[begin : begin + window], key=lambda index: lengths[index])
        steps += [part[first : first + batch_size] for first in range(0, len(part), batch_size)]
    return [steps[index] for index in generator.permutation(len(steps))]


def split_by_tokens(
    indices: Sequence[int], lengths: Sequence[int], sequences: Sequence[int], max_tokens: int
) -> Iterator[list[int]]:
    """Micro-batches of at most `max_tokens` tokens, padding included; a unit that is larger is one by itself.

    `lengths` holds the longest sequence of each unit, `sequences` how many it has.
    """
    batch: list[int] = []
    rows = 0
    for index in sorted(indices, key=lambda index: lengths[index]):
        # Sorted: this one is the longest so far.
        if batch and (rows + sequences[index]) * lengths[index] > max_tokens:
            yield batch
            batch, rows = [], 0
        batch.append(index)
        rows += sequences[index]
    if batch:
        yield batch


def pad(
    sequences: Sequence[NDArray[np.int32]], pad_token_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [N, T] padded on the right, and the mask [N, T] that is 1 on real tokens."""
    longest = max(len(sequence) for sequence in sequences)
    ids_NT = np.full((len(sequences), longest), pad_token_id, dtype=np.int64)
    mask_NT = np.zeros((len(sequences), longest), dtype=np.int64)
    for row, sequence in enumerate(sequences):
        ids_NT[row, : len(sequence)] = sequence
        mask_NT[row, : len(sequence)] = 1
    return torch.from_numpy(ids_NT).to(device), torch.from_numpy(mask_NT).to(device)
