"""Writes what the recipes of long2short need into a folder: the math domain alone, in thoughts of several lengths.

    python prepare_styles.py --out DIR --seed N

`model/` (an untrained model and its tokenizer), `heldout.jsonl`, `prompts.jsonl`, `sft_styles.jsonl` and
`sft_short.jsonl`. The same seed writes the same bytes.
"""

from __future__ import annotations

import random
from collections.abc import Set
from dataclasses import asdict
from pathlib import Path

from prepare import main, write_lines
from tasks import expressions
from tasks.problem import Example, Problem, draw_share
from tasks.sets import Sizes, Styles
from tiny_model import write_model

HELDOUT_SIZE, POOL_SIZE, SFT_SIZE = 256, 3000, 30_000
# Thoughts of three lengths for problems of every size, as in the responses of a model that reasons at length.
STYLES: Styles = (("checked", 0.35), ("restated", 0.35), ("written", 0.3))
SHORT: Styles = (("written", 1.0),)
SIZES: Sizes = ((2, 0.2), (3, 0.26), (4, 0.24), (5, 0.18), (6, 0.12))
# Single operations, too: facts are learnt from short examples.
SFT_SIZES: Sizes = ((1, 0.14), (2, 0.22), (3, 0.24), (4, 0.18), (5, 0.14), (6, 0.08))


def draw_problems(rng: random.Random, count: int, excluded: Set[str]) -> list[Problem]:
    """Draws different problems that are not excluded."""
    problems: dict[str, Problem] = {}
    while len(problems) < count:
        problem = expressions.make_problem(expressions.draw_steps(rng, draw_share(rng, SIZES)))
        if problem.prompt not in excluded:
            problems.setdefault(problem.prompt, problem)
    return list(problems.values())


def draw_examples(rng: random.Random, count: int, styles: Styles, excluded: Set[str]) -> list[Example]:
    """Draws supervised examples, all of them correct."""
    examples: list[Example] = []
    while len(examples) < count:
        steps = expressions.draw_steps(rng, draw_share(rng, SFT_SIZES))
        prompt = expressions.render_prompt(steps)
        if prompt not in excluded:
            examples.append(Example(prompt, expressions.render_response(steps, draw_share(rng, styles))))
    return examples


def prepare(out: Path, seed: int) -> None:
    """Writes the model folder and the four sets; held-out problems are in no other."""
    out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    write_model(out / "model", seed)
    heldout = draw_problems(rng, HELDOUT_SIZE, frozenset())
    held = frozenset(problem.prompt for problem in heldout)
    pool = draw_problems(rng, POOL_SIZE, held)
    write_lines(out / "heldout.jsonl", (each.to_line(f"heldout-{index:04d}") for index, each in enumerate(heldout)))
    write_lines(out / "prompts.jsonl", (each.to_line(f"pool-{index:04d}") for index, each in enumerate(pool)))
    write_lines(out / "sft_styles.jsonl", map(asdict, draw_examples(rng, SFT_SIZE, STYLES, held)))
    write_lines(out / "sft_short.jsonl", map(asdict, draw_examples(rng, SFT_SIZE // 3, SHORT, held)))


if __name__ == "__main__":
    main(prepare)
