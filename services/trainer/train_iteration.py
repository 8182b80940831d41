"""One iteration of policy mirror descent: reference pass, then optimizer steps over shares of the groups."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from perigee.errors import InvalidArgumentError
from services.trainer.batches import MicroBatch, TokenSequence, make_micro_batches
from services.trainer.jobs import JobContext, check_finite
from services.trainer.mirror_descent import (
    Baseline,
    compute_advantages,
    mask_stale_tokens,
    policy_mirror_descent,
    truncate_importance,
)
from services.trainer.optimizer import AdamW, scheduled_rate
from services.trainer.parallel import Control, Layout
from services.trainer.policy import Policy
from services.trainer.trajectories import Group, Trajectory

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class MirrorDescent:
    """Settings of policy mirror descent; see the design's section on the algorithm."""

    tau: float
    baseline: Baseline
    minibatches: int
    max_tokens_per_microbatch: int
    max_staleness: int
    token_scale: float
    temperature: float
    tis_cap: float
    optimizer: AdamW

    def validate(self) -> None:
        """Raises InvalidArgumentError naming the first field out of range."""
        for field in ("token_scale", "temperature"):
            if not math.isfinite(getattr(self, field)) or getattr(self, field) <= 0:
                raise InvalidArgumentError.of(f"algorithm.{field}", f"{getattr(self, field)} is not a number above 0")
        for field in ("tau", "tis_cap"):
            if not math.isfinite(getattr(self, field)) or getattr(self, field) < 0:
                raise InvalidArgumentError.of(
                    f"algorithm.{field}", f"{getattr(self, field)} is not a number of at least 0"
                )
        for field in ("minibatches", "max_tokens_per_microbatch"):
            if getattr(self, field) < 1:
                raise InvalidArgumentError.of(f"algorithm.{field}", "has to be at least 1")
        if self.baseline is Baseline.LOG_MEAN_EXP and self.tau == 0:
            raise InvalidArgumentError.of("algorithm.tau", "has to be above 0 for the log-mean-exp baseline")
        self.optimizer.validate()


@dataclass(frozen=True)
class IterationResult:
    """What an iteration reports; see TrainResult in the contract."""

    trajectories: int
    trajectories_multi_version: int
    tokens: int
    trained_tokens: int
    loss: float
    gradient_norm: float
    policy_shift: float
    max_logprob_difference: float
    mean_logprob_difference: float
    reference_seconds: float
    update_seconds: float


@dataclass(frozen=True)
class Example:
    """A trajectory in the loss: its tokens and mask, its advantage, and its share of its group (1 / k)."""

    trajectory: Trajectory
    sequence: TokenSequence
    group: int
    advantage: float
    share: float


def train_iteration(
    policy: Policy,
    control: Control,
    groups: Sequence[Group],
    base_version: int,
    settings: MirrorDescent,
    seed: int,
    context: JobContext,
) -> IterationResult:
    """Trains the policy on the groups; a collective of all ranks, which get the same arguments and the same result.

    Reports (step, steps) through `context`. Raises CancelledError or InternalError with the weights half-trained: the
    caller puts them back.
    """
    start = time.monotonic()
    examples = prepare_examples(groups, base_version, settings)
    reference = _compute_reference(policy, control, examples, settings, context)
    examples = [_weigh(example, reference[i], settings.tis_cap) for i, example in enumerate(examples)]
    differences = [_engine_differences(example, reference[i], base_version) for i, example in enumerate(examples)]
    differences_T = np.concatenate([*differences, np.zeros(0, np.float32)])
    reference_seconds = time.monotonic() - start

    start = time.monotonic()
    losses, norms, shift = _update(policy, control, examples, reference, len(groups), settings, seed, context)
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    return IterationResult(
        trajectories=len(trajectories),
        trajectories_multi_version=sum(len(np.unique(trajectory.versions_T)) > 1 for trajectory in trajectories),
        tokens=sum(len(trajectory.tokens_T) for trajectory in trajectories),
        trained_tokens=sum(int(example.sequence.trained_T.sum()) for example in examples),
        loss=float(np.mean(losses)),
        gradient_norm=float(np.mean(norms)),
        policy_shift=shift,
        max_logprob_difference=float(differences_T.max(initial=0.0)),
        mean_logprob_difference=float(differences_T.mean()) if len(differences_T) else 0.0,
        reference_seconds=reference_seconds,
        update_seconds=time.monotonic() - start,
    )


def prepare_examples(groups: Sequence[Group], base_version: int, settings: MirrorDescent) -> list[Example]:
    """The trajectories that have trained tokens; one without any counts in its group's baseline and k alone."""
    examples = []
    for index, group in enumerate(groups):
        advantages = compute_advantages(group.rewards, settings.baseline, settings.tau)
        for trajectory, advantage in zip(group.trajectories, advantages, strict=True):
            tokens = np.concatenate([trajectory.prompt_tokens, trajectory.tokens_T])
            trained_T = np.zeros(len(tokens) - 1, np.bool_)
            # The prediction of token i + 1 is at i, so the response begins one before its first token.
            trained_T[len(trajectory.prompt_tokens) - 1 :] = mask_stale_tokens(
                trajectory.versions_T, base_version, settings.max_staleness
            )
            if trained_T.any():
                sequence = TokenSequence(tokens, trained_T, np.ones(len(trained_T), np.float32))
                examples.append(Example(trajectory, sequence, index, advantage, 1 / len(group.trajectories)))
    return examples


def split_groups(groups: int, minibatches: int, seed: int) -> list[list[int]]:
    """Group indices of each optimizer step: shuffled by `seed`, in shares that differ by at most one group."""
    order = np.random.default_rng(seed).permutation(groups)
    return [sorted(int(i) for i in share) for share in np.array_split(order, min(minibatches, groups))]


def _compute_reference(
    policy: Policy, control: Control, examples: Sequence[Example], settings: MirrorDescent, context: JobContext
) -> list[FloatArray]:
    """log pi_ref of each example's predictions, under the weights that open the iteration; on every rank."""
    layout = policy.layout
    batches = _batches(examples, range(len(examples)), settings, layout)
    own: list[tuple[int, FloatArray]] = []
    # Slices keep the job stoppable; ranks of one pipeline have the same slices.
    for start in range(0, max(control.gather(len(batches))), _REFERENCE_SLICE):
        context.check(control)
        some = batches[start : start + _REFERENCE_SLICE]
        for batch, logprobs_T in policy.evaluate(some, settings.temperature) if some else ():
            pieces = torch.split(logprobs_T.cpu(), torch.bincount(batch.layout.sequence_T.cpu()).tolist())
            own += [(index, piece.numpy()) for index, piece in zip(batch.indices, pieces, strict=False)]
    by_index = {i: values for part in control.gather(own if layout.tensor_rank == 0 else []) for i, values in part}
    return [by_index[i] for i in range(len(examples))]


_REFERENCE_SLICE = 8


def _weigh(example: Example, reference_T: FloatArray, cap: float) -> Example:
    """The example with truncated importance weights on its response tokens."""
    if cap == 0:
        return example
    response = len(example.trajectory.prompt_tokens) - 1
    importance_T = example.sequence.importance_T.copy()
    importance_T[response:] = truncate_importance(reference_T[response:], example.trajectory.engine_logprobs_T, cap)
    sequence = TokenSequence(example.sequence.tokens, example.sequence.trained_T, importance_T)
    return Example(example.trajectory, sequence, example.group, example.advantage, example.share)


def _engine_differences(example: Example, reference_T: FloatArray, base_version: int) -> FloatArray:
    """|engine - trainer| log-probability over the tokens that the base version sampled."""
    trajectory = example.trajectory
    response_T = reference_T[len(trajectory.prompt_tokens) - 1 :]
    differences_T: FloatArray = np.abs(response_T - trajectory.engine_logprobs_T)[trajectory.versions_T == base_version]
    return differences_T


def _update(
    policy: Policy,
    control: Control,
    examples: Sequence[Example],
    reference: Sequence[FloatArray],
    groups: int,
    settings: MirrorDescent,
    seed: int,
    context: JobContext,
) -> tuple[list[float], list[float], float]:
    """The optimizer steps; returns losses and gradient norms by step, and the mean shift of log pi after the first."""
    reference_sums = [float(r[e.sequence.trained_T].sum()) for e, r in zip(examples, reference, strict=True)]
    policy.begin_job(settings.optimizer)
    shares = split_groups(groups, settings.minibatches, seed)
    norms: list[float] = []
    own_reports: list[list[tuple[float, list[float]]]] = []
    for step, share in enumerate(shares):
        context.check(control)
        context.report((step, len(shares)))
        chosen = [i for i, example in enumerate(examples) if example.group in set(share)]
        batches = _batches(examples, chosen, settings, policy.layout)

        def loss(batch: MicroBatch, logprobs_T: torch.Tensor, groups: int = len(share)) -> tuple[torch.Tensor, Any]:
            return _batch_loss(batch, logprobs_T, examples, reference_sums, groups, settings)

        norm, reports = policy.step(
            batches, settings.temperature, loss, scheduled_rate(settings.optimizer, step, len(shares))
        )
        check_finite("gradient norm", norm)
        norms.append(norm)
        own_reports.append(reports)
    gathered = control.gather(own_reports if policy.layout.tensor_rank == 0 else [[] for _ in shares])
    by_step = [[report for part in gathered for report in part[step]] for step in range(len(shares))]
    losses = [sum(value for value, _ in reports) for reports in by_step]
    shifts = [shift for reports in by_step[1:] for _, values in reports for shift in values]
    return losses, norms, float(np.mean(shifts)) if shifts else 0.0


def _batch_loss(
    batch: MicroBatch,
    logprobs_T: torch.Tensor,
    examples: Sequence[Example],
    reference_sums: Sequence[float],
    groups: int,
    settings: MirrorDescent,
) -> tuple[torch.Tensor, tuple[float, list[float]]]:
    """The micro-batch's part of the minibatch's loss, and (its value, each trajectory's log pi - log pi_ref)."""
    if not batch.indices:
        return logprobs_T.sum() * 0.0, (0.0, [])
    trained_T = logprobs_T * batch.trained_T
    zeros_N = logprobs_T.new_zeros(batch.layout.sequences)
    policy_sums_N = zeros_N.index_add(0, batch.layout.sequence_T, trained_T)
    weighted_sums_N = zeros_N.index_add(0, batch.layout.sequence_T, trained_T * batch.importance_T)
    reference_sums_N, advantages_N, weights_N = logprobs_T.new_tensor(
        [
            [reference_sums[i] for i in batch.indices],
            [examples[i].advantage for i in batch.indices],
            [examples[i].share / groups for i in batch.indices],
        ]
    )
    value = policy_mirror_descent(
        policy_sums_N, weighted_sums_N, reference_sums_N, advantages_N, weights_N, settings.tau, settings.token_scale
    )
    return value, (float(value.detach()), (policy_sums_N.detach() - reference_sums_N).tolist())


def _batches(
    examples: Sequence[Example], chosen: Sequence[int], settings: MirrorDescent, layout: Layout
) -> list[MicroBatch]:
    sequences = [example.sequence for example in examples]
    return make_micro_batches(
        sequences, chosen, settings.max_tokens_per_microbatch, layout.data, layout.data_rank, layout.device
    )
