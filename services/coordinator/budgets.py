"""Budgets: how many tokens a trajectory may add in an iteration, by its context and by the time that it may take.

Work is counted in sampled tokens of a short context. A weight update empties the prefix cache, so each iteration
prefills the contexts of its trajectories; attention makes both kinds of tokens dearer with their position.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from services.coordinator.run_config import RolloutSettings

# Tokens of prompt and response that a trajectory has, and response tokens that it may still add.
Context: TypeAlias = tuple[int, int]

# Weight of the latest iteration in the speed. Where the seconds of a phase grow with the work's power p, each iteration
# leaves 1 - SPEED_WEIGHT * p of the distance of the work's logarithm from where it should be: it does not overshoot up
# to p = 2, and is stable up to p = 4.
SPEED_WEIGHT = 0.5


@dataclass(frozen=True)
class Budgets:
    """Budgets of one iteration: `base` for short contexts, more for those whose prefill asks for it."""

    base: int
    settings: RolloutSettings

    def of(self, tokens: int) -> int:
        """Returns the budget of a trajectory whose prompt and response have so many tokens."""
        settings = self.settings
        # A cache that stays over commits is emptied once it is older than that.
        iterations = 1 + settings.max_kv_staleness
        return max(self.base, settings.costs.least_budget(tokens, settings.max_prefill_share, iterations))

    def work(self, contexts: Iterable[Context]) -> float:
        """Returns the work of the iteration if every trajectory uses its budget."""
        return sum(self.settings.costs.work(tokens, min(self.of(tokens), room)) for tokens, room in contexts)


def choose_budgets(
    settings: RolloutSettings, contexts: Sequence[Context], speed: float | None, ahead_seconds: float = 0.0
) -> Budgets:
    """Returns the budgets with which these contexts take the target duration at a speed in work per second.

    Workers had `ahead_seconds` for them before. Without a target, or a measured speed, the base is the token budget.
    """
    cap = settings.max_response_tokens
    low = Budgets(min(settings.token_budget, cap) or cap, settings)
    if settings.target_seconds is None or speed is None or not contexts:
        return low
    work = (settings.target_seconds + ahead_seconds) * speed
    while low.base < cap:
        middle = replace(low, base=(low.base + cap + 1) // 2)
        if middle.work(contexts) <= work:
            low = middle
        else:
            cap = middle.base - 1
    return low


def update_speed(
    settings: RolloutSettings, speed: float | None, work: float, seconds: float, ahead_seconds: float = 0.0
) -> float | None:
    """Returns the speed after a phase that planned so much work: a moving mean of logarithms.

    The first phase counts as much as others: before it, the speed is taken for the one that the target asks for.
    """
    if settings.target_seconds is None or work <= 0 or seconds <= 0:
        return speed
    before = work / (settings.target_seconds + ahead_seconds) if speed is None else speed
    measured = work / (seconds + ahead_seconds)
    return float(before ** (1 - SPEED_WEIGHT) * measured**SPEED_WEIGHT)
