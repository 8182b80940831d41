"""Packed micro-batches: sequences laid end to end, and the padded view of them that attention works on.

Everything but attention runs on the T packed tokens without padding. Attention gathers them into a padded
[n, L] batch, where right padding cannot reach a real token under a causal mask, and scatters the result back.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from megatron.core.packed_seq_params import PackedSeqParams

IntArray = npt.NDArray[np.int64]


@dataclass
class PackedLayout(PackedSeqParams):  # type: ignore[misc]  # megatron.core is untyped
    """Where each packed token sits; travels through Megatron as its `packed_seq_params`.

    `qkv_format` stays "sbhd" (batch 1), so Megatron itself never splits the pack.
    """

    # Position of each token in its own sequence, [T].
    positions_T: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    # Sequence of each token, [T].
    sequence_T: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    # Row of each token in the padded batch flattened to [n * L], [T].
    rows_T: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    sequences: int = 0
    longest: int = 0

    @property
    def is_dense(self) -> bool:
        """Whether all sequences are equally long, so that no padding is needed."""
        return self.sequences * self.longest == len(self.rows_T)


def lay_out(lengths: list[int], device: torch.device) -> PackedLayout:
    """The layout of sequences of these lengths, laid end to end."""
    lengths_N = np.asarray(lengths, dtype=np.int64)
    starts_N = np.cumsum(lengths_N) - lengths_N
    sequence_T = np.repeat(np.arange(len(lengths)), lengths_N)
    positions_T = np.arange(int(lengths_N.sum())) - starts_N[sequence_T]
    longest = int(lengths_N.max())

    def put(array: IntArray) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    return PackedLayout(
        qkv_format="sbhd",
        positions_T=put(positions_T),
        sequence_T=put(sequence_T),
        rows_T=put(sequence_T * longest + positions_T),
        sequences=len(lengths),
        longest=longest,
    )


class _Pad(torch.autograd.Function):
    """[T, ...] -> [n, L, ...] with zeros for padding. A gather backward is much faster than index_add."""

    @staticmethod
    def forward(ctx: Any, x_T: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
        ctx.layout = layout
        return _scatter(x_T, layout)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0].flatten(0, 1).index_select(0, ctx.layout.rows_T), None


class _Unpad(torch.autograd.Function):
    """[n, L, ...] -> [T, ...]; padding gets a zero gradient."""

    @staticmethod
    def forward(ctx: Any, x_NL: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
        ctx.layout = layout
        return x_NL.flatten(0, 1).index_select(0, layout.rows_T)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _scatter(gradients[0], ctx.layout), None


def _scatter(x_T: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
    padded = x_T.new_zeros(layout.sequences * layout.longest, *x_T.shape[1:])
    return padded.index_copy_(0, layout.rows_T, x_T).view(layout.sequences, layout.longest, *x_T.shape[1:])


def pad(x_T: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
    """Packed [T, ...] as a padded batch [n, L, ...]."""
    if layout.is_dense:
        return x_T.reshape(layout.sequences, layout.longest, *x_T.shape[1:])
    padded: torch.Tensor = _Pad.apply(x_T, layout)  # type: ignore[no-untyped-call]
    return padded


def unpad(x_NL: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
    """The real tokens of a padded batch [n, L, ...], packed: [T, ...]."""
    if layout.is_dense:
        return x_NL.flatten(0, 1)
    packed: torch.Tensor = _Unpad.apply(x_NL, layout)  # type: ignore[no-untyped-call]
    return packed
