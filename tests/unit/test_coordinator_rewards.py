"""Length reward, shaping and training batches on groups worked by hand."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perigee.buffer.v1 import buffer_pb2
from services.coordinator.groups import Group, Trajectory
from services.coordinator.length_reward import length_reward, length_reward_weight
from services.coordinator.prompts import MathLine, Prompt
from services.coordinator.run_config import AlgorithmConfig, LengthRewardConfig, OptimizerConfig
from services.coordinator.shaping import JudgedResponse, ShapingWeights, is_uniform, shape_rewards
from services.coordinator.training_batch import learning_rate_at, make_algorithm, make_training_batch

PROMPT = Prompt(MathLine(id="p", prompt="1+1=", verifier="math", answer="2"), (1, 2, 3))


@pytest.mark.parametrize(
    ("lengths", "correct", "expected"),
    [
        # min 10, max 30: lambda = 0.5, 0, -0.5.
        ([10, 20, 30], [True, True, True], [0.5, 0.0, -0.5]),
        # A short wrong response gains nothing; a long wrong one loses as a correct one would.
        ([10, 20, 30], [False, False, False], [0.0, 0.0, -0.5]),
        ([10, 20, 30], [False, True, True], [0.0, 0.0, -0.5]),
        # lambda = 0.5 - (15 - 10) / 40 = 0.375 and 0.5 - 30 / 40 = -0.25.
        ([10, 15, 40, 50], [True, True, False, True], [0.5, 0.375, -0.25, -0.5]),
        ([7, 7, 7], [True, False, True], [0.0, 0.0, 0.0]),
        ([12], [True], [0.0]),
    ],
)
def test_length_reward_of_hand_worked_groups(lengths: list[int], correct: list[bool], expected: list[float]) -> None:
    assert length_reward(lengths, correct) == pytest.approx(expected)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 10_000), st.booleans()), min_size=1, max_size=32))
def test_length_reward_is_gated_and_bounded(group: list[tuple[int, bool]]) -> None:
    rewards = length_reward([length for length, _ in group], [correct for _, correct in group])
    for (length, correct), reward in zip(group, rewards, strict=True):
        assert -0.5 <= reward <= 0.5
        assert correct or reward <= 0.0
        for (other_length, other_correct), other in zip(group, rewards, strict=True):
            if correct and other_correct and length < other_length:
                assert reward > other


def test_length_reward_warms_up() -> None:
    config = LengthRewardConfig(weight=0.4, start_iteration=3, warmup_iterations=4)
    weights = [length_reward_weight(config, iteration) for iteration in range(1, 9)]
    assert weights == pytest.approx([0.0, 0.0, 0.1, 0.2, 0.3, 0.4, 0.4, 0.4])


def test_shaping_adds_length_reward_and_takes_repetition_penalty() -> None:
    group = [
        JudgedResponse(tokens=10, reward=1.0, correct=True, repeated=False),
        JudgedResponse(tokens=30, reward=0.0, correct=False, repeated=True),
    ]
    assert shape_rewards(group, ShapingWeights(0.2, 0.25)) == pytest.approx([1.0 + 0.1, -0.1 - 0.25])
    assert shape_rewards([], ShapingWeights(0.2, 0.25)) == []


def test_uniform_groups() -> None:
    assert is_uniform([1.0, 1.0, 1.0 + 1e-12])
    assert not is_uniform([1.0, 0.0])


def make_group(verdicts: list[int], rewards: list[float | None], finished: int | None = None) -> Group:
    group = Group("g00000000", PROMPT, 1)
    for number, (verdict, reward) in enumerate(zip(verdicts, rewards, strict=True)):
        trajectory = Trajectory(f"t{number}", group, tokens=10 + number)
        trajectory.finished = finished is None or number < finished
        trajectory.verdict, trajectory.reward = verdict, reward  # type: ignore[assignment]
        trajectory.tokens_by_version.update({3: 10, 4: number} if number else {3: 10})
        group.trajectories.append(trajectory)
    return group


CORRECT, WRONG, FAILED = buffer_pb2.VERDICT_CORRECT, buffer_pb2.VERDICT_WRONG, buffer_pb2.VERDICT_FAILED


def test_a_failed_member_takes_no_part_in_its_group() -> None:
    batch = make_training_batch(
        [make_group([CORRECT, FAILED, WRONG], [1.0, None, 0.0])], ShapingWeights(1.0, 0.0), True
    )
    [group] = batch.groups
    # Lengths 10 (correct) and 12 (wrong): the failure's 11 does not count.
    rewards = {member.trajectory_id: member.reward for member in group.trajectories}
    assert rewards == pytest.approx({"t0": 1.5, "t2": -0.5})
    assert batch.tokens_by_version == {3: 20, 4: 2}
    [increment] = batch.increments
    assert (increment.trajectories, increment.correct) == (2, 1)


def test_groups_that_teach_nothing_are_consumed_and_not_trained() -> None:
    uniform = make_group([CORRECT, CORRECT], [1.0, 1.0])
    failed = make_group([CORRECT, FAILED], [1.0, None])
    unfinished = make_group([CORRECT, WRONG], [1.0, 0.0], finished=1)
    unscored = make_group([CORRECT, buffer_pb2.VERDICT_UNSPECIFIED], [1.0, None])
    batch = make_training_batch([uniform, failed, unfinished, unscored], ShapingWeights(0.0, 0.0), True)
    assert batch.groups == []
    assert batch.consumed == [uniform, failed]
    assert (batch.uniform, batch.failed) == (1, 1)
    kept = make_training_batch([uniform], ShapingWeights(0.0, 0.0), False)
    assert len(kept.groups) == 1


def test_learning_rate_falls_over_the_run() -> None:
    config = AlgorithmConfig(optimizer=OptimizerConfig(learning_rate=2e-4), final_learning_rate_share=0.3)
    assert [learning_rate_at(config, share) for share in (0.0, 0.5, 1.0)] == pytest.approx([2e-4, 1.3e-4, 0.6e-4])
    message = make_algorithm(config, 1.0, learning_rate_at(config, 0.5))
    assert message.optimizer.learning_rate == pytest.approx(1.3e-4)
    assert message.optimizer.beta2 == pytest.approx(0.95)
