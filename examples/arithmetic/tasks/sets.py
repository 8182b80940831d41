"""The sets of a run: held-out problems, the pool that reinforcement learning samples, supervised examples.

Sizes are long-tailed, so lengths are too. Held-out prompts occur in no other set; within the held-out set
and within the pool every prompt occurs once.
"""

import random
from collections.abc import Callable, Set
from dataclasses import dataclass

from tasks import expressions, functions
from tasks.problem import Example, Problem, draw_share

Sizes = tuple[tuple[int, float], ...]
Styles = tuple[tuple[str, float], ...]

EXPRESSION_SIZES: Sizes = ((2, 0.32), (3, 0.28), (4, 0.18), (5, 0.09), (6, 0.06), (7, 0.04), (8, 0.03))
FUNCTION_SIZES: Sizes = ((1, 0.20), (2, 0.36), (3, 0.28), (4, 0.11), (5, 0.05))


@dataclass(frozen=True)
class SftMix:
    """Make-up of a supervised stage: the share of code, and shares of sizes and styles in either domain."""

    code_share: float
    expression_sizes: Sizes
    expression_styles: Styles
    function_sizes: Sizes
    function_styles: Styles


# First thinking, on the shorter problems: single operations are learnt from written equations.
EASY_MIX = SftMix(
    code_share=0.2,
    expression_sizes=((1, 0.1), (2, 0.25), (3, 0.25), (4, 0.2), (5, 0.1), (6, 0.1)),
    expression_styles=(("written", 1.0),),
    function_sizes=((1, 0.5), (2, 0.5)),
    function_styles=(("growing", 1.0),),
)
# Then all sizes, and mostly answers without a thought: that thinking pays is left to be found out.
FULL_MIX = SftMix(
    code_share=0.4,
    expression_sizes=EXPRESSION_SIZES,
    expression_styles=(("written", 0.3), ("direct", 0.7)),
    function_sizes=FUNCTION_SIZES,
    function_styles=(("growing", 0.3), ("direct", 0.7)),
)


@dataclass(frozen=True)
class Sets:
    """Everything that one run learns from and is measured on."""

    heldout: list[Problem]
    pool: list[Problem]
    sft_easy: list[Example]
    sft_full: list[Example]


def make_sets(rng: random.Random, heldout_size: int, pool_size: int, sft_size: int) -> Sets:
    """Draws all sets, half of each from either domain; sizes are problems or examples, in all."""
    heldout = _draw_problems(rng, heldout_size, excluded=frozenset())
    held_prompts = frozenset(problem.prompt for problem in heldout)
    return Sets(
        heldout=heldout,
        pool=_draw_problems(rng, pool_size, excluded=held_prompts),
        sft_easy=_draw_examples(rng, sft_size, EASY_MIX, held_prompts),
        sft_full=_draw_examples(rng, sft_size, FULL_MIX, held_prompts),
    )


def draw_expression_problem(rng: random.Random) -> Problem:
    """Draws a problem of the math domain."""
    return expressions.make_problem(expressions.draw_steps(rng, draw_share(rng, EXPRESSION_SIZES)))


def draw_function_problem(rng: random.Random) -> Problem:
    """Draws a problem of the code domain."""
    return functions.make_problem(functions.draw_steps(rng, draw_share(rng, FUNCTION_SIZES)))


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


def _draw_examples(rng: random.Random, size: int, mix: SftMix, excluded: Set[str]) -> list[Example]:
    examples: list[Example] = []
    while len(examples) < size:
        is_code = rng.random() < mix.code_share
        example = _draw_function_example(rng, mix) if is_code else _draw_expression_example(rng, mix)
        if example.prompt not in excluded:
            examples.append(example)
    rng.shuffle(examples)
    return examples


def _draw_expression_example(rng: random.Random, mix: SftMix) -> Example:
    steps = expressions.draw_steps(rng, draw_share(rng, mix.expression_sizes))
    style = draw_share(rng, mix.expression_styles)
    return Example(expressions.render_prompt(steps), expressions.render_response(steps, style))


def _draw_function_example(rng: random.Random, mix: SftMix) -> Example:
    steps = functions.draw_steps(rng, draw_share(rng, mix.function_sizes))
    style = draw_share(rng, mix.function_styles)
    return Example(functions.render_prompt(steps), functions.render_response(steps, style))
