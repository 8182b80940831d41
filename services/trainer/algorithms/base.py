"""Bases of the algorithms: advantages from the rewards of a group, and a loss on the log-probabilities of tokens; for
supervised stages a loss on the log-probabilities of an example's responses.

Everything else is the same for all algorithms and lives in `training.py` and `fine_tuning.py`: reading and packing
tokens, the pass that computes reference log-probabilities, masks, importance weights, optimizer steps and metrics.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from services.kit.config import Model

# The command line checks an algorithm's settings without it.
if TYPE_CHECKING:
    import torch

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class LossBatch:
    """Input of a loss: a micro-batch of T predicted tokens of N trajectories, laid end to end."""

    logprobs_T: torch.Tensor
    """log pi of each token at the sampling temperature, with gradient; 0 for tokens that are not trained."""
    reference_logprobs_T: torch.Tensor
    """The same under the weights that open the iteration, without gradient."""
    trained_T: torch.Tensor
    """Whether the token takes part in the loss; prompt tokens and stale tokens do not."""
    importance_T: torch.Tensor
    """Truncated importance weight of each token against the rollout's log-probability; ones when `tis_cap` is 0."""
    sequence_T: torch.Tensor
    """Trajectory of each token, from 0."""
    advantages_N: torch.Tensor
    """What `Algorithm.advantages` returned for each trajectory."""
    weights_N: torch.Tensor
    """1 / (trajectories in the group * groups in the minibatch): sums of these are means over groups of means."""
    trained_tokens: int
    """Tokens in the loss of the whole minibatch, on all ranks: divide by it for a mean over tokens."""
    token_scale: float
    """The divisor of sums over a trajectory's tokens; see UpdateSettings."""

    def sum_by_trajectory(self, values_T: torch.Tensor) -> torch.Tensor:
        """Returns the sum of `values_T` over the trained tokens of each trajectory, [N]."""
        zeros_N = values_T.new_zeros(len(self.advantages_N))
        return zeros_N.index_add(0, self.sequence_T, values_T * self.trained_T)

    @property
    def tokens_N(self) -> torch.Tensor:
        """Number of trained tokens of each trajectory, at least 1."""
        return self.sum_by_trajectory(self.logprobs_T.new_ones(len(self.logprobs_T))).clamp(min=1)


class Algorithm(ABC):
    """Base of the algorithms. A subclass nests its `Settings` and is registered in `algorithms/__init__.py`."""

    skips_zero_advantages: ClassVar[bool] = False
    """Whether trajectories whose advantage is 0 take no part: they are not read, and their tokens do not count. Then a
    group without a correct response is left out of training, and not one with equal rewards."""

    class Settings(Model):
        """Settings of the algorithm, each field with a docstring; unknown ones are refused."""

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    @abstractmethod
    def advantages(self, rewards_K: FloatArray) -> FloatArray:
        """Returns the advantage of each of the K trajectories of one group, in their order."""

    @abstractmethod
    def loss(self, batch: LossBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Returns this micro-batch's part of the loss, and sums over its trained tokens by the name of a metric.

        The parts of a minibatch are added up over micro-batches and ranks, without further scaling. A sum called
        `name` is reported as `train/name`, its mean over the trained tokens of the iteration.
        """


@dataclass(frozen=True)
class ExampleBatch:
    """Input of a supervised loss: a micro-batch of T predicted tokens of the K responses of P examples.

    They are laid end to end: the first response of each example, then the second of each.
    """

    logprobs_T: torch.Tensor
    """log pi of each token, with gradient; 0 for those of prompts."""
    trained_T: torch.Tensor
    """Whether the token is one of a response."""
    sequence_T: torch.Tensor
    """Sequence of each token, from 0."""
    responses: int
    """K."""
    reference_KP: torch.Tensor | None
    """Sums of log pi over each response under the weights that the job starts from; None where none are needed."""
    examples: int
    """Examples of the whole step, on all ranks."""
    trained_tokens: int
    """Tokens of responses of the whole step, on all ranks."""

    @property
    def sums_KP(self) -> torch.Tensor:
        """Sum of log pi over the tokens of each response."""
        return self._sum(self.logprobs_T * self.trained_T)

    @property
    def tokens_KP(self) -> torch.Tensor:
        """Number of tokens of each response."""
        return self._sum(self.trained_T.to(self.logprobs_T.dtype))

    def _sum(self, values_T: torch.Tensor) -> torch.Tensor:
        sums_N = values_T.new_zeros(int(self.sequence_T[-1]) + 1).index_add(0, self.sequence_T, values_T)
        return sums_N.view(self.responses, -1)


class SupervisedAlgorithm(ABC):
    """Base of the algorithms of supervised stages. A subclass nests its `Settings` and is registered in
    `algorithms/__init__.py`; `RESPONSE_KEYS` in `perigee/chat.py` has the responses that its examples hold.
    """

    needs_reference: ClassVar[bool] = False
    """Whether the loss wants the log-probabilities under the weights that the job starts from."""

    class Settings(Model):
        """Settings of the algorithm, each field with a docstring; unknown ones are refused."""

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    @abstractmethod
    def loss(self, batch: ExampleBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Returns this micro-batch's part of the step's loss, and sums over its examples by the name of a metric.

        The parts of a step are added up over micro-batches and ranks, without further scaling.
        """
