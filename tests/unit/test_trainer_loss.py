"""Policy mirror descent as a function: baselines, the mask on resume, importance weights, the report's gradient."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from google.protobuf import struct_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from perigee.errors import InvalidArgumentError
from perigee.trainer.v1 import trainer_pb2 as pb
from services.trainer.algorithms import ALGORITHMS, make_algorithm
from services.trainer.algorithms.base import Algorithm, LossBatch
from services.trainer.config import TrainerConfig
from services.trainer.megatron.optimizer import scheduled_rate
from services.trainer.trainer import LoadedPolicy, Trainer
from services.trainer.training import (
    PlannedTrajectory,
    check_training,
    make_sequence,
    plan_steps,
    split_groups,
    truncate_importance,
)
from tests.fixtures.trainer import MadeTrajectory, make_groups, train_request
from tests.fixtures.trainer_ranks import to_trajectories

REWARDS = st.lists(st.floats(-2, 2, allow_nan=False), min_size=1, max_size=16)


def mirror_descent(**settings: object) -> Algorithm:
    message = pb.Algorithm(name="policy_mirror_descent")
    message.settings.update(settings)
    return make_algorithm(message)


def compute_advantages(rewards: list[float], baseline: str, tau: float) -> list[float]:
    return mirror_descent(baseline=baseline, tau=tau).advantages(np.array(rewards)).tolist()


def loss_batch(logprobs_T: torch.Tensor, **fields: torch.Tensor) -> LossBatch:
    """One trajectory per token, every weight neutral."""
    values = {
        "logprobs_T": logprobs_T,
        "reference_logprobs_T": logprobs_T.detach(),
        "trained_T": torch.ones(len(logprobs_T), dtype=torch.bool),
        "importance_T": torch.ones_like(logprobs_T),
        "sequence_T": torch.arange(len(logprobs_T)),
        "advantages_N": torch.ones_like(logprobs_T),
        "weights_N": torch.ones_like(logprobs_T),
    } | fields
    return LossBatch(**values, trained_tokens=len(logprobs_T), token_scale=1.0)


@given(REWARDS)
def test_the_mean_baseline_sums_to_zero(rewards: list[float]) -> None:
    assert sum(compute_advantages(rewards, "mean", 0.1)) == pytest.approx(0, abs=1e-9)


@given(REWARDS, st.floats(0.01, 10))
def test_log_mean_exp_lies_between_mean_and_maximum(rewards: list[float], tau: float) -> None:
    advantages = compute_advantages(rewards, "log_mean_exp", tau)
    baseline = rewards[0] - advantages[0]
    assert np.mean(rewards) - 1e-9 <= baseline <= max(rewards) + 1e-9
    assert np.allclose(np.subtract(rewards, advantages), baseline)


def test_log_mean_exp_by_hand() -> None:
    baseline = 0.5 * math.log((math.exp(2) + 1) / 2)
    assert compute_advantages([1.0, 0.0], "log_mean_exp", 0.5) == pytest.approx([1 - baseline, -baseline])


def test_the_gradient_of_one_group_is_the_report_s() -> None:
    """(1 / k) sum_j [grad log pi (r_j - mean r) - (tau / 2) grad (log pi / pi_i)^2], on a table of logits."""
    torch.manual_seed(0)
    k, length, vocabulary, tau = 3, 4, 5, 0.7
    logits = torch.randn(k, length, vocabulary, dtype=torch.float64, requires_grad=True)
    before = torch.randn(k, length, vocabulary, dtype=torch.float64)
    tokens = torch.randint(0, vocabulary, (k, length, 1))
    rewards = torch.tensor([1.0, 0.0, 0.4], dtype=torch.float64)

    gradient = torch.zeros_like(logits)
    probabilities = logits.detach().softmax(-1)
    log_pi = probabilities.log().gather(-1, tokens).sum((1, 2))
    log_reference = before.log_softmax(-1).gather(-1, tokens).sum((1, 2))
    # d log pi / d logits = one-hot - softmax.
    score = torch.zeros_like(probabilities).scatter(-1, tokens, 1.0) - probabilities
    for j in range(k):
        shift = log_pi[j] - log_reference[j]
        gradient[j] = score[j] * ((rewards[j] - rewards.mean()) - tau * shift) / k

    logprobs = logits.log_softmax(-1).gather(-1, tokens).flatten()
    batch = loss_batch(
        logprobs,
        reference_logprobs_T=before.log_softmax(-1).gather(-1, tokens).flatten(),
        sequence_T=torch.arange(k).repeat_interleave(length),
        advantages_N=torch.tensor(compute_advantages(rewards.tolist(), "mean", tau), dtype=torch.float64),
        weights_N=torch.full((k,), 1 / k, dtype=torch.float64),
    )
    mirror_descent(tau=tau).loss(batch)[0].backward()  # type: ignore[no-untyped-call]
    assert torch.allclose(logits.grad, -gradient, rtol=1e-12, atol=1e-14)


def plan(groups: dict[str, list[MadeTrajectory]], rewards: list[float], **update: object) -> list[PlannedTrajectory]:
    """The trajectories in the loss of an iteration of one step that starts from version 3."""
    request = train_request("r", groups, rewards, base=3, **update)
    (step,) = plan_steps(request, mirror_descent(), 1, 0)
    return [trajectory for packs in step.packs_by_rank for pack in packs for trajectory in pack]


def test_a_trajectory_without_trained_tokens_still_counts_in_its_group() -> None:
    made = make_groups("old", 0, groups=1, k=2, spans=[[(0, 4)], [(3, 4)]])
    (planned,) = plan(made, [1.0, 0.0], max_staleness=0)
    assert planned.advantage == -0.5
    assert planned.weight == 0.5


@given(st.dictionaries(st.integers(0, 20), st.integers(1, 9), min_size=1), st.integers(0, 20))
def test_stale_means_older_than_allowed(versions: dict[int, int], staleness: int) -> None:
    made = make_groups("stale", 0, groups=1, k=1, spans=[sorted(versions.items())])
    fresh = sum(tokens for version, tokens in versions.items() if 3 - version <= staleness)
    assert sum(planned.trained_tokens for planned in plan(made, [1.0], max_staleness=staleness)) == fresh


def test_the_mask_covers_every_resumed_segment() -> None:
    """A trajectory resumed twice: 4 tokens of version 1, 2 of version 2, 5 of version 3."""
    made = make_groups("mask", 0, groups=1, k=1, spans=[[(1, 4), (2, 2), (3, 5)]])
    (trajectory,) = to_trajectories(made).values()
    prompt = len(trajectory.prompt_tokens)
    for staleness, first in [(0, 6), (1, 4), (2, 0), (9, 0)]:
        sequence = make_sequence(trajectory, 3, staleness)
        assert len(sequence.trained_T) == prompt + 11 - 1
        # Prediction i is of token i + 1; masked tokens stay in the sequence and condition the rest.
        assert np.flatnonzero(sequence.trained_T).tolist() == list(range(prompt - 1 + first, prompt - 1 + 11))
        assert sequence.tokens.tolist() == made["mask-g0"][0].prompt + made["mask-g0"][0].tokens


def test_importance_weights_are_truncated_above_only() -> None:
    trainer_T, rollout_T = torch.tensor([0.5, 0.1, 0.9]).log(), torch.tensor([0.25, 0.2, 0.1]).log()
    assert truncate_importance(trainer_T, rollout_T, 3.0).tolist() == pytest.approx([2.0, 0.5, 3.0])
    assert truncate_importance(trainer_T, rollout_T, 0.0).tolist() == [1.0, 1.0, 1.0]


def test_importance_weighs_the_gain_alone() -> None:
    logprobs_T = torch.tensor([-1.0, -2.0])
    loss, sums = mirror_descent().loss(loss_batch(logprobs_T, importance_T=torch.tensor([3.0, 0.5])))
    assert loss.item() == 3.0 + 1.0
    assert sums == {}


def settings_struct(**settings: object) -> struct_pb2.Struct:
    struct = struct_pb2.Struct()
    struct.update(settings)
    return struct


@pytest.mark.parametrize(
    ("algorithm", "fields"),
    [
        (pb.Algorithm(name="mirror"), ["algorithm.name"]),
        (pb.Algorithm(name="policy_mirror_descent", settings=settings_struct(tua=1.0)), ["algorithm.settings.tua"]),
        (pb.Algorithm(name="policy_mirror_descent", settings=settings_struct(tau=-1.0)), ["algorithm.settings.tau"]),
        (pb.Algorithm(name="policy_mirror_descent", settings=settings_struct(tau=0, baseline="log_mean_exp")), None),
    ],
)
def test_every_setting_out_of_range_is_named(algorithm: pb.Algorithm, fields: list[str] | None) -> None:
    """Violations of the algorithm, of what all algorithms share and of the optimizer come together."""
    update = pb.UpdateSettings(minibatches=1, max_tokens_per_microbatch=9, token_scale=1.0)
    with pytest.raises(InvalidArgumentError) as caught:
        check_training(algorithm, update, pb.Optimizer(learning_rate=1e-3, beta1=1.0))
    found = [violation.field for violation in caught.value.violations]
    assert found == [*(fields or ["algorithm.settings"]), "update.temperature", "optimizer.beta1"]


def test_every_algorithm_has_working_defaults() -> None:
    for name in ALGORITHMS:
        algorithm = make_algorithm(pb.Algorithm(name=name))
        logprobs_T = torch.tensor([-1.0, -2.0], requires_grad=True)
        assert len(algorithm.advantages(np.array([1.0, 0.0]))) == 2
        algorithm.loss(loss_batch(logprobs_T))[0].backward()  # type: ignore[no-untyped-call]
        assert logprobs_T.grad is not None
        assert logprobs_T.grad.isfinite().all()


@settings(deadline=None)  # the first call is slow: numpy builds its generator
@given(st.integers(1, 60), st.integers(1, 12), st.integers(0, 99))
def test_groups_are_shared_out_evenly_over_the_steps(groups: int, minibatches: int, seed: int) -> None:
    shares = split_groups(groups, minibatches, seed)
    assert sorted(i for share in shares for i in share) == list(range(groups))
    assert len(shares) == min(groups, minibatches)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert shares == split_groups(groups, minibatches, seed)


def test_the_learning_rate_warms_up_and_decays() -> None:
    adam = pb.Optimizer(learning_rate=2.0, warmup_steps=2, min_lr_ratio=0.5)
    rates = [scheduled_rate(adam, step, 6) for step in range(7)]
    assert rates == pytest.approx([1.0, 2.0, 2.0, 1.75, 1.5, 1.25, 1.0])


@pytest.mark.parametrize(
    ("dtype", "default", "cap"), [("bfloat16", True, 2.0), ("bfloat16", False, 0.0), ("float32", True, 0.0)]
)
async def test_bfloat16_alone_has_a_cap_by_default(tmp_path: Path, dtype: str, default: bool, cap: float) -> None:
    trainer = Trainer(TrainerConfig(model=str(tmp_path), run_path=str(tmp_path), dtype=dtype), None, None)
    done = train_request("r", {}, [], tis_cap=cap, default_tis_cap=default)
    trainer.loaded = LoadedPolicy("r", 1, done, "the answer of the job before")
    again = train_request("r", {}, [], default_tis_cap=default)
    assert [response async for response in trainer.train(again)] == ["the answer of the job before"]
