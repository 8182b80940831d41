"""The algorithms beside policy mirror descent as functions: loss and gradient against the papers' equations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from perigee.chat import RESPONSE_KEYS
from perigee.errors import InvalidArgumentError
from perigee.trainer.v1 import trainer_pb2 as pb
from services.trainer.algorithms import SUPERVISED, make_algorithm, make_supervised
from services.trainer.algorithms.base import Algorithm, ExampleBatch, LossBatch
from services.trainer.fine_tuning import check_fine_tuning
from services.trainer.training import plan_steps
from tests.fixtures.trainer import make_groups, train_request

# Tokens of each trajectory of one micro-batch, all of one minibatch of two groups.
LENGTHS = [3, 1, 4, 2]
ADVANTAGES = [1.2, -0.7, 0.4, -2.0]
TOKEN_SCALE = 7.0


def algorithm(name: str, **settings: object) -> Algorithm:
    message = pb.Algorithm(name=name)
    message.settings.update(settings)
    return make_algorithm(message)


def make_batch() -> LossBatch:
    """Four trajectories with ratios on both sides of every clip; the first begins with two tokens of its prompt."""
    generator = torch.Generator().manual_seed(5)
    sequence_T = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    sequence_T = torch.cat([torch.zeros(2, dtype=torch.long), sequence_T])
    trained_T = torch.arange(len(sequence_T)) >= 2
    logprobs_T = -torch.rand(len(sequence_T), generator=generator, dtype=torch.float64) * trained_T
    shifts_T = 1.6 * torch.randn(len(sequence_T), generator=generator, dtype=torch.float64) * trained_T
    return LossBatch(
        logprobs_T=logprobs_T.requires_grad_(),
        reference_logprobs_T=(logprobs_T + shifts_T).detach(),
        trained_T=trained_T,
        importance_T=torch.rand(len(sequence_T), generator=generator, dtype=torch.float64) + 0.5,
        sequence_T=sequence_T,
        advantages_N=torch.tensor(ADVANTAGES, dtype=torch.float64),
        weights_N=torch.full((len(LENGTHS),), 1 / 8, dtype=torch.float64),
        trained_tokens=31,
        token_scale=TOKEN_SCALE,
    )


def grpo_by_hand(batch: LossBatch, options: dict[str, Any]) -> tuple[float, np.ndarray]:
    """Loss and gradient in numpy, token by token, with the derivative of each branch written out."""
    log_pi, log_ref = batch.logprobs_T.detach().numpy(), batch.reference_logprobs_T.numpy()
    low, high = 1 - options.get("clip_low", 0.2), 1 + options.get("clip_high", 0.2)
    loss, gradient = 0.0, np.zeros(len(log_pi))
    for number, advantage in enumerate(ADVANTAGES):
        tokens = [t for t in range(len(log_pi)) if batch.trained_T[t] and batch.sequence_T[t] == number]
        factor = {
            "token_mean": 1 / batch.trained_tokens,
            "sequence_mean": float(batch.weights_N[number]) / len(tokens),
            "constant": float(batch.weights_N[number]) / TOKEN_SCALE,
        }[options.get("aggregation", "token_mean")]
        mean_shift = np.mean([log_pi[t] - log_ref[t] for t in tokens])
        for t in tokens:
            by_sequence = options.get("ratio") == "sequence"
            ratio = np.exp(mean_shift if by_sequence else log_pi[t] - log_ref[t])
            flat = (advantage > 0 and ratio > high) or (advantage < 0 and ratio < low)
            value, slope = (np.clip(ratio, low, high), 0.0) if flat else (ratio, ratio)
            if options.get("dual_clip") and advantage < 0 and ratio > options["dual_clip"]:
                value, slope = options["dual_clip"], 0.0
            loss -= factor * value * advantage * float(batch.importance_T[t])
            for other in tokens if by_sequence else [t]:
                share = 1 / len(tokens) if by_sequence else 1.0
                gradient[other] -= factor * slope * share * advantage * float(batch.importance_T[t])
            difference = log_ref[t] - log_pi[t]
            loss += factor * options.get("kl_coef", 0.0) * (np.exp(difference) - difference - 1)
            gradient[t] += factor * options.get("kl_coef", 0.0) * (1 - np.exp(difference))
    return loss, gradient


GRPO_OPTIONS: list[dict[str, Any]] = [
    {},
    {"clip_low": 0.3, "clip_high": 0.9, "aggregation": "sequence_mean"},
    {"kl_coef": 0.4, "aggregation": "constant"},
    {"ratio": "sequence", "clip_high": 0.28, "aggregation": "sequence_mean"},
    {"ratio": "sequence", "kl_coef": 0.1},
    {"dual_clip": 1.5, "kl_coef": 0.2},
]


@pytest.mark.parametrize("options", GRPO_OPTIONS, ids=str)
def test_loss_and_gradient_of_grpo(options: dict[str, Any]) -> None:
    batch = make_batch()
    loss, sums = algorithm("grpo", **options).loss(batch)
    loss.backward()  # type: ignore[no-untyped-call]
    expected, gradient = grpo_by_hand(batch, options)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert batch.logprobs_T.grad is not None
    assert batch.logprobs_T.grad.numpy() == pytest.approx(gradient, rel=1e-12, abs=1e-15)
    assert 0 < sums["ratio_clip_low"] + sums["ratio_clip_high"] < sum(LENGTHS)


def test_advantages_of_grpo() -> None:
    rewards_K = np.array([1.0, 0.0, 0.0, 1.0, 0.5])
    centered = rewards_K - 0.5
    assert algorithm("grpo", scale_by_std=False).advantages(rewards_K) == pytest.approx(centered)
    assert algorithm("grpo").advantages(rewards_K) == pytest.approx(centered / 0.5, rel=1e-5)
    assert algorithm("grpo").advantages(np.ones(3)).tolist() == [0.0, 0.0, 0.0]
    assert algorithm("grpo").advantages(np.ones(1)).tolist() == [0.0]


def test_a_dual_clip_within_the_clip_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match=r"dual_clip has to be 0 or above 1 \+ clip_high, which is 1\.28"):
        algorithm("grpo", dual_clip=1.1, clip_high=0.28)


def test_rest_keeps_what_is_good_enough() -> None:
    rewards_K = np.array([1.2, 0.0, 0.5, 1.2, 0.49])
    assert algorithm("rest").advantages(rewards_K).tolist() == [1, 0, 1, 1, 0]
    assert algorithm("rest", keep="best").advantages(rewards_K).tolist() == [1, 0, 0, 0, 0]
    assert algorithm("rest", keep="best", min_reward=2.0).advantages(rewards_K).tolist() == [0] * 5


def test_rest_is_supervised_learning_on_the_responses_kept() -> None:
    """The tokens of wrong responses are neither read nor counted; those kept have one weight each."""
    made = make_groups("rest", 0, groups=2, k=2, spans=[[(0, 4)], [(0, 3)]])
    request = train_request("r", made, [1.0, 0.0], base=0)
    rest = algorithm("rest")
    [step] = plan_steps(request, rest, 1, 0)
    planned = [each for packs in step.packs_by_rank for pack in packs for each in pack]
    assert [each.response_tokens for each in planned] == [4, 4]
    assert step.trained_tokens == 8
    logprobs_T = torch.linspace(-2, -1, 8, dtype=torch.float64, requires_grad=True)
    batch = LossBatch(
        logprobs_T=logprobs_T,
        reference_logprobs_T=torch.zeros(8, dtype=torch.float64),
        trained_T=torch.ones(8, dtype=torch.bool),
        importance_T=torch.full((8,), 3.0, dtype=torch.float64),
        sequence_T=torch.arange(2).repeat_interleave(4),
        advantages_N=torch.tensor([each.advantage for each in planned], dtype=torch.float64),
        weights_N=torch.full((2,), 0.25, dtype=torch.float64),
        trained_tokens=step.trained_tokens,
        token_scale=1.0,
    )
    loss, _ = rest.loss(batch)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == pytest.approx(1.5, rel=1e-12)
    assert logprobs_T.grad is not None
    assert logprobs_T.grad.tolist() == pytest.approx([-1 / 8] * 8, rel=1e-12)


def test_an_iteration_without_a_response_to_keep_has_no_work() -> None:
    made = make_groups("rest", 0, groups=2, k=2, spans=[[(0, 4)], [(0, 3)]])
    [step] = plan_steps(train_request("r", made, [0.0, 0.0], base=0), algorithm("rest"), 1, 0)
    assert (step.packs_by_rank, step.trained_tokens) == ([[]], 0)


# Tokens of the responses of three pairs: the chosen ones, then the rejected ones.
PAIRS = [2, 1, 3, 4, 2, 1]
REFERENCE = [[-2.0, -0.3, -4.0], [-1.0, -2.5, -0.2]]


def make_pairs() -> ExampleBatch:
    """A micro-batch of three pairs of a step of seven; each sequence begins with a token of its prompt."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.tensor(PAIRS) + 1
    sequence_T = torch.arange(len(PAIRS)).repeat_interleave(lengths)
    trained_T = torch.cat([torch.arange(int(n)) > 0 for n in lengths])
    logprobs_T = -2 * torch.rand(len(sequence_T), generator=generator, dtype=torch.float64) * trained_T
    return ExampleBatch(
        logprobs_T=logprobs_T.requires_grad_(),
        trained_T=trained_T,
        sequence_T=sequence_T,
        responses=2,
        reference_KP=torch.tensor(REFERENCE, dtype=torch.float64),
        examples=7,
        trained_tokens=40,
    )


def dpo_by_hand(batch: ExampleBatch, options: dict[str, Any]) -> tuple[float, np.ndarray, dict[str, float]]:
    """Loss, gradient and the sums reported, in numpy and pair by pair, with the derivative written out."""
    log_pi, beta = batch.logprobs_T.detach().numpy(), options.get("beta", 0.1)
    smoothing, coefficient = options.get("label_smoothing", 0.0), options.get("sft_coef", 0.0)
    loss, gradient = 0.0, np.zeros(len(log_pi))
    reported = dict.fromkeys(("margin", "accuracy", "chosen_logprob", "rejected_logprob"), 0.0)
    for pair in range(3):
        tokens = [np.flatnonzero((batch.sequence_T == k * 3 + pair) & batch.trained_T) for k in range(2)]
        scales = [1 / len(found) if options.get("length_normalized") else 1.0 for found in tokens]
        chosen, rejected = (scales[k] * (log_pi[tokens[k]].sum() - REFERENCE[k][pair]) for k in range(2))
        margin = beta * (chosen - rejected)
        right = 1 / (1 + np.exp(-margin))
        loss -= (1 - smoothing) * np.log(right) + smoothing * np.log(1 - right)
        slope = -(1 - smoothing) * (1 - right) + smoothing * right
        gradient[tokens[0]] += slope * beta * scales[0] - coefficient / len(tokens[0])
        gradient[tokens[1]] -= slope * beta * scales[1]
        loss -= coefficient * log_pi[tokens[0]].mean()
        reported["margin"] += margin
        reported["accuracy"] += margin > 0
        reported["chosen_logprob"] += log_pi[tokens[0]].sum()
        reported["rejected_logprob"] += log_pi[tokens[1]].sum()
    return loss / 7, gradient / 7, reported


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta": 0.7, "label_smoothing": 0.1},
        {"beta": 5.0, "length_normalized": True},
        {"beta": 0.3, "sft_coef": 0.5, "length_normalized": True},
    ],
    ids=str,
)
def test_loss_and_gradient_of_dpo(options: dict[str, Any]) -> None:
    message = pb.Algorithm(name="dpo")
    message.settings.update(options)
    batch = make_pairs()
    loss, sums = make_supervised(message).loss(batch)
    loss.backward()  # type: ignore[no-untyped-call]
    expected, gradient, reported = dpo_by_hand(batch, options)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert batch.logprobs_T.grad is not None
    assert batch.logprobs_T.grad.numpy() == pytest.approx(gradient, rel=1e-12, abs=1e-15)
    assert {name: float(value) for name, value in sums.items()} == pytest.approx(reported, rel=1e-12)


def test_loss_and_gradient_of_sft() -> None:
    batch = make_pairs()
    loss, _ = make_supervised(pb.Algorithm()).loss(batch)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == pytest.approx(-batch.logprobs_T.sum().item() / 40, rel=1e-12)
    assert batch.logprobs_T.grad is not None
    assert (batch.logprobs_T.grad[batch.trained_T] == -1 / 40).all()


def test_every_setting_of_a_supervised_stage_out_of_range_is_named() -> None:
    request = pb.FineTuneRequest(steps=1, batch_size=0, max_tokens_per_microbatch=9)
    request.algorithm.name = "dpo"
    request.algorithm.settings.update({"beta": 0.0, "label_smoothing": 0.5, "tau": 1.0})
    with pytest.raises(InvalidArgumentError) as caught:
        check_fine_tuning(request)
    found = {violation.field for violation in caught.value.violations}
    settings = {f"algorithm.settings.{name}" for name in ("beta", "label_smoothing", "tau")}
    assert found == {*settings, "batch_size", "optimizer.learning_rate"}
    request.algorithm.name = "grpo"
    with pytest.raises(InvalidArgumentError, match=r"'grpo' is not one of \['dpo', 'sft'\]"):
        check_fine_tuning(request)


def test_the_responses_of_every_supervised_algorithm_are_known() -> None:
    assert SUPERVISED.keys() == RESPONSE_KEYS.keys()
