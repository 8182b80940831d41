"""Throughput of the whole rollout service, buffer included, against bare AsyncLLM with the same requests."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bare_engine import bare_engine, generate_all
from rollout_stack import rollout_stack
from workload import create_run, create_trajectories, extend

from services.rollout.config import RolloutConfig

CAP_MARGIN = 1


@dataclass(frozen=True)
class RolloutRatio:
    """Tokens per second of each turn; the two arms take turns in one process tree on one machine."""

    service: list[float]
    bare: list[float]

    @property
    def ratio(self) -> float:
        """Median of the service over median of the bare engine."""
        return statistics.median(self.service) / statistics.median(self.bare)


async def measure_rollout_ratio(
    folder: Path, config: RolloutConfig, prompts: Sequence[Sequence[int]], size: int, max_tokens: int, turns: int
) -> RolloutRatio:
    """Each turn extends `size` trajectories of every prompt by at most `max_tokens`, once through either arm.

    One untimed turn of both comes first.
    """
    service: list[float] = []
    bare: list[float] = []
    requests = [prompt for prompt in prompts for _ in range(size)]
    async with rollout_stack(folder, config, "ratio") as stack, bare_engine(config) as engine:
        await create_run(stack)
        for _ in range(turns + 1):
            trajectories = await create_trajectories(stack, prompts, size)
            result = await extend(
                stack, trajectories, token_budget=max_tokens, max_response_tokens=max_tokens + CAP_MARGIN
            )
            service.append(result.tokens / result.seconds)
            bare.append(await generate_all(engine, Path(config.model), requests, max_tokens))
    return RolloutRatio(service[1:], bare[1:])
