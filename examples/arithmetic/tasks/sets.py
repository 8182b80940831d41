"""The sets of a run: held-out problems, the pool that reinforcement learning samples, warm-up examples.

Sizes are long-tailed, so lengths are too. Held-out prompts occur in no other set; within the held-out set
and within the pool every prompt occurs once.
"""

import random
from collections.abc import Callable, Set
from dataclasses import dataclass

from tasks import expressions, functions
from tasks.problem import Example, Problem, draw_size

Shares = tuple[tuple[int, float], ...]

EXPRESSION_SHARES: Shares = ((2, 0.32), (3, 0.28), (4, 0.18), (5, 0.09), (6, 0.06), (7, 0.04), (8, 0.03))
FUNCTION_SHARES: Shares = ((1, 0.20), (2, 0.40), (3, 0.24), (4, 0.11), (5, 0.05))
EASY_EXPRESSION_SHARES: Shares = ((2, 0.4), (3, 0.35), (4, 0.25))
EASY_FUNCTION_SHARES: Shares = ((1, 0.4), (2, 0.6))

EXPRESSION_STYLE_SHARES = {"verbose": 0.5, "terse": 0.25, "direct": 0.25}
FUNCTION_STYLE_SHARES = {"growing": 0.5, "direct": 0.5}


@dataclass(frozen=True)
class Sets:
    """Everything that one run learns from and is measured on."""

    heldout: list[Problem]
    pool: list[Problem]
    warmup_easy: list[Example]
    warmup_full: list[Example]


def make_sets(rng: random.Random, heldout_size: int, pool_size: int, warmup_size: int) -> Sets:
    """Draws all sets, half of each from either domain; sizes are problems or examples, in all."""
    heldout = _draw_problems(rng, heldout_size, excluded=frozenset())
    held_prompts = frozenset(problem.prompt for problem in heldout)
    return Sets(
        heldout=heldout,
        pool=_draw_problems(rng, pool_size, excluded=held_prompts),
        warmup_easy=_draw_examples(rng, warmup_size, EASY_EXPRESSION_SHARES, EASY_FUNCTION_SHARES, held_prompts),
        warmup_full=_draw_examples(rng, warmup_size, EXPRESSION_SHARES, FUNCTION_SHARES, held_prompts),
    )


def draw_expression_problem(rng: random.Random) -> Problem:
    """Draws a problem of the math domain."""
    return expressions.make_problem(expressions.draw_steps(rng, draw_size(rng, EXPRESSION_SHARES)))


def draw_function_problem(rng: random.Random) -> Problem:
    """Draws a problem of the code domain."""
    return functions.make_problem(functions.draw_steps(rng, draw_size(rng, FUNCTION_SHARES)))


def _draw_problems(rng: random.Random, size: int, excluded: Set[str]) -> list[Problem]:
    math = _draw_distinct(rng, size - size // 2, draw_expression_problem, excluded)
    code = _draw_distinct(rng, size // 2, draw_function_problem, excluded)
    problems = math + code
    rng.shuffle(problems)
    return problems


def _draw_distinct(
    rng: random.Random, count: int, draw: Callable[[random.Random], Problem], excluded: Set[str]
) -> list[Problem]:
    problems: dict[str, Problem] = {}
    while len(problems) < count:
        problem = draw(rng)
        if problem.prompt not in excluded:
            problems.setdefault(problem.prompt, problem)
    return list(problems.values())


def _draw_examples(
    rng: random.Random, size: int, expression_shares: Shares, function_shares: Shares, excluded: Set[str]
) -> list[Example]:
    examples: list[Example] = []
    while len(examples) < size:
        math = len(examples) % 2 == 0
        example = (
            _draw_expression_example(rng, expression_shares) if math else _draw_function_example(rng, function_shares)
        )
        if example.prompt not in excluded:
            examples.append(example)
    rng.shuffle(examples)
    return examples


def _draw_expression_example(rng: random.Random, shares: Shares) -> Example:
    steps = expressions.draw_steps(rng, draw_size(rng, shares))
    style = rng.choices(tuple(EXPRESSION_STYLE_SHARES), tuple(EXPRESSION_STYLE_SHARES.values()))[0]
    return Example(expressions.render_prompt(steps), expressions.render_response(steps, style))


def _draw_function_example(rng: random.Random, shares: Shares) -> Example:
    steps = functions.draw_steps(rng, draw_size(rng, shares))
    style = rng.choices(tuple(FUNCTION_STYLE_SHARES), tuple(FUNCTION_STYLE_SHARES.values()))[0]
    return Example(functions.render_prompt(steps), functions.render_response(steps, style))
