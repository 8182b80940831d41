"""Budgets by context and by duration, and the spread of their work over workers."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from bench.long_tail import CAP, Load, MeasuredCosts, simulate, total
from perigee.rollout.client import RolloutClient
from services.coordinator.budgets import choose_budgets, update_speed
from services.coordinator.dispatcher import Work, deal
from services.coordinator.run_config import RolloutSettings, TokenCosts
from services.coordinator.workers import READY, Worker

positions = st.floats(100, 1e6)
costs = st.builds(TokenCosts, prefill=st.floats(1e-3, 10), prefill_doubles_at=positions, sampling_doubles_at=positions)
contexts = st.lists(st.tuples(st.integers(0, 131_072), st.integers(1, 131_072)), min_size=1, max_size=50)


@given(costs, st.integers(0, 131_072), st.floats(0.01, 0.99))
def test_the_budget_is_the_least_that_keeps_the_share_of_prefill(costs: TokenCosts, tokens: int, share: float) -> None:
    budget = costs.least_budget(tokens, share)
    prefill = costs.prefill_work(tokens)
    assert prefill <= (share + 1e-9) * costs.work(tokens, budget)
    if budget > 1:
        assert prefill >= (share - 1e-9) * costs.work(tokens, budget - 1)
    assert costs.least_budget(tokens + 1000, share) >= budget
    assert costs.least_budget(tokens, 1.0) == 0


@given(costs, st.integers(0, 131_072), st.floats(0, 1e6))
def test_tokens_of_work_are_the_inverse_of_sampling_work(costs: TokenCosts, tokens: int, new_tokens: float) -> None:
    assert costs.tokens_of(tokens, costs.sampling_work(tokens, new_tokens)) == pytest.approx(new_tokens, abs=1e-6)


@given(costs, contexts, st.integers(1, 9_000), st.integers(1, 131_072), st.floats(1, 1e4), st.floats(1, 1e6))
def test_a_base_budget_is_the_most_that_the_target_allows(
    costs: TokenCosts, contexts: list[tuple[int, int]], floor: int, cap: int, seconds: float, speed: float
) -> None:
    settings = RolloutSettings(token_budget=floor, max_response_tokens=cap, target_seconds=seconds, costs=costs)
    budgets = choose_budgets(settings, contexts, speed)
    assert min(floor, cap) <= budgets.base <= cap
    if budgets.base > min(floor, cap):
        assert budgets.work(contexts) <= seconds * speed
    if budgets.base < cap:
        assert replace(budgets, base=budgets.base + 1).work(contexts) > seconds * speed
    assert choose_budgets(settings, contexts, speed, ahead_seconds=seconds).base >= budgets.base
    assert choose_budgets(settings, contexts, None).base == min(floor, cap)


@settings(max_examples=30, deadline=None)
@given(
    power=st.floats(0.5, 2.0),
    fixed_share=st.floats(0, 0.5),
    noise=st.floats(0, 0.2),
    change=st.sampled_from([0.5, 1.0, 1.7]),
    draw=st.randoms(use_true_random=False),
)
def test_the_duration_settles_at_its_target_and_stays(
    power: float, fixed_share: float, noise: float, change: float, draw: random.Random
) -> None:
    """Phases that take a fixed time and a power of the work; midway, workers come or go."""
    target, reference = 100.0, 1e5
    settings = RolloutSettings(
        token_budget=5_000, max_response_tokens=10_000_000, max_prefill_share=1, target_seconds=target
    )
    live, distances = [(0, 10_000_000)], []
    speed: float | None = None
    for iteration in range(100):
        work = choose_budgets(settings, live, speed).work(live)
        factor = 1.0 if iteration < 50 else change
        seconds = target * (fixed_share + factor * (1 - fixed_share) * (work / reference) ** power)
        distances.append(math.log(seconds / target))
        speed = update_speed(settings, speed, work, seconds * math.exp(draw.uniform(-noise, noise)))
    # No more than the noise of the measurement, in either half.
    assert max(map(abs, distances[40:50] + distances[90:])) < noise + 0.03
    if not noise:
        assert max(distances[:50]) < 0.01  # it comes from below and does not overshoot
        assert all(abs(later) <= abs(earlier) + 1e-3 for earlier, later in pairwise(distances[51:]))


def test_a_target_needs_a_floor() -> None:
    with pytest.raises(ValidationError, match="target_seconds needs a token_budget"):
        RolloutSettings(target_seconds=10)


def make_worker(name: str, capacity: int, speed: float | None) -> Worker:
    # The client dials nobody.
    worker = Worker(name, "127.0.0.1:1", capacity, 1, RolloutClient.connect("127.0.0.1:1"), math.inf, READY, 1)
    if speed is not None:
        worker.record_phase(speed, 1.0)
    return worker


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.1, 100), max_size=60), st.lists(st.floats(0.1, 10) | st.none(), min_size=1, max_size=5))
async def test_long_sequences_are_spread_over_workers_by_their_speed(
    work: list[float], speeds: list[float | None]
) -> None:
    workers = [make_worker(f"w{n}", capacity=4, speed=speed) for n, speed in enumerate(speeds)]
    by_key = {str(n): each for n, each in enumerate(sorted(work, reverse=True))}
    dealt = deal({key: Work(each) for key, each in by_key.items()}, dict.fromkeys(workers, 100))
    assert sorted(key for keys in dealt.values() for key in keys) == sorted(by_key)
    known = [speed for speed in speeds if speed is not None]
    assumed = sum(known) / len(known) if known else 4.0
    by_worker = [speed or assumed for speed in speeds]
    done = [sum(dealt[worker].values()) / speed for worker, speed in zip(workers, by_worker, strict=True)]
    # List scheduling: no worker is later than what the last sequence given to it would have been on any other.
    bound = (sum(work) + (len(workers) - 1) * max(work, default=0)) / sum(by_worker)
    assert max(done) <= bound + 1e-6


async def test_rooms_are_kept_and_the_longest_go_to_different_workers() -> None:
    first, second = make_worker("a", 4, None), make_worker("b", 4, None)
    by_key = {"long": 9.0, "also long": 8.0, "short": 1.0, "shorter": 0.5, "left": 0.1}
    dealt = deal({key: Work(each) for key, each in by_key.items()}, {first: 1, second: 3})
    assert dealt == {first: {"long": 9.0}, second: {"also long": 8.0, "short": 1.0, "shorter": 0.5}}
    # A sequence goes where it costs less, if that is not later.
    dealt = deal(dict.fromkeys("xy", Work(3.0, "b", saved=2.0)), {first: 2, second: 2})
    assert dealt == {first: {}, second: {"x": 1.0, "y": 1.0}}


@pytest.mark.parametrize("speeds", [(1.0, 1.0, 1.0, 1.0), (1.0, 1.0, 0.5, 0.5)])
def test_workers_of_any_speed_end_their_part_of_a_phase_together(speeds: tuple[float, ...]) -> None:
    """Simulated phases against those whose segments are spread evenly by the workers' true speeds."""
    costs = MeasuredCosts(
        step_s=7.5e-3,
        sampled_token_s=3e-4,
        sampled_position_s=1e-8,
        prefilled_token_s=3e-5,
        prefilled_position_s=1e-9,
        trained_token_s=0.0,
        trained_position_s=0.0,
        other_s=0.0,
    )
    load = Load(median=500.0, groups=32, speeds=speeds, capacity=64)
    settings = RolloutSettings(token_budget=1000, max_response_tokens=CAP, costs=costs.token_costs(load.capacity))
    # The first five measure the speeds and mix the ages.
    phases = simulate(costs, load, settings, seed=0, iterations=20)[5:]
    assert total(phases, "even") > 0.85 * total(phases, "rollout")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 40)), min_size=1, max_size=4), st.integers(0, 40))
async def test_prefixes_stay_with_their_workers_up_to_a_fair_part(counts: list[tuple[int, int]], free: int) -> None:
    workers = [make_worker(f"w{n}", capacity, None) for n, (capacity, _) in enumerate(counts)]
    holders = {
        f"{worker.worker_id}/{n}": worker
        for worker, (_, count) in zip(workers, counts, strict=True)
        for n in range(count)
    }
    keys = [*holders, *(f"free/{n}" for n in range(free))]
    work = {key: Work(9.0, holders[key].worker_id, saved=1.0) if key in holders else Work(9.0) for key in keys}
    dealt = deal(work, dict.fromkeys(workers, len(keys)))
    assert sorted(key for some in dealt.values() for key in some) == sorted(keys)
    # As if all were as cheap as they can be.
    fair = (8.0 * len(holders) + 9.0 * free) / sum(capacity for capacity, _ in counts) if keys else 0.0
    for worker, (capacity, count) in zip(workers, counts, strict=True):
        stayed = sum(holders.get(key) is worker for key in dealt[worker])
        assert stayed >= min(count, int(fair * capacity / 8.0 + 1e-6))
        assert list(dealt[worker]) == [key for key in keys if key in dealt[worker]]
