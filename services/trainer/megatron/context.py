"""Context parallelism: collectives by which ranks that share the tokens of a micro-batch attend over all of them.

Ulysses (arXiv 2309.14509): before attention all-to-all turns a share of the tokens with all heads into all tokens with
a share of the heads, and back behind it, so that attention itself is that of one rank. Every rank has the same tokens,
heads and causal pairs, and no share needs balancing.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist


def spread_heads(x_THD: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Returns this rank's share of the heads for the tokens of all ranks: [T, H, D] -> [ranks * T, heads, D].

    Heads that the ranks cannot share evenly, those of grouped keys and values, are repeated as often as it takes.
    """
    ranks = group.size()
    x_THD = x_THD.repeat_interleave(math.lcm(x_THD.shape[1], ranks) // x_THD.shape[1], dim=1)
    tokens, heads, width = x_THD.shape
    x_RTHD = x_THD.view(tokens, ranks, heads // ranks, width).transpose(0, 1)
    return _exchange(x_RTHD, group).flatten(0, 1)


def gather_heads(x_TD: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Returns all heads of this rank's tokens, the way back: [ranks * T, heads * D] -> [T, H * D]."""
    ranks = group.size()
    x_RTD = _exchange(x_TD.view(ranks, len(x_TD) // ranks, -1), group)
    return x_RTD.transpose(0, 1).flatten(1)


def gather_tokens(share_T: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Returns the values of all ranks' tokens, in order, of which every rank makes the same loss.

    Backward each rank keeps the gradient of its own tokens, so that each token counts once.
    """
    values_T: torch.Tensor = _GatherTokens.apply(share_T, group)  # type: ignore[no-untyped-call]
    return values_T


def _exchange(x_R: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Sends block j of the first axis to rank j, and returns what the ranks sent here."""
    received_R: torch.Tensor = _AllToAll.apply(x_R, group)  # type: ignore[no-untyped-call]
    return received_R


class _AllToAll(torch.autograd.Function):
    """Exchange of blocks, whose gradients go the same way back."""

    @staticmethod
    def forward(ctx: Any, x_R: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        x_R = x_R.contiguous()
        received_R = torch.empty_like(x_R)
        dist.all_to_all_single(received_R, x_R, group=group)
        return received_R

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _exchange(gradients[0], ctx.group), None


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, share_T: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.rank, ctx.size = dist.get_rank(group), group.size()
        parts = [torch.empty_like(share_T) for _ in range(ctx.size)]
        dist.all_gather(parts, share_T.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0].chunk(ctx.size)[ctx.rank], None
