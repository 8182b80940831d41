"""Rollout time of an iteration with the token budget against without it, on long-tailed lengths.

The model has random weights and a vocabulary of `mean_tokens`, so each token ends the response with a probability of
one in `mean_tokens`: lengths are exponentially distributed. Both arms keep the same number of trajectories live and
start fresh ones for those that finished. Without a budget an iteration lasts as long as its longest response; with one
it lasts as long as the budget, and the rest is continued in the iterations that follow.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiny_model
from rollout_stack import RolloutStack, rollout_stack
from safetensors.numpy import load_file, save_file
from workload import Round, create_run, create_trajectories, extend

from services.rollout.config import RolloutConfig

PROMPT_ROOM = 16
EMBEDDING_STD = 0.02
RUN_IN_MEANS = 2


@dataclass(frozen=True)
class BudgetLoad:
    """Trajectories live at once, their mean length, and the limits of a segment and a response, in tokens."""

    live: int
    mean_tokens: int
    token_budget: int
    max_response_tokens: int


@dataclass(frozen=True)
class BudgetRatio:
    """Rounds of both arms, without those that mix the ages first."""

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
    """Returns the median seconds of a round."""
    return statistics.median(round_.seconds for round_ in rounds)


def finished_per_second(rounds: Sequence[Round]) -> float:
    """Returns the trajectories that ended per second of all rounds."""
    return sum(len(round_.finished) for round_ in rounds) / sum(round_.seconds for round_ in rounds)


def write_long_model(folder: Path, mean_tokens: int, max_response_tokens: int) -> None:
    """Writes the recipe's model with random weights, another vocabulary size and room for the longest response."""
    tiny_model.write_model(folder, seed=0)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"vocab_size": mean_tokens, "max_position_embeddings": max_response_tokens + PROMPT_ROOM}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    weights = load_file(folder / "model.safetensors")
    # Small logits: the next token is all but uniform.
    embedding = np.random.default_rng(0).standard_normal((mean_tokens, tiny_model.Shape().hidden)) * EMBEDDING_STD
    weights["model.embed_tokens.weight"] = embedding.astype(np.float32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


async def measure_budget_ratio(folder: Path, config: RolloutConfig, load: BudgetLoad, rounds: int) -> BudgetRatio:
    """Runs `rounds` timed iterations of either arm in turn, after rounds of both that mix the ages."""
    async with rollout_stack(folder, config, "budget") as stack:
        await create_run(stack)
        with_budget, without_budget = Arm(stack, load, load.token_budget), Arm(stack, load, load.max_response_tokens)
        await without_budget.run()
        run_in = RUN_IN_MEANS * load.mean_tokens // load.token_budget
        for _ in range(run_in):
            await with_budget.run()
        for _ in range(rounds):
            await with_budget.run()
            await without_budget.run()
    return BudgetRatio(with_budget.rounds[run_in:], without_budget.rounds[1:])


class Arm:
    """Iterations under one budget: each resumes partial trajectories and adds new ones."""

    def __init__(self, stack: RolloutStack, load: BudgetLoad, token_budget: int) -> None:
        self.rounds: list[Round] = []
        self._stack = stack
        self._load = load
        self._token_budget = token_budget

    async def run(self) -> None:
        """Runs one iteration."""
        partial = self.rounds[-1].partial if self.rounds else []
        fresh = self._load.live - len(partial)
        prompts = [[3 + index % 10, 3 + index % 7, 13, 14] for index in range(fresh)]
        trajectories = partial + await create_trajectories(self._stack, prompts, 1)
        self.rounds.append(await extend(self._stack, trajectories, self._token_budget, self._load.max_response_tokens))
