"""Mixture of experts on tensor-parallel ranks that all hold every token."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from copy import copy
from typing import Any

import torch
import torch.nn.functional as F
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


def reduce_apart(parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> None:
    """Marks the experts' weights, whose gradients are summed over the ranks that hold the same experts.

    Megatron marks them with several expert-parallel ranks only, and takes tensor-parallel ranks for alike with one.
    """
    for name, parameter in parameters:
        if ".experts." in name:
            parameter.allreduce = False  # type: ignore[attr-defined]
