"""Curriculum and prioritized sampling: what is drawn, how often, and again after a restart."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perigee.errors import DataLossError
from perigee.reward.items import PromptLine
from perigee.reward.v1 import reward_pb2
from services.coordinator.prompts import Prompt
from services.coordinator.run_config import CurriculumConfig, PrioritizedConfig, RunConfig
from services.coordinator.sampling import PrioritizedSampler, Sampler, allowed_difficulty, make_sampler

OFF = CurriculumConfig()


def make_prompts(difficulties: list[float]) -> list[Prompt]:
    return [
        Prompt(PromptLine(f"p{n}", "default", difficulty, reward_pb2.ScoreItem(prompt="x")), (1,))
        for n, difficulty in enumerate(difficulties)
    ]


def ids(prompts: list[Prompt]) -> list[str]:
    return [prompt.id for prompt in prompts]


def test_every_prompt_is_drawn_once_before_any_is_drawn_twice() -> None:
    sampler = Sampler(make_prompts([1.0] * 30), OFF, seed=1)
    drawn = Counter(prompt_id for _ in range(6) for prompt_id in ids(sampler.sample(10, 1, set())))
    assert set(drawn.values()) == {2}
    assert len(drawn) == 30


def test_a_prompt_that_is_left_out_is_not_drawn() -> None:
    sampler = Sampler(make_prompts([1.0] * 4), OFF, seed=1)
    sampler.left_out.add("p2")
    assert set(ids(sampler.sample(4, 1, {"p0"}))) == {"p1", "p3"}
    continued = Sampler(make_prompts([1.0] * 4), OFF, seed=1)
    continued.restore(sampler.state())
    assert continued.left_out == {"p2"}


def test_a_ramp_allows_harder_prompts_as_iterations_pass() -> None:
    curriculum = CurriculumConfig(kind="ramp", start_difficulty=2, end_difficulty=6, iterations=4)
    assert [allowed_difficulty(curriculum, iteration)[1] for iteration in (1, 2, 3, 5, 9)] == [2, 3, 4, 6, 6]
    prompts = make_prompts([float(n % 8) for n in range(80)])
    sampler = Sampler(prompts, curriculum, seed=0)
    assert {p.line.difficulty for p in sampler.sample(30, 1, set())} == {0.0, 1.0, 2.0}
    assert max(p.line.difficulty for p in sampler.sample(60, 9, set())) == 6.0


def test_too_few_allowed_prompts_are_filled_up_by_the_nearest() -> None:
    curriculum = CurriculumConfig(kind="ramp", start_difficulty=1, end_difficulty=1, iterations=1)
    sampler = Sampler(make_prompts([1.0, 1.0, 2.0, 3.0, 9.0]), curriculum, seed=0)
    assert set(ids(sampler.sample(4, 1, set()))) == {"p0", "p1", "p2", "p3"}


def test_hard_after_warmup() -> None:
    curriculum = CurriculumConfig(kind="hard_after_warmup", end_difficulty=3, iterations=2)
    sampler = Sampler(make_prompts([1.0, 2.0, 3.0, 4.0] * 5), curriculum, seed=0)
    assert {p.line.difficulty for p in sampler.sample(20, 2, set())} == {1.0, 2.0, 3.0, 4.0}
    assert {p.line.difficulty for p in sampler.sample(10, 3, set())} == {3.0, 4.0}


def test_prioritized_draws_in_proportion_to_one_minus_success_rate() -> None:
    prompts = make_prompts([1.0] * 3)
    sampler = PrioritizedSampler(prompts, OFF, seed=3, floor=0.1)
    sampler.record("p0", 10, 10)
    sampler.record("p1", 10, 5)
    assert sampler.weights() == pytest.approx([0.1, 0.5, 1.0])
    drawn = Counter(ids(sampler.sample(1, 1, set()))[0] for _ in range(4000))
    shares = np.array([drawn[f"p{n}"] for n in range(3)]) / 4000
    # Four standard errors of a share are at most 0.032.
    assert shares == pytest.approx(np.array([0.1, 0.5, 1.0]) / 1.6, abs=0.032)


@settings(deadline=None)
@given(
    st.booleans(),
    st.lists(st.integers(1, 12), min_size=1, max_size=5),
    st.lists(st.integers(0, 11), max_size=6),
    st.integers(0, 1000),
)
def test_a_restored_sampler_draws_what_the_first_would_have(
    enabled: bool, counts: list[int], excluded: list[int], seed: int
) -> None:
    prompts = make_prompts([float(n) for n in range(12)])
    curriculum = CurriculumConfig(kind="ramp", start_difficulty=3, end_difficulty=9, iterations=5)
    config = RunConfig.model_validate(
        {"prompts": "p", "heldout": "h", "iterations": 1, "seed": seed, "curriculum": curriculum}
        | {"prioritized": PrioritizedConfig(enabled=enabled)}
    )
    exclude = {f"p{n}" for n in excluded}
    first = make_sampler(prompts, config, {"p1": (4, 3)})
    for iteration, count in enumerate(counts, start=1):
        chosen = first.sample(count, iteration, exclude)
        assert len(set(ids(chosen))) == len(chosen) == min(count, 12 - len(exclude))
        assert not exclude & set(ids(chosen))
    second = make_sampler(prompts, config, {"p1": (4, 3)})
    second.restore(first.state())
    assert ids(second.sample(5, 4, exclude)) == ids(first.sample(5, 4, exclude))


def test_a_state_of_another_prompt_set_is_refused() -> None:
    state = Sampler(make_prompts([1.0] * 3), OFF, 0).state()
    with pytest.raises(DataLossError, match="counts 3 prompts, the file holds 4"):
        Sampler(make_prompts([1.0] * 4), OFF, 0).restore(state)
