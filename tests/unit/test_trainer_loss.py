"""Policy mirror descent as a function: baselines, the mask on resume, importance weights, the report's gradient."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.trainer.mirror_descent import (
    Baseline,
    compute_advantages,
    mask_stale_tokens,
    policy_mirror_descent,
    truncate_importance,
)
from services.trainer.optimizer import AdamW, scheduled_rate
from services.trainer.train_iteration import prepare_examples, split_groups
from tests.fixtures.trainer import make_groups, mirror_descent
from tests.fixtures.trainer_ranks import to_groups

REWARDS = st.lists(st.floats(-2, 2, allow_nan=False), min_size=1, max_size=16)


@given(REWARDS)
def test_the_mean_baseline_sums_to_zero(rewards: list[float]) -> None:
    assert sum(compute_advantages(rewards, Baseline.MEAN, 0.1)) == pytest.approx(0, abs=1e-9)


@given(REWARDS, st.floats(0.01, 10))
def test_log_mean_exp_lies_between_mean_and_maximum(rewards: list[float], tau: float) -> None:
    advantages = compute_advantages(rewards, Baseline.LOG_MEAN_EXP, tau)
    baseline = rewards[0] - advantages[0]
    assert np.mean(rewards) - 1e-9 <= baseline <= max(rewards) + 1e-9
    assert np.allclose(np.subtract(rewards, advantages), baseline)


def test_log_mean_exp_by_hand() -> None:
    baseline = 0.5 * math.log((math.exp(2) + 1) / 2)
    assert compute_advantages([1.0, 0.0], Baseline.LOG_MEAN_EXP, 0.5) == pytest.approx([1 - baseline, -baseline])


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

    sums = logits.log_softmax(-1).gather(-1, tokens).sum((1, 2))
    advantages = torch.tensor(compute_advantages(rewards.tolist(), Baseline.MEAN, tau), dtype=torch.float64)
    weights = torch.full((k,), 1 / k, dtype=torch.float64)
    policy_mirror_descent(sums, sums, log_reference, advantages, weights, tau, 1.0).backward()
    assert torch.allclose(logits.grad, -gradient, rtol=1e-12, atol=1e-14)


def test_the_mask_covers_every_resumed_segment() -> None:
    """A trajectory resumed twice: 3 prompt tokens, 4 of version 1, 2 of version 2, 5 of version 3."""
    made = make_groups("mask", 0, groups=1, k=1, spans=[[(1, 4), (2, 2), (3, 5)]])
    prompt = len(made["mask-g0"][0].prompt)
    for staleness, first in [(0, 6), (1, 4), (2, 0), (9, 0)]:
        (example,) = prepare_examples(to_groups(made, [1.0]), 3, mirror_descent("mean", max_staleness=staleness))
        trained = np.flatnonzero(example.sequence.trained_T)
        assert len(example.sequence.trained_T) == prompt + 11 - 1
        # Prediction i is of token i + 1; masked tokens stay in the sequence and condition the rest.
        assert trained.tolist() == list(range(prompt - 1 + first, prompt - 1 + 11))
        assert example.sequence.tokens.tolist() == made["mask-g0"][0].prompt + made["mask-g0"][0].tokens


def test_a_trajectory_without_trained_tokens_still_counts_in_its_group() -> None:
    made = make_groups("old", 0, groups=1, k=2, spans=[[(0, 4)], [(3, 4)]])
    (example,) = prepare_examples(to_groups(made, [1.0, 0.0]), 3, mirror_descent("mean", max_staleness=0))
    assert example.advantage == -0.5
    assert example.share == 0.5


@given(st.lists(st.integers(0, 20), max_size=50), st.integers(0, 20), st.integers(0, 20))
def test_stale_means_older_than_allowed(versions: list[int], base: int, staleness: int) -> None:
    mask = mask_stale_tokens(np.array(versions, np.int64), base, staleness)
    assert mask.tolist() == [base - version <= staleness for version in versions]


def test_importance_weights_are_truncated_above_only() -> None:
    trainer, engine = np.log(np.array([0.5, 0.1, 0.9], np.float32)), np.log(np.array([0.25, 0.2, 0.1], np.float32))
    assert truncate_importance(trainer, engine, 3.0).tolist() == pytest.approx([2.0, 0.5, 3.0])
    assert truncate_importance(trainer, engine, 0.0).tolist() == [1.0, 1.0, 1.0]


@settings(deadline=None)  # the first call is slow: numpy builds its generator
@given(st.integers(1, 60), st.integers(1, 12), st.integers(0, 99))
def test_groups_are_shared_out_evenly_over_the_steps(groups: int, minibatches: int, seed: int) -> None:
    shares = split_groups(groups, minibatches, seed)
    assert sorted(i for share in shares for i in share) == list(range(groups))
    assert len(shares) == min(groups, minibatches)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert shares == split_groups(groups, minibatches, seed)


def test_the_learning_rate_warms_up_and_decays() -> None:
    adam = AdamW(
        learning_rate=2.0, beta1=0.9, beta2=0.95, weight_decay=0.0, max_grad_norm=1.0, warmup_steps=2, min_lr_ratio=0.5
    )
    rates = [scheduled_rate(adam, step, 6) for step in range(7)]
    assert rates == pytest.approx([1.0, 2.0, 2.0, 1.75, 1.5, 1.25, 1.0])
