"""Texts of responses that ended without the coordinator hearing of it: read from the buffer and decoded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tokenizers import Tokenizer

from perigee.buffer.client import BufferClient
from perigee.buffer.v1 import buffer_pb2 as pb


async def read_response_texts(
    buffer: BufferClient, run_id: str, trajectory_ids: Iterable[str], tokenizer: Tokenizer, timeout_s: float
) -> Mapping[str, str]:
    """Response text by trajectory id, special tokens left out."""
    token_ids: dict[str, list[int]] = {}
    request = pb.ReadTrajectoriesRequest(run_id=run_id, trajectory_ids=trajectory_ids)
    async for piece in buffer.read_trajectories(request, timeout_s=timeout_s):
        token_ids.setdefault(piece.trajectory_id, []).extend(piece.token_ids)
    return {trajectory_id: tokenizer.decode(ids) for trajectory_id, ids in token_ids.items()}
