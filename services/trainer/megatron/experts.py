"""Mixture of experts on tensor-parallel ranks that all hold every token, and the replay of the rollout's choices."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable
from copy import copy
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, scatter_to_sequence_parallel_region
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig

# megatron-core 0.16.1 reads this name in every router, and defines it only where Transformer Engine is installed.
if not hasattr(moe_utils, "te_general_gemm"):
    moe_utils.te_general_gemm = None
# It warns of each layer with a class that it does not know, such as the one below.
logging.getLogger("megatron.core.transformer.transformer_layer").setLevel(logging.ERROR)


class DividedMoELayer(MoELayer):  # type: ignore[misc]  # megatron.core is untyped
    """Megatron's layer, whose experts are whole, with the tokens divided over the tensor-parallel ranks within it.

    Each rank routes all tokens alike, so that the router's gradient is whole everywhere, and sends a share of them to
    the experts. Megatron's own layer divides tokens by sequence parallelism alone.
    """

    config: TransformerConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # `forward` asks for it; the parts of the layer keep the configuration of the model.
        self.config = copy(self.config)
        self.config.sequence_parallel = True

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        """Returns the experts' output for the tokens [T, 1, D], on every rank for all of them, and no bias."""
        share, _ = super().forward(hidden_states, *args, **kwargs)
        whole = gather_from_sequence_parallel_region(share, tensor_parallel_output_grad=False, group=self.attn_tp_group)
        return whole[: len(hidden_states)], None

    def preprocess(
        self, hidden_states: torch.Tensor, probs: torch.Tensor, routing_map: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hands this rank's share of the tokens on; those that fill it up go to no expert."""
        found: tuple[torch.Tensor, torch.Tensor] = super().preprocess(
            *(self._take_share(each) for each in (hidden_states, probs, routing_map))
        )
        return found

    def _take_share(self, values_T: torch.Tensor) -> torch.Tensor:
        missing = -len(values_T) % self.attn_tp_group.size()
        if missing:
            values_T = F.pad(values_T, (0, 0) * (values_T.ndim - 1) + (0, missing))
        share: torch.Tensor = scatter_to_sequence_parallel_region(values_T, group=self.attn_tp_group)
        return share


class ExpertReplay:
    """Experts of one layer that the rollout chose, which its router takes instead of its own (arXiv 2510.11370).

    Takes the place of Megatron's RouterReplay, which replays a micro-batch for all of its tokens or for none. The
    weights of the experts stay the router's, and so does their gradient.
    """

    experts_TLK: torch.Tensor | None = None
    """Choices for the micro-batch whose forward pass is under way, -1 where the router chooses."""

    def __init__(self, layer: int) -> None:
        self._layer = layer
        self._recomputes = False
        # Choices of the micro-batches whose backward passes, which compute the layer again, are still to come.
        self._to_recompute: deque[torch.Tensor | None] = deque()
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
        own_scores_TK, own_TK = compute_topk(scores_TE, topk, num_groups, group_topk)
        again = self._recomputes and torch.is_grad_enabled()
        experts_TLK = self._to_recompute.popleft() if again else self.experts_TLK
        if self._recomputes and not again:
            self._to_recompute.append(experts_TLK)
        if experts_TLK is None:
            return own_scores_TK, own_TK
        wanted_TK = experts_TLK[:, self._layer].long()
        chosen_TK = torch.where(wanted_TK < 0, own_TK, wanted_TK)
        if not again:
            differs_TK = (chosen_TK[:, :, None] != own_TK[:, None, :]).all(-1)
            self._counts_2 = self._counts_2 + torch.stack([(wanted_TK >= 0).sum(), differs_TK.sum()])
        return scores_TE.gather(1, chosen_TK), chosen_TK


def install_replay(core: GPTModel) -> list[ExpertReplay]:
    """Has the routers of this stage ask for the rollout's choices; returns what they ask."""
    replays = []
    for layer in core.decoder.layers:
        replays.append(ExpertReplay(layer.layer_number - 1))
        layer.mlp.router.router_replay = replays[-1]
    return replays


def reduce_apart(parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> None:
    """Marks the experts' weights, whose gradients are summed over the ranks that hold the same experts.

    Megatron marks them with several expert-parallel ranks only, and takes tensor-parallel ranks for alike with one.
    """
    for name, parameter in parameters:
        if ".experts." in name:
            parameter.allreduce = False  # type: ignore[attr-defined]
