"""The output head in chunks of tokens: log-probabilities, entropies and gradients without the logits of all tokens.

Logits of a chunk exist twice, in the forward and again in the backward pass, and never for all tokens at once. Tokens
outside the loss do not pass the head. With tensor parallelism V is this rank's share of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

# Large enough that reading the weight and its gradient once for each chunk costs little beside the products.
_CHUNK_BYTES = 384 << 20


class HiddenOutput(torch.nn.Module):
    """Takes the place of GPTModel's output layer, whose weight it keeps: the model's output is its hidden states.

    Where tensor-parallel ranks share the tokens each gets all of them, as each has a share of the vocabulary.
    """

    sequence_parallel = False

    def __init__(self, weight_VD: torch.nn.Parameter | None, gathers: bool) -> None:
        super().__init__()
        # None where the head is the embedding of the same stage.
        self.weight = weight_VD
        self._gathers = gathers

    def forward(
        self, hidden_T1D: torch.Tensor, weight: Any = None, runtime_gather_output: Any = None
    ) -> tuple[torch.Tensor, None]:
        """Returns the hidden states, and no bias."""
        if self._gathers:
            # The gradient that the head returns is that of all ranks.
            hidden_T1D = gather_from_sequence_parallel_region(hidden_T1D, tensor_parallel_output_grad=False)
        return hidden_T1D, None


@dataclass(frozen=True)
class Head:
    """Head of a policy that samples at a temperature; `group` holds the ranks that share the vocabulary."""

    weight_VD: torch.Tensor
    temperature: float = 1.0
    group: dist.ProcessGroup | None = None
    chunk_bytes: int = _CHUNK_BYTES
    """Logits that exist at once."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of logits and of what is made of them: that of the weight, or float32 where it has fewer bits."""
        return torch.promote_types(self.weight_VD.dtype, torch.float32)

    def evaluate(
        self, hidden_TD: torch.Tensor, targets_T: torch.Tensor, trained_T: torch.Tensor, *, with_entropies: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns log softmax(logits / temperature) at the targets with gradient, and entropies in nats without.

        Both are of the head's `dtype`, and 0 where not trained; entropies are 0 unless asked for. The weight's gradient
        is added to its `main_grad` where it has one, as Megatron's own layers with fused accumulation do: another
        tensor of its size would come to more than the logits of a chunk.
        """
        rows = trained_T.nonzero()[:, 0]
        found: tuple[torch.Tensor, torch.Tensor] = _Evaluation.apply(  # type: ignore[no-untyped-call]
            hidden_TD, self.weight_VD, targets_T, rows, self, with_entropies
        )
        return found

    def describe(
        self, hidden_TD: torch.Tensor, targets_T: torch.Tensor, rows: torch.Tensor, *, with_entropies: bool
    ) -> torch.Tensor:
        """Returns [3, T]: log-probability, log of the sum of exponentials, and entropy (else 0) of the chosen rows."""
        found_3T = hidden_TD.new_zeros(3, len(hidden_TD), dtype=self.dtype)
        for rows_C in self.chunks(rows):
            logits_CV = self.logits(hidden_TD[rows_C])
            top_C = self.reduce(logits_CV.amax(-1), dist.ReduceOp.MAX)
            shifted_CV = logits_CV.sub_(top_C[:, None])
            columns_C1, owned_C1 = self.locate(targets_T[rows_C])
            picked_C = (shifted_CV.gather(1, columns_C1) * owned_C1)[:, 0]
            weights_CV = shifted_CV.exp() if with_entropies else shifted_CV.exp_()
            sum_C = weights_CV.sum(-1)
            weighted_C = weights_CV.mul_(shifted_CV).sum(-1) if with_entropies else torch.zeros_like(sum_C)
            picked_C, sum_C, weighted_C = self.reduce(torch.stack([picked_C, sum_C, weighted_C]))
            log_C = sum_C.log()
            # With w = exp(x - top): H = log sum w - sum (w * (x - top)) / sum w.
            entropy_C = log_C - weighted_C / sum_C if with_entropies else weighted_C
            found_3T[:, rows_C] = torch.stack([picked_C - log_C, top_C + log_C, entropy_C])
        return found_3T

    def chunks(self, rows: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yields the rows in chunks, none when there are no rows."""
        size = max(1, self.chunk_bytes // (self.dtype.itemsize * len(self.weight_VD)))
        return (rows[start : start + size] for start in range(0, len(rows), size))

    def logits(self, hidden_CD: torch.Tensor) -> torch.Tensor:
        """Returns logits / temperature, in memory of their own."""
        logits_CV = (hidden_CD.to(self.weight_VD.dtype) @ self.weight_VD.T).to(self.dtype)
        return logits_CV if self.temperature == 1.0 else logits_CV.div_(self.temperature)

    def locate(self, targets_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the column of each target in this rank's share [C, 1], and whether the target is in it."""
        first = 0 if self.group is None else dist.get_rank(self.group) * len(self.weight_VD)
        columns_C1 = targets_C[:, None] - first
        owned_C1 = (columns_C1 >= 0) & (columns_C1 < len(self.weight_VD))
        return columns_C1.clamp(0, len(self.weight_VD) - 1), owned_C1

    def reduce(self, values: torch.Tensor, operation: Any = dist.ReduceOp.SUM) -> torch.Tensor:
        """Returns the values, reduced in place over the ranks that share the vocabulary."""
        if self.group is not None:
            dist.all_reduce(values, operation, group=self.group)
        return values


class _Evaluation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        targets_T: torch.Tensor,
        rows: torch.Tensor,
        head: Head,
        with_entropies: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        found_3T = head.describe(hidden_TD, targets_T, rows, with_entropies=with_entropies)
        ctx.save_for_backward(hidden_TD, targets_T, rows, found_3T[1])
        # The parameter itself, which has `main_grad`.
        ctx.head = head
        entropies_T = found_3T[2].clone()
        ctx.mark_non_differentiable(entropies_T)
        return found_3T[0].clone(), entropies_T

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_TD, targets_T, rows, normalizers_T = ctx.saved_tensors
        head: Head = ctx.head
        weight_VD = head.weight_VD
        hidden_gradient_TD = torch.zeros_like(hidden_TD)
        main_gradient_VD = getattr(weight_VD, "main_grad", None)
        gradient_VD = main_gradient_VD
        if gradient_VD is None:
            gradient_VD = torch.zeros_like(weight_VD, dtype=head.dtype)
        for rows_C in head.chunks(rows):
            hidden_CD = hidden_TD[rows_C].to(weight_VD.dtype)
            # d log p / d logits = one-hot - softmax, here with its sign turned; [C, V] is written as seldom as can be.
            scale_C1 = -gradients[0][rows_C, None] / head.temperature
            columns_C1, owned_C1 = head.locate(targets_T[rows_C])
            error_CV = head.logits(hidden_CD).sub_(normalizers_T[rows_C, None]).exp_()
            error_CV = error_CV.scatter_add_(1, columns_C1, -owned_C1.to(head.dtype)).to(weight_VD.dtype)
            hidden_gradient_TD[rows_C] = (error_CV @ weight_VD * scale_C1).to(hidden_TD.dtype)
            scaled_CD = (hidden_CD * scale_C1).to(weight_VD.dtype)
            if gradient_VD.dtype == weight_VD.dtype:
                gradient_VD.addmm_(error_CV.T, scaled_CD)
            else:
                gradient_VD += error_CV.T @ scaled_CD
        head.reduce(hidden_gradient_TD)
        weight_gradient_VD = gradient_VD.to(weight_VD.dtype) if main_gradient_VD is None else None
        return hidden_gradient_TD, weight_gradient_VD, None, None, None, None
