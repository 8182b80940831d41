"""Cuts a set of sequences into micro-batches that are balanced by tokens, and deals them out to data-parallel ranks."""

from __future__ import annotations

from collections.abc import Sequence


def pack_sequences(lengths: Sequence[int], max_tokens: int, ranks: int = 1) -> list[list[list[int]]]:
    """Micro-batches of sequence indices for each rank: result[rank][micro-batch].

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
    """Gives each pack, largest first, to the rank with the fewest tokens among those with the fewest packs."""
    tokens = [sum(lengths[i] for i in pack) for pack in packs]
    dealt: list[list[list[int]]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for index in sorted(range(len(packs)), key=lambda i: (-tokens[i], i)):
        rank = min(range(ranks), key=lambda r: (len(dealt[r]), load[r], r))
        dealt[rank].append(packs[index])
        load[rank] += tokens[index]
    return dealt
