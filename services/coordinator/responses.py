"""Texts of responses that ended without the coordinator hearing of it: read from the buffer and decoded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tokenizers import Tokenizer

from perigee.buffer.client import BufferClient
from perigee.buffer.packing import unpack_token_ids


async def read_response_texts(
    buffer: BufferClient, run_id: str, trajectory_ids: Iterable[str], tokenizer: Tokenizer, timeout_s: float
) -> Mapping[str, str]:
    """Response text by trajectory id, special tokens left out."""
    return {
        trajectory.trajectory_id: tokenizer.decode(list(unpack_token_ids(trajectory.token_ids)))
        async for trajectory in buffer.read_trajectories(run_id, list(trajectory_ids), timeout_s=timeout_s)
    }
