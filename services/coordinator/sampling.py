"""Sampling of prompts: a curriculum by difficulty, and priorities by success rate (k1.5 section 2.3.4)."""

from __future__ import annotations

import base64
import zlib
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from perigee.errors import DataLossError
from services.coordinator.prompts import Prompt
from services.coordinator.run_config import CurriculumConfig, RunConfig


@dataclass(frozen=True)
class SamplerState:
    """State of a sampler between processes, as JSON values."""

    step: int = 0
    draws: str = ""
    left_out: list[str] = field(default_factory=list)


class Sampler:
    """Draws prompts of the difficulty that the iteration allows, those drawn least first, ties broken at random.

    Sources take part in proportion to their weights. When fewer prompts are allowed than asked for, the nearest
    difficulties fill up. The same state draws the same.
    """

    def __init__(
        self, prompts: Sequence[Prompt], curriculum: CurriculumConfig, seed: int, weights: Sequence[float] = (1.0,)
    ) -> None:
        self._prompts = prompts
        self._weights_S = weights
        self._source_P = np.array([prompt.source for prompt in prompts], dtype=np.int64)
        self._curriculum = curriculum
        self._seed = seed
        self._step = 0
        self._index = {prompt.id: index for index, prompt in enumerate(prompts)}
        self._difficulty_P = np.array([prompt.line.difficulty for prompt in prompts], dtype=np.float64)
        self._draws_P = np.zeros(len(prompts), dtype=np.uint32)
        self.left_out: set[str] = set()
        """Prompts whose tests cannot be judged."""

    def sample(self, count: int, iteration: int, exclude: Collection[str]) -> list[Prompt]:
        """Returns at most `count` different prompts that are neither in `exclude` nor left out."""
        return self._choose(count, iteration, exclude, self._draws_P.astype(np.float64))

    def _choose(
        self, count: int, iteration: int, exclude: Collection[str], cost_P: NDArray[np.float64]
    ) -> list[Prompt]:
        """Returns the allowed prompts of least cost, ties at random, and counts the draws."""
        generator = self._next_generator()
        distance_P = self._distance_from_allowed(iteration)
        order_P = np.lexsort((generator.random(len(self._prompts)), cost_P, distance_P))
        refused = self.left_out.union(exclude)
        free = [int(index) for index in order_P if self._prompts[int(index)].id not in refused]
        chosen = free[:count] if len(self._weights_S) == 1 else self._mix(free, count, distance_P)
        self._draws_P[chosen] += 1
        return [self._prompts[index] for index in chosen]

    def _mix(self, order: Sequence[int], count: int, distance_P: NDArray[np.float64]) -> list[int]:
        """Returns the first `count` prompts, one at a time from the source that is furthest behind its weight.

        Prompts that the iteration allows come before others, whatever their source. What each source has given follows
        from the draws, so that a resumed run goes on with the same mixture.
        """
        sources = range(len(self._weights_S))
        queues = [deque(index for index in order if self._source_P[index] == source) for source in sources]
        drawn_S = np.bincount(self._source_P, weights=self._draws_P, minlength=len(sources))
        chosen: list[int] = []
        while len(chosen) < count and (open_sources := [source for source in sources if queues[source]]):
            source = min(
                open_sources, key=lambda s: (distance_P[queues[s][0]], (drawn_S[s] + 1) / self._weights_S[s], s)
            )
            chosen.append(queues[source].popleft())
            drawn_S[source] += 1
        return chosen

    def _next_generator(self) -> np.random.Generator:
        """Returns a new random generator for each step, so that the number of the step is all of its state."""
        self._step += 1
        return np.random.default_rng([self._seed, self._step])

    def _distance_from_allowed(self, iteration: int) -> NDArray[np.float64]:
        """Returns the distance of each prompt's difficulty from the range that the iteration allows; 0 inside."""
        low, high = allowed_difficulty(self._curriculum, iteration)
        outside_P = np.maximum(low - self._difficulty_P, self._difficulty_P - high)
        return np.asarray(np.maximum(0.0, outside_P), dtype=np.float64)

    def record(self, prompt_id: str, trajectories: int, correct: int) -> None:
        """Does nothing: a curriculum uses difficulties, not success rates."""

    def count_draw(self, prompt_id: str) -> None:
        """Counts a prompt that was drawn by a process that died before it could save its state."""
        self._draws_P[self._index[prompt_id]] += 1

    def state(self) -> SamplerState:
        """Returns the step, how often each prompt was drawn, packed, and what is left out."""
        packed = zlib.compress(self._draws_P.astype("<u4").tobytes())
        return SamplerState(self._step, base64.b64encode(packed).decode(), sorted(self.left_out))

    def restore(self, state: SamplerState) -> None:
        """Sets the sampler to a saved state; raises DataLossError when it is of another prompt set."""
        draws_P = np.frombuffer(zlib.decompress(base64.b64decode(state.draws)), dtype="<u4")
        if len(draws_P) != len(self._prompts):
            raise DataLossError(f"The run's state counts {len(draws_P)} prompts, the file holds {len(self._prompts)}.")
        self._step = state.step
        self.left_out = set(state.left_out)
        self._draws_P = draws_P.astype(np.uint32)


class PrioritizedSampler(Sampler):
    """Draws prompts with probabilities proportional to 1 - success rate, among those that the curriculum allows.

    A prompt that was never judged has a success rate of 0; `floor` is the smallest weight. Success rates are no part of
    the state: they are the buffer's prompt statistics.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        curriculum: CurriculumConfig,
        seed: int,
        floor: float,
        weights: Sequence[float] = (1.0,),
    ) -> None:
        super().__init__(prompts, curriculum, seed, weights)
        self._floor = floor
        self._judged_P = np.zeros(len(prompts))
        self._correct_P = np.zeros(len(prompts))

    def weights(self) -> NDArray[np.float64]:
        """Returns each prompt's weight."""
        success_P = self._correct_P / np.maximum(1.0, self._judged_P)
        return np.asarray(np.maximum(self._floor, 1.0 - success_P), dtype=np.float64)

    def sample(self, count: int, iteration: int, exclude: Collection[str]) -> list[Prompt]:
        """Returns at most `count` different prompts as a plain sampler does, drawn without replacement."""
        # Exponential clocks: the first `count` to ring are a weighted draw without replacement.
        clock_P = self._next_generator().exponential(size=len(self._judged_P)) / self.weights()
        return self._choose(count, iteration, exclude, clock_P)

    def record(self, prompt_id: str, trajectories: int, correct: int) -> None:
        """Adds judged trajectories to the prompt's success rate."""
        index = self._index.get(prompt_id)
        if index is not None:
            self._judged_P[index] += trajectories
            self._correct_P[index] += correct


def allowed_difficulty(curriculum: CurriculumConfig, iteration: int) -> tuple[float, float]:
    """Returns the lowest and highest difficulty that an iteration (from 1) may draw."""
    passed = iteration - 1
    if curriculum.kind == "ramp":
        share = min(1.0, passed / curriculum.iterations)
        rise = curriculum.end_difficulty - curriculum.start_difficulty
        return -np.inf, curriculum.start_difficulty + share * rise
    if curriculum.kind == "hard_after_warmup" and passed >= curriculum.iterations:
        return curriculum.end_difficulty, np.inf
    return -np.inf, np.inf


def make_sampler(prompts: Sequence[Prompt], config: RunConfig, statistics: Mapping[str, tuple[int, int]]) -> Sampler:
    """Returns the run's sampler; `statistics` has (judged, correct) of each prompt judged before."""
    weights = [source.weight for source in config.prompts]
    sampler = Sampler(prompts, config.curriculum, config.seed, weights)
    if config.prioritized.enabled:
        sampler = PrioritizedSampler(prompts, config.curriculum, config.seed, config.prioritized.floor, weights)
    for prompt_id, (judged, correct) in statistics.items():
        sampler.record(prompt_id, judged, correct)
    return sampler
