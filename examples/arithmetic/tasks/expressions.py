"""The math domain: left-nested integer expressions, answered one operation at a time.

A prompt is `((4+5)*3)-6=`. Every intermediate value lies in 0..49, so that a step is a fact the model
can learn, and the number of operations is the difficulty. Supervised responses come in four styles:

- checked: `4+5=9;9*3=27;27-6=21:4+5=9;9*3=27;27-6=21#21`, all of it a second time
- restated: `4+5=9:(9*3)-6;9*3=27:27-6;27-6=21#21`, after each operation what is left of the expression
- written: `4+5=9;9*3=27;27-6=21#21`
- direct: `#21`

Written-out thoughts are the more reliable; that they pay is left to reinforcement learning to find out.
"""

import operator
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from tasks.problem import ANSWER_MARKER, Problem

STYLES = ("checked", "restated", "written", "direct")
LARGEST_VALUE = 49
LARGEST_OPERAND = 9

_OPERATIONS: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}
_SYMBOL_WEIGHTS = (2, 2, 1)


@dataclass(frozen=True)
class Step:
    """One operation: `left symbol right = value`."""

    left: int
    symbol: str
    right: int
    value: int


def draw_steps(rng: random.Random, operations: int) -> list[Step]:
    """Draws a chain of `operations` steps, each starting from the value of the one before."""
    steps: list[Step] = []
    value = rng.randint(1, LARGEST_OPERAND)
    while len(steps) < operations:
        symbol = rng.choices(tuple(_OPERATIONS), _SYMBOL_WEIGHTS)[0]
        right = rng.randint(1 if symbol != "*" else 2, LARGEST_OPERAND)
        result = _OPERATIONS[symbol](value, right)
        if 0 <= result <= LARGEST_VALUE:
            steps.append(Step(value, symbol, right, result))
            value = result
    return steps


def render_expression(steps: Sequence[Step]) -> str:
    """Returns the expression of a chain, left-nested."""
    text = str(steps[0].left)
    for index, step in enumerate(steps):
        text = f"{text if index == 0 else f'({text})'}{step.symbol}{step.right}"
    return text


def render_prompt(steps: Sequence[Step]) -> str:
    """Returns the expression of a chain, ending in an equals sign."""
    return f"{render_expression(steps)}="


def render_response(steps: Sequence[Step], style: str) -> str:
    """Returns the chain of thought of a style, the answer marker, and the answer."""
    if style not in STYLES:
        raise ValueError(f"style must be one of {', '.join(STYLES)}, not {style!r}")
    equations = [f"{step.left}{step.symbol}{step.right}={step.value}" for step in steps]
    written = ";".join(equations)
    left = [f":{render_expression(steps[done:])}" for done in range(1, len(steps))]
    thoughts = {
        "checked": f"{written}:{written}",
        "restated": ";".join(map("".join, zip_longest(equations, left, fillvalue=""))),
        "written": written,
        "direct": "",
    }
    return f"{thoughts[style]}{ANSWER_MARKER}{steps[-1].value}"


def make_problem(steps: Sequence[Step]) -> Problem:
    """Returns the problem of a chain, with the value of the expression as its answer."""
    return Problem(
        domain="math",
        prompt=render_prompt(steps),
        difficulty=float(len(steps)),
        verification={"verifier": "math", "answer": str(steps[-1].value)},
    )
