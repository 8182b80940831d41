"""Routers of a mixture of experts: the replay of the rollout's choices, and the load-balancing loss."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe import moe_utils

# megatron-core 0.16.1 reads this name in every router, and defines it only where Transformer Engine is installed.
if not hasattr(moe_utils, "te_general_gemm"):
    moe_utils.te_general_gemm = None


@dataclass(frozen=True)
class RoutedTokens:
    """Tokens of a micro-batch that this rank routes."""

    experts_TLK: torch.Tensor | None
    """Experts that routers are to take, -1 where they choose; None where they choose all."""
    tokens: int
    """Those at the beginning that count; the others fill this rank's share up."""
    balance: float
    """Factor of the load-balancing loss: of each expert's choices on all ranks times its probabilities here."""


class RouterControl:
    """What one layer's router chooses: the rollout's experts, where there are any, else its own (arXiv 2510.11370).

    Takes the place of Megatron's RouterReplay, which replays a micro-batch for all of its tokens or for none. The
    weights of the experts stay the router's, and so does their gradient. Adds the load-balancing loss, which goes by
    the router's own choices: Megatron's counts the tokens that fill up a rank's share.
    """

    routed: RoutedTokens
    """Of the micro-batch whose forward pass is under way."""

    def __init__(self, layer: int, normalizes: bool, group: dist.ProcessGroup) -> None:
        """Has the router's number from 0, whether it chooses by logits, and the ranks that share a micro-batch."""
        self._layer = layer
        self._normalizes = normalizes
        self._group = group
        self._recomputes = False
        # Tokens of the micro-batches whose backward passes, which compute the layer again, are still to come.
        self._to_recompute: deque[RoutedTokens] = deque()
        self._counts_2: torch.Tensor | int = 0

    def begin(self, recomputes: bool) -> None:
        """Begins a pass over micro-batches; with `recomputes` their backward passes compute the layer again."""
        self._recomputes = recomputes
        self._to_recompute.clear()

    def take_counts(self) -> tuple[int, int]:
        """Returns how many choices were replayed since the last call, and how many the router would not have made."""
        counts_2, self._counts_2 = self._counts_2, 0
        replayed, differing = (0, 0) if isinstance(counts_2, int) else counts_2.tolist()
        return replayed, differing

    def get_replay_topk(
        self,
        scores_TE: torch.Tensor,
        topk: int,
        num_groups: int | None,
        group_topk: int | None,
        compute_topk: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns scores and numbers of each token's experts [T, K]; Megatron's router calls it."""
        chosen_scores_TK, own_TK = compute_topk(scores_TE, topk, num_groups, group_topk)
        again = self._recomputes and torch.is_grad_enabled()
        routed = self._to_recompute.popleft() if again else self.routed
        if self._recomputes and not again:
            self._to_recompute.append(routed)
        chosen_TK = own_TK
        if routed.experts_TLK is not None:
            wanted_TK = routed.experts_TLK[:, self._layer].long()
            chosen_TK = torch.where(wanted_TK < 0, own_TK, wanted_TK)
            chosen_scores_TK = scores_TE.gather(1, chosen_TK)
            if not again:
                differs_TK = (chosen_TK[:, :, None] != own_TK[:, None, :]).all(-1)
                self._counts_2 = self._counts_2 + torch.stack([(wanted_TK >= 0).sum(), differs_TK.sum()])
        if routed.balance and torch.is_grad_enabled():
            loss = self._balance(scores_TE[: routed.tokens], own_TK[: routed.tokens]) * routed.balance
            chosen_scores_TK = _AddLoss.apply(chosen_scores_TK, loss)  # type: ignore[no-untyped-call]
        return chosen_scores_TK, chosen_TK

    def _balance(self, scores_TE: torch.Tensor, own_TK: torch.Tensor) -> torch.Tensor:
        """Returns the sum over experts of the choices on all ranks times the probabilities here."""
        probabilities_TE = scores_TE.softmax(-1, dtype=torch.float32) if self._normalizes else scores_TE.float()
        chosen_E = torch.bincount(own_TK.flatten(), minlength=scores_TE.shape[1]).float()
        dist.all_reduce(chosen_E, group=self._group)
        return (chosen_E * probabilities_TE.sum(0)).sum()


class _AddLoss(torch.autograd.Function):
    """Hands values on, and adds a loss to that which gradients are of."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return gradients[0], gradients[0].new_ones((), dtype=torch.float32)


def control_routers(core: GPTModel, group: dist.ProcessGroup) -> list[RouterControl]:
    """Has the routers of this stage ask for their choices; returns what they ask. `group` shares each micro-batch."""
    controls = []
    for layer in core.decoder.layers:
        normalizes = not layer.mlp.router.config.moe_router_pre_softmax
        controls.append(RouterControl(layer.layer_number - 1, normalizes, group))
        layer.mlp.router.router_replay = controls[-1]
    return controls


def reduce_apart(parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> None:
    """Marks the experts' weights, whose gradients are summed over the ranks that hold the same experts.

    Megatron marks them with several expert-parallel ranks only, and takes tensor-parallel ranks for alike with one.
    """
    for name, parameter in parameters:
        if ".experts." in name:
            parameter.allreduce = False  # type: ignore[attr-defined]
