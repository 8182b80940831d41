"""Direct preference optimization (arXiv 2305.18290), a long2short method of the Kimi k1.5 report (section 2.4)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from services.kit.config import Model
from services.trainer.algorithms.base import ExampleBatch, SupervisedAlgorithm

# The command line checks an algorithm's settings without it.
if TYPE_CHECKING:
    import torch


class DPO(SupervisedAlgorithm):
    """Logistic loss of the margin between chosen and rejected, against the weights that the job starts from."""

    settings: Settings
    needs_reference: ClassVar[bool] = True

    class Settings(Model):
        """Settings of DPO."""

        beta: float = Field(0.1, gt=0, allow_inf_nan=False)
        """Strength of the pull to the weights that the job starts from: the higher, the nearer the policy stays."""
        label_smoothing: float = Field(0.0, ge=0, lt=0.5)
        """Probability that a pair is the wrong way round (conservative DPO)."""
        length_normalized: bool = False
        """Take log-probabilities per token, so that long responses weigh no more than short ones; `beta` is then
        larger, such as 5 (Tulu 3, arXiv 2411.15124)."""
        sft_coef: float = Field(0.0, ge=0, allow_inf_nan=False)
        """Weight of the negative log-likelihood per token of the chosen response, which keeps it from falling."""

    def loss(self, batch: ExampleBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Returns the mean over pairs of -(1 - e) log sigma(m) - e log sigma(-m), plus sft_coef times the likelihood.

        m = beta ((log pi - log pi_ref)(chosen) - (log pi - log pi_ref)(rejected)), e is `label_smoothing`.
        """
        from torch.nn.functional import logsigmoid

        options, sums_KP, tokens_KP = self.settings, batch.sums_KP, batch.tokens_KP
        assert batch.reference_KP is not None
        ratios_KP = sums_KP - batch.reference_KP
        if options.length_normalized:
            ratios_KP = ratios_KP / tokens_KP
        margins_P = options.beta * (ratios_KP[0] - ratios_KP[1])
        smoothing = options.label_smoothing
        losses_P = -(1 - smoothing) * logsigmoid(margins_P) - smoothing * logsigmoid(-margins_P)
        losses_P = losses_P - options.sft_coef * sums_KP[0] / tokens_KP[0]
        return losses_P.sum() / batch.examples, {
            "margin": margins_P.sum(),
            "accuracy": (margins_P > 0).sum(),
            "chosen_logprob": sums_KP[0].sum(),
            "rejected_logprob": sums_KP[1].sum(),
        }
