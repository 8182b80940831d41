"""Writes the untrained models and the problem sets of one seed: the math domain of examples/arithmetic alone.

    python bench/reproduce/prepare.py --out DIR --seed N

Programs are left out, since judging them takes as long as all the rest.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Set
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "arithmetic"))

from prepare import main, write_lines
from tasks import expressions
from tasks.problem import Problem, draw_share
from tiny_model import Shape, write_model

HELDOUT_SIZE, POOL_SIZE, SFT_SIZE = 256, 3000, 20_000
# Share of each number of operations.
SIZES = ((3, 0.20), (4, 0.20), (5, 0.18), (6, 0.14), (7, 0.11), (8, 0.09), (9, 0.08))
# Those of more are left to be learnt by reinforcement.
EASY_SIZES = ((1, 0.1), (2, 0.3), (3, 0.3), (4, 0.2), (5, 0.1))
THINKING = (("written", 1.0),)
EITHER = (("written", 0.5), ("direct", 0.5))
# Operations of the hard problems, two fifths of all.
HARD = 6
# Of 3,258,432 parameters: deeper, so that it computes more before the first token.
LARGE = Shape(hidden=192, layers=6, intermediate=768, heads=6)

Shares = tuple[tuple[int, float], ...]


def draw_problems(rng: random.Random, count: int, excluded: Set[str]) -> list[Problem]:
    """Draws different problems that are not excluded."""
    problems: dict[str, Problem] = {}
    while len(problems) < count:
        problem = expressions.make_problem(expressions.draw_steps(rng, draw_share(rng, SIZES)))
        if problem.prompt not in excluded:
            problems.setdefault(problem.prompt, problem)
    return list(problems.values())


def draw_examples(
    rng: random.Random, sizes: Shares, styles: tuple[tuple[str, float], ...], excluded: Set[str]
) -> list[dict[str, str]]:
    """Draws supervised examples, all of them correct."""
    examples: list[dict[str, str]] = []
    while len(examples) < SFT_SIZE:
        steps = expressions.draw_steps(rng, draw_share(rng, sizes))
        prompt = expressions.render_prompt(steps)
        if prompt not in excluded:
            response = expressions.render_response(steps, draw_share(rng, styles))
            examples.append({"prompt": prompt, "response": response})
    return examples


def prepare(out: Path, seed: int) -> None:
    """Writes the models and the four sets; held-out problems are in no other, and are `easy` or `hard` by domain."""
    rng = random.Random(seed)
    write_model(out / "model", seed)
    write_model(out / "model-large", seed, LARGE)
    heldout = draw_problems(rng, HELDOUT_SIZE, frozenset())
    held = frozenset(problem.prompt for problem in heldout)
    kinds = ("hard" if problem.difficulty >= HARD else "easy" for problem in heldout)
    labelled = (
        problem.to_line(f"heldout-{index:04d}") | {"domain": kind}
        for index, (problem, kind) in enumerate(zip(heldout, kinds, strict=True))
    )
    write_lines(out / "heldout.jsonl", labelled)
    pool = draw_problems(rng, POOL_SIZE, held)
    write_lines(out / "prompts.jsonl", (problem.to_line(f"pool-{index:04d}") for index, problem in enumerate(pool)))
    write_lines(out / "sft_easy.jsonl", draw_examples(rng, EASY_SIZES, THINKING, held))
    write_lines(out / "sft_full.jsonl", draw_examples(rng, SIZES, EITHER, held))


if __name__ == "__main__":
    main(prepare)
