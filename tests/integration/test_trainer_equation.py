"""The trainer's loss and gradient against the report's equation (3), written out anew in float64 on transformers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from tests.fixtures.trainer import MadeTrajectory, make_groups, mirror_descent
from tests.fixtures.trainer_ranks import Sizes, run_ranks, to_groups

if TYPE_CHECKING:
    from services.trainer.engine import Engine
    from services.trainer.train_iteration import MirrorDescent

REWARDS = [1.0, 0.25, 0.0, 0.6]
# Base version 3: spans of versions 1 and 2 lie behind it.
SPANS = [[(3, 7)], [(1, 4), (2, 3), (3, 5)], [(2, 6), (3, 2)], [(2, 5)]]


def loss_and_gradient(
    engine: Engine, made: dict[str, list[MadeTrajectory]], algorithm: MirrorDescent
) -> tuple[float, dict[str, torch.Tensor]]:
    """The trainer's own: an iteration of one step on moved weights, with the reference taken before the move."""
    from services.trainer import train_iteration as module
    from services.trainer.jobs import JobContext
    from services.trainer.train_iteration import train_iteration

    # The quadratic term is flat at the reference itself, so the gradient is taken a step away from it.
    compute = module._compute_reference

    def compute_then_move(policy: Any, *arguments: Any) -> Any:
        reference = compute(policy, *arguments)
        with torch.no_grad():
            for _, parameter in sorted(policy.core.named_parameters()):
                parameter.mul_(1.05)
        return reference

    module._compute_reference = compute_then_move
    result = train_iteration(engine.policy, engine.control, to_groups(made, REWARDS), 3, algorithm, 0, JobContext())
    with torch.no_grad():
        for parameter in engine.policy.core.parameters():
            parameter.copy_(parameter.main_grad)
    return result.loss, dict(engine.policy.collect())


def equation_3(
    model_path: Path, made: dict[str, list[MadeTrajectory]], algorithm: MirrorDescent
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss (the surrogate with the sign turned) and gradient, trajectory by trajectory, in float64."""
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float64)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    rewards = torch.tensor(REWARDS, dtype=torch.float64)
    baseline = rewards.mean()
    if algorithm.baseline.value == "log_mean_exp":
        baseline = algorithm.tau * torch.log(torch.exp(rewards / algorithm.tau).mean())

    def logprobs(policy: Any, item: MadeTrajectory) -> torch.Tensor:
        ids = torch.tensor([item.prompt + item.tokens])
        table = torch.log_softmax(policy(ids).logits[0] / algorithm.temperature, dim=-1)
        first = len(item.prompt)
        picked: torch.Tensor = torch.stack([table[first + t - 1, token] for t, token in enumerate(item.tokens)])
        return picked

    objective = torch.zeros((), dtype=torch.float64)
    for items in made.values():
        for item, reward in zip(items, rewards, strict=True):
            versions = [version for version, count in item.versions for _ in range(count)]
            fresh = torch.tensor([3 - version <= algorithm.max_staleness for version in versions])
            with torch.no_grad():
                before = logprobs(reference, item)
            now = logprobs(model, item)
            weight = torch.ones_like(before)
            if algorithm.tis_cap:
                engine = torch.tensor(item.logprobs, dtype=torch.float64)
                weight = torch.exp(before - engine).clamp(max=algorithm.tis_cap)
            scale = algorithm.token_scale
            gain = (reward - baseline) * (now * weight)[fresh].sum() / scale
            penalty = algorithm.tau / 2 * ((now - before)[fresh].sum() / scale) ** 2
            objective = objective + (gain - penalty) / len(items)
    objective = objective / len(made)
    objective.backward()  # type: ignore[no-untyped-call]
    gradient = {name: -p.grad for name, p in model.named_parameters() if p.grad is not None}
    return -float(objective), gradient


@pytest.mark.parametrize(
    ("baseline", "cap", "sizes"),
    [
        ("mean", 0.0, Sizes()),
        ("log_mean_exp", 0.0, Sizes()),
        ("mean", 1.5, Sizes()),
        ("mean", 0.0, Sizes(tensor=2)),
        ("mean", 0.0, Sizes(pipeline=2)),
    ],
)
def test_loss_and_gradient_are_equation_3(trainer_model: Path, baseline: str, cap: float, sizes: Sizes) -> None:
    made = make_groups("eq", 5, groups=3, k=4, spans=SPANS)
    algorithm = mirror_descent(baseline, tis_cap=cap)
    loss, gradient = run_ranks(sizes, trainer_model, partial(loss_and_gradient, made=made, algorithm=algorithm))
    expected_loss, expected = equation_3(trainer_model, made, algorithm)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert gradient.keys() == expected.keys()
    largest = max(float(value.abs().max()) for value in expected.values())
    for name, value in expected.items():
        assert (gradient[name].double() - value).abs().max() < 1e-5 * largest, name


def train_twice(engine: Engine, made: dict[str, list[MadeTrajectory]], algorithm: MirrorDescent) -> Any:
    """A fine-tuning job and an iteration; their figures and the weights after them."""
    from services.trainer.batches import TokenSequence
    from services.trainer.fine_tune import FineTuning, fine_tune
    from services.trainer.jobs import JobContext
    from services.trainer.train_iteration import train_iteration

    generator = np.random.default_rng(0)
    lengths = generator.integers(4, 30, 20)
    examples = [
        TokenSequence(generator.integers(2, 48, n), np.arange(1, n) >= n // 2, np.ones(n - 1, np.float32))
        for n in lengths
    ]
    tuning = FineTuning(steps=4, batch_size=5, max_tokens_per_microbatch=40, seed=1, optimizer=algorithm.optimizer)
    # Figures cover the steps since the last report: with none in between, all of them.
    first = fine_tune(engine.policy, engine.control, examples, tuning, JobContext(interval_s=math.inf))
    second = train_iteration(engine.policy, engine.control, to_groups(made, REWARDS), 3, algorithm, 0, JobContext())
    figures = [first.loss, first.gradient_norm, second.loss, second.gradient_norm, second.policy_shift]
    return figures, second.trained_tokens, dict(engine.policy.collect())


@pytest.fixture(scope="module")
def alone(trainer_model: Path) -> Any:
    """What one rank makes of it."""
    return run_ranks(Sizes(), trainer_model, _job())


def _job() -> Any:
    made = make_groups("equal", 6, groups=5, k=4, spans=SPANS)
    return partial(train_twice, made=made, algorithm=mirror_descent("mean", minibatches=2))


@pytest.mark.parametrize("sizes", [Sizes(tensor=2), Sizes(pipeline=2), Sizes(data=2), Sizes(recompute=True)], ids=str)
def test_every_layout_trains_as_one_rank(trainer_model: Path, alone: Any, sizes: Sizes) -> None:
    figures, trained, weights = run_ranks(sizes, trainer_model, _job())
    assert trained == alone[1]
    assert figures == pytest.approx(alone[0], rel=1e-4, abs=1e-6)
    assert weights.keys() == alone[2].keys()
    for name, value in alone[2].items():
        assert (weights[name] - value).abs().max() < 2e-5, name


def test_token_scale_one_is_the_report_itself(trainer_model: Path) -> None:
    """With one token per trajectory and no scale the loss is worked out by hand."""
    made = make_groups("one", 7, groups=1, k=4, spans=[[(3, 1)]])
    algorithm = mirror_descent("mean", token_scale=1.0, tau=0.0)
    loss, _ = run_ranks(Sizes(), trainer_model, partial(loss_and_gradient, made=made, algorithm=algorithm))
    expected: Sequence[float] = equation_3(trainer_model, made, algorithm)[:1]
    assert loss == pytest.approx(expected[0], rel=1e-5)
