"""Rollout time of an iteration with the token budget against without it, on long-tailed lengths.

The model has random weights, so each token ends the response with a probability of one in its vocabulary: lengths are
exponentially distributed. Both arms keep the same number of trajectories live and start fresh ones for those that
finished. Without a budget an iteration lasts as long as its longest response; with one it lasts as long as the budget,
and the rest is continued in the iterations that follow.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rollout_stack import RolloutStack, rollout_stack
from workload import Round, create_run, create_trajectories, extend

from services.rollout.config import RolloutConfig


@dataclass(frozen=True)
class BudgetRatio:
    """Rounds of both arms, those of the run-in left out."""

    with_budget: list[Round]
    without_budget: list[Round]

    @property
    def iteration_ratio(self) -> float:
        """Median seconds of an iteration without the budget over those with it."""
        return median_seconds(self.without_budget) / median_seconds(self.with_budget)

    @property
    def finished_ratio(self) -> float:
        """Trajectories finished per second with the budget over those without it."""
        return finished_per_second(self.with_budget) / finished_per_second(self.without_budget)


def median_seconds(rounds: Sequence[Round]) -> float:
    """Median seconds of a round."""
    return statistics.median(round_.seconds for round_ in rounds)


def finished_per_second(rounds: Sequence[Round]) -> float:
    """Trajectories that ended, over the seconds of all rounds."""
    return sum(len(round_.finished) for round_ in rounds) / sum(round_.seconds for round_ in rounds)


async def measure_budget_ratio(
    folder: Path, config: RolloutConfig, live: int, token_budget: int, response_cap: int, rounds: int
) -> BudgetRatio:
    """Runs `rounds` timed iterations of either arm; the budgeted arm first runs in until its ages are mixed."""
    async with rollout_stack(folder, config, "budget") as stack:
        await create_run(stack)
        await run_rounds(stack, live, response_cap, response_cap, 1)
        without = await run_rounds(stack, live, response_cap, response_cap, rounds)
        run_in = response_cap // token_budget // 2
        within = await run_rounds(stack, live, token_budget, response_cap, run_in + rounds)
    return BudgetRatio(within[run_in:], without)


async def run_rounds(stack: RolloutStack, live: int, token_budget: int, response_cap: int, rounds: int) -> list[Round]:
    """Iterations that resume what is partial and fill up with fresh trajectories to `live`."""
    results: list[Round] = []
    partial: list[str] = []
    for number in range(rounds):
        prompts = [[3 + (number * live + index) % 10, 13, 14] for index in range(live - len(partial))]
        trajectories = partial + await create_trajectories(stack, prompts, 1)
        results.append(await extend(stack, trajectories, token_budget, response_cap))
        partial = results[-1].partial
    return results
