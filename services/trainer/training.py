"""An iteration of reinforcement learning.

Who trains what is planned from token counts alone, so that each data-parallel replica reads the tokens of its own
sequences and no others.
"""

from __future__ import annotations

import math
import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from perigee.errors import (
    DataLossError,
    FieldViolation,
    InvalidArgumentError,
    PerigeeError,
)
from perigee.trainer.v1 import trainer_pb2 as pb
from services.kit.tracing import span
from services.trainer.algorithms import make_algorithm
from services.trainer.algorithms.base import Algorithm, LossBatch
from services.trainer.data import Trajectory, unpack_experts
from services.trainer.job import SLICE, JobContext, find_optimizer_violations
from services.trainer.megatron.model import Evaluated, Policy
from services.trainer.megatron.optimizer import scheduled_rate
from services.trainer.packing import MicroBatch, TokenSequence, make_micro_batches, pack_sequences

# Reads trajectories of a run by id, given the tokens that they have together; raises a PerigeeError when one cannot be
# read.
Reader = Callable[[str, Sequence[str], int], Mapping[str, Trajectory]]


def check_training(algorithm: pb.Algorithm, update: pb.UpdateSettings, optimizer: pb.Optimizer) -> Algorithm:
    """Returns the algorithm; raises InvalidArgumentError that names every field out of range."""
    violations = [*_find_update_violations(update), *find_optimizer_violations(optimizer)]
    try:
        made = make_algorithm(algorithm)
    except InvalidArgumentError as error:
        raise InvalidArgumentError.for_fields([*error.violations, *violations]) from error
    if violations:
        raise InvalidArgumentError.for_fields(violations)
    return made


def _find_update_violations(update: pb.UpdateSettings) -> Iterator[FieldViolation]:
    """Yields the fields of the settings common to all algorithms that are out of range."""
    for name in ("token_scale", "temperature"):
        value = getattr(update, name)
        if not math.isfinite(value) or value <= 0:
            yield FieldViolation(f"update.{name}", f"{value} is not a number above 0")
    if not math.isfinite(update.tis_cap) or update.tis_cap < 0:
        yield FieldViolation("update.tis_cap", f"{update.tis_cap} is not a number of at least 0")
    for name in ("minibatches", "max_tokens_per_microbatch"):
        if getattr(update, name) < 1:
            yield FieldViolation(f"update.{name}", "has to be at least 1")


@dataclass(frozen=True)
class PlannedTrajectory:
    """A trajectory in the loss, as the request describes it."""

    trajectory_id: str
    prompt_tokens: int
    response_tokens: int
    trained_tokens: int
    advantage: float
    # 1 / (trajectories in its group * groups in its minibatch).
    weight: float


@dataclass(frozen=True)
class PlannedStep:
    """An optimizer step: `packs_by_rank[rank][micro-batch]` lists the trajectories that go together."""

    packs_by_rank: list[list[list[PlannedTrajectory]]]
    trained_tokens: int


def plan_steps(request: pb.TrainRequest, algorithm: Algorithm, ranks: int, seed: int) -> list[PlannedStep]:
    """Plans the optimizer steps over the request's groups for `ranks` data-parallel ranks; the same on every rank.

    A trajectory without trained tokens counts in its group's advantages and size, but is in no step.
    """
    steps = []
    for share in split_groups(len(request.groups), request.update.minibatches, seed):
        planned = [
            trajectory
            for index in share
            for trajectory in _plan_group(request, request.groups[index], algorithm, len(share))
        ]
        lengths = [trajectory.prompt_tokens + trajectory.response_tokens - 1 for trajectory in planned]
        packs_by_rank = [
            [[planned[i] for i in pack] for pack in packs]
            for packs in pack_sequences(lengths, request.update.max_tokens_per_microbatch, ranks)
        ]
        steps.append(PlannedStep(packs_by_rank, sum(trajectory.trained_tokens for trajectory in planned)))
    return steps


def _plan_group(
    request: pb.TrainRequest, group: pb.TrainingGroup, algorithm: Algorithm, groups: int
) -> Iterator[PlannedTrajectory]:
    rewards_K = np.array([trajectory.reward for trajectory in group.trajectories], np.float64)
    for trajectory, advantage in zip(group.trajectories, algorithm.advantages(rewards_K), strict=True):
        trained_tokens = sum(
            tokens
            for version, tokens in trajectory.tokens_by_version.items()
            if request.base_version - version <= request.update.max_staleness
        )
        if algorithm.skips_zero_advantages and advantage == 0:
            trained_tokens = 0
        if trained_tokens:
            yield PlannedTrajectory(
                trajectory_id=trajectory.trajectory_id,
                prompt_tokens=trajectory.prompt_tokens,
                response_tokens=sum(trajectory.tokens_by_version.values()),
                trained_tokens=trained_tokens,
                advantage=float(advantage),
                weight=1 / (len(group.trajectories) * groups),
            )


def make_sequence(trajectory: Trajectory, base_version: int, max_staleness: int) -> TokenSequence:
    """Joins prompt and response; tokens older than the base version by more than `max_staleness` are masked."""
    fresh_T = base_version - trajectory.versions_T <= max_staleness
    # The prediction of token i + 1 is at i, so the response begins one before its first token.
    prompt_T = np.zeros(len(trajectory.prompt_tokens) - 1, np.bool_)
    tokens = np.concatenate([trajectory.prompt_tokens, trajectory.tokens_T])
    return TokenSequence(tokens, np.concatenate([prompt_T, fresh_T]), images=trajectory.images)


def truncate_importance(trainer_T: torch.Tensor, rollout_T: torch.Tensor, cap: float) -> torch.Tensor:
    """Returns min(pi_trainer / pi_rollout, cap) of log-probabilities; ones when `cap` is 0."""
    if cap == 0:
        return torch.ones_like(trainer_T)
    return (trainer_T - rollout_T).exp().clamp(max=cap)


def split_groups(groups: int, minibatches: int, seed: int) -> list[list[int]]:
    """Returns the groups of each optimizer step: shuffled by `seed`, in shares that differ by at most one group."""
    order = np.random.default_rng(seed).permutation(groups)
    return [sorted(int(i) for i in share) for share in np.array_split(order, min(minibatches, groups))]


def train_iteration(
    policy: Policy, context: JobContext, request: pb.TrainRequest, seed: int, read: Reader
) -> pb.TrainResult:
    """Trains the policy on the request's groups; every rank returns the same result.

    Reports TrainResponse messages through `context`. Raises CancelledError or InternalError with the weights
    half-trained: the caller puts them back.
    """
    return _Iteration(policy, context, request, seed).run(read)


@dataclass(frozen=True)
class _Pack:
    """Contents of a micro-batch of trajectories; T predictions of all of them, laid end to end."""

    trajectories: Sequence[PlannedTrajectory]
    sequences: list[TokenSequence]
    # Zero for tokens of prompts.
    rollout_logprobs_T: torch.Tensor
    # Whether the base version sampled the token.
    base_T: torch.Tensor


class _Iteration:
    def __init__(self, policy: Policy, context: JobContext, request: pb.TrainRequest, seed: int) -> None:
        self._policy = policy
        self._context = context
        self._request = request
        self._update = request.update
        self._algorithm = check_training(request.algorithm, request.update, request.optimizer)
        self._steps = plan_steps(request, self._algorithm, policy.dims.data, seed)
        # This rank's packs and their reference log-probabilities, by step and micro-batch; the first step needs none.
        self._packs: list[list[_Pack]] = []
        self._reference: list[list[torch.Tensor]] = [[]]
        self._norms: list[float] = []
        # Whether any rank has trajectories with expert choices.
        self._replays = False
        # Sums over this rank's tokens, and the largest difference between rollout and trainer.
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._largest_difference = 0.0

    def run(self, read: Reader) -> pb.TrainResult:
        """Reads, evaluates the reference, updates, and returns counts and metrics."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        seconds = {}
        for name, phase in (
            ("read", partial(self._read, read)),
            ("reference", self._evaluate_reference),
            ("update", self._take_steps),
        ):
            start = time.monotonic()
            with span(name):
                phase()
            seconds[name] = time.monotonic() - start
        return self._result(seconds)

    def _read(self, read: Reader) -> None:
        """Reads the trajectories of this replica, by one of its ranks."""
        own = [step.packs_by_rank[self._policy.dims.data_rank] for step in self._steps]
        planned = [trajectory for packs in own for pack in packs for trajectory in pack]
        found: Mapping[str, Trajectory] = {}
        error = None
        if self._policy.dims.is_replica_leader:
            try:
                tokens = sum(trajectory.prompt_tokens + trajectory.response_tokens for trajectory in planned)
                found = read(self._request.run_id, [trajectory.trajectory_id for trajectory in planned], tokens)
                self._check_stored(planned, found)
            except PerigeeError as problem:
                error = problem
        self._context.everyone.raise_first(error)
        found = self._context.replica.broadcast(found)
        self._packs = [[self._make_pack(pack, found) for pack in packs] for packs in own]
        if self._policy.shape.experts:
            replayed = [each.trained_tokens for each in planned if found[each.trajectory_id].experts]
            self._replays = any(self._context.everyone.gather(bool(replayed)))
            if self._policy.dims.is_replica_leader:
                self._sums["replayed_tokens"] += sum(replayed)

    def _check_stored(self, planned: Sequence[PlannedTrajectory], found: Mapping[str, Trajectory]) -> None:
        """Raises DataLossError when the buffer holds other tokens than the request says, or another model's experts."""
        for each in planned:
            trajectory = found[each.trajectory_id]
            sequence = self._make_sequence(trajectory)
            stored = (len(trajectory.prompt_tokens), len(trajectory.tokens_T), int(sequence.trained_T.sum()))
            wanted = (each.prompt_tokens, each.response_tokens, each.trained_tokens)
            if stored != wanted:
                raise DataLossError(
                    f"trajectory {each.trajectory_id}: the buffer holds {stored} prompt, response and trained tokens, "
                    f"the request says {wanted}"
                )

    def _make_sequence(self, trajectory: Trajectory) -> TokenSequence:
        sequence = make_sequence(trajectory, self._request.base_version, self._update.max_staleness)
        if not trajectory.experts or not self._policy.shape.experts:
            return sequence
        return replace(sequence, experts_TLK=unpack_experts(trajectory, self._policy.shape))

    def _make_pack(self, pack: Sequence[PlannedTrajectory], found: Mapping[str, Trajectory]) -> _Pack:
        base, sequences, logprobs, sampled_by_base = self._request.base_version, [], [], []
        for planned in pack:
            trajectory = found[planned.trajectory_id]
            sequences.append(self._make_sequence(trajectory))
            prompt_T = np.zeros(planned.prompt_tokens - 1, np.bool_)
            logprobs.append(np.concatenate([prompt_T.astype(np.float32), trajectory.rollout_logprobs_T]))
            sampled_by_base.append(np.concatenate([prompt_T, trajectory.versions_T == base]))
        return _Pack(
            pack,
            sequences,
            torch.from_numpy(np.concatenate(logprobs)),
            torch.from_numpy(np.concatenate(sampled_by_base)),
        )

    def _make_batches(self, step: int) -> list[MicroBatch]:
        """Builds the micro-batches of this rank's packs, as many as the rank with the most has."""
        count = max(len(packs) for packs in self._steps[step].packs_by_rank)
        return make_micro_batches([pack.sequences for pack in self._packs[step]], self._policy.dims.device, count)

    def _evaluate_reference(self) -> None:
        """Computes the log-probabilities under the weights that open the iteration, on the last pipeline stage.

        The first step is taken from these weights, and what it computes of its own tokens is their reference.
        """
        if self._replays:
            self._evaluate_unreplayed()
        for number in range(1, len(self._steps)):
            batches = self._make_batches(number)
            reference = []
            for start in range(0, len(batches), SLICE):
                self._context.check()
                for found in self._policy.evaluate(batches[start : start + SLICE], self._update.temperature):
                    if not found.batch.is_filler:
                        reference.append(found.logprobs_T.cpu())
                        self._describe(number, found)
            self._reference.append(reference)

    def _evaluate_unreplayed(self) -> None:
        """Adds up the distance of the rollout's log-probabilities without replay, over one micro-batch that has it."""
        packs = [pack for pack in self._packs[0] if any(each.experts_TLK is not None for each in pack.sequences)][:1]
        [batch] = make_micro_batches([pack.sequences for pack in packs], self._policy.dims.device)
        found = self._policy.evaluate([replace(batch, experts_TLK=None)], self._update.temperature)
        for each, pack in zip(found, packs, strict=False):
            ratios_B = (each.logprobs_T.cpu() - pack.rollout_logprobs_T)[pack.base_T].double()
            self._sums["unreplayed_difference"] += float(ratios_B.abs().sum())
            self._sums["unreplayed_tokens"] += len(ratios_B)
        # Those of an earlier iteration's last steps.
        self._policy.take_replay_counts()

    def _describe(self, step: int, found: Evaluated) -> None:
        """Adds up entropies, and for tokens of the base version the distance of the rollout's log-probabilities."""
        self._sums["entropy"] += float(found.entropies_T.sum())
        pack = self._packs[step][found.batch.index]
        # log (pi_trainer / pi_rollout) of tokens that the rollout drew, for the k3 estimate of KL(rollout || trainer).
        ratios_B = (found.logprobs_T.detach().cpu() - pack.rollout_logprobs_T)[pack.base_T].double()
        if not len(ratios_B):
            return
        self._sums["base_tokens"] += len(ratios_B)
        self._sums["difference"] += float(ratios_B.abs().sum())
        self._sums["infer_kl"] += float((ratios_B.exp() - 1 - ratios_B).sum())
        self._largest_difference = max(self._largest_difference, float(ratios_B.abs().max()))

    def _take_steps(self) -> None:
        """Takes the optimizer steps and adds up what their losses report."""
        self._policy.begin_job(self._request.optimizer)
        for number in range(len(self._steps)):
            self._context.check()
            self._context.report(pb.TrainResponse(step=number, steps=len(self._steps)))
            rate = scheduled_rate(self._request.optimizer, number, len(self._steps))
            norm, reports = self._policy.step(
                self._make_batches(number),
                self._update.temperature,
                partial(self._loss, number),
                rate,
                entropies=number == 0,
            )
            self._norms.append(norm)
            if number == 0:
                self._count_replayed()
            for report in reports:
                for name, value in report.items():
                    self._sums[name] += value

    def _count_replayed(self) -> None:
        """Adds up the choices replayed so far, all of them under the weights that open the iteration."""
        replayed, differing = self._policy.take_replay_counts()
        self._sums["replayed_choices"] += replayed
        self._sums["differing_choices"] += differing

    def _loss(self, step: int, found: Evaluated) -> tuple[torch.Tensor, dict[str, float]]:
        """Returns the micro-batch's part of the minibatch's loss, and the sums to report of it."""
        batch, logprobs_T = found.batch, found.logprobs_T
        if batch.is_filler:
            return logprobs_T.sum() * 0.0, {}
        pack = self._packs[step][batch.index]
        if step:
            reference_T = self._reference[step][batch.index].to(logprobs_T.device)
        else:
            reference_T = logprobs_T.detach()
            self._describe(step, found)
        rollout_T = pack.rollout_logprobs_T.to(reference_T.device)
        importance_T = truncate_importance(reference_T, rollout_T, self._update.tis_cap)
        loss, sums = self._algorithm.loss(
            LossBatch(
                logprobs_T=logprobs_T,
                reference_logprobs_T=reference_T,
                trained_T=batch.trained_T,
                importance_T=importance_T,
                sequence_T=batch.packed.sequence_T,
                advantages_N=logprobs_T.new_tensor([planned.advantage for planned in pack.trajectories]),
                weights_N=logprobs_T.new_tensor([planned.weight for planned in pack.trajectories]),
                trained_tokens=self._steps[step].trained_tokens,
                token_scale=self._update.token_scale,
            )
        )
        report = {f"algorithm/{name}": float(value.detach()) for name, value in sums.items()}
        report["loss"] = float(loss.detach())
        if self._update.tis_cap:
            report["clipped"] = float(((importance_T == self._update.tis_cap) & batch.trained_T).sum())
        if step:
            ratios_T = ((logprobs_T.detach() - reference_T) * batch.trained_T).double()
            report["kl_k1"], report["kl_k3"] = float(-ratios_T.sum()), float((ratios_T.exp() - 1 - ratios_T).sum())
        return loss, report

    def _result(self, seconds: Mapping[str, float]) -> pb.TrainResult:
        """Gathers the sums of all ranks and returns counts and metrics."""
        trajectories = [trajectory for group in self._request.groups for trajectory in group.trajectories]
        counts = [dict(trajectory.tokens_by_version) for trajectory in trajectories]
        result = pb.TrainResult(
            policy_version=self._request.new_version,
            groups=len(self._request.groups),
            trajectories=len(trajectories),
            trajectories_multi_version=sum(sum(tokens > 0 for tokens in each.values()) > 1 for each in counts),
            tokens=sum(sum(each.values()) for each in counts),
            trained_tokens=sum(step.trained_tokens for step in self._steps),
        )
        result.metrics.update(self._metrics(result, seconds))
        return result

    def _metrics(self, result: pb.TrainResult, seconds: Mapping[str, float]) -> dict[str, float]:
        reports = self._context.everyone.gather(
            (self._sums if self._policy.dims.reports else {}, self._largest_difference, peak_memory_bytes())
        )
        sums: defaultdict[str, float] = defaultdict(float)
        for part, _, _ in reports:
            for name, value in part.items():
                sums[name] += value
        trained = result.trained_tokens
        # Before the first step the policy is the reference: with no other step the KL is unknown.
        later = sum(step.trained_tokens for step in self._steps[1:])
        metrics = {
            "train/loss": sums["loss"] / len(self._steps) if trained else math.nan,
            "train/grad_norm": float(np.mean(self._norms)) if trained else math.nan,
            "train/entropy": _ratio(sums["entropy"], trained),
            "train/kl_k1": _ratio(sums["kl_k1"], later),
            "train/kl_k3": _ratio(sums["kl_k3"], later),
            "train/train_infer_logprob_diff_mean": _ratio(sums["difference"], sums["base_tokens"]),
            "train/train_infer_logprob_diff_max": max(largest for _, largest, _ in reports),
            "train/train_infer_kl": _ratio(sums["infer_kl"], sums["base_tokens"]),
            "train/clip_share": _ratio(sums["clipped"], trained),
            "train/mask_share": 1 - _ratio(trained, result.tokens),
            "train/tokens_per_second": _ratio(self._sequence_tokens(), seconds["reference"] + seconds["update"]),
            "train/peak_memory_bytes": max(peak for _, _, peak in reports),
        }
        if self._policy.shape.experts:
            metrics["train/replay_share"] = _ratio(sums["replayed_tokens"], trained)
        if self._replays:
            metrics["train/replay_diff_share"] = sums["differing_choices"] / sums["replayed_choices"]
            metrics["train/unreplayed_logprob_diff_mean"] = _ratio(
                sums["unreplayed_difference"], sums["unreplayed_tokens"]
            )
        metrics |= {f"time/{name}_seconds": value for name, value in seconds.items()}
        own = {name.removeprefix("algorithm/"): value for name, value in sums.items() if name.startswith("algorithm/")}
        return metrics | {f"train/{name}": _ratio(value, trained) for name, value in own.items()}

    def _sequence_tokens(self) -> int:
        """Returns the tokens, prompts included, of the trajectories in the loss."""
        planned = (t for step in self._steps for packs in step.packs_by_rank for pack in packs for t in pack)
        return sum(trajectory.prompt_tokens + trajectory.response_tokens for trajectory in planned)


def peak_memory_bytes() -> int:
    """Returns the most memory that this process had: of the GPU since its last reset, or resident since its start."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _ratio(value: float, count: float) -> float:
    """Returns a mean; that of nothing is no number."""
    return value / count if count else math.nan
