"""Attention, normalization and rotary embedding of packed micro-batches, in place of those of Megatron's local spec."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from services.trainer.megatron.context import gather_heads, spread_heads
from services.trainer.packing import PackLayout, PaddedBatch, pad, unpad


class PackedAttention(MegatronModule):  # type: ignore[misc]  # megatron.core is untyped
    """Causal attention within each sequence of a pack, by torch's scaled dot product kernels.

    With context parallelism each rank attends over all tokens of the pack with its share of the heads.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale
        self.grouped = config.num_attention_heads != config.num_query_groups
        self.context = parallel_state.get_context_parallel_group() if config.context_parallel_size > 1 else None

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackLayout | None = None,
    ) -> torch.Tensor:
        """Attends from query [T, 1, heads, d] to key and value [T, 1, groups, d]; returns [T, 1, heads * d].

        Tokens behind those of the layout, which fill up the last rank's share, attend to nothing and get zeros.
        """
        assert packed_seq_params is not None, "packed micro-batches only"
        projections = [x.squeeze(1) for x in (query, key, value)]
        if self.context is not None:
            projections = [spread_heads(x, self.context) for x in projections]
        batches = packed_seq_params.batches
        sizes = [len(batch.rows_T) for batch in batches]
        tokens, filled = sum(sizes), len(projections[0])
        parts = zip(*(torch.split(x[:tokens], sizes) for x in projections), batches, strict=True)
        contexts = [self._attend(*part) for part in parts]
        if filled > tokens:
            contexts.append(contexts[0].new_zeros(filled - tokens, contexts[0].shape[1]))
        context_TD = contexts[0] if len(contexts) == 1 else torch.cat(contexts)
        if self.context is not None:
            context_TD = gather_heads(context_TD, self.context)
        return context_TD.unsqueeze(1)

    def _attend(
        self, query_THD: torch.Tensor, key_TGD: torch.Tensor, value_TGD: torch.Tensor, batch: PaddedBatch
    ) -> torch.Tensor:
        query_NHLD, key_NGLD, value_NGLD = (pad(x, batch).transpose(1, 2) for x in (query_THD, key_TGD, value_TGD))
        context_NHLD = F.scaled_dot_product_attention(
            query_NHLD, key_NGLD, value_NGLD, is_causal=True, scale=self.scale, enable_gqa=self.grouped
        )
        return unpad(context_NHLD.transpose(1, 2).flatten(2), batch)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """Returns nothing: attention has no weights."""
        return {}


class SharedRMSNorm(torch.nn.RMSNorm):
    """Normalization whose tokens tensor-parallel ranks share, so that its weight's gradient is summed over them."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class PackedRotary(torch.nn.Module):
    """Rotary angles of each token's position in its own sequence, exact for any pack.

    Megatron's table runs over the pack as a whole; angles at large positions lose float32 precision, which would
    set the trainer's log-probabilities apart from the engine's. With `axes_D` each frequency turns by the position on
    an axis of its own, which differ at the tokens of images.
    """

    def __init__(self, inverse_frequencies_D: torch.Tensor, axes_D: torch.Tensor | None = None) -> None:
        super().__init__()
        self.inverse_frequencies_D = inverse_frequencies_D
        self.axes_D = axes_D

    def get_rotary_seq_len(
        self, inference_context: Any, transformer: Any, transformer_input: Any, config: Any, packed: PackLayout
    ) -> PackLayout:
        """Returns what Megatron hands on to `forward`: the layout, which says more than the length that it asks for."""
        return packed

    def forward(self, packed: PackLayout, packed_seq: bool = False, cp_group: Any = None) -> torch.Tensor:
        """Returns angles [T, 1, 1, d], the two halves alike."""
        frequencies_D = self.inverse_frequencies_D.to(packed.positions_T.device)
        positions_3T = packed.images.positions_3T if packed.images is not None else None
        if self.axes_D is None or positions_3T is None:
            angles_TD = torch.outer(packed.positions_T.float(), frequencies_D)
        else:
            angles_TD = positions_3T.float()[self.axes_D.to(positions_3T.device)].T * frequencies_D
        return torch.cat((angles_TD, angles_TD), dim=-1)[:, None, None, :]
