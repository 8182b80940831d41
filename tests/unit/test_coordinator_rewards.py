"""Length reward, shaping and training batches on groups worked by hand."""

from __future__ import annotations

from unittest.mock import AsyncMock, Mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perigee.buffer.v1 import buffer_pb2
from perigee.errors import InvalidArgumentError
from perigee.reward.items import PromptLine
from perigee.reward.v1 import reward_pb2
from perigee.trainer.v1 import trainer_pb2
from services.coordinator.groups import Group, Trajectory
from services.coordinator.iteration import Iteration, learning_rate_at, overlong_rate, reward_metrics, rollout_metrics
from services.coordinator.prompts import Prompt
from services.coordinator.rewards import (
    ShapingWeights,
    TrainingBatch,
    is_uniform,
    length_reward,
    length_reward_weight,
    make_training_batch,
    overlong_penalty,
    shape_rewards,
)
from services.coordinator.rollout_phase import RolloutCounts
from services.coordinator.run_config import (
    CurriculumConfig,
    LengthRewardConfig,
    RunConfig,
    SftStage,
    parse_run_config,
    to_message,
)
from services.coordinator.run_log import PhaseTime, Timeline
from services.coordinator.sampling import Sampler

PROMPT = Prompt(PromptLine("p", "default", 0.0, reward_pb2.ScoreItem(prompt="1+1=")), (1, 2, 3))
CORRECT, WRONG, FAILED = buffer_pb2.VERDICT_CORRECT, buffer_pb2.VERDICT_WRONG, buffer_pb2.VERDICT_FAILED


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


def judged(tokens: int, reward: float, repeated: bool = False) -> Trajectory:
    """A trajectory with a verdict, correct when it has a reward."""
    trajectory = Trajectory("t", Group("g00000000", PROMPT, 1), tokens=tokens, finished=True, reward=reward)
    trajectory.verdict = CORRECT if reward else WRONG
    trajectory.end_reason = buffer_pb2.END_REASON_REPETITION if repeated else buffer_pb2.END_REASON_STOP
    return trajectory


def test_shaping_adds_length_reward_and_takes_repetition_penalty() -> None:
    group = [judged(10, 1.0), judged(30, 0.0, repeated=True)]
    assert shape_rewards(group, ShapingWeights(0.2, 0.25)) == pytest.approx([1.0 + 0.1, -0.1 - 0.25])
    assert shape_rewards([], ShapingWeights(0.2, 0.25)) == []


@pytest.mark.parametrize(
    ("tokens", "penalty"),
    [(0, 0.0), (79, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (99, -0.95), (100, -1.0), (150, -1.0)],
)
def test_overlong_penalty_grows_over_the_buffer(tokens: int, penalty: float) -> None:
    assert overlong_penalty(tokens, cap=100, buffer=20) == pytest.approx(penalty)


@settings(deadline=None)
@given(st.integers(0, 5000), st.integers(0, 5000), st.integers(2, 4000), st.data())
def test_overlong_penalty_never_rewards_length(one: int, other: int, cap: int, data: st.DataObject) -> None:
    buffer = data.draw(st.integers(1, cap - 1))
    shorter, longer = sorted((one, other))
    assert -1 <= overlong_penalty(longer, cap, buffer) <= overlong_penalty(shorter, cap, buffer) <= 0


def test_shaping_takes_the_overlong_penalty_whatever_the_verdict() -> None:
    group = [judged(70, 1.0), judged(95, 1.0), judged(100, 0.0)]
    weights = ShapingWeights(0.0, 0.0, overlong_penalty=0.4, overlong_cap=100, overlong_buffer=20)
    assert shape_rewards(group, weights) == pytest.approx([1.0, 1.0 - 0.3, -0.4])
    assert shape_rewards(group, ShapingWeights(0.0, 0.0)) == [1.0, 1.0, 0.0]


RUN = {"model": "m", "prompts": "p", "heldout": "h", "iterations": 9}


def test_weights_of_an_iteration_come_from_the_recipe() -> None:
    config = RunConfig(
        **RUN,
        rollout={"max_response_tokens": 300},
        length_reward={"weight": 0.4, "warmup_iterations": 4},
        repetition_penalty=0.1,
        overlong_penalty={"weight": 0.5, "buffer": 100},
    )
    assert ShapingWeights.at(config, 2) == ShapingWeights(0.2, 0.1, 0.5, 300, 100)
    assert ShapingWeights.at(RunConfig(**RUN), 2).overlong_penalty == 0.0


@pytest.mark.parametrize(
    ("penalty", "message"),
    [
        (
            "{weight: 1, buffer: 1024}",
            "recipe: run: overlong_penalty.buffer must be less than the cap of 1024 tokens, is 1024",
        ),
        (
            "{weight: 1, cap: 1250}",
            "recipe: run: overlong_penalty.cap of 1250 tokens is never reached: rollout.max_response_tokens",
        ),
        ("{wieght: 1}", "recipe: run.overlong_penalty.wieght: unknown key; did you mean weight?"),
    ],
)
def test_a_penalty_that_makes_no_sense_is_refused(penalty: str, message: str) -> None:
    text = f"{{model: m, prompts: p, heldout: h, iterations: 9, overlong_penalty: {penalty}}}"
    with pytest.raises(InvalidArgumentError) as caught:
        parse_run_config(text)
    assert caught.value.message.startswith(message)


@pytest.mark.parametrize(("weight", "rate"), [(0.0, 0.0), (0.5, 0.5)])
def test_the_rate_of_overlong_responses(weight: float, rate: float) -> None:
    weights = ShapingWeights(0.0, 0.0, overlong_penalty=weight, overlong_cap=100, overlong_buffer=20)
    assert overlong_rate([10, 11, 81, 200], weights) == rate


def test_rates_of_no_response_are_null() -> None:
    weights = ShapingWeights(0.0, 0.0, overlong_penalty=0.5, overlong_cap=100, overlong_buffer=20)
    batch = TrainingBatch()
    timeline = Timeline(phases={"rollout": PhaseTime(0.0, 1.0)})
    line = rollout_metrics(RolloutCounts(), batch, timeline, weights) | reward_metrics(batch, 0, weights)
    assert {key: value for key, value in line.items() if key.endswith("_rate")} == {
        "rollout/partial_rate": None,
        "rollout/capped_rate": None,
        "rollout/repetition_rate": None,
        "rollout/overlong_rate": None,
        "reward/ungradable_rate": None,
    }


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


def test_rest_learns_from_groups_of_right_responses_and_from_no_group_without_one() -> None:
    right, wrong = make_group([CORRECT, CORRECT], [1.0, 1.0]), make_group([WRONG, WRONG], [0.1, 0.0])
    batch = make_training_batch([right, wrong], ShapingWeights(0.0, 0.0), True, skips_zero_advantages=True)
    assert [len(group.trajectories) for group in batch.groups] == [2]
    assert (batch.consumed, batch.uniform) == ([right, wrong], 1)


async def test_a_prompt_that_cannot_be_judged_is_named_once_and_left_out() -> None:
    group = make_group([0, 0], [None, None])
    recorded = AsyncMock(return_value=buffer_pb2.RecordVerdictsResponse(recorded=2))
    events: list[str] = []
    iteration = object.__new__(Iteration)
    iteration._samples = Mock()
    iteration._groups = Mock(trajectory=lambda name: group.trajectories[int(name[1:])])
    iteration._sampler = Sampler([PROMPT], CurriculumConfig(), seed=0)
    iteration._scoring_failures = 0
    iteration._context = Mock(run_id="r", status=Mock(report=events.append))
    iteration._context.peers.buffer.record_verdicts = recorded
    outcome = reward_pb2.ScoreResponse(verdict=FAILED, unjudgeable=True, reason="wrong")
    outcomes = [reward_pb2.ScoreResponse(id=trajectory.id) for trajectory in group.trajectories]
    for each in outcomes:
        each.MergeFrom(outcome)
    await iteration._record(outcomes)
    assert events == ["prompt p is left out: wrong"]
    assert iteration._sampler.sample(1, 1, ()) == []
    assert [trajectory.reward for trajectory in group.trajectories] == [None, None]


def test_a_group_of_a_prompt_that_cannot_be_judged_gives_no_reward() -> None:
    group = make_group([CORRECT, WRONG], [1.0, 0.0])
    batch = make_training_batch([group], ShapingWeights(0.0, 0.0), True, {group.prompt.id})
    assert (batch.groups, batch.consumed, batch.failed, batch.increments) == ([], [group], 1, [])


def test_a_group_that_finished_ahead_is_of_the_next_iteration() -> None:
    group = make_group([CORRECT, WRONG], [1.0, 0.0])
    one, other = group.trajectories
    other.start, other.limit = other.tokens - 8, other.tokens - 3
    assert (one.ended, other.ended) == (True, False)
    assert (other.added, other.counted) == (5, other.tokens - 3)
    assert make_training_batch([group], ShapingWeights(0.0, 0.0), True).consumed == []
    other.limit = other.tokens
    assert make_training_batch([group], ShapingWeights(0.0, 0.0), True).consumed == [group]


def test_workers_generate_while_the_trainer_trains_where_stale_tokens_count() -> None:
    def generates(deployment: str, max_staleness: int, during_training: bool | None = None) -> bool:
        changes = {"update": {"max_staleness": max_staleness}, "rollout": {"during_training": during_training}}
        return RunConfig(**RUN, deployment=deployment, **changes).rolls_out_during_training

    assert generates("hybrid", 1)
    assert not generates("hybrid", 0)
    assert not generates("separate", 1)
    assert generates("separate", 0, during_training=True)
    assert not generates("hybrid", 1, during_training=False)


def test_learning_rate_falls_over_the_run() -> None:
    rates = [learning_rate_at(2e-4, 0.3, progress) for progress in (0.0, 0.5, 1.0)]
    assert rates == pytest.approx([2e-4, 1.3e-4, 0.6e-4])


def test_settings_reach_the_trainer_under_their_own_names() -> None:
    config = RunConfig(
        **RUN,
        algorithm={"name": "policy_mirror_descent", "tau": 0.2, "baseline": "mean"},
        update={"max_staleness": 3, "tis_cap": 2.0},
        optimizer={"beta2": 0.98, "max_grad_norm": 0.5},
        rollout={"temperature": 0.7},
    )
    algorithm = config.algorithm.message()
    assert (algorithm.name, dict(algorithm.settings)) == ("policy_mirror_descent", {"tau": 0.2, "baseline": "mean"})
    update = config.update_message()
    assert (update.minibatches, update.max_staleness, update.tis_cap, update.temperature) == (2, 3, 2.0, 0.7)
    assert not update.default_tis_cap
    assert RunConfig(**RUN).update_message().default_tis_cap
    stage = SftStage(dataset="d.jsonl", steps=3, optimizer={"beta1": 0.8})
    request = to_message(stage, trainer_pb2.FineTuneRequest(), seed=7)
    assert (request.dataset_path, request.steps, request.seed, request.optimizer.beta1) == ("d.jsonl", 3, 7, 0.8)
    optimizer = config.optimizer_message(1.3e-4)
    assert (optimizer.learning_rate, optimizer.beta2, optimizer.max_grad_norm) == (1.3e-4, 0.98, 0.5)
