"""The sets of a run: held-out problems, the pool that reinforcement learning samples, supervised examples.

What a held-out problem asks about, a scene, a chart or a sum, occurs in no other set, in any picture or font.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import islice

from visual_tasks import charts, scenes, sums
from visual_tasks.problem import Problem

# The domains with their shares of every set.
DOMAINS: dict[Callable[[random.Random], Problem], float] = {
    scenes.make_problem: 0.3,
    charts.make_problem: 0.25,
    sums.make_printed_problem: 0.3,
    sums.make_text_problem: 0.15,
}


def draw_problems(rng: random.Random, count: int, held_out: bool) -> Iterator[Problem]:
    """Draws problems of all domains that may be measured by, or trained on; no two ask the same of the same picture."""
    seen: set[tuple[str, str, bytes]] = set()

    def draw() -> Iterator[Problem]:
        while True:
            [make_problem] = rng.choices(list(DOMAINS), list(DOMAINS.values()))
            problem = make_problem(rng)
            identity = (problem.question, problem.key, problem.image.tobytes() if problem.image else b"")
            if problem.held_out is held_out and identity not in seen:
                seen.add(identity)
                yield problem

    return islice(draw(), count)
