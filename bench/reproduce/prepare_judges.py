"""Writes the untrained model and the judgements of one seed: does an expression have the value of a reference?

    python bench/reproduce/prepare_judges.py --out DIR --seed N

The same examples for both judges: `labelled.jsonl` for a value head, and `sft.jsonl` for a model that works out the
expression and its difference before its verdict, `18:(9*3)-6=` -> `9*3=27;27-6=21;21-18=3#no`; held-out ones alike.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "arithmetic"))

from prepare import main, write_lines
from tasks import expressions
from tasks.problem import draw_share
from tiny_model import write_model

EXAMPLES, HELDOUT = 20_000, 512
SIZES = ((2, 0.4), (3, 0.4), (4, 0.2))
# The value of a wrong response is near the reference, as a slip's is.
LARGEST_SLIP = 10


@dataclass(frozen=True)
class Judgement:
    """A reference and a response that states an expression in its place."""

    reference: int
    expression: str
    thought: str
    is_right: bool

    @property
    def prompt(self) -> str:
        """What the judge is asked."""
        return f"{self.reference}:{self.expression}="

    @property
    def verdict(self) -> str:
        """The right verdict."""
        return "yes" if self.is_right else "no"

    def labelled(self) -> dict[str, str | bool]:
        """Returns the line for a value head."""
        return {
            "question": "same value",
            "reference": str(self.reference),
            "response": self.expression,
            "label": self.is_right,
        }


def draw_judgements(seed: int) -> Iterator[Judgement]:
    """Draws different judgements, half of them of right responses."""
    rng, seen = random.Random(seed), set()
    while True:
        steps = expressions.draw_steps(rng, draw_share(rng, SIZES))
        value, is_right = steps[-1].value, rng.random() < 0.5
        slips = [near for near in range(value - LARGEST_SLIP, value + LARGEST_SLIP + 1) if near >= 0 and near != value]
        expression = expressions.render_prompt(steps).removesuffix("=")
        reference = value if is_right else rng.choice(slips)
        worked_out = expressions.render_response(steps, "written").rpartition("#")[0]
        thought = f"{worked_out};{value}-{reference}={value - reference}"
        if expression not in seen:
            seen.add(expression)
            yield Judgement(reference, expression, thought, is_right)


def prepare(out: Path, seed: int) -> None:
    """Writes the model and the sets."""
    judgements = draw_judgements(seed)
    heldout = [next(judgements) for _ in range(HELDOUT)]
    examples = [next(judgements) for _ in range(EXAMPLES)]
    write_model(out / "model", seed)
    answers = {"verifier": "exact", "answer_marker": "#", "difficulty": 1.0}
    problems = (
        {"id": f"{i:04d}", "prompt": one.prompt, "answer": one.verdict, **answers} for i, one in enumerate(heldout)
    )
    write_lines(out / "heldout.jsonl", problems)
    write_lines(out / "labelled_heldout.jsonl", (one.labelled() for one in heldout))
    write_lines(out / "labelled.jsonl", (one.labelled() for one in examples))
    write_lines(
        out / "sft.jsonl", ({"prompt": one.prompt, "response": f"{one.thought}#{one.verdict}"} for one in examples)
    )


if __name__ == "__main__":
    main(prepare)
