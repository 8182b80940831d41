"""The policy on one rank: Megatron model and optimizer, log-probabilities of packed tokens, and optimizer steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

from services.trainer.batches import MicroBatch
from services.trainer.hf_config import ModelShape
from services.trainer.hf_folder import TensorReader
from services.trainer.hf_weights import collect_weights, load_weights
from services.trainer.model import build_model, core_of
from services.trainer.optimizer import AdamW, build_optimizer, reset_optimizer, set_learning_rate
from services.trainer.parallel import Layout

# The loss of a micro-batch from its log-probabilities [T], and what is to be reported of it.
LossFunction = Callable[[MicroBatch, torch.Tensor], tuple[torch.Tensor, Any]]


class Policy:
    """The trained model's part on this rank. Jobs are collective: every rank calls their methods alike."""

    def __init__(
        self, shape: ModelShape, layout: Layout, dtype: torch.dtype, max_sequence_length: int, recompute: bool = False
    ) -> None:
        self.shape = shape
        self.layout = layout
        self.model = build_model(shape, layout, dtype, max_sequence_length, recompute)
        self.core = core_of(self.model)
        self.optimizer = build_optimizer(self.model, bf16=dtype is torch.bfloat16)
        self._run_schedule = get_forward_backward_func()

    def load(self, folder: Path) -> None:
        """Takes the weights of a Hugging Face folder."""
        load_weights(self.core, self.shape, self.layout, TensorReader(folder).read)
        self.optimizer.reload_model_params()

    def collect(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The whole policy as Hugging Face tensors; see `collect_weights`."""
        return collect_weights(self.core, self.shape, self.layout)

    def take_snapshot(self) -> list[torch.Tensor]:
        """Copies of this rank's weights, to go back to when a job fails."""
        return [parameter.detach().clone() for parameter in self.core.parameters()]

    @torch.no_grad()
    def restore_snapshot(self, snapshot: Sequence[torch.Tensor]) -> None:
        """Puts the weights of a snapshot back."""
        for parameter, saved in zip(self.core.parameters(), snapshot, strict=True):
            parameter.copy_(saved)
        self.optimizer.reload_model_params()

    def begin_job(self, settings: AdamW) -> None:
        """Starts a job with a fresh optimizer."""
        reset_optimizer(self.optimizer, settings)

    def evaluate(self, batches: Sequence[MicroBatch], temperature: float) -> list[tuple[MicroBatch, torch.Tensor]]:
        """Log-probabilities [T] of each micro-batch's targets, on ranks of the last pipeline stage; empty on others."""

        def keep(batch: MicroBatch, logprobs_T: torch.Tensor) -> tuple[torch.Tensor, Any]:
            return logprobs_T.sum(), (batch, logprobs_T.detach())

        with torch.no_grad():
            return self._run(batches, temperature, keep, forward_only=True)

    def step(
        self, batches: Sequence[MicroBatch], temperature: float, loss: LossFunction, learning_rate: float
    ) -> tuple[float, list[Any]]:
        """One optimizer step on the summed losses of all micro-batches of all ranks.

        Returns the gradient norm before clipping, and the reports of this rank's micro-batches (last stage only).
        """
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        reports = self._run(batches, temperature, loss, forward_only=False)
        set_learning_rate(self.optimizer, learning_rate)
        _, norm, _ = self.optimizer.step()
        return float(norm), reports

    def _run(
        self, batches: Sequence[MicroBatch], temperature: float, loss: LossFunction, *, forward_only: bool
    ) -> list[Any]:
        def forward_step(
            source: Iterator[MicroBatch], model: Any
        ) -> tuple[torch.Tensor, Callable[[torch.Tensor], Any]]:
            batch = next(source)
            output = model(batch.inputs_T[None], None, None, packed_seq_params=batch.layout)

            def finish(logits_1TV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Any]:
                logprobs_T = _target_logprobs(logits_1TV[0], batch.targets_T, temperature, self.layout.tensor)
                value, report = loss(batch, logprobs_T)
                return value, torch.zeros((), dtype=torch.int), report

            return output, finish

        reports: list[Any] = self._run_schedule(
            forward_step_func=forward_step,
            data_iterator=iter(batches),
            model=[self.model],
            num_microbatches=len(batches),
            seq_length=max(len(batch.inputs_T) for batch in batches),
            micro_batch_size=1,
            forward_only=forward_only,
        )
        return reports


def _target_logprobs(logits_TV: torch.Tensor, targets_T: torch.Tensor, temperature: float, ranks: int) -> torch.Tensor:
    """log softmax(logits / temperature) at the targets, in float32; V is this rank's share of the vocabulary."""
    scaled_TV = logits_TV.float() if temperature == 1.0 else logits_TV.float() / temperature
    if ranks == 1:
        return -F.cross_entropy(scaled_TV, targets_T, reduction="none")
    # Megatron's loss overwrites its input.
    owned_TV = scaled_TV.clone(memory_format=torch.contiguous_format)
    logprobs_T: torch.Tensor = -vocab_parallel_cross_entropy(owned_TV, targets_T)
    return logprobs_T
